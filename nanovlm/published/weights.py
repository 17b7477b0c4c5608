"""Published weights: rename tables between their names and ours, and the checkpoints that the tables are applied to.

A table is a tuple of entries, the published name on the left, ours on the right, and is read in both directions:

    ("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attention.q.weight")   the same tensor
    Entry("h.{i}.qkv.weight", ("h.{i}.q.weight", "h.{i}.k.weight", "h.{i}.v.weight"))  several of ours in one of theirs
    Entry("cls_token", "class_token", unit_axes=(0, 1))                             axes of length one that ours lacks
    ("lm_head.weight", "embedding.weight")                                          a second name, which is only read
    Unread("{rest}.inv_freq", "the rotary angles are computed")                     may be there, has no place in ours
    Alias("vision_tower.{rest}", "vision_tower.vision_model.{rest}")                another spelling of a name

In a pattern `{i}` and `{j}` stand for a number, `{p}` for weight or bias, `{rest}` for anything; they mean the same on
both sides. A table may name more than one model has (biases, a head of its own): an entry holds where the model has
its tensors. Where two entries know a name, the first holds; a tensor is written under the first of its names. `plan`
decides from names and shapes alone what happens to every tensor, so that nothing is read before everything fits; each
tensor of the file and of the model is consumed or named in the error.
"""

import json
import math
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict

from nanovlm.architecture import UNBUILT
from nanovlm.machine import check_memory
from nanovlm.vit import resize_positions
from nanovlm.vlm import VLM, part_of

FIELDS = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "p": r"(?P<p>weight|bias)", "rest": r"(?P<rest>.+)"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
WRAPPER = re.compile(r"((module|_orig_mod|base_model\.model)\.)*")  # DDP's, torch.compile's, PEFT's, before every name
OURS = (("{rest}", "{rest}"),)  # the table of files that carry our names already
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class WeightsError(ValueError):
    """Weights that do not fit, cannot be read or cannot be written; the message says which, and what to do."""


# ---- tables ----


@dataclass(frozen=True)
class Entry:
    """The same numbers under two names; a plain pair of names in a table means this.

    Several of ours have one shape and lie along the first axis of the published tensor; None among them, not in front,
    stands for zeros that only that tensor holds (EVA's bias of the keys).
    """

    published: str
    ours: str | tuple[str | None, ...]
    num_heads: int = 1  # of several, interleaved: row = (head * parts + part) * D + d
    unit_axes: tuple[int, ...] = ()  # ascending axes of the published tensor that ours lacks

    @property
    def parts(self):
        """Our names: tuple, one for every part of the published tensor."""
        return self.ours if isinstance(self.ours, tuple) else (self.ours,)

    def join(self, parts):
        """Our tensors -> the published one."""
        if len(parts) == 1:
            return reduce(torch.unsqueeze, self.unit_axes, parts[0])
        parts = [torch.zeros_like(parts[0]) if part is None else part for part in parts]
        return torch.stack([part.unflatten(0, (self.num_heads, -1)) for part in parts], dim=1).flatten(0, 2)

    def split(self, tensor):
        """The published tensor -> ours."""
        if len(self.parts) == 1:
            return [tensor.squeeze(self.unit_axes)]
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (self.num_heads, len(self.parts), -1)).unbind(1)]


@dataclass(frozen=True)
class Unread:
    """A published tensor without a place in our model, for a reason; it may be absent."""

    published: str
    reason: str


@dataclass(frozen=True)
class Alias:
    """Another spelling: a name that no entry knows is tried again under `canonical`.

    A file spells all its names one way: where a name already matches `canonical`, the other spelling is a mistake.
    """

    published: str
    canonical: str


WRAPPED = Alias("model.{rest}", "{rest}")  # saved from inside another module; holds for every table


def as_entry(entry):
    """An entry of a table as an object, which a pair of names is not."""
    return Entry(*entry) if isinstance(entry, tuple) else entry


def prefixed(table, published="", ours=""):
    """A table whose names all stand behind a prefix, dots included: tuple of entries."""
    moved = []
    for entry in map(as_entry, table):
        changes = {"published": published + entry.published}
        if isinstance(entry, Alias):
            changes["canonical"] = published + entry.canonical
        elif isinstance(entry, Entry):
            changes["ours"] = tuple(part and ours + part for part in entry.parts)
        moved.append(replace(entry, **changes))
    return tuple(moved)


@lru_cache(maxsize=None)
def expression(pattern):
    """The regular expression of a pattern; a field that repeats must match the same text."""
    pieces = re.split(r"\{(\w+)\}", pattern)  # text and fields in turn
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            pieces[place] = re.escape(piece)
        else:
            pieces[place] = FIELDS[piece] if FIELDS[piece] not in pieces else f"(?P={piece})"
    return re.compile("".join(pieces))


@dataclass(frozen=True)
class Published:
    """How a published checkpoint becomes our model and back."""

    family: str  # what --family calls it
    build: Callable  # (config: dict of a config.json, manifest or golden file) -> nn.Module
    layout: Callable  # (config) -> table
    configs: dict[str, dict] = field(default_factory=dict)  # size -> config; the first is as published
    contents: str = ""  # what the released files hold, where they are not the whole model

    def on_meta(self, config):
        """A model without memory, and its table. Raises: WeightsError if the config describes none."""
        try:
            with torch.device("meta"):
                return self.build(config), self.layout(config)
        except UNBUILT as error:
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise WeightsError(f"no {self.family} can be built from this config: {what}") from error


# ---- what happens to every tensor ----


@dataclass
class Plan:
    """What happens to every tensor of a checkpoint, before any is read. Entries have their names written out.

    consumed: {published name: entry}. skipped: {published name: reason}; a second copy of a tied tensor is in both, and
    must be equal to the first. missing: {our name: published name}. unexpected: published names.
    misshaped: {published name: (found, expected)} shapes. resized: {our name: (found, expected)} position tables.
    """

    consumed: dict = field(default_factory=dict)
    skipped: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)
    unexpected: list = field(default_factory=list)
    misshaped: dict = field(default_factory=dict)
    resized: dict = field(default_factory=dict)

    def filled(self):
        """Our names that the checkpoint holds: {name: None}, in its order."""
        return dict.fromkeys(part for entry in self.consumed.values() for part in entry.parts if part)

    def remarks(self):
        """What is not read, and what is resized: list of lines."""
        reasons = Counter(self.skipped.values())
        return [*(f"  not read {number:,} tensors: {reason}" for reason, number in reasons.items()),
                *(f"  resized  {name}: {list(has)} to {list(wants)}" for name, (has, wants) in self.resized.items())]

    def wrong_shapes(self):
        """What does not fit: list of str."""
        return [f"{name} is {list(has)}, expected {list(wants)}" for name, (has, wants) in self.misshaped.items()]

    def check(self, where, partly=False):
        """Raise WeightsError naming all that does not fit, and the probable reason; partly: the model may lack some."""
        if not (self.unexpected or self.misshaped or self.missing and not partly):
            return
        kinds = {"missing": dict.fromkeys(self.missing.values()), "unexpected": self.unexpected,
                 "mis-shaped": self.wrong_shapes()}
        lines = [f"  {kind} ({len(names)}): {'; '.join(grouped(names))}" for kind, names in kinds.items() if names]
        lines = [f"{where} does not fit the model.", *lines, f"  likely cause: {likely_cause(self)}"]
        raise WeightsError("\n".join(lines))


def plan(table, found, ours, resizable=()):
    """What happens to every tensor: Plan.

    found: {published name: shape}. ours: {our name: shape}. resizable: our names of tables that may have other rows.
    """
    table, result = [as_entry(entry) for entry in (*table, WRAPPED)], Plan()
    known, filled = places(table, ours), set()
    for name, entry in match(table, found, known).items():
        if entry is None:
            result.unexpected.append(name)
            continue
        if isinstance(entry, Unread):
            result.skipped[name] = entry.reason
            continue
        real = [part for part in entry.parts if part]
        joined = entry.join([part and torch.empty(ours[part], device="meta") for part in entry.parts])
        has, wants = tuple(found[name]), tuple(joined.shape)
        if has != wants:
            shape = entry.split(torch.empty(has, device="meta"))[0].shape if real[0] in resizable else ()
            if shape[1:] == ours[real[0]][1:] and shape:  # but for the rows
                result.resized[real[0]] = has, wants
            else:
                result.misshaped[name] = has, wants
        if filled & set(real):
            result.skipped[name] = "a second copy of a tied tensor"
        result.consumed[name] = entry
        filled |= set(real)
    names = homes(known)
    result.missing = {name: names.get(name, name) for name in ours if name not in filled}
    return result


def places(table, ours):
    """Every name under which a table can have the model's tensors: {published name: entry, its names written out}."""
    found = {}
    for entry in table:
        pattern = entry.parts[0] if isinstance(entry, Entry) else ""
        for fields in filter(None, map(expression(pattern).fullmatch, ours)):
            fields = fields.groupdict()
            parts = tuple(part and part.format(**fields) for part in entry.parts)
            if all(part in ours for part in parts if part):
                whole = replace(entry, published=entry.published.format(**fields), ours=parts)
                found.setdefault(whole.published, whole)
    return found


def homes(known):
    """{our name: published name under which it is written}, of the result of `places`."""
    return {part: entry.published for entry in reversed(known.values()) for part in entry.parts if part}


def match(table, names, known):
    """The entry of every published name, None where there is none: dict; known: result of `places`."""
    unread = [entry for entry in table if isinstance(entry, Unread)]

    def find(name):
        return known.get(name) or next((one for one in unread if expression(one.published).fullmatch(name)), None)

    found = {name: find(name) for name in names}
    direct = [name for name, entry in found.items() if isinstance(entry, Entry)]
    for alias in (one for one in table if isinstance(one, Alias)):
        if any(map(expression(alias.canonical).fullmatch, direct)):
            continue  # a file spells all its names one way: this one was renamed by mistake
        for name in [name for name, entry in found.items() if entry is None]:
            spelled = expression(alias.published).fullmatch(name)
            if spelled:
                found[name] = find(alias.canonical.format(**spelled.groupdict()))
    return found


def grouped(names):
    """Names with their first number drawn together: ["h.0.w", "h.1.w"] -> ["h.{0-1}.w (2)"]."""
    groups, lines = {}, []
    for name in names:
        head, number, tail = re.fullmatch(r"(\D*)(\d*)(.*)", name, re.DOTALL).groups()
        groups.setdefault((head, tail), []).append(number)
    for (head, tail), numbers in groups.items():
        if len(numbers) == 1:
            lines.append(f"{head}{numbers[0]}{tail}")
            continue
        numbers.sort(key=int)
        gapless = int(numbers[-1]) - int(numbers[0]) < len(numbers)
        span = f"{numbers[0]}-{numbers[-1]}" if gapless else ",".join(numbers)
        lines.append(f"{head}{{{span}}}{tail} ({len(numbers)})")
    return lines


def likely_cause(found):
    """The probable reason why a Plan does not fit: str."""
    absent = {name.split(".")[0] for name in found.missing} - {name.split(".")[0] for name in found.filled()}
    if any("Wqkv" in name and "attn.Wqkv" not in name for name in found.unexpected):
        return "Phi-2's layout of before January 2024 (fused Wqkv), which is not read; download the present files"
    if absent & {"vision", "decoder"} and found.consumed and not found.unexpected:
        return (f"the files hold no {' and no '.join(sorted(absent))}; put them together with "
                "`python -m nanovlm.recipes convert ... --vision PATH --language PATH`")
    if len(found.missing) > len(found.consumed) and (found.unexpected or not found.consumed):
        prefix = os.path.commonprefix(found.unexpected).rpartition(".")[0]
        wrapped = f"names inside of {prefix!r}, which is no wrapper that is known, or " if prefix else ""
        return f"{wrapped}a checkpoint of another family; name the right one with --family, inspect tells which"
    if found.unexpected:
        return "config.json does not belong to these weights (a larger model, more parts?), or tensors were renamed"
    if found.missing:
        return "a missing shard, or a file that holds only a part of the model (inspect names the parts)"
    return ("config.json does not belong to these weights; for another resolution ask with image_size, for another "
            "vocabulary correct vocab_size")


# ---- renaming ----


def to_ours(table, tensors, ours):
    """Rename published tensors: {our name: Tensor}, every one in `ours`, which is {our name: Tensor or shape}.

    Raises: WeightsError naming what is missing, unexpected, mis-shaped, or there twice with different values.
    """
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in ours.items()}
    found = plan(table, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes)
    found.check("the checkpoint")
    return renamed(found, ((name, tensors[name]) for name in found.consumed), "the checkpoint")


def renamed(found, tensors, where, change=lambda piece: piece):
    """{our name: Tensor} of a Plan from (published name, Tensor) pairs; change: what is done to each of our tensors."""
    result = {}
    for name, tensor in tensors:
        entry = found.consumed[name]
        for part, piece in zip(entry.parts, entry.split(tensor)):
            if part is None:
                continue
            if part in found.resized:
                piece = resized(part, piece, found.resized[part][1][-2:][0])
            piece = change(piece)
            if part in result and not torch.equal(result[part], piece):
                raise WeightsError(f"{where}: {name} is a second copy of our {part}, but its values differ")
            result[part] = piece
    return result


def to_published(table, state):
    """Rename our tensors back, a state_dict(): {published name: Tensor}, without what is computed, unused or tied.

    Raises: WeightsError naming the tensors for which the layout has no place.
    """
    known = places(map(as_entry, table), state)
    names = homes(known)
    homeless = [name for name in state if name not in names]
    if homeless:
        raise WeightsError(f"the published layout has no place for {len(homeless)} tensors: "
                           f"{'; '.join(grouped(homeless))}; merge or remove what the paper's model does not have")
    entries = [known[name] for name in dict.fromkeys(names[name] for name in state)]
    return {entry.published: entry.join([part and state[part] for part in entry.parts]) for entry in entries}


def resized(name, table, num_rows):
    """float[R, ...] with another number of rows: positions are stretched, words cut off or added at the words' mean.

    Source: Lynx's loader for the words.
    """
    if name.endswith("positions"):
        return resize_positions(table, math.isqrt(num_rows) ** 2)
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table[:num_rows], mean.expand(max(num_rows - len(table), 0), *mean.shape[1:])])


# ---- checkpoints ----


@dataclass
class Checkpoint:
    """A checkpoint that is open, with nothing read but the headers."""

    where: str  # for messages
    headers: dict[str, torch.Tensor]  # name -> Tensor on the meta device: shape and type
    files: dict[str, Path]  # name -> its file
    wrapper: str  # what stands before every name in the files
    notes: tuple[str, ...]  # what is unusual about the files

    @property
    def shapes(self):
        """{name: shape}."""
        return {name: tuple(header.shape) for name, header in self.headers.items()}

    def read(self, names):
        """(name, Tensor) one by one; a shard is closed before the next is opened."""
        for path in dict.fromkeys(self.files[name] for name in names):
            tensors = opened(path)
            yield from ((name, tensors[self.wrapper + name]) for name in names if self.files[name] == path)


def open_checkpoint(path):
    """Open a published checkpoint, or one of ours: Checkpoint, its names without the prefix of a wrapper around all.

    path: str or Path, a file (.safetensors; .bin and .pt with weights_only=True) or a folder that holds one, or shards
      with an index. Where a folder holds both, the single file is read, as transformers does.
    Raises: FileNotFoundError for a missing file or shard; WeightsError naming a damaged one.
    """
    path, headers, files = Path(path), {}, {}
    found = find_file(path) if path.is_dir() else path
    for file, listed in (read_index(found) if found.suffix == ".json" else {found: None}).items():
        held = opened(file)
        wrong = held.keys() ^ (held if listed is None else listed)
        if wrong:
            raise WeightsError(f"{found} and {file.name} belong to different downloads: only one has {min(wrong)}")
        headers |= {name: tensor.to("meta") for name, tensor in held.items()}
        files |= dict.fromkeys(held, file)
    wrapper = WRAPPER.match(os.path.commonprefix([*headers]))[0]
    headers, files = ({name.removeprefix(wrapper): one for name, one in old.items()} for old in (headers, files))
    unread = [name for name in usual_files(path) if name != found.name]
    notes = (f"{path} holds {', '.join([found.name, *unread])}: the first is read, the others are not",)
    return Checkpoint(str(path), headers, files, wrapper, notes * bool(unread))


def usual_files(folder):
    """Which of the usual names of weights a folder holds, the first of which is read: list of str."""
    return [name for name in (SINGLE, INDEX, *PICKLED) if (folder / name).exists()]


def find_file(folder):
    """The file of a folder that holds its weights, or their index: Path. Raises: FileNotFoundError, WeightsError."""
    refuse_adapter(folder)
    usual = [folder / name for name in usual_files(folder)[:1]]
    found = usual or [*folder.glob("*.safetensors")] or [*folder.glob("*.pt"), *folder.glob("*.pth")]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no weights"
        raise FileNotFoundError(f"{folder} holds {names}, but no {SINGLE} and no {INDEX}; name the file itself")
    return found[0]


def refuse_adapter(folder):
    """Raise WeightsError for the folder of a LoRA adapter, which is no model."""
    if (folder / "adapter_config.json").exists():
        raise WeightsError(f"{folder} is a LoRA adapter, which is read with its base model alone: `python -m "
                           f"nanovlm.recipes convert BASE {folder} OUT` adds it (so does PEFT's merge_and_unload)")


def read_index(index):
    """What an index says: {Path of a shard: names in it}. Raises: FileNotFoundError, WeightsError."""
    shards = {}
    try:
        for name, shard in json.loads(index.read_text())["weight_map"].items():
            shards.setdefault(index.with_name(shard), []).append(name)  # with_name refuses other folders
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index} is no index of shards in its folder ({error}); download it again") from error
    missing = sorted(shard.name for shard in shards if not shard.exists())
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}")
    return dict(sorted(shards.items()))


def damage(path):
    """What is wrong with a file that cannot be read: str."""
    with open(path, "rb") as file:
        pointer = file.read(23) == b"version https://git-lfs"
    return "a pointer of git-lfs: run `git lfs pull`" if pointer else "cut short or damaged: download it again"


def opened(path):
    """The tensors of one file, memory-mapped: {name: Tensor}; of pickles nothing else is read. Raises: WeightsError."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file makes torch's reader raise almost anything
        objects = "damaged, or holds Python objects beside tensors, which are not loaded"
        hint = objects if isinstance(error, pickle.UnpicklingError) else damage(path)
        raise WeightsError(f"{path} is {hint} ({[*str(error).splitlines(), type(error).__name__][0]})") from error
    for key in ("model", "state_dict", "model_state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    content = content if isinstance(content, dict) else {}
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors by name")
    return tensors


def write_checkpoint(folder, table, state, max_shard_bytes=5_000_000_000):
    """Write {our name: Tensor} in a published layout (OURS keeps the names) into a new folder: list of file names.

    One file, or shards with an index; a tensor larger than max_shard_bytes gets a shard of its own.
    Raises: WeightsError if the layout has no place for a tensor, or the disk none for the file.
    """
    tensors = to_published(table, {name: tensor.detach().cpu() for name, tensor in state.items()})
    try:
        save_torch_state_dict(tensors, folder, max_shard_size=max_shard_bytes)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{folder} could not be written ({error}); make room") from error
    return sorted(path.name for path in folder.glob("*.safetensors"))


def read_weights(found, checkpoint, dtype, device):
    """The tensors of a Plan that fits: {our name: Tensor}, copies of the wanted type on the wanted device."""
    foreign = {checkpoint.headers[name].dtype for name in found.consumed}.difference(TYPES)
    if foreign:
        raise WeightsError(f"{checkpoint.where} holds weights of type {', '.join(map(str, foreign))} (quantised?); "
                           "take the original in float32, float16 or bfloat16")
    tensors = checkpoint.read(found.consumed)
    return renamed(found, tensors, checkpoint.where, lambda piece: piece.to(device, dtype, copy=True).contiguous())


def load_weights(model, table, checkpoint, dtype=torch.float32, device="cpu", resizable=()):
    """Replace a model's parameters, which may stand on the meta device: Plan; everything fits or nothing is loaded.

    The files are read tensor by tensor, straight to type and device, with the memory of one shard beside the model's.
    resizable: our names of position tables, stretched if the file's have another number of rows.
    Raises: WeightsError naming everything that does not fit.
    """
    found = plan(table, checkpoint.shapes, shapes_of(model), resizable)
    found.check(checkpoint.where)
    needed = count(shapes_of(model).values()) * dtype.itemsize
    check_memory(needed, device, f"the weights of {checkpoint.where}, as {str(dtype).removeprefix('torch.')},")
    model.load_state_dict(read_weights(found, checkpoint, dtype, device), assign=True)
    return found


def shapes_of(model):
    """{our name: shape} of a model's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def by_part(model, names):
    """{part: its names among these}; a bare tower's or language model's parts are its modules."""
    parts = {}
    for name in names:
        parts.setdefault(part_of(name) if isinstance(model, VLM) else name.split(".")[0], []).append(name)
    return parts


def count(shapes):
    """How many numbers are in tensors of these shapes: int."""
    return sum(map(math.prod, shapes))
