"""The output head and its loss in one, without the scores: at 49,152 words they outweigh the rest of a small model.

Scores of N tokens over V words are N * V numbers, and eager training keeps them, their softmax and their gradient.
But the gradient of a cross-entropy is known as soon as its scores are: so 256 rows are scored, turned into their
gradient in place, and multiplied into the gradients of the hidden states and of the weight, before the next rows are
looked at. All that is kept are these two gradients, which the backward pass only has to scale.

For a row with scores s = W h + b and label y, with p = softmax(s):
  loss = log(sum(exp(s))) - s_y     d loss / d s = p - [y]     d loss / d h = W^T (p - [y])     d loss / d W = (p - [y]) h^T

Source: the idea is that of Liger Kernel, arXiv:2410.10989, Sec. 3.2, here in plain torch.

N tokens, W width, V vocabulary
"""

import torch
from torch import nn

from nanovlm.training.shared_prefix import wanted_states
from nanovlm.vlm import cross_entropy, IGNORE, next_tokens

ROWS = 256  # scored at a time: enough to keep the product busy, few enough to be forgotten
LARGE_VOCABULARY = 16384  # words, from which `language_loss` works so


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over the rows, with every gradient made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):
        """hidden float[N, W], weight float[V, W], bias float[V] or None, labels int64[N] -> float32[]."""
        needed = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if needed[0] else None
        # bfloat16 would lose the small rows of many sums
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, row_labels, place in zip(hidden.split(ROWS), labels.split(ROWS), range(0, len(hidden), ROWS)):
            scores = torch.nn.functional.linear(rows, weight, bias).float()
            top = scores.amax(1, keepdim=True)
            right = scores.gather(1, row_labels[:, None])
            shares = scores.sub_(top).exp_()
            sums = shares.sum(1, keepdim=True)
            total += (sums.log() + top - right).sum()
            if not any(needed):
                continue
            d_scores = shares.div_(sums)
            d_scores.scatter_add_(1, row_labels[:, None], torch.full_like(right, -1.0))
            if d_bias is not None:
                d_bias += d_scores.sum(0)
            d_scores = d_scores.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[place : place + ROWS].copy_(d_scores @ weight)
            if d_weight is not None:
                add_product(d_weight, d_scores.t(), rows)
            del scores, shares, d_scores  # before the next rows are scored
        gradients = (d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype),
                     d_bias if d_bias is None else d_bias.to(bias.dtype))  # fmt: skip
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, d_total):
        """Scale in place: a second copy of the weight's gradient would be the largest tensor of all."""
        # autograd notices the change, and refuses to use the same graph again
        return *(None if grad is None else grad.mul_(d_total) for grad in ctx.saved_tensors), None


def add_product(total, a, b):
    """total float32[V, W] += a [V, n] @ b [n, W]."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def linear_cross_entropy(hidden, weight, labels, bias=None):
    """Cross-entropy of the scores hidden @ weight^T + bias, summed over the rows.

    Args:
      hidden: float[N, W]. weight: float[V, W]. labels: int64[N], in [0, V). bias: float[V] or None.
    Returns: float32[], in nats. Its graph serves one backward pass.
    Raises: ValueError for shapes that do not fit.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, W] and [V, W]")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} must be one for each of the {len(hidden)} rows of hidden")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be one for each of the {len(weight)} rows of weight")
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # once here, not once per chunk
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():  # autograd functions are told of gradients all the same
        hidden, weight, bias = hidden.detach(), weight.detach(), bias if bias is None else bias.detach()
    return LinearCrossEntropy.apply(hidden, weight, bias, labels)


def language_loss(model, batch, share=True, lean=True, chunked=None):
    """`VLM.loss` in less time and memory.

    Args:
      model: vlm.VLM. batch: vlm.Batch.
      share: the image tokens of a picture that several rows show run once (shared_prefix.py).
      lean: leave out what the loss does not depend on, so that its parameters get no gradient instead of zeros. False
        for many processes, each of which has to run every module.
      chunked: never hold all scores at once; None = with a large vocabulary.
    Returns: as `VLM.loss`.
    """
    labels, head = next_tokens(batch.labels), model.decoder.lm_head
    trained = labels != IGNORE
    hidden = wanted_states(model, batch, trained, lean) if share else model.hidden(batch)[trained]
    chunked = is_chunked(model) if chunked is None else chunked
    if chunked and (head is None or type(head) is nn.Linear):  # a low-rank update is more than a weight
        weight, bias = (model.decoder.embedding.weight, None) if head is None else (head.weight, head.bias)
        return linear_cross_entropy(hidden, weight, labels[trained], bias), int(trained.sum())
    return cross_entropy(model.decoder.logits(hidden), labels[trained]), int(trained.sum())


def is_chunked(model):
    """bool, whether a vlm.VLM has so many words that its scores are made in chunks."""
    return model.decoder.config.vocab_size >= LARGE_VOCABULARY
