"""mPLUG-Owl2's modality-adaptive module: images and words share queries, but not norms, keys and values.

Image tokens and text tokens live at different scales and granularities; pressing both through one key and value
projection makes them interfere. So a layer keeps two sets of normalisation, W_K and W_V, and every token meets
those of its own modality. Queries, output projection and feed-forward stay shared.

mPLUG-Owl2, arXiv:2311.04257, Sec. 3.3. With M in {0, 1} the modality of each token:
  Eq. 4  H~ = LN_V(H where M = vision) + LN_T(H where M = text)
  Eq. 6  K  = H~_V W_K^V + H~_T W_K^T
  Eq. 7  V  = H~_V W_V^V + H~_T W_V^T
Differs from the paper, as the released code does:
- modality 0 is text and 1 is vision (the paper numbers them the other way round);
- both norms of a layer are split, the one before attention and the one before the feed-forward.

Each split layer has three equal forms. `as_written` computes both branches for all tokens and selects, as the equations
read; `routed` computes only a token's own branch, by copying the tokens of a branch together. That needs their number,
for which the host would wait for a GPU; there `in_place` takes over, a kernel that lets every token stay where it is.

B batch, T tokens, W width
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TEXT, VISION = 0, 1
TILE = 128  # tokens of one modality that a program of routed_projection takes


@dataclass(frozen=True)
class Routing:
    """Where each modality's tokens stand, computed once per batch and used by every layer.

    modality: int[B, T], 0 = text, 1 = vision; None where all tokens are text.
    text, vision: int[N_text], int[N_vision], flat indices of the tokens; None where there are none, or with `order`.
    order, text_end: what `sort` returns, for `in_place`; None for `routed`.
    """

    modality: Tensor | None
    text: Tensor | None
    vision: Tensor | None
    order: Tensor | None = None
    text_end: Tensor | None = None


def sort(modality):
    """List the tokens of int[B, T] in tiles of one modality each, without asking how many there are.

    Returns: (order int64[tiles, TILE], flat indices, text first, each modality filled up with B * T to whole tiles;
      text_end int64[], how many places are text's).
    """
    is_vision = modality.flatten() == VISION
    number = len(is_vision)
    text_end = ((~is_vision).sum() + TILE - 1) // TILE * TILE
    place = torch.where(is_vision, text_end + is_vision.cumsum(0), (~is_vision).cumsum(0)) - 1
    order = torch.full(((-(-number // TILE) + 1) * TILE,), number, device=modality.device)
    return order.scatter(0, place, torch.arange(number, device=modality.device)).unflatten(0, (-1, TILE)), text_end


def route(modality, in_place=None):
    """The Routing of int[B, T]; None = all text, known without looking.

    in_place: whether for `ModalityAdaptive.in_place`; None = on a GPU, where Triton is installed.
    """
    if modality is None:
        return Routing(None, None, None)
    if in_place is None:
        in_place = modality.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if in_place:
        return Routing(modality, None, None, *sort(modality))
    flat = modality.flatten()
    vision = (flat == VISION).nonzero().squeeze(1)
    text = (flat != VISION).nonzero().squeeze(1)
    return Routing(modality, text if len(text) else None, vision if len(vision) else None)


class ModalityAdaptive(nn.Module):
    """Two copies of one layer that works token by token: a norm, or a linear projection."""

    def __init__(self, text, vision):
        super().__init__()
        self.text = text
        self.vision = vision

    def as_written(self, x, routing):
        """Eq. 4, 6, 7 literally: both branches on every token, then each token keeps its own."""
        is_vision = (routing.modality == VISION)[..., None]  # B T 1
        return torch.where(is_vision, self.vision(x), self.text(x))

    def routed(self, x, routing):
        """The same, but each token meets only its own branch: gather, apply, put back."""
        if routing.text is None or routing.vision is None:
            return self.text(x) if routing.vision is None else self.vision(x)
        flat = x.flatten(0, 1)  # BT W
        text = self.text(flat[routing.text])
        vision = self.vision(flat[routing.vision])
        out = text.new_empty(flat.shape[0], text.shape[-1])
        out = out.index_copy(0, routing.text, text).index_copy(0, routing.vision, vision)
        return out.unflatten(0, x.shape[:2])

    def in_place(self, x, routing):
        """The same without moving a token and without waiting for a GPU; what is no plain projection, as written."""
        if not type(self.text) is type(self.vision) is nn.Linear:
            return self.as_written(x, routing)
        from nanovlm.routed_projection import project  # here, as Triton exists on Linux only

        out = project(x.flatten(0, 1), self.text.weight, self.vision.weight, routing.order, routing.text_end)
        out = out.unflatten(0, x.shape[:2])
        if self.text.bias is None:
            return out
        is_vision = (routing.modality == VISION)[..., None]
        return out + torch.where(is_vision, self.vision.bias, self.text.bias).to(out.dtype)

    def forward(self, x, routing):
        """x float[B, T, W] and the batch's Routing -> float[B, T, W_out]."""
        return self.routed(x, routing) if routing.order is None else self.in_place(x, routing)


def split(module, routing):
    """Bind a layer to the batch: a ModalityAdaptive one takes the routing, any other module just its input."""
    if isinstance(module, ModalityAdaptive):
        return lambda x: module(x, routing)
    return module
