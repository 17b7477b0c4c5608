"""Beam search as transformers 4.28 ran it behind prompts of embeddings, which is how Lynx decoded.

A prompt of embeddings has no ids, so that version put one dummy token in their place. It is never embedded, but it is
counted, and a few more rules were others than today's:

- a text that does not end by itself is scored by its sum / (1 + new tokens) ** length_penalty; one that ends, by
  (1 + new tokens without the end token), which is the number that today's rule divides by as well;
- at the last step the num_beams best candidates that do not end are all hypotheses, besides those that do;
- penalties and n-grams see the new tokens only, never the prompt (sampler and `propose` see to it);
- with sampling all beams start equal, temperature acts on the summed scores, and drawn candidates are sorted;
- always twice as many candidates as beams, and truncation leaves two ids.

Differs from that version: the dummy itself is part of no n-gram. There it was the id that begins a text, and could be
repeated only by a model that writes such an id.

Source: bytedance/lynx-llm with transformers 4.28.1, `beam_search`, `beam_sample` and `BeamSearchScorer`.

B prompts, N beams, K candidates, V vocabulary, M new tokens at most
"""

import dataclasses

import torch

from nanovlm.beams import EXCLUDED, Rules, draw, ends_text, pick
from nanovlm.logits_processors import penalise, truncate


def start(beams, decoding):
    """Exclude all but one beam, but not for sampling, where equal beams may draw differently: Beams."""
    running_scores = beams.running_scores.clone()
    if not decoding.do_sample:
        running_scores[:, 1:] = EXCLUDED
    return dataclasses.replace(beams, running_scores=running_scores)


def propose(rows, beams, decoding, active, num_prompts, generator):
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


def advance(beams, candidates, step, decoding):
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


def is_done(beams, scores, length, decoding):
    """Prompts whose hypotheses are final, now that beams have `length` new tokens: bool[B]."""
    if length == decoding.max_new_tokens:
        return torch.ones_like(beams.is_ended[:, 0])
    return is_final(beams, scores, length, decoding)


RULES = Rules(start, propose, advance, is_done)
