"""Attention: who may look at whom, where tokens stand, and the weighted sum itself.

Every mask in this package is one idea: query t sees the keys of one interval [first, stop). Causal text, padding,
packed documents, a bidirectional ViT and a prefix are all intervals, so that one kernel serves them all and
a mask costs two integers per query. The readable `reference` spells the equation out; `sdpa` is torch's fused form.

B batch, T queries, S keys, H heads, K key/value heads, D head width
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm.names import check_known

BACKENDS = ("reference", "sdpa", "triton")


@dataclass(frozen=True)
class Visible:
    """The interval of keys that each query may attend to.

    `pattern` is a hint that lets a backend leave the mask out: "causal" (lower triangle over as many keys as queries),
    "full" (every key), "documents" (causal ones side by side) or "intervals" (anything).
    """

    first: Tensor  # int[B or 1, T], the first visible key
    stop: Tensor  # int[B or 1, T], one past the last visible key; stop <= first: the query sees nothing
    pattern: str = "intervals"
    lengths: tuple[int, ...] = ()  # of "documents": tokens of each
    slopes: Tensor | None = None  # float[H], ALiBi: what the score of each head loses for each key of distance

    def mask(self, num_keys):
        """Draw the intervals as bool[B or 1, T, num_keys]; True = may attend."""
        keys = torch.arange(num_keys, device=self.first.device)
        return (keys >= self.first[..., None]) & (keys < self.stop[..., None])

    def bias(self, num_keys):
        """ALiBi, float[B or 1, H, T, num_keys]: -slope (t - s), of query t's own place, the last key that it sees."""
        keys = torch.arange(num_keys, device=self.first.device)
        return self.slopes[:, None, None] * (keys - (self.stop[..., None] - 1))[:, None]

    def check(self, num_keys):
        """Raise ValueError where an interval leaves [0, num_keys]; for those who build one (it reads values)."""
        if bool((self.first < 0).any()) or bool((self.stop > num_keys).any()):
            raise ValueError(f"intervals from {self.first.min()} to {self.stop.max()}, but keys 0 to {num_keys}")
        return self


def full(num_queries, num_keys, device=None):
    """Every query sees every key: a ViT, or a resampler's latents."""
    first = torch.zeros(1, num_queries, dtype=torch.long, device=device)
    return Visible(first, first + num_keys, "full")


def causal(segments):
    """Each token sees its own document, whose first token is `first`, up to itself.

    Args: segments: int[B, T], number of each token's packed document, side by side; -1 = padding, which sees nothing.
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(begins, index, 0).cummax(dim=1).values
    return Visible(first, torch.where(segments < 0, first, index + 1))


def causal_rows(num_rows, num_tokens, device=None):
    """Plain causal rows without packing or padding before the text; the fast case of `causal`."""
    index = torch.arange(num_tokens, device=device).expand(num_rows, -1)
    return Visible(torch.zeros_like(index), index + 1, "causal")


def documents(lengths, device=None):
    """Documents of `lengths` tokens side by side in one row, causal each: `causal` of lengths known on the host."""
    sizes = torch.tensor(lengths)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)[None].to(device)
    stop = torch.arange(1, first.shape[1] + 1, device=device)[None]
    return Visible(first, stop, "documents", tuple(lengths))


def prefix(segments, prefix_lengths):
    """Causal, but the first int[B] `prefix_lengths` tokens, all of a row's one document, see one another both ways."""
    visible = causal(segments)
    stop = torch.maximum(visible.stop, visible.first + prefix_lengths[:, None])
    return Visible(visible.first, torch.where(segments < 0, visible.first, stop))


def sliding_window(segments, window):
    """Causal, but only the last `window` >= 1 tokens (oneself included) are visible."""
    visible = causal(segments)
    return Visible(torch.maximum(visible.first, visible.stop - window), visible.stop)


def sincos(num_places, width, device=None):
    """Places 0, 1, 2 ... on a line as float[num_places, width]: sines, then cosines, ever slower along the channels."""
    speeds = 10000.0 ** (-torch.arange(width // 2, device=device) / (width // 2))  # radians per place
    angles = torch.arange(num_places, device=device)[:, None] * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_positions(num_patches, width, device=None):
    """Places of a square grid, float[num_patches, width]: half for the row, half for the column (arXiv:2205.01580)."""
    side = math.isqrt(num_patches)
    axis = sincos(side, width // 2, device)
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def rope_tables(positions, rotary_width, base):
    """Cosines and sines of rotary positions int[B, T] for channels that turn: two float32[B, 1, T, rotary_width / 2].

    RoFormer, arXiv:2104.09864, Eq. 15, base its theta; half-split as in LLaMA.
    """
    channel = torch.arange(0, rotary_width, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * base ** (-channel / rotary_width)  # B 1 T D/2
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Turn the first channels of x float[B, H, T, D] by their position's angle; the rest pass through."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def alibi_slopes(num_heads, largest=8.0, interleaved=True):
    """Slopes of ALiBi, steepest first: tuple of H floats, 2^(-largest h / H), h = 1 ... H (arXiv:2108.12409, Sec. 3).

    Attention with Linear Biases adds -slope (t - s) to the score of query t and key s: what is far counts less, and a
    distance never seen in training still means "far". No table and no angle says where a token stands.
    interleaved: where H is no power of two, every other slope of the next one, h = 2, 4 ..., then those between
      (MPT-7B); False: the formula as it stands (MPT-1B).
    """
    count = 2 ** (num_heads - 1).bit_length() if interleaved else num_heads
    slopes = [2.0 ** (-largest * h / count) for h in range(1, count + 1)]
    return tuple(slopes if count == num_heads else (slopes[1::2] + slopes[::2])[:num_heads])


def attention_weights(q, k, visible):
    """Softmax of the scaled scores over the visible keys, float[B, H, T, S]; rows that see nothing are zero.

    q float[B, H, T, D], k float[B, K, S, D], H a multiple of K (Attention Is All You Need, arXiv:1706.03762, Eq. 1).
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # grouped queries share their keys
    scores = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5  # B H T S
    if visible.slopes is not None:
        scores = scores + visible.bias(k.shape[2])
    mask = visible.mask(k.shape[2])[:, None]
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights.masked_fill(~mask, 0.0)  # a row of -inf gave NaN


def reference(q, k, v, visible):
    """Attention as written: softmax(q k^T / sqrt(D)) v, with float32 scores."""
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return (attention_weights(q, k, visible) @ v.float()).to(q.dtype)


def sdpa(q, k, v, visible):
    """The same sum by torch's fused kernels; the mask is left out where the pattern is known."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # torch 2.13's backward is 3 to 6 times slower in bfloat16
        with torch.autocast("cpu", enabled=False):
            return sdpa(q.float(), k.float(), v.float(), visible).to(q.dtype)
    grouped, pattern = q.shape[1] != k.shape[1], visible.pattern if visible.slopes is None else "intervals"
    if pattern == "full" or pattern == "causal" and q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=pattern == "causal", enable_gqa=grouped)
    if pattern == "documents":
        apart = zip(*(x.split(visible.lengths, dim=2) for x in (q, k, v)))
        seen = [F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=grouped) for one in apart]
        return torch.cat(seen, dim=2)
    seen = mask = visible.mask(k.shape[2])[:, None]  # B 1 T S
    if visible.slopes is not None:
        seen = visible.bias(k.shape[2]).masked_fill(~mask, float("-inf")).to(q.dtype)  # B H T S
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
    # torch does not promise zeros for a row that sees nothing
    return out.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)


def multi_head(q, k, v, num_heads, backend="sdpa", visible=None, maps=None):
    """Attend head by head: q float[B, T, H * D], k and v float[B, S, H * D], projected already -> float[B, T, H * D].

    visible: Visible over the S keys; None = all. maps: list that receives the weights float[B, H, T, S], for plots.
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # B H T|S D
    visible = full(q.shape[2], k.shape[2], q.device) if visible is None else visible
    if maps is not None:
        maps.append(attention_weights(q, k, visible))
    return attention(q, k, v, visible, backend).transpose(1, 2).flatten(-2)


def attention(q, k, v, visible, backend="sdpa"):
    """Attend, by the backend asked for: float[B, H, T, D]; zeros where a query sees nothing.

    Args:
      q: float[B, H, T, D]. k, v: float[B, K, S, D], H a multiple of K (grouped queries).
      visible: Visible, intervals over the S keys.
      backend: "reference", "sdpa", or "triton" (flash_attention.py; a GPU and heads of at most 128 channels).
    Raises: ValueError for an unknown backend.
    """
    if backend == "reference":
        return reference(q, k, v, visible)
    if backend == "sdpa":
        return sdpa(q, k, v, visible)
    check_known("unknown attention backend", backend, BACKENDS)
    from nanovlm.flash_attention import flash_attention  # here, as Triton exists on Linux only

    return flash_attention(q, k, v, visible)
