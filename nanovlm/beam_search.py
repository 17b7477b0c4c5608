"""Beam search: keep the best few unfinished texts, extend each by every id, keep the best few again.

Running beams carry summed log-probabilities. A candidate that ends moves to the prompt's hypotheses if it is among
the first num_beams candidates, scored by its sum / (new tokens) ** length_penalty; the best num_beams hypotheses stay.
The rules, and their order, are those of transformers 5 (`GenerationMixin._beam_search`), including what looks odd there:
twice as many candidates as beams (more with several end tokens), of which the later half may run on but not end.

With do_sample the candidates are drawn, without replacement, instead of taken from the top.

B prompts, N beams, K candidates, V vocabulary, M new tokens at most
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovlm.logits_processors import process

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


def start(num_prompts, decoding, device):
    """Beams before the first step: all but one beam of a prompt are excluded, since all are equal still."""
    shape = (num_prompts, decoding.num_beams)
    ids = torch.zeros(*shape, decoding.max_new_tokens, dtype=torch.long, device=device)
    running_scores = torch.full(shape, EXCLUDED, device=device)
    running_scores[:, 0] = 0.0
    return Beams(
        running=ids,
        running_scores=running_scores,
        ended=ids,
        ended_scores=torch.full(shape, EXCLUDED, device=device),
        ended_lengths=torch.zeros(shape, dtype=torch.long, device=device),
        is_ended=torch.zeros(shape, dtype=torch.bool, device=device),
    )


def beam_search(rows, decoding, generator=None):
    """Search.

    Args:
      rows: prefill.Rows, one per prompt; used up.
      decoding: sampler.Decoding with num_beams > 1.
      generator: with do_sample, one torch.Generator or a list of one per prompt, as in sampler.generate.
    Returns: list of B lists of num_return_sequences Hypothesis, best first.
    """
    num_prompts, num_beams, device = len(rows.logits), decoding.num_beams, rows.logits.device
    beams = start(num_prompts, decoding, device)
    rows.select(torch.arange(num_prompts, device=device).repeat_interleave(num_beams))
    active, found = list(range(num_prompts)), [None] * num_prompts
    for step in range(decoding.max_new_tokens):
        candidates = propose(rows, beams, decoding, active, num_prompts, generator)
        beams, source = advance(beams, candidates, step, decoding)
        done = is_done(beams, step + 1, decoding).tolist()  # the one wait for the device in a step
        for place in (place for place, stop in enumerate(done) if stop):
            found[active[place]] = hypotheses(beams, place, decoding)
        going = [place for place, stop in enumerate(done) if not stop]
        if not going:
            return found
        source = source + torch.arange(len(active), device=device)[:, None] * num_beams  # numbers of rows
        if len(going) < len(active):
            kept = torch.tensor(going, device=device)
            active, beams = [active[place] for place in going], beams.select(kept)
            rows.select(source[kept].flatten())
        else:
            rows.reorder(source.flatten())
        rows.step(beams.running[:, :, step].flatten())


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


def draw(totals, number, active, num_prompts, generator):
    """Draw candidates without replacement, in the order drawn: totals float32[B, N * V] -> int64[B, number]."""
    probabilities = totals.softmax(dim=-1)
    if isinstance(generator, list):
        draws = [torch.multinomial(p, number, generator=generator[i]) for i, p in zip(active, probabilities)]
        return torch.stack(draws)
    everyone = torch.ones(num_prompts, totals.shape[1], device=totals.device)  # transformers draws for ended prompts too
    everyone[active] = probabilities
    return torch.multinomial(everyone, number, generator=generator)[active]


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
    ends = torch.isin(token, torch.tensor(decoding.eos_ids, dtype=torch.long, device=token.device))
    if length == decoding.max_new_tokens:
        ends = torch.ones_like(ends)

    running_scores, best = (scores + ends * EXCLUDED).topk(num_beams)
    running, source = pick(texts, best), beam.gather(1, best)

    may_end = ends & (torch.arange(scores.shape[1], device=scores.device) < num_beams)
    final_scores = scores / length**decoding.length_penalty + ~may_end * EXCLUDED
    ended_scores, best = torch.cat([beams.ended_scores, final_scores], dim=1).topk(num_beams)
    is_ended = torch.cat([beams.is_ended, may_end], dim=1).gather(1, best)
    lengths = torch.cat([beams.ended_lengths, torch.full_like(token, length)], dim=1).gather(1, best)
    ended = pick(torch.cat([beams.ended, texts], dim=1), best)
    return Beams(running, running_scores, ended, ended_scores, lengths, is_ended), source


def pick(texts, places):
    """Texts int64[B, K, M] at places int64[B, N] -> int64[B, N, M]."""
    return texts.gather(1, places[..., None].expand(-1, -1, texts.shape[2]))


def is_done(beams, length, decoding):
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


def hypotheses(beams, place, decoding):
    """The best hypotheses of one prompt: list of Hypothesis."""
    texts, lengths, scores = (x[place].tolist() for x in (beams.ended, beams.ended_lengths, beams.ended_scores))
    texts = [text[:length] for text, length in zip(texts, lengths)][: decoding.num_return_sequences]
    texts = [text[:-1] if text and text[-1] in decoding.eos_ids else text for text in texts]
    return [Hypothesis(text, score) for text, score in zip(texts, scores)]
