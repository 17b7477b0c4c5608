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
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from nanovlm.weight_errors import explain, grouped

FIELDS = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "p": r"(?P<p>weight|bias)", "rest": r"(?P<rest>.+)"}
ORDERS = ("blocks", "heads")


class WeightsError(ValueError):
    """Weights that do not fit, cannot be read or cannot be written; the message says which, and what to do."""


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
    """Another spelling: a name that no entry knows is tried again under `canonical`."""

    published: str
    canonical: str


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
            entry = replace(entry, canonical=published + entry.canonical)
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


@dataclass
class Plan:
    """What happens to every tensor of a checkpoint, before any is read.

    consumed: {published name: (entry, our names)}; None among the names for zeros.
    twice: {published name: (entry, our names)} whose target another tensor already fills: must be equal.
    computed, unused: {published name: reason}. missing: {our name: published name}. unexpected: published names.
    misshaped: {published name: (found, expected)} shapes. resized: {our name: (found, expected)} position tables.
    """

    consumed: dict = field(default_factory=dict)
    twice: dict = field(default_factory=dict)
    computed: dict = field(default_factory=dict)
    unused: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)
    unexpected: list = field(default_factory=list)
    misshaped: dict = field(default_factory=dict)
    resized: dict = field(default_factory=dict)

    @property
    def fits(self):
        """bool, nothing missing, unexpected or mis-shaped."""
        return not (self.missing or self.unexpected or self.misshaped)


def find_entry(table, name, ours):
    """The first entry that a published name fits: (entry, our names), or None.

    Args:
      table: list of entries. name: str. ours: container of the model's tensor names.
    """
    for entry in table:
        found = None if isinstance(entry, Alias) else expression(entry.published).fullmatch(name)
        if found is None:
            continue
        if isinstance(entry, Computed):
            return entry, ()
        names = tuple(None if part is None else part.format(**found.groupdict()) for part in entry.parts)
        if all(part is None or part in ours for part in names):
            return entry, names
    return None


def find_renamed(table, name, ours):
    """`find_entry`, then once more under every alias of the name."""
    found = find_entry(table, name, ours)
    for alias in table if found is None else ():
        spelled = expression(alias.published).fullmatch(name) if isinstance(alias, Alias) else None
        if spelled and (found := find_entry(table, alias.canonical.format(**spelled.groupdict()), ours)):
            break
    return found


def published_name(table, name, ours):
    """Where one of our tensors is published: (published name, entry, our names); None if the table has no place.

    Args:
      table: list of entries. name: str, ours. ours: container of the model's tensor names.
    """
    for entry in table:
        if isinstance(entry, (Computed, Alias, Tied)):
            continue
        for pattern in entry.parts:
            found = None if pattern is None else expression(pattern).fullmatch(name)
            if found is None:
                continue
            names = tuple(None if part is None else part.format(**found.groupdict()) for part in entry.parts)
            if all(part is None or part in ours for part in names):
                return entry.published.format(**found.groupdict()), entry, names
    return None


def plan(table, found, ours, resizable=()):
    """Decide what happens to every tensor.

    Args:
      table: tuple of entries. found: {published name: shape}. ours: {our name: shape}.
      resizable: our names of position tables that may have another number of rows.
    Returns: Plan.
    """
    table, result, filled = [as_entry(entry) for entry in table], Plan(), set()
    tied_last = sorted(found, key=lambda name: isinstance((find_renamed(table, name, ours) or (None,))[0], Tied))
    for name in tied_last:
        entry, names = find_renamed(table, name, ours) or (None, ())
        if entry is None:
            result.unexpected.append(name)
        elif isinstance(entry, Computed):
            (result.unused if isinstance(entry, Unused) else result.computed)[name] = entry.reason
        else:
            real = [part for part in names if part is not None]
            expected = entry.published_shape([ours[part] for part in real])
            if tuple(found[name]) != expected:
                if real[0] in resizable and resizes(found[name], expected):
                    result.resized[real[0]] = (tuple(found[name]), expected)
                else:
                    result.misshaped[name] = (tuple(found[name]), expected)
            (result.twice if filled & set(real) else result.consumed)[name] = (entry, names)
            filled |= set(real)
    for name in ours:
        if name not in filled:
            result.missing[name] = (published_name(table, name, ours) or (name,))[0]
    return result


def resizes(found, expected):
    """bool, whether two shapes of position tables differ in their rows alone."""
    return len(found) == len(expected) and found[-1] == expected[-1]


def to_ours(table, tensors, ours, where="the checkpoint"):
    """Rename published tensors.

    Args:
      table: tuple of entries. tensors: {published name: Tensor}.
      ours: {our name: Tensor or shape}, what the model needs: its state_dict().
      where: str, named in errors.
    Returns: {our name: Tensor}, every one that the model needs.
    Raises: WeightsError naming what is missing, unexpected, mis-shaped, or there twice with different values.
    """
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in ours.items()}
    found = plan(table, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes)
    if not found.fits:
        raise WeightsError(explain(found, where))
    renamed = {}
    for name, (entry, names) in (found.consumed | found.twice).items():
        for part, tensor in zip(names, entry.split(tensors[name])):
            if part in renamed and not torch.equal(renamed[part], tensor):
                raise WeightsError(differs(where, name, part))
            if part is not None:
                renamed[part] = tensor
    return renamed


def to_published(table, state):
    """Rename our tensors back: the inverse of `to_ours`, without what is computed, unused or tied.

    Args:
      table: tuple of entries. state: {our name: Tensor}, a state_dict().
    Returns: {published name: Tensor}.
    Raises: WeightsError naming the tensors for which the layout has no place.
    """
    return {name: entry.join([None if part is None else state[part] for part in names])
            for name, (entry, names) in placed(table, state).items()}


def placed(table, state):
    """Where our tensors go: {published name: (entry, our names)}; raises WeightsError as `to_published` does."""
    table = [as_entry(entry) for entry in table]
    homeless, result = [], {}
    for name in state:
        found = published_name(table, name, state)
        if found is None:
            homeless.append(name)
        else:
            result[found[0]] = found[1:]
    if homeless:
        raise WeightsError(f"the published layout has no place for {len(homeless)} tensors: "
                           f"{'; '.join(grouped(homeless))}; merge or remove what the paper's model does not have")
    return result


def differs(where, name, part):
    """The message for a tensor that a file holds twice with different values."""
    return f"{where}: {name} is a second copy of our {part}, but its values differ; the file is damaged or not tied"
