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

import torch

from nanovlm import beam_search_4_28
from nanovlm.beams import EXCLUDED, Rules, draw, empty, ends_text, pick
from nanovlm.logits_processors import process


def beam_search(rows, decoding, generator=None):
    """Search.

    Args:
      rows: prefill.Rows, one per prompt; used up.
      decoding: sampler.Decoding with num_beams > 1.
      generator: with do_sample, one torch.Generator or a list of one per prompt, as in sampler.generate.
    Returns: list of B lists of num_return_sequences beams.Hypothesis, best first.
    """
    num_prompts, num_beams, device = len(rows.logits), decoding.num_beams, rows.logits.device
    rules = beam_search_4_28.RULES if decoding.counts_dummy_token else RULES
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
