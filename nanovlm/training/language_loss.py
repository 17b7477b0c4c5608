"""The next-token loss in less time and memory than `VLM.loss`, which says what it is: the same values and gradients.

A picture that several rows show runs once. Where the image stands in front of the text, as in Lynx, a causal decoder
computes for it the same keys and values whatever is asked behind it. So they are computed once per picture and copied
to every row that shows it, with those of the words that all rows begin with, such as a chat's "user:". With six short
questions per picture this halves the decoder's work. What stands behind the last trained word of a row is left out.

The scores of all tokens are never there at once: N * V numbers for N tokens and V words, which eager training keeps
with their softmax and gradient. But the gradient of a cross-entropy is known as soon as its scores are: so 256 rows are
scored, turned into their gradient in place, and multiplied into the gradients of the hidden states and of the weight.
Only these two are kept, and the backward pass scales them. For a row with scores s = W h + b and label y:

  loss = log(sum(exp(s))) - s_y    d loss / d s = p - [y]    d loss / d h = W^T (p - [y])   d loss / d W = (p - [y]) h^T

with p = softmax(s). The idea is that of Liger Kernel, arXiv:2410.10989, Sec. 3.2, here in plain torch. (torch 2.13 has
F.linear_cross_entropy, which takes no part in autocast and in bfloat16 sums in bfloat16.)

B rows, T tokens, M visual inputs, N image tokens of each, K key/value heads, D head width, W width, V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.attention import Visible, causal_rows
from nanovlm.cache import KeptKeys
from nanovlm.modality_adaptive import TEXT, VISION
from nanovlm.vlm import IGNORE, IMAGE_TOKEN, check_counts, cross_entropy, next_tokens

ROWS = 256  # scored at a time: enough to keep the product busy, few enough to be forgotten
LARGE_VOCABULARY = 16384  # words, from which scores are made in chunks


def language_loss(model, batch, share=True, lean=True, chunked=None):
    """`VLM.loss` in less time and memory.

    Args:
      model: vlm.VLM. batch: vlm.Batch.
      share: the image tokens of a picture that several rows show run once.
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


class SharedKeys:
    """In place of a cache: before a row's own keys and values stand its picture's; layers: (k, v) float[M, K, N, D]."""

    def __init__(self, layers, picture):
        self.layers, self.picture = layers, picture

    def update(self, layer_index, k, v):
        """k, v float[B, K, T, D] -> float[B, K, N + T, D]."""
        image_k, image_v = (self.copy(x) for x in self.layers[layer_index])
        return torch.cat([image_k, k], dim=2), torch.cat([image_v, v], dim=2)

    def copy(self, kept):
        """float[M, K, N, D], one a picture -> float[B, K, N, D], one a row."""
        copies = kept.index_select(0, self.picture)
        if copies.requires_grad:
            copies.register_hook(torch.Tensor.contiguous)  # index_select is slow at adding up a slice's rows
        return copies


def can_share(batch, is_image):
    """Whether pictures stand in front of rows, one each, equally long, at equal positions, and some one twice."""
    if len(batch.frames) in (0, len(batch.shown)):
        return False
    counts, real = is_image.sum(1), batch.segments >= 0
    longest = int(counts.max())
    positions = batch.positions[counts > 0, :longest]
    return bool((counts == is_image[:, :longest].sum(1)).all()  # in front
                and ((counts == 0) | (counts == longest)).all() and len(batch.owner) == (counts > 0).sum()
                and (batch.segments <= 0).all() and (real[:, 1:] <= real[:, :-1]).all()  # a document, padded behind
                and (positions == positions[:1]).all())


def num_common(batch, is_image, wanted):
    """Words that all rows with a picture write behind it, at equal positions, before any wanted one: int."""
    shows, first = is_image.any(1), int(is_image.sum(1).max())
    ids, positions, late = (x[shows, first:] for x in (batch.ids, batch.positions, wanted))
    equal = (ids == ids[:1]).all(0) & (positions == positions[:1]).all(0) & ~late.any(0)
    return int(equal.cumprod(0).sum())


def two_lengths(lengths):
    """Split rows, int[B] tokens, into short and long ones so that few columns are computed: one or two int[b]."""
    lengths, order = lengths.sort()
    num_short = torch.arange(len(lengths), device=lengths.device)
    longest_short = torch.cat([lengths[:1], lengths[:-1]])
    columns = num_short * longest_short + (len(lengths) - num_short) * lengths[-1]
    best = int(columns.argmin())
    return [order] if best == 0 else [order[:best], order[best:]]


def wanted_states(model, batch, wanted, lean):
    """The states of `VLM.hidden` at wanted positions bool[B, T]: float[N, W]; pictures run once where they can.

    lean: where no image token is wanted, the last layer computes no more of them than their keys and values.
    """
    is_image, decoder, device = batch.ids == IMAGE_TOKEN, model.decoder, batch.ids.device
    if model.media_token is not None or not can_share(batch, is_image):
        return model.hidden(batch)[wanted]
    only_text = lean and not bool((wanted & is_image).any())

    # The pictures, once each, and what all rows write behind them, at the positions that these have in any row.
    image_tokens = model.encode(batch.pixels, batch.frames)
    check_counts(is_image, [image_tokens[m] for m in batch.shown.tolist()])
    image_tokens = torch.stack(image_tokens).to(decoder.embedding.weight.dtype)  # M N W
    num_shared = image_tokens.shape[1] + num_common(batch, is_image, wanted)
    row_of = torch.zeros(len(image_tokens), dtype=torch.long, device=device).index_copy(0, batch.shown, batch.owner)
    words = batch.ids[row_of, image_tokens.shape[1] : num_shared]
    shared, kept = torch.cat([image_tokens, decoder.embedding(words)], dim=1), KeptKeys()
    positions, visible = batch.positions[row_of, :num_shared], causal_rows(*shared.shape[:2], device)
    modality = torch.where(is_image[row_of, :num_shared], VISION, TEXT)
    image_hidden = decoder(shared, positions, visible, modality, cache=kept, only_fill=only_text)

    # The text: short rows and long rows apart. A row without a picture gets some picture's keys and does not see them.
    states, places, count = [], [], torch.arange(1, batch.ids.shape[1] + 1, device=device)
    skip = torch.where(is_image.any(1), num_shared, 0)  # B
    length = ((count * wanted).amax(1) - skip).clamp(min=1)  # up to the last wanted word
    picture = torch.zeros_like(skip).index_copy(0, batch.owner, batch.shown)
    for rows in two_lengths(length):
        index = torch.arange(int(length[rows].max()), device=device)
        real = index < length[rows, None]  # b T'
        column = (index + skip[rows, None]).clamp(max=batch.ids.shape[1] - 1)
        first = torch.where(skip[rows] > 0, 0, num_shared)[:, None].expand_as(column)
        visible = Visible(first, torch.where(real, num_shared + index + 1, first))
        ids = batch.ids[rows].gather(1, column)
        text_hidden = decoder(decoder.embedding(ids.clamp(min=0)), batch.positions[rows].gather(1, column), visible,
                              torch.full_like(ids, TEXT), cache=SharedKeys(kept.layers, picture[rows]))
        chosen = real & wanted[rows].gather(1, column)
        states.append(text_hidden[chosen])
        places.append((rows[:, None] * batch.ids.shape[1] + column)[chosen])
    if not only_text:
        place = batch.owner[:, None] * batch.ids.shape[1] + torch.arange(num_shared, device=device)
        chosen = wanted.flatten()[place]
        states.append(image_hidden[batch.shown][chosen])
        places.append(place[chosen])
    return torch.cat(states)[torch.cat(places).argsort()]


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
            scores = F.linear(rows, weight, bias).float()
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
            if d_weight is not None and d_scores.dtype == d_weight.dtype:
                d_weight.addmm_(d_scores.t(), rows)
            elif d_weight is not None:
                d_weight += d_scores.t() @ rows
            del scores, shares, d_scores  # before the next rows are scored
        gradients = zip((d_hidden, d_weight, d_bias), (hidden, weight, bias))
        ctx.save_for_backward(*(grad if grad is None else grad.to(like.dtype) for grad, like in gradients))
        return total

    @staticmethod
    def backward(ctx, d_total):
        """Scale in place: a second copy of the weight's gradient would be the largest tensor of all."""
        # autograd notices the change, and refuses to use the same graph again
        return *(None if grad is None else grad.mul_(d_total) for grad in ctx.saved_tensors), None


def linear_cross_entropy(hidden, weight, labels, bias=None):
    """Cross-entropy of the scores hidden @ weight^T + bias, summed over the rows.

    Args:
      hidden: float[N, W]. weight: float[V, W]. labels: int64[N], in [0, V). bias: float[V] or None.
    Returns: float32[], in nats. Its graph serves one backward pass.
    """
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # once here, not once per chunk
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():  # autograd functions are told of gradients all the same
        hidden, weight, bias = hidden.detach(), weight.detach(), bias if bias is None else bias.detach()
    return LinearCrossEntropy.apply(hidden, weight, bias, labels)
