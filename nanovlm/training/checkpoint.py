"""Checkpoints: the whole state of a run in one folder, which is either complete or not there.

    OUT/state/step-00001234/model.safetensors        weights of the vision-language model
                            text_tower.safetensors   the contrastive model's text side, if the recipe has one
                            optimizer.safetensors    "exp_avg/decoder.norm.weight": state by parameter name
                            movement.safetensors     where the parts that train began, see diagnostics.py
                            random.safetensors       torch's random state
                            state.json               stage and step, data cursors, settings that must not change

The folder is written under a temporary name, every file is forced to the disk, then the folder is renamed: a kill or a
full disk at any moment leaves the previous checkpoint in place. Of several processes the main one writes. With fsdp
each writes its own shards of all tensors (shard-00001-model-00001-of-00001.safetensors, torch.distributed.checkpoint's
form), which any number of processes reads again. Nothing is ever unpickled.
"""

import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from nanovlm import files
from nanovlm.files import TEMPORARY, sync
from nanovlm.training.processes import Processes, shard_of

PREFIX = "step-"
STATE_KEYS = {  # what each optimizer keeps per parameter
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Muon": ("momentum_buffer",),
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or does not belong to this run; the message says what to do."""


def open_folder(out, resume):
    """The config.json of the run in a folder: dict; None if it begins now. Refuses to overwrite, and what is no run."""
    held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if held and not resume:
        raise CheckpointError(f"{out} already holds {held[0]}; continue that run with --resume, "
                              "name another folder with --out, or remove this one")
    if (out / "config.json").exists():
        return json.loads((out / "config.json").read_text())
    foreign = [name for name in held if not name.endswith(TEMPORARY)]
    if foreign:
        raise CheckpointError(f"{out} holds {foreign[0]} but no config.json, so it is no run to resume; "
                              "name another folder with --out")
    return None


def check_same(saved, now, words):
    """Raise CheckpointError, with these words, unless two JSON objects are equal."""
    changed = files.differences(saved, now)
    if changed:
        raise CheckpointError(f"{words}: {', '.join(changed)}")


def complete(out):
    """The complete checkpoints of a run, oldest first: list of Path."""
    return sorted(path for path in (out / "state").glob(f"{PREFIX}*") if not path.name.endswith(TEMPORARY))


# Single files of a run.


def replace(path, write):
    """files.replace; a file that cannot be written is a CheckpointError, and the old one stays."""
    try:
        files.replace(path, write)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written ({error}); make room, then use --resume") from error


def replace_json(path, value):
    """`replace` with a JSON value."""
    replace(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1)))


def replace_tensors(path, tensors):
    """`replace` with a safetensors file of dict name -> Tensor."""
    replace(path, lambda temporary: save_tensors(temporary, tensors))


def save_tensors(path, tensors):
    """Write a safetensors file of dict name -> Tensor."""
    safetensors.torch.save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def write_model(out, tensors, image_size):
    """Make a run's folder one of a finished model; tensors: {"model", "text_tower": {name: Tensor}}."""
    for name in ("text_tower", "model"):
        if tensors.get(name):
            replace_tensors(out / f"{name}.safetensors", tensors[name])
    replace_json(out / "config.json", json.loads((out / "config.json").read_text()) | {"image_size": image_size})


def consolidate(out):
    """Write the model of a run's newest checkpoint as the end of the run would: list of str, what was written."""
    folders = complete(out)
    if not folders:
        raise CheckpointError(f"{out} holds no checkpoint; give the output folder of train.py")
    state, tensors = read_state(folders[-1]), read(folders[-1])
    write_model(out, tensors, state["image_size"])
    number = sum(tensor.numel() for tensor in tensors["model"].values())
    size = f"{len(tensors['model'])} tensors, {number:,} parameters"
    return [f"{out / 'model.safetensors'}: {size}, of step {state['step']}"]


# Writing.


def begin(out, step, tensors, state, processes=Processes(), keep=1, background=False):
    """Do what of a checkpoint must happen before the next step; all processes call this.

    Args:
      out: Path, the run's folder. tensors: file name without ending -> name -> Tensor. state: JSON-able dict.
      keep: int, checkpoints that stay, this one included. background: the tensors may change before the rest is done.
    Returns: a function for the rest, which returns the checkpoint's Path. Both raise CheckpointError, in all processes.
    """
    folder = out / "state" / f"{PREFIX}{step:08d}"
    temporary = Path(f"{folder}{TEMPORARY}")

    def attempt(action, here=True):
        try:
            processes.together(action, here, processes.saving)
        except (OSError, SafetensorError) as error:
            if processes.main:
                shutil.rmtree(temporary, ignore_errors=True)  # gives the space back; the next save sweeps up the rest
            intact = ", ".join(path.name for path in complete(out)) or "no earlier one"
            raise CheckpointError(f"the checkpoint of step {step} could not be written to {out / 'state'} ({error}); "
                                  f"{intact} is intact. Make room, then continue with --resume.") from error

    def make_room():
        for path in (out / "state").glob(f"*{TEMPORARY}"):  # what a killed or failed write has left behind
            shutil.rmtree(path)
        temporary.mkdir(parents=True)

    def finish():
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for path in (*sorted(temporary.iterdir()), temporary):
            sync(path)
        os.rename(temporary, folder)
        sync(folder.parent)
        for old in complete(out)[:-keep]:
            doomed = Path(f"{old}{TEMPORARY}")  # a half-removed folder must not look complete
            os.rename(old, doomed)
            shutil.rmtree(doomed)

    def write():
        for name, content in tensors.items():
            save_tensors(temporary / f"{name}.safetensors", content)

    if processes.first(folder.exists() or None):
        return lambda: folder  # the same step of the same run: the same content
    attempt(make_room, processes.main)
    sharded = processes.mode == "fsdp"
    if sharded:
        write = begin_sharded(temporary, tensors, processes)  # from here on its thread talks to the others
    elif background and processes.main:
        tensors = {name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in content.items()}
                   for name, content in tensors.items()}

    def rest():
        attempt(write, processes.main or sharded)
        attempt(finish, processes.main)
        return folder

    return rest


def begin_sharded(folder, tensors, processes):
    """Copy this process's shards to the CPU and begin to write them: a function that waits until all is written."""
    flat = {f"{kind}/{name}": tensor.detach() for kind, content in tensors.items() for name, tensor in content.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writing = dcp.async_save(flat, storage_writer=writer, process_group=processes.saving)

    def end():
        try:
            writing.result()
        except CheckpointException as failed:
            raise OSError("; ".join(sorted({str(error) for error, _ in failed.failures.values()}))) from failed
        for path in folder.glob(f"shard-{processes.rank + 1:05d}-*.safetensors"):
            sync(path)

    return end


# Reading.


def read_state(folder):
    """A checkpoint's state.json: dict. Raises: CheckpointError if it is missing or damaged."""
    with undamaged(folder):
        return json.loads((folder / "state.json").read_text())


@contextlib.contextmanager
def undamaged(path):
    """Within, something is read; what is wrong with it is a CheckpointError."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it, then train or copy it again") from error


def read(folder, targets=None, processes=Processes()):
    """The tensors of a checkpoint, whole or in shards: {kind: {name: Tensor}}.

    targets: {kind: {name: Tensor}}; of a DTensor only its own shards are read.
    """
    with undamaged(folder):
        if not any(folder.glob("shard-*.safetensors")):
            return {path.stem: safetensors.torch.load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        targets, flat, reader = targets or {}, {}, HuggingFaceStorageReader(str(folder))
        result = {kind: {} for kind in targets}
        for key, data in reader.read_metadata().state_dict_metadata.items():
            kind, name = key.split("/", 1)
            target = targets.get(kind, {}).get(name)
            sharded = isinstance(target, DTensor) and target.shape == data.size
            flat[key] = torch.empty_like(target) if sharded else torch.empty(data.size, dtype=data.properties.dtype)
            result.setdefault(kind, {})[name] = flat[key]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process is no surprise
            dcp.load(flat, storage_reader=reader, process_group=processes.saving, no_dist=processes.size == 1)
        return result


def load_file_into(targets, *paths):
    """`copy_into` from safetensors files. Raises: FileNotFoundError; CheckpointError if they do not fit."""
    tensors = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        with undamaged(path):
            tensors |= safetensors.torch.load_file(path)
    copy_into(targets, tensors, str(paths[0]))


@torch.no_grad()
def copy_into(targets, tensors, where):
    """Copy loaded tensors into a model's own, whose memory, and so its alignment, stays; what does not fit is named."""
    problems = [f"{name} is missing" for name in sorted(targets.keys() - tensors.keys())]
    problems += [f"{name} is not part of this model" for name in sorted(tensors.keys() - targets.keys())]
    problems += [f"{name} has shape {tuple(tensor.shape)}, this model's has {tuple(targets[name].shape)}"
                 for name, tensor in tensors.items() if name in targets and tensor.shape != targets[name].shape]
    if problems:
        raise CheckpointError(f"{where} does not fit this model: {'; '.join(problems)}")
    for name, target in targets.items():
        target.copy_(shard_of(tensors[name], target))


def places(optimizers):
    """Where all that optimizers can hold belongs: {"key/parameter name": (state of the optimizer, Parameter, key)}."""
    return {f"{key}/{name}": (optimizer.state, parameter, key) for optimizer in optimizers
            for group in optimizer.param_groups for parameter, name in zip(group["params"], group["param_names"])
            for key in STATE_KEYS[type(optimizer).__name__]}


def optimizer_tensors(optimizers):
    """State of torch optimizers: "key/parameter name" -> Tensor. Parameters that never had a gradient have none."""
    return {place: state[parameter][key] for place, (state, parameter, key) in places(optimizers).items()
            if parameter in state}


def load_optimizer(optimizers, tensors):
    """Give freshly built optimizers what `optimizer_tensors` gave. Raises: CheckpointError naming what does not fit."""
    stateful = {place.split("/", 1)[1] for place in tensors}
    expected = {place: at for place, at in places(optimizers).items() if place.split("/", 1)[1] in stateful}
    missing, left = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or left:
        raise CheckpointError(f"the optimizer's state does not fit: missing {missing}, left over {left}")
    for place, (state, parameter, key) in expected.items():
        state[parameter][key] = shard_of(tensors[place], parameter)
