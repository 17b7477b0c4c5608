"""Beam search: keep the best few unfinished texts, extend each by every id, keep the best few again.

Running beams carry summed log-probabilities. A candidate that ends moves to the prompt's hypotheses if it is among
the first num_beams candidates, scored by its sum / (new tokens) ** length_penalty; the best num_beams hypotheses stay.
The rules, and their order, are those of transformers 5 (`GenerationMixin._beam_search`), with what looks odd there:
twice as many candidates as beams (more with several end tokens), of which the later half may run on but not end.
With do_sample the candidates are drawn, without replacement, instead of taken from the top.

With counts_dummy_token the search is that of transformers 4.28 behind prompts of embeddings, which is how Lynx decoded
(bytedance/lynx-llm; `beam_search`, `beam_sample` and `BeamSearchScorer` of transformers 4.28.1). Such a prompt has no
ids, so that version put one dummy token in their place. It is never embedded, but counted, and other rules differed:

- a text that does not end by itself is scored by its sum / (1 + new tokens) ** length_penalty; one that ends, by
  (1 + new tokens without the end token), which is the number that today's rule divides by as well;
- at the last step the num_beams best candidates that do not end are all hypotheses, besides those that do;
- penalties and n-grams see the new tokens only, never the prompt;
- with sampling all beams start equal, temperature acts on the summed scores, and drawn candidates are sorted;
- always twice as many candidates as beams, and truncation leaves two ids.

Differs from 4.28: the dummy itself is part of no n-gram. There it was the id that begins a text, and could be
repeated only by a model that writes such an id.

B prompts, N beams, K candidates, V vocabulary, M new tokens at most
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovlm.generation.logits_processors import draw, penalise, truncate

EXCLUDED = -1e9  # added to what may not be chosen
NONE = -1  # where a text has no id


class Hypothesis(NamedTuple):
    """A finished text: new ids without the end token, and its score, higher is better."""

    tokens: list[int]
    score: float


class Beams(NamedTuple):
    """State of the search; the first dimension of every field is the prompt."""

    running: Tensor  # int64[B, N, M], new ids of the beams that go on, NONE behind them
    running_scores: Tensor  # float32[B, N], summed log-probabilities, best first
    ended: Tensor  # int64[B, N, M], new ids of the hypotheses, the end token included
    ended_scores: Tensor  # float32[B, N], best first
    is_ended: Tensor  # bool[B, N], False = the slot is still empty

    def select(self, prompts):
        """Keep some prompts, int64[n]: Beams."""
        return Beams(*(one[prompts] for one in self))

    def keep_best(self, texts, scores, may_end):
        """The best hypotheses so far and among texts int64[B, K, M], of float32[B, K], where bool[B, K]: Beams."""
        num_beams = self.ended_scores.shape[1]
        ended_scores, best = torch.cat([self.ended_scores, scores + ~may_end * EXCLUDED], dim=1).topk(num_beams)
        ended = pick(torch.cat([self.ended, texts], dim=1), best)
        is_ended = torch.cat([self.is_ended, may_end], dim=1).gather(1, best)
        return self._replace(ended=ended, ended_scores=ended_scores, is_ended=is_ended)

    def hypotheses(self, place, decoding):
        """The best hypotheses of one prompt: list of Hypothesis."""
        texts = [[token for token in text if token != NONE] for text in self.ended[place].tolist()]
        texts = [text[:-1] if text and text[-1] in decoding.eos_ids else text for text in texts]
        return [*map(Hypothesis, texts, self.ended_scores[place].tolist())][: decoding.num_return_sequences]


def pick(texts, places):
    """Texts int64[B, K, M] at places int64[B, N] -> int64[B, N, M]."""
    return texts.gather(1, places[..., None].expand(-1, -1, texts.shape[2]))


def beam_search(rows, decoding, generator=None):
    """Search.

    Args:
      rows: prefill.Rows, one per prompt; used up.
      decoding: sampler.Decoding with num_beams > 1.
      generator: with do_sample, one torch.Generator or a list of one per prompt, as in sampler.generate.
    Returns: list of B lists of num_return_sequences Hypothesis, best first.
    """
    num_prompts, num_beams, device = len(rows.logits), decoding.num_beams, rows.logits.device
    rows.select([prompt for prompt in range(num_prompts) for _ in range(num_beams)])
    ids = torch.full((num_prompts, num_beams, decoding.max_new_tokens), NONE, device=device)
    scores = torch.zeros(num_prompts, num_beams, device=device)
    beams = Beams(ids, scores, ids, torch.full_like(scores, EXCLUDED), torch.zeros_like(scores, dtype=torch.bool))
    if not (decoding.counts_dummy_token and decoding.do_sample):  # there, equal beams may draw differently
        scores[:, 1:] = EXCLUDED  # the beams of a prompt are equal: the best would win N times
    active, found = list(range(num_prompts)), [None] * num_prompts
    for step in range(decoding.max_new_tokens):
        candidates = propose(rows, beams, decoding, active, num_prompts, generator)
        beams, source = advance(beams, candidates, step, decoding)
        done = is_done(beams, candidates[0], step + 1, decoding) | (step + 1 == decoding.max_new_tokens)
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


def propose(rows, beams, decoding, active, num_prompts, generator):
    """The candidates among all continuations of all beams: (scores float32[B, K] summed log-probabilities, beam
    int64[B, K], token int64[B, K]). active: numbers of the prompts that go on, of num_prompts."""
    has_dummy, num_ends = decoding.counts_dummy_token, len(decoding.eos_ids)
    num_candidates = 2 if has_dummy else max(2, 1 + num_ends)  # if all ids that end come first, the beams still go on
    so_far = beams.running_scores.flatten()[:, None]  # BN 1
    scores = penalise(rows.logits.log_softmax(dim=-1), rows.seen(decoding), rows.num_new, decoding)  # BN V
    if has_dummy:
        scores = scores + so_far
    if decoding.do_sample:
        scores = truncate(scores, decoding, min_keep=2 if has_dummy or not num_ends else num_ends + 1)
    if decoding.renormalize:
        scores = scores.log_softmax(dim=-1)
    totals = (scores if has_dummy else scores + so_far).view(len(active), -1)  # B NV
    if decoding.do_sample:
        chosen = draw(totals, active, num_prompts, generator, num_candidates * decoding.num_beams)
        if has_dummy:
            chosen = chosen.gather(1, totals.gather(1, chosen).argsort(dim=1, descending=True, stable=True))
    else:
        chosen = totals.topk(num_candidates * decoding.num_beams).indices
    vocab_size = scores.shape[1]
    return totals.gather(1, chosen), chosen // vocab_size, chosen % vocab_size


def advance(beams, candidates, step, decoding):
    """One step: candidates of `propose` become running beams or hypotheses. step: number of this new token, from 0.

    Returns: (Beams, source int64[B, N], the old beam that every new running beam continues).
    """
    scores, beam, token = candidates
    num_beams, length = decoding.num_beams, step + 1
    is_last = length == decoding.max_new_tokens
    texts = pick(beams.running, beam)  # B K M
    texts[:, :, step] = token
    ends = torch.isin(token, torch.tensor(decoding.eos_ids, dtype=torch.long, device=token.device))
    if is_last and not decoding.counts_dummy_token:
        ends = torch.ones_like(ends)
    may_end = ends & (torch.arange(scores.shape[1], device=scores.device) < num_beams)
    beams = beams.keep_best(texts, scores / length**decoding.length_penalty, may_end)
    running_scores, best = (scores + ends * EXCLUDED).topk(num_beams)
    beams = beams._replace(running=pick(texts, best), running_scores=running_scores)
    if is_last and decoding.counts_dummy_token:
        is_cut = ~is_done(beams, scores, length, decoding)[:, None] & ~ends.gather(1, best)
        beams = beams.keep_best(beams.running, running_scores / (length + 1) ** decoding.length_penalty, is_cut)
    return beams, beam.gather(1, best)


def is_done(beams, scores, length, decoding):
    """Prompts of which no beam of `length` new tokens can improve the hypotheses: bool[B]. scores: of the candidates.

    Some beam must be able to improve on the worst hypothesis, at the length that is assumed for it; an empty place
    takes anything. With early_stopping as many hypotheses as beams are enough.
    """
    is_full, full_is_enough = beams.is_ended.all(dim=1), decoding.early_stopping is True
    if decoding.early_stopping == "never" and decoding.length_penalty > 0:
        length = decoding.max_new_tokens + decoding.counts_dummy_token  # where a positive penalty treats a beam best
    if decoding.counts_dummy_token:
        attainable = scores.amax(dim=1) / length**decoding.length_penalty
        return is_full & ((beams.ended_scores.amin(dim=1) >= attainable) | full_is_enough)
    best = beams.running_scores[:, :1] / length**decoding.length_penalty
    worst = beams.ended_scores.amin(dim=1, keepdim=True).where(beams.is_ended, EXCLUDED)
    return (is_full & full_is_enough) | (best <= worst).all(dim=1)
