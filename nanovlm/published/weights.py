"""Rename the tensors of a published checkpoint to ours and back, every one of them consumed or named.

A table (weight_tables.py) says which tensor becomes which; `plan` decides from names and shapes alone what happens to
each, so that nothing is read before everything fits; `to_ours` and `to_published` then do it.
"""

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from nanovlm.vit import resize_positions


# What to say when weights do not fit: every tensor by name, drawn together by layer, and the probable reason.


class WeightsError(ValueError):
    """Weights that do not fit, cannot be read or cannot be written; the message says which, and what to do."""


def grouped(names):
    """Names with their first number drawn together: ["h.0.w", "h.1.w"] -> ["h.{0-1}.w (2)"]."""
    groups = {}
    for name in names:
        head, number, tail = re.fullmatch(r"(\D*)(\d*)(.*)", name, re.DOTALL).groups()
        groups.setdefault((head, tail), []).append(number)
    lines = []
    for (head, tail), numbers in groups.items():
        single = len(numbers) == 1
        lines.append(f"{head}{numbers[0]}{tail}" if single else f"{head}{{{ranges(numbers)}}}{tail} ({len(numbers)})")
    return lines


def ranges(numbers):
    """["0", "1", "2", "5"] -> "0-2,5"."""
    numbers, runs = sorted(set(map(int, numbers))), []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def explain(found, where):
    """Say what does not fit, and why it probably does not.

    Args:
      found: Plan that does not fit. where: str, the checkpoint.
    Returns: str of several lines.
    """
    lines = [f"{where} does not fit the model."]
    for title, names in (("missing", list(found.missing.values())), ("unexpected", found.unexpected)):
        if names:
            lines.append(f"  {title} ({len(names)}): " + "; ".join(grouped(dict.fromkeys(names))))
    if found.misshaped:
        lines.append(f"  mis-shaped ({len(found.misshaped)}): " + "; ".join(
            f"{name} is {list(has)}, expected {list(expected)}" for name, (has, expected) in found.misshaped.items()))
    return "\n".join([*lines, f"  likely cause: {likely_cause(found)}"])


def likely_cause(found):
    """The probable reason why a Plan does not fit: str."""
    names = " ".join(found.unexpected)
    if "Wqkv" in names:
        return ("Phi-2's layout of before January 2024 (fused Wqkv), which is not read; download the present files "
                "of microsoft/phi-2")
    absent = {name.split(".")[0] for name in found.missing} - {
        part.split(".")[0] for _, names in found.consumed.values() for part in names if part is not None
    }
    if absent & {"vision", "decoder"} and found.consumed and not found.unexpected:
        return (f"the files hold no {' and no '.join(sorted(absent))}, as some were published; put them together with "
                "`python -m nanovlm.recipes convert ... --vision PATH --language PATH`")
    if len(found.missing) > len(found.consumed) and (found.unexpected or not found.consumed):
        return "a checkpoint of another family; name the right one with --family, or see what it is with inspect"
    if found.misshaped and not found.missing and not found.unexpected:
        if all("pos" in name for name in found.misshaped):
            return "a position table of another resolution; ask for its resizing with image_size"
        if all(has[1:] == expected[1:] and "embed" in name or "lm_head" in name
               for name, (has, expected) in found.misshaped.items()):
            return "another vocabulary; correct vocab_size in config.json"
        return "another size of the same family; config.json does not belong to these weights"
    if found.missing and not found.unexpected:
        return "a missing shard, or a file that holds only a part of the model (inspect names the parts)"
    if found.unexpected and not found.missing:
        return "a larger model, or one with more parts, than config.json says"
    return "config.json does not belong to these weights, or tensors were renamed"


# Rename tables: the names of a published checkpoint on the left, ours on the right, read in both directions.
#
# A table is a tuple of entries. Most are a pair of names; the rest say what else can happen to a tensor:
#
#     ("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attention.q.weight")   the same tensor
#     Fused("h.{i}.qkv.weight", ("h.{i}.q.weight", "h.{i}.k.weight", "h.{i}.v.weight"))  several of ours in one of theirs
#     Reshaped("cls_token", "class_token", unit_axes=(0, 1))                          axes of length one that ours lacks
#     Tied("lm_head.weight", "embedding.weight")                                      a second name for a tensor of ours
#     Computed("{rest}.inv_freq", "the rotary angles are computed")                   may be there, is not needed
#     Unused("head.{rest}", "attention pooling")                                      is there, is not wanted
#     Alias("vision_tower.{rest}", "vision_tower.vision_model.{rest}")                another spelling of a name
#
# In a pattern `{i}` and `{j}` stand for a number, `{p}` for weight or bias, `{rest}` for anything; they mean the same on
# both sides. A table may name more than one model has (biases, a head of its own): an entry holds where the model has
# its tensors. Every tensor of a file is consumed or named, and so is every tensor of the model.


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


  # fmt: skip

__all__ = ["Alias", "Computed", "Fused", "Plan", "Reshaped", "Same", "Tied", "Unused", "WeightsError", "placed", "plan",
           "prefixed", "published_name", "to_ours", "to_published"]


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


def match(table, names, ours):
    """The entry of every published name: {name: (entry, our names)}, (None, ()) where there is none.

    Args:
      table: list of entries. names: iterable of str. ours: container of the model's tensor names.
    """
    found = {name: find_entry(table, name, ours) for name in names}
    direct = [name for name, match in found.items() if match and not isinstance(match[0], Computed)]
    for alias in table:
        if not isinstance(alias, Alias):
            continue
        if any(expression(alias.whole or alias.canonical).fullmatch(name) for name in direct):
            continue  # a file spells all its names one way: this one was renamed by mistake
        for name in [name for name, match in found.items() if match is None]:
            spelled = expression(alias.published).fullmatch(name)
            if spelled:
                found[name] = find_entry(table, alias.canonical.format(**spelled.groupdict()), ours)
    return {name: match or (None, ()) for name, match in found.items()}


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
      resizable: our names of tables that may have another number of rows.
    Returns: Plan.
    """
    table, result, filled = [as_entry(entry) for entry in table], Plan(), set()
    matches = match(table, found, ours)
    for name in sorted(found, key=lambda name: isinstance(matches[name][0], Tied)):  # the second names behind the first
        entry, names = matches[name]
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
    """bool, whether two shapes differ in their rows alone; behind the leading ones of a published table, maybe."""
    rows = max(len(expected) - 2, 0)  # the axis of the rows: [R, W], [1, R, W] or, of a bias, [R]
    others = [(*shape[:rows], *shape[rows + 1 :]) for shape in (found, expected)]
    return len(found) == len(expected) and others[0] == others[1]


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


# Read and write checkpoints of any size: safetensors, one file or shards with an index, never more than one at a time.
#
# A file is opened by its header alone: names, shapes and types come first, the tensors, memory-mapped, one by one when
# everything fits (weight_loading.py). Published .pt and .bin files are opened for conversion only, weights_only=True.


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("pytorch_model.bin.index.json", "pytorch_model.bin")
MAX_SHARD_BYTES = 5_000_000_000
MAPPED_BYTES = 8 * 2**20  # read from one mapping: its pages count as this process's memory until it is closed
TEMPORARY = ".tmp"
OURS = (("{rest}", "{rest}"),)  # the table of files that carry our names already
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Checkpoint:
    """A checkpoint that is open, with nothing read but the headers.

    where: str, for messages. shapes: {name: tuple}. dtypes: {name: str}, as safetensors writes them ("F32").
    files: {name: Path}, the shard of each tensor. reader: context manager (Path) -> function(name) -> Tensor.
    """

    where: str
    shapes: dict
    dtypes: dict
    files: dict
    reader: Callable

    def read(self, names):
        """Tensors one by one, shard by shard, each shard closed before the next is opened: yields (name, Tensor)."""
        by_file = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, held in by_file.items():
            with self.reader(path) as get:
                for name in held:
                    yield name, get(name)


@contextmanager
def safetensors_reader(path):
    """A function(name) -> Tensor, memory-mapped; the file is mapped anew now and then, to give its pages back."""
    file, num_bytes = opened(path), 0

    def get(name):
        nonlocal file, num_bytes
        if num_bytes > MAPPED_BYTES:
            file, num_bytes = opened(path), 0
        tensor = file.get_tensor(name)
        num_bytes += tensor.nbytes
        return tensor

    yield get


def opened(path):
    """`safetensors.safe_open`, with errors that name the file. Raises: FileNotFoundError, WeightsError."""
    try:
        return safetensors.safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; a shard of the checkpoint is missing, download it") from error
    except (safetensors.SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        hint = "it is a pointer of git-lfs: run `git lfs pull`" if pointer else "download or copy it again"
        raise WeightsError(f"{path} is cut short or damaged ({error}); {hint}") from error


def open_checkpoint(path, pickled=False):
    """Open a published checkpoint, or one of ours.

    Args:
      path: str or Path, a safetensors file or a folder that holds one or shards with an index.
      pickled: bool, whether .pt and .bin files may be opened (weights_only=True).
    Returns: Checkpoint.
    Raises: FileNotFoundError for a missing file or shard; WeightsError naming a damaged one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        return open_files([path], str(path), pickled)
    for name in (INDEX, SINGLE, *PICKLED):
        found = path / name
        if not found.exists():
            continue
        if name in PICKLED and not pickled:
            raise WeightsError(f"{path} holds {name} and no safetensors; write them with `python -m nanovlm.recipes "
                               "convert`")
        if name.endswith(".json"):
            return open_files(shards(found), str(path), pickled, found)
        return open_files([found], str(path), pickled)
    singles = sorted(path.glob("*.safetensors"))
    if pickled and not singles:
        singles = sorted([*path.glob("*.pt"), *path.glob("*.pth")])
    if len(singles) == 1:
        return open_files(singles, str(path), pickled)
    names = ", ".join(found.name for found in singles) or "no safetensors file"
    raise FileNotFoundError(f"{path} holds {names}, but no {SINGLE} and no {INDEX}; name the file itself, or restore "
                            "the index")


def shards(index):
    """The files that an index names: list of Path. Raises: FileNotFoundError, WeightsError."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{index} is no index of shards ({what}); download it again") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise WeightsError(f"{index} names files outside its folder; download it again")
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}; "
                                "download them")
    return [index.parent / name for name in names]


def open_files(paths, where, pickled, index=None):
    """Open the headers of some files as one Checkpoint; see `open_checkpoint`."""
    result = Checkpoint(where, {}, {}, {}, safetensors_reader)
    for path in paths:
        if path.suffix == ".safetensors":
            with opened(path) as file:
                for name in file.keys():
                    header = file.get_slice(name)
                    add(result, path, name, header.get_shape(), header.get_dtype())
        elif pickled:
            result.reader = pickled_reader
            for name, tensor in unpickle(path).items():
                known = {dtype: name for name, dtype in TYPES.items()}
                add(result, path, name, tensor.shape, known.get(tensor.dtype, str(tensor.dtype)))
        else:
            raise WeightsError(f"{path} is no safetensors file; write one with `python -m nanovlm.recipes convert`")
    listed = json.loads(index.read_text())["weight_map"] if index else {}
    absent = sorted(name for name in listed if result.files.get(name) != index.parent / listed[name])
    if absent:
        raise WeightsError(f"{where}: {len(absent)} tensors of the index are not in their shards, {absent[0]} first "
                           f"({listed[absent[0]]}); index and shards belong to different downloads")
    return result


def add(result, path, name, shape, dtype):
    """Note one tensor of a file. Raises: WeightsError if two files hold it."""
    if name in result.files:
        raise WeightsError(f"{name} stands in {result.files[name]} and in {path}; remove the file that is too many")
    result.shapes[name], result.dtypes[name], result.files[name] = tuple(shape), dtype, path


@contextmanager
def pickled_reader(path):
    """As `safetensors_reader`, for .pt and .bin."""
    yield unpickle(path).__getitem__


def unpickle(path):
    """The tensors of a .pt or .bin file, read with weights_only=True: {name: Tensor}.

    Raises: WeightsError for a file that is damaged, holds more than tensors, or holds none.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} is damaged, or holds Python objects beside tensors, which are not loaded "
                           f"({first_line(error)})") from error
    except Exception as error:  # a damaged file makes torch's reader raise almost anything
        raise WeightsError(f"{path} is cut short or damaged ({first_line(error)}); download it again") from error
    for key in ("model", "state_dict", "model_state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = content if isinstance(content, dict) else {}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors by name")
    return tensors


def first_line(error):
    """The first line of an error's message, its type where it has none: str."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def write_checkpoint(folder, table, state, max_shard_bytes=MAX_SHARD_BYTES):
    """Write weights in a published layout: one file, or shards with an index, each through a temporary name.

    Args:
      folder: Path that exists. table: tuple of entries (OURS keeps the names). state: {our name: Tensor}.
      max_shard_bytes: int; a single larger tensor gets a shard of its own.
    Returns: list of file names.
    Raises: WeightsError if the layout has no place for a tensor, or the disk none for the file.
    """
    places, groups = placed(table, state), [[]]
    room = max_shard_bytes
    for name, (entry, names) in places.items():
        needed = sum(state[part].nbytes for part in names if part is not None)
        if needed > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= needed
    names = [SINGLE]
    if len(groups) > 1:
        names = [f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" for number in range(len(groups))]
    total = 0
    for file_name, group in zip(names, groups):
        tensors = {}
        for name in group:
            entry, parts = places[name]
            tensors[name] = entry.join([None if part is None else state[part].detach() for part in parts])
            tensors[name] = tensors[name].cpu().contiguous()
            total += tensors[name].nbytes
        form = {"format": "pt"}  # transformers reads no file without it
        write_file(folder / file_name, lambda path: safetensors.torch.save_file(tensors, path, metadata=form))
    if len(groups) > 1:
        weight_map = {name: file_name for file_name, group in zip(names, groups) for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=2)))
    return names


def write_file(path, write):
    """Write one file under a temporary name and rename it; write: function(Path). Raises: WeightsError."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise WeightsError(f"{path} could not be written ({error}); make room") from error


@contextmanager
def new_folder(path):
    """A folder that appears whole or not at all: yields a temporary Path, renamed to `path` at the end.

    Raises: FileExistsError if there is something already.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists; name another folder, or remove it")
    temporary = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# Fill a model from a checkpoint: everything fits or nothing is loaded, straight to the wanted type and device.
#
# The model is built without memory (on torch's meta device) and compared with the names and shapes of the files. Then
# it is given memory of the wanted type on the wanted device, and filled tensor by tensor, one shard open at a time.


def load_model(build, table, checkpoint, dtype=torch.float32, device="cpu", resizable=()):
    """Build a model and fill it: straight to type and device, with the memory of one shard beside the model's.

    Args:
      build: function() -> nn.Module, called on the meta device.
      table: tuple of entries. checkpoint: Checkpoint.
      dtype: torch.dtype. device: where the model shall stand.
      resizable: our names of position tables, stretched if the file's have another number of rows.
    Returns: (nn.Module in evaluation mode, weights.Plan).
    Raises: WeightsError; then no model is returned at all.
    """
    with torch.device("meta"):
        model = build()
    found = fit(model, table, checkpoint, resizable)
    materialise(model, dtype, device)
    fill(model.state_dict(), found, checkpoint)
    return model.eval(), found


def fit(model, table, checkpoint, resizable=()):
    """The Plan of filling a model. Raises: WeightsError naming everything that does not fit."""
    found = plan(table, checkpoint.shapes, shapes_of(model), resizable)
    if not found.fits:
        raise WeightsError(explain(found, checkpoint.where))
    check_types(found, checkpoint)
    return found


def shapes_of(model):
    """{our name: shape} of a model's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_types(found, checkpoint):
    """Raise WeightsError if a tensor to be read is no floating-point one."""
    foreign = sorted({checkpoint.dtypes[name] for name in found.consumed} - TYPES.keys())
    if foreign:
        raise WeightsError(f"{checkpoint.where} holds weights of type {', '.join(foreign)} (quantised?); take the "
                           f"original in one of {', '.join(TYPES)}")


def materialise(model, dtype, device):
    """Give memory to the parameters of a model on the meta device; their values are whatever lies there."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


@torch.no_grad()
def fill(targets, found, checkpoint):
    """Copy the tensors of a checkpoint into a model's, one after the other.

    Args:
      targets: {our name: Tensor}, changed in place; model.state_dict(). found: Plan that fits. checkpoint: Checkpoint.
    Raises: WeightsError for a tensor that is there twice with different values.
    """
    for name, tensor in checkpoint.read(found.consumed):
        entry, names = found.consumed[name]
        for part, piece in zip(names, entry.split(tensor)):
            if part in found.resized:
                piece = resized(part, piece, len(targets[part]))
            if part is not None:
                targets[part].copy_(piece)
    for name, tensor in checkpoint.read(found.twice):
        entry, names = found.twice[name]
        for part, piece in zip(names, entry.split(tensor)):
            if part is not None and not torch.equal(targets[part], piece.to(targets[part])):
                raise WeightsError(differs(checkpoint.where, name, part))


def resized(name, table, num_rows):
    """A table with another number of rows: positions are stretched, words are cut off or added at the words' mean.

    Args:
      name: str, ours. table: float[R, ...]. num_rows: int.
    Returns: float[num_rows, ...].
    Source: Lynx's loader for the words, whose new rows are the mean of the old ones.
    """
    if name.endswith("positions"):
        return resize_positions(table, math.isqrt(num_rows) ** 2)
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    added = mean.expand(max(num_rows - len(table), 0), *mean.shape[1:])
    return torch.cat([table[:num_rows], added])
