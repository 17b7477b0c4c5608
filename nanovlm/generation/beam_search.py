"""Beam search: keep the best few unfinished texts, extend each by every id, keep the best few again.

Running beams carry summed log-probabilities. A candidate that ends moves to the prompt's hypotheses if it is among
the first num_beams candidates, scored by its sum / (new tokens) ** length_penalty; the best num_beams hypotheses stay.
The rules, and their order, are those of transformers 5 (`GenerationMixin._beam_search`), including what looks odd there:
twice as many candidates as beams (more with several end tokens), of which the later half may run on but not end.

With do_sample the candidates are drawn, without replacement, instead of taken from the top. With counts_dummy_token
another set of rules takes over, see beam_search_4_28.py.

B prompts, N beams, K candidates, V vocabulary, M new tokens at most
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovlm.generation.logits_processors import penalise, process, truncate


# What a beam search carries from step to step, and the small operations on it.
#
# B prompts, N beams, K candidates, V vocabulary, M new tokens at most


EXCLUDED = -1e9  # added to what may not be chosen


@dataclass(frozen=True)
class Hypothesis:
    """A finished text: new ids without the end token, and its score, higher is better."""

    tokens: list[int]
    score: float


@dataclass
class Beams:
    """State of the search; the first dimension of every field is the prompt."""

    running: Tensor  # int64[B, N, M], new ids of the beams that go on
    running_scores: Tensor  # float32[B, N], summed log-probabilities, best first
    ended: Tensor  # int64[B, N, M], new ids of the hypotheses, the end token included
    ended_scores: Tensor  # float32[B, N], best first
    ended_lengths: Tensor  # int64[B, N], tokens
    is_ended: Tensor  # bool[B, N], False = the slot is still empty

    def select(self, prompts):
        """Keep some prompts, int64[n]: Beams."""
        return Beams(*(getattr(self, field.name)[prompts] for field in dataclasses.fields(self)))

    def keep_best(self, texts, scores, length, may_end):
        """The best hypotheses among those so far and new ones.

        Args:
          texts: int64[B, K, M], of `length` tokens. scores: float32[B, K], final ones.
          may_end: bool[B, K], which of them are hypotheses.
        Returns: Beams.
        """
        num_beams = self.ended_scores.shape[1]
        ended_scores, best = torch.cat([self.ended_scores, scores + ~may_end * EXCLUDED], dim=1).topk(num_beams)
        lengths = torch.full_like(may_end, length, dtype=torch.long)
        return dataclasses.replace(
            self,
            ended=pick(torch.cat([self.ended, texts], dim=1), best),
            ended_scores=ended_scores,
            ended_lengths=torch.cat([self.ended_lengths, lengths], dim=1).gather(1, best),
            is_ended=torch.cat([self.is_ended, may_end], dim=1).gather(1, best),
        )

    def hypotheses(self, place, decoding):
        """The best hypotheses of one prompt: list of Hypothesis."""
        texts, lengths, scores = (x[place].tolist() for x in (self.ended, self.ended_lengths, self.ended_scores))
        texts = [text[:length] for text, length in zip(texts, lengths)][: decoding.num_return_sequences]
        texts = [text[:-1] if text and text[-1] in decoding.eos_ids else text for text in texts]
        return [Hypothesis(text, score) for text, score in zip(texts, scores)]


@dataclass(frozen=True)
class Rules:
    """The four choices in which beam searches differ; see beam_search.py for what each does."""

    start: Callable
    propose: Callable
    advance: Callable
    is_done: Callable


def empty(num_prompts, decoding, device):
    """Beams before the first step, all with score 0."""
    shape = (num_prompts, decoding.num_beams)
    ids = torch.zeros(*shape, decoding.max_new_tokens, dtype=torch.long, device=device)
    return Beams(
        running=ids,
        running_scores=torch.zeros(shape, device=device),
        ended=ids,
        ended_scores=torch.full(shape, EXCLUDED, device=device),
        ended_lengths=torch.zeros(shape, dtype=torch.long, device=device),
        is_ended=torch.zeros(shape, dtype=torch.bool, device=device),
    )


def draw(totals, number, active, num_prompts, generator):
    """Draw candidates without replacement, in the order drawn.

    Args:
      totals: float32[b, N * V] of the prompts still active. active: their numbers among the first `num_prompts`.
      number: K. generator: as in sampler.generate.
    Returns: int64[b, K].
    """
    probabilities = totals.softmax(dim=-1)
    if isinstance(generator, list):
        draws = [torch.multinomial(p, number, generator=generator[i]) for i, p in zip(active, probabilities)]
        return torch.stack(draws)
    everyone = torch.ones(num_prompts, totals.shape[1], device=totals.device)  # transformers draws for ended prompts too
    everyone[active] = probabilities
    return torch.multinomial(everyone, number, generator=generator)[active]


def ends_text(token, decoding):
    """Which candidates end their text by an end token: int64[B, K] -> bool[B, K]."""
    return torch.isin(token, torch.tensor(decoding.eos_ids, dtype=torch.long, device=token.device))


def pick(texts, places):
    """Texts int64[B, K, M] at places int64[B, N] -> int64[B, N, M]."""
    return texts.gather(1, places[..., None].expand(-1, -1, texts.shape[2]))


def beam_search(rows, decoding, generator=None):
    """Search.

    Args:
      rows: prefill.Rows, one per prompt; used up.
      decoding: sampler.Decoding with num_beams > 1.
      generator: with do_sample, one torch.Generator or a list of one per prompt, as in sampler.generate.
    Returns: list of B lists of num_return_sequences beams.Hypothesis, best first.
    """
    num_prompts, num_beams, device = len(rows.logits), decoding.num_beams, rows.logits.device
    rules = RULES_4_28 if decoding.counts_dummy_token else RULES
    beams = rules.start(empty(num_prompts, decoding, device), decoding)
    rows.select([prompt for prompt in range(num_prompts) for _ in range(num_beams)])
    active, found = list(range(num_prompts)), [None] * num_prompts
    for step in range(decoding.max_new_tokens):
        candidates = rules.propose(rows, beams, decoding, active, num_prompts, generator)
        beams, source = rules.advance(beams, candidates, step, decoding)
        done = rules.is_done(beams, candidates[0], step + 1, decoding)
        state = torch.cat([done[:, None].long(), source], dim=1).tolist()  # the one wait for the device in a step
        going = [place for place, (stop, *_) in enumerate(state) if not stop]
        for place in set(range(len(state))) - set(going):
            found[active[place]] = beams.hypotheses(place, decoding)
        if not going:
            return found
        numbers = [place * num_beams + beam for place in going for beam in state[place][1:]]  # of rows
        if len(going) < len(active):
            active, beams = [active[place] for place in going], beams.select(torch.tensor(going, device=device))
            rows.select(numbers)
        else:
            rows.reorder(numbers)
        rows.step(beams.running[:, :, step].flatten())


def start(beams, decoding):
    """Exclude all but one beam of a prompt, since all are equal still: Beams."""
    running_scores = torch.full_like(beams.running_scores, EXCLUDED)
    running_scores[:, 0] = 0.0
    return dataclasses.replace(beams, running_scores=running_scores)


def propose(rows, beams, decoding, active, num_prompts, generator):
    """Choose the candidates of this step among all continuations of all beams.

    Returns: (scores float32[B, K] summed log-probabilities, beam int64[B, K], token int64[B, K]).
    """
    ends = len(decoding.eos_ids)
    num_candidates = max(2, 1 + ends) * decoding.num_beams  # even if all ids that end come first, num_beams go on
    min_keep = ends + 1 if ends else 2
    log_probabilities = rows.logits.log_softmax(dim=-1)
    log_probabilities = process(log_probabilities, rows.tokens, rows.num_new, decoding, min_keep)
    vocab_size = log_probabilities.shape[1]
    totals = log_probabilities.unflatten(0, (len(active), -1)) + beams.running_scores[..., None]  # B N V
    totals = totals.flatten(1)
    if decoding.do_sample:
        chosen = draw(totals, num_candidates, active, num_prompts, generator)
    else:
        chosen = totals.topk(num_candidates).indices
    return totals.gather(1, chosen), chosen // vocab_size, chosen % vocab_size


def advance(beams, candidates, step, decoding):
    """One step: candidates become running beams or hypotheses.

    Args:
      candidates: (scores, beam, token) of `propose`. step: number of this new token, from 0.
    Returns: (Beams, source int64[B, N], the old beam that every new running beam continues).
    """
    scores, beam, token = candidates
    num_beams, length = decoding.num_beams, step + 1
    texts = pick(beams.running, beam)  # B K M
    texts[:, :, step] = token
    ends = ends_text(token, decoding)
    if length == decoding.max_new_tokens:
        ends = torch.ones_like(ends)
    may_end = ends & (torch.arange(scores.shape[1], device=scores.device) < num_beams)
    beams = beams.keep_best(texts, scores / length**decoding.length_penalty, length, may_end)
    running_scores, best = (scores + ends * EXCLUDED).topk(num_beams)
    beams = dataclasses.replace(beams, running=pick(texts, best), running_scores=running_scores)
    return beams, beam.gather(1, best)


def is_done(beams, scores, length, decoding):
    """Prompts whose hypotheses are final, now that beams have `length` new tokens: bool[B].

    Some beam must be able to improve on the worst hypothesis, at the length that is assumed for it; an empty place
    takes anything. With early_stopping as many hypotheses as beams are enough.
    """
    if length == decoding.max_new_tokens:
        return torch.ones_like(beams.is_ended[:, 0])
    if decoding.early_stopping == "never" and decoding.length_penalty > 0:
        length = decoding.max_new_tokens  # where a positive penalty treats a beam best
    best = beams.running_scores[:, :1] / length**decoding.length_penalty
    worst = beams.ended_scores.amin(dim=1, keepdim=True).where(beams.is_ended, EXCLUDED)
    full = beams.is_ended.all(dim=1) & (decoding.early_stopping is True)
    return full | (best <= worst).all(dim=1)


RULES = Rules(start, propose, advance, is_done)


# Beam search as transformers 4.28 ran it behind prompts of embeddings, which is how Lynx decoded.
#
# A prompt of embeddings has no ids, so that version put one dummy token in their place. It is never embedded, but it is
# counted, and a few more rules were others than today's:
#
# - a text that does not end by itself is scored by its sum / (1 + new tokens) ** length_penalty; one that ends, by
#   (1 + new tokens without the end token), which is the number that today's rule divides by as well;
# - at the last step the num_beams best candidates that do not end are all hypotheses, besides those that do;
# - penalties and n-grams see the new tokens only, never the prompt (sampler and `propose` see to it);
# - with sampling all beams start equal, temperature acts on the summed scores, and drawn candidates are sorted;
# - always twice as many candidates as beams, and truncation leaves two ids.
#
# Differs from that version: the dummy itself is part of no n-gram. There it was the id that begins a text, and could be
# repeated only by a model that writes such an id.
#
# Source: bytedance/lynx-llm with transformers 4.28.1, `beam_search`, `beam_sample` and `BeamSearchScorer`.
#
# B prompts, N beams, K candidates, V vocabulary, M new tokens at most


def start_4_28(beams, decoding):
    """Exclude all but one beam, but not for sampling, where equal beams may draw differently: Beams."""
    running_scores = beams.running_scores.clone()
    if not decoding.do_sample:
        running_scores[:, 1:] = EXCLUDED
    return dataclasses.replace(beams, running_scores=running_scores)


def propose_4_28(rows, beams, decoding, active, num_prompts, generator):
    """Choose the candidates of this step; arguments and result as in beam_search.propose."""
    log_probabilities = penalise(rows.logits.log_softmax(dim=-1), rows.new_tokens, rows.num_new, decoding)
    vocab_size = log_probabilities.shape[1]
    totals = log_probabilities + beams.running_scores.flatten()[:, None]  # BN V
    if decoding.do_sample:
        totals = truncate(totals, decoding, min_keep=2)
    if decoding.renormalize:
        totals = totals.log_softmax(dim=-1)
    totals = totals.view(len(active), -1)  # B NV
    number = 2 * decoding.num_beams
    if decoding.do_sample:
        chosen = draw(totals, number, active, num_prompts, generator)
        chosen = chosen.gather(1, totals.gather(1, chosen).argsort(dim=1, descending=True, stable=True))
    else:
        chosen = totals.topk(number).indices
    return totals.gather(1, chosen), chosen // vocab_size, chosen % vocab_size


def advance_4_28(beams, candidates, step, decoding):
    """One step: candidates become running beams or hypotheses; arguments and result as in beam_search.advance."""
    scores, beam, token = candidates
    num_beams, length = decoding.num_beams, step + 1
    texts = pick(beams.running, beam)  # B K M
    texts[:, :, step] = token
    ends = ends_text(token, decoding)
    may_end = ends & (torch.arange(scores.shape[1], device=scores.device) < num_beams)
    beams = beams.keep_best(texts, scores / length**decoding.length_penalty, length, may_end)
    running_scores, best = (scores + ends * EXCLUDED).topk(num_beams)
    beams = dataclasses.replace(beams, running=pick(texts, best), running_scores=running_scores)
    if length == decoding.max_new_tokens:
        cut = ~is_final(beams, scores, length, decoding)[:, None] & ~ends.gather(1, best)
        final_scores = running_scores / (length + 1) ** decoding.length_penalty  # the dummy counts
        beams = beams.keep_best(beams.running, final_scores, length, cut)
    return beams, beam.gather(1, best)


def is_final(beams, scores, length, decoding):
    """Prompts that the search gives up for, as none of `scores` float32[B, K] can improve on their hypotheses: bool[B]."""
    if decoding.early_stopping is True:
        return beams.is_ended.all(dim=1)
    if decoding.early_stopping == "never" and decoding.length_penalty > 0:
        length = decoding.max_new_tokens + 1
    attainable = scores.amax(dim=1) / length**decoding.length_penalty
    return beams.is_ended.all(dim=1) & (beams.ended_scores.amin(dim=1) >= attainable)


def is_done_4_28(beams, scores, length, decoding):
    """Prompts whose hypotheses are final, now that beams have `length` new tokens: bool[B]."""
    if length == decoding.max_new_tokens:
        return torch.ones_like(beams.is_ended[:, 0])
    return is_final(beams, scores, length, decoding)


RULES_4_28 = Rules(start_4_28, propose_4_28, advance_4_28, is_done_4_28)
