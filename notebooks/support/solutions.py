"""One solution of each exercise; the lessons show them at their end."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from support import recipe_12


def patchify(pixels, patch_size):
    """Lesson 01: pixels float[F, 3, H, W] -> float[F, N, 3 * patch_size ** 2], patches in row-major order."""
    patches = pixels.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # F 3 rows p columns p
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # F N 3pp


def sees_latest(is_media):
    """Lesson 02: the number of a picture equals the count of media tokens so far; with >= all earlier ones are seen too."""
    text_time = is_media.cumsum(0)
    return text_time[:, None] == torch.arange(1, int(is_media.sum()) + 1)


def place(embeddings, is_image, image_tokens):
    """Lesson 03: the k-th image token goes to the k-th True of is_image, counted row by row."""
    placed = embeddings.clone()
    placed[is_image] = image_tokens
    return placed


def look(q, k, v):
    """Lesson 04: each latent spreads a weight of 1 over the patches and takes their values in these shares."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # M H L N
    return scores.softmax(dim=-1) @ v


def silence(adapter):
    """Lesson 05: the widening adds nothing; what comes before it stays, so that the widening has something to learn from."""
    torch.nn.init.zeros_(adapter.up.weight)
    torch.nn.init.zeros_(adapter.up.bias)


def gate_gradients(gate, update, dy):
    """Lesson 06: y = x + tanh(gate) * update, and tanh' = 1 - tanh^2; all tokens and channels share the one gate."""
    opening = gate.tanh()
    return (1 - opening**2) * (dy * update).sum(), opening * dy


def route_by_hand(x, modality, text, vision):
    """Lesson 07: every token through the layer of its own modality, and through no other."""
    out = torch.empty(*x.shape[:2], text(x[:0]).shape[-1])
    out[modality == 0] = text(x[modality == 0])
    out[modality == 1] = vision(x[modality == 1])
    return out


def stretch(table, side):
    """Lesson 08: the class token's row as it is, the grid behind it enlarged like a picture."""
    old = math.isqrt(len(table) - 1)
    grid = table[1:].T.unflatten(1, (old, old))[None]  # 1 W rows columns
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid[0].flatten(1).T])


def merge(one, other):
    """Lesson 09: two parts of a softmax, each (top float[T], total float[T], acc float[T, D]), as if seen at once."""
    top = torch.maximum(one[0], other[0])
    shrink_one, shrink_other = (one[0] - top).exp(), (other[0] - top).exp()
    return (
        top,
        one[1] * shrink_one + other[1] * shrink_other,
        one[2] * shrink_one[:, None] + other[2] * shrink_other[:, None],
    )


def tile_kinds(first, stop, num_keys, size):
    """Lesson 09: int[T] intervals -> int[query tiles, key tiles]; 0 = nobody sees it, 1 = in part, 2 = all see all."""
    kinds = []
    for lo, hi in zip(first.split(size), stop.split(size)):
        line = []
        for begin in range(0, num_keys, size):
            end = min(begin + size, num_keys)
            seen = bool(((lo < end) & (hi > begin) & (lo < hi)).any())
            line.append(2 if bool(((lo <= begin) & (hi >= end)).all()) else int(seen))
        kinds.append(line)
    return torch.tensor(kinds)


def blame_scores(shares, d_shares):
    """Lesson 09: gradient of the scores float[T, S] from the softmax's output and the gradient of that."""
    return shares * (d_shares - (shares * d_shares).sum(-1, keepdim=True))


def nucleus(probabilities, p):
    """Lesson 10: probabilities float[V] -> bool[V], the fewest best words whose sum reaches p."""
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]  # what the better words already hold
    kept = torch.empty_like(probabilities, dtype=torch.bool)
    kept[order] = before < p
    return kept


class RowBridge(torch.nn.Module):
    """Lesson 11: the mean of every row of patches, through one linear layer."""

    def __init__(self, vision_width, output_width):
        super().__init__()
        self.output_width = output_width
        self.linear = torch.nn.Linear(vision_width, output_width)

    def num_image_tokens(self, num_patches, num_frames=1):
        """As many as the grid has rows, for every frame."""
        return math.isqrt(num_patches) * num_frames

    def forward(self, patches, num_frames=1, out=None):
        """float[M, frames * N, vision_width] -> float[M, frames * rows, output_width]."""
        side = math.isqrt(patches.shape[1] // num_frames)
        return self.linear(patches.unflatten(1, (num_frames * side, side)).mean(dim=2))


def repair(stage):
    """Lesson 12: a description's row is longer than 20 tokens; CONTEXT is the most that the model can read."""
    return dataclasses.replace(stage, max_tokens=recipe_12.CONTEXT)
