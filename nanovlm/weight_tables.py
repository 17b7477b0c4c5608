"""Rename tables: the names of a published checkpoint on the left, ours on the right, read in both directions.

A table is a tuple of entries. Most are a pair of names; the rest say what else can happen to a tensor:

    ("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attention.q.weight")   the same tensor
    Fused("h.{i}.qkv.weight", ("h.{i}.q.weight", "h.{i}.k.weight", "h.{i}.v.weight"))  several of ours in one of theirs
    Reshaped("cls_token", "class_token", unit_axes=(0, 1))                          axes of length one that ours lacks
    Tied("lm_head.weight", "embedding.weight")                                      a second name for a tensor of ours
    Computed("{rest}.inv_freq", "the rotary angles are computed")                   may be there, is not needed
    Unused("head.{rest}", "attention pooling")                                      is there, is not wanted
    Alias("vision_tower.{rest}", "vision_tower.vision_model.{rest}")                another spelling of a name

In a pattern `{i}` and `{j}` stand for a number, `{p}` for weight or bias, `{rest}` for anything; they mean the same on
both sides. A table may name more than one model has (biases, a head of its own): an entry holds where the model has
its tensors. Every tensor of a file is consumed or named, and so is every tensor of the model.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

FIELDS = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "p": r"(?P<p>weight|bias)", "rest": r"(?P<rest>.+)"}
ORDERS = ("blocks", "heads")


@dataclass(frozen=True)
class Same:
    """The same tensor under two names; a plain pair of names in a table means this."""

    published: str
    ours: str

    @property
    def parts(self):
        """Our names, as many as there are parts."""
        return (self.ours,)

    def published_shape(self, shapes):
        """Shapes of our parts (list of tuple) -> tuple, the published one's."""
        return tuple(shapes[0])

    def join(self, tensors):
        """Our parts (list of Tensor) -> the published Tensor."""
        return tensors[0]

    def split(self, tensor):
        """The published Tensor -> list of our parts."""
        return [tensor]


@dataclass(frozen=True)
class Tied(Same):
    """A second published name of a tensor that has a place in the model anyway; never written."""


@dataclass(frozen=True)
class Reshaped(Same):
    """The same numbers, but the published tensor has `unit_axes` of length one that ours lacks."""

    unit_axes: tuple[int, ...] = (0,)  # ascending axes of the published tensor

    def published_shape(self, shapes):
        """As `Same.published_shape`."""
        shape = list(shapes[0])
        for axis in self.unit_axes:
            shape.insert(axis, 1)
        return tuple(shape)

    def join(self, tensors):
        """As `Same.join`."""
        return tensors[0].reshape(self.published_shape([tensors[0].shape]))

    def split(self, tensor):
        """As `Same.split`."""
        return [tensor.squeeze(self.unit_axes)]


@dataclass(frozen=True)
class Fused:
    """Several of our tensors, of one shape, along the first axis of a published one.

    published: str. ours: names; None = zeros that only the published tensor holds (EVA's bias of the keys).
    order: "blocks", one behind another, or "heads", part by part within every head of the published tensor
      (row = head * parts * D + part * D + d).
    num_heads: needed for "heads".
    """

    published: str
    ours: tuple[str | None, ...]
    order: str = "blocks"
    num_heads: int = 0

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} of {self.published} is none of {', '.join(ORDERS)}")
        if self.order == "heads" and not self.num_heads:
            raise ValueError(f"{self.published} is interleaved by heads: give num_heads")

    @property
    def parts(self):
        """As `Same.parts`."""
        return self.ours

    def published_shape(self, shapes):
        """As `Same.published_shape`; shapes of the parts that exist."""
        return (shapes[0][0] * len(self.ours), *shapes[0][1:])

    def join(self, tensors):
        """As `Same.join`; None for a part of zeros."""
        like = next(tensor for tensor in tensors if tensor is not None)
        tensors = [torch.zeros_like(like) if tensor is None else tensor for tensor in tensors]
        if self.order == "blocks":
            return torch.cat(tensors)
        return torch.stack([tensor.unflatten(0, (self.num_heads, -1)) for tensor in tensors], dim=1).flatten(0, 2)

    def split(self, tensor):
        """As `Same.split`; the zeros are split off like the rest."""
        if self.order == "blocks":
            return list(tensor.chunk(len(self.ours)))
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (self.num_heads, len(self.ours), -1)).unbind(1)]


@dataclass(frozen=True)
class Computed:
    """A published tensor that the model computes: it may be absent, and is not read."""

    published: str
    reason: str


@dataclass(frozen=True)
class Unused(Computed):
    """A published tensor that has no place in this model, for a reason."""


@dataclass(frozen=True)
class Alias:
    """Another spelling: a name that no entry knows is tried again under `canonical`.

    A file spells all its names one way: where a name already matches `canonical`, or `whole` if that is given, the
    other spelling is a mistake.
    """

    published: str
    canonical: str
    whole: str = ""


def prefixed(table, published="", ours=""):
    """A table whose names all stand behind a prefix.

    Args:
      table: tuple of entries. published, ours: str, put in front of the names, dots included.
    Returns: tuple of entries.
    """
    moved = []
    for entry in map(as_entry, table):
        entry = replace(entry, published=published + entry.published)
        if isinstance(entry, Alias):
            entry = replace(entry, canonical=published + entry.canonical, whole=entry.whole and published + entry.whole)
        elif isinstance(entry, Same):
            entry = replace(entry, ours=ours + entry.ours)
        elif isinstance(entry, Fused):
            entry = replace(entry, ours=tuple(None if name is None else ours + name for name in entry.ours))
        moved.append(entry)
    return tuple(moved)


def as_entry(entry):
    """An entry of a table as an object; a pair of names becomes Same."""
    return Same(*entry) if isinstance(entry, tuple) else entry


@lru_cache(maxsize=None)
def expression(pattern):
    """The regular expression of a pattern; a field that repeats must match the same text."""
    seen, pieces = set(), []
    for piece in re.split(r"(\{\w+\})", pattern):
        name = piece[1:-1]
        if not piece.startswith("{"):
            pieces.append(re.escape(piece))
        elif name not in FIELDS:
            raise ValueError(f"unknown field {piece} in the pattern {pattern!r}; there are {', '.join(FIELDS)}")
        else:
            pieces.append(f"(?P={name})" if name in seen else FIELDS[name])
            seen.add(name)
    return re.compile("".join(pieces))
