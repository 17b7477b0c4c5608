"""Read and write checkpoints of any size: safetensors, one file or shards with an index, never more than one at a time.

A file is opened by its header alone: names, shapes and types come first, the tensors, memory-mapped, one by one when
everything fits (weight_loading.py). Published .pt and .bin files are opened for conversion only, weights_only=True.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from nanovlm.weight_errors import WeightsError
from nanovlm.weights import placed

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
