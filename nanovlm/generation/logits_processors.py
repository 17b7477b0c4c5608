"""What is done to the scores of the next token before one is chosen: penalties first, then truncation.

Every processor is a pure function of scores float32[R, V] and returns new ones. Their order is that of
`transformers.generate`: repetition penalty, no-repeat n-gram, minimum length; then, only when sampling, temperature,
top-k, top-p, min-p. `process` applies them all.

Differs from transformers: padding and image tokens (ids below 0) are never counted as seen, so that a row's tokens do
not depend on its padding.

R rows, T tokens so far (prompt and new ones), V vocabulary
"""

import torch

NEVER = float("-inf")


def seen_tokens(tokens, vocab_size):
    """Which ids occur in a row: int64[R, T] -> bool[R, V]; ids below 0 (padding, image tokens) do not count."""
    seen = torch.zeros(len(tokens), vocab_size + 1, dtype=torch.bool, device=tokens.device)
    ids = tokens.where(tokens >= 0, vocab_size)  # the extra column takes what does not count
    return seen.scatter(1, ids, True)[:, :vocab_size]


def repetition_penalty(scores, tokens, penalty):
    """Ids that occur in the row, int64[R, T]: positive scores are divided by the penalty, negative ones multiplied.

    Source: CTRL, arXiv:1909.05858, Sec. 4.1.
    """
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen_tokens(tokens, scores.shape[1]), penalised, scores)


def no_repeat_ngram(scores, tokens, size):
    """Forbid every id that would complete an n-gram of n = size which the row, int64[R, T], already holds."""
    if tokens.shape[1] < size:
        return scores
    windows = tokens.unfold(1, size, 1)  # R T-n+1 n
    last = tokens[:, tokens.shape[1] - size + 1 :]  # R n-1, what the next id would complete
    repeats = (windows[..., :-1] == last[:, None]).all(dim=-1)  # R T-n+1
    completing = windows[..., -1].where(repeats, -1)
    return scores.masked_fill(seen_tokens(completing, scores.shape[1]), NEVER)


def forbid(scores, ids):
    """Forbid some ids in every row: scores float32[R, V], ids a sequence of int."""
    return scores.index_fill(1, torch.tensor(ids, dtype=torch.long, device=scores.device), NEVER)


def top_k(scores, k, min_keep=1):
    """Keep the k best ids, and those that tie with the last of them; at least `min_keep`."""
    k = min(max(k, min_keep), scores.shape[1])
    return scores.masked_fill(scores < scores.topk(k).values[:, -1:], NEVER)


def top_p(scores, p, min_keep=1):
    """Nucleus sampling: keep the smallest set of best ids whose probability reaches p; at least `min_keep`.

    Source: The Curious Case of Neural Text Degeneration, arXiv:1904.09751, Sec. 3.1.
    """
    ascending, order = scores.sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p  # the tail that the nucleus can do without
    drop[:, -min_keep:] = False
    return scores.masked_fill(drop.scatter(1, order, drop), NEVER)


def min_p(scores, share, min_keep=1):
    """Keep ids at least `share` times as probable as the best one; at least `min_keep`.

    Source: Turning Up the Heat, arXiv:2407.01082, Sec. 3.
    """
    probabilities = scores.softmax(dim=-1)
    drop = probabilities < share * probabilities.amax(dim=-1, keepdim=True)
    best = scores.argsort(dim=-1, descending=True)[:, :min_keep]
    return scores.masked_fill(drop.scatter(1, best, False), NEVER)


def penalise(scores, tokens, num_new, decoding):
    """What every decoding may ask for: repetition penalty, no-repeat n-gram, minimum length. Args: as in `process`."""
    if decoding.repetition_penalty != 1:
        scores = repetition_penalty(scores, tokens, decoding.repetition_penalty)
    if decoding.no_repeat_ngram_size > 0:
        scores = no_repeat_ngram(scores, tokens, decoding.no_repeat_ngram_size)
    if num_new < decoding.min_new_tokens:
        scores = forbid(scores, decoding.eos_ids)
    return scores


def truncate(scores, decoding, min_keep=1):
    """What only sampling asks for: temperature, top-k, top-p, min-p. Args: as in `process`."""
    if decoding.temperature != 1:
        scores = scores / decoding.temperature  # above 1 the distribution is flatter, below 1 sharper
    if decoding.top_k > 0:
        scores = top_k(scores, decoding.top_k, min_keep)
    if decoding.top_p < 1:
        scores = top_p(scores, decoding.top_p, min_keep)
    if decoding.min_p > 0:
        scores = min_p(scores, decoding.min_p, min_keep)
    return scores


def process(scores, tokens, num_new, decoding):
    """Apply everything that a Decoding asks for.

    Args:
      scores: float32[R, V], logits, or log-probabilities in a beam search.
      tokens: int64[R, T], prompt and new tokens so far; ids below 0 are padding and image tokens.
      num_new: new tokens so far, of the T.
      decoding: sampler.Decoding.
    Returns: float32[R, V].
    """
    scores = penalise(scores, tokens, num_new, decoding)
    if decoding.do_sample:
        scores = truncate(scores, decoding)
    return scores.log_softmax(dim=-1) if decoding.renormalize else scores


def draw(scores, active, num_rows, generator, number=1):
    """Draw ids by chance, without replacement, in the order drawn.

    Args:
      scores: float32[N, V] of the rows still active. active: their numbers among the first `num_rows`.
      generator: as in sampler.generate. One generator draws for ended rows as well, as transformers does.
      number: K, ids per row.
    Returns: int64[N, K].
    """
    probabilities = scores.softmax(dim=-1)
    if isinstance(generator, list):
        drawn = [torch.multinomial(one, number, generator=generator[row]) for row, one in zip(active, probabilities)]
        return torch.stack(drawn)
    everyone = torch.ones(num_rows, scores.shape[1], device=scores.device)
    everyone[active] = probabilities
    return torch.multinomial(everyone, number, generator=generator)[active]
