"""Checkpoints: the whole state of a run in one folder, which is either complete or not there.

    OUT/state/step-00001234/model.safetensors        weights of the vision-language model
                            text_tower.safetensors   the contrastive model's text side, if the recipe has one
                            optimizer.safetensors    "exp_avg/decoder.norm.weight": state by parameter name
                            rng.safetensors          torch's random state
                            state.json               stage and step, data cursors, settings that must not change

Nothing is ever unpickled. How a folder is written, saving.py says; where many processes hold shards, the tensors lie in
other files (sharded_checkpoint.py).
"""

import json
import os
import shutil
import threading
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from nanovlm.training.processes import copy_shard, Processes, shard_of


TEMPORARY = ".tmp"
PREFIX = "step-"
STATE_KEYS = {  # what each optimizer keeps per parameter
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Muon": ("momentum_buffer",),
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or does not belong to this run; the message says what to do."""


def open_folder(out, resume):
    """Look into an output folder, new or, with resume, that of an earlier process.

    Args:
      out: Path.
      resume: bool.
    Returns: dict, the settings in config.json with which the run began; None if it begins now.
    Raises: CheckpointError if the folder holds anything and resume is False, or holds something else than a run.
    """
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


def complete(out):
    """The complete checkpoints of a run, oldest first: list of Path."""
    return sorted(path for path in (out / "state").glob(f"{PREFIX}*") if not path.name.endswith(TEMPORARY))


def read(folder):
    """Read a checkpoint.

    Args:
      folder: Path, from `complete`.
    Returns: (dict file name without ending -> dict tensor name -> Tensor, dict of state.json).
    Raises: CheckpointError if a file is missing or damaged.
    """
    try:
        return {path.stem: safetensors.torch.load_file(path) for path in sorted(folder.glob("*.safetensors"))}, read_state(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(folder, error) from error


def read_state(folder):
    """Read a checkpoint's state.json: dict. Raises: CheckpointError if it is missing or damaged."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error


def damaged(folder, error):
    """The CheckpointError of a checkpoint that cannot be read."""
    return CheckpointError(f"{folder} is damaged ({error}); remove it, or start again in another --out")


def load_file_into(targets, path):
    """`copy_into` from a safetensors file.

    Raises: FileNotFoundError; CheckpointError if the file is damaged or does not fit.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or train it again") from error
    copy_into(targets, tensors, str(path))


def write_tensors(path, tensors):
    """Write a safetensors file and force it to the disk; dict name -> Tensor."""
    safetensors.torch.save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)


def write_text(path, text):
    """Write a text file and force it to the disk."""
    path.write_text(text)
    sync(path)


def sync(path):
    """Force a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path, write):
    """Write a single file so that readers see the old or the new one, never half of it.

    Args:
      path: Path.
      write: function(Path) that writes the content.
    Raises: CheckpointError if it cannot be written; the old file stays.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written ({error}); make room, then use --resume") from error


def replace_json(path, value):
    """`replace` with a JSON value."""
    replace(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1)))


def replace_tensors(path, tensors):
    """`replace` with a safetensors file of dict name -> Tensor."""
    replace(path, lambda temporary: write_tensors(temporary, tensors))


def copy_into(targets, tensors, where):
    """Copy loaded tensors into a model's own, key by key.

    Args:
      targets: dict name -> Tensor or Parameter, changed in place (its memory, and so its alignment, stays).
      tensors: dict name -> Tensor.
      where: str, named in errors.
    Raises: CheckpointError if a key is missing, left over or of another shape; all of them are named.
    """
    problems = [f"{name} is missing" for name in sorted(targets.keys() - tensors.keys())]
    problems += [f"{name} is not part of this model" for name in sorted(tensors.keys() - targets.keys())]
    problems += [f"{name} has shape {tuple(tensors[name].shape)}, this model's has {tuple(target.shape)}"
                 for name, target in targets.items() if name in tensors and tensors[name].shape != target.shape]
    if problems:
        raise CheckpointError(f"{where} does not fit this model: {'; '.join(problems)}")
    with torch.no_grad():
        for name, target in targets.items():
            copy_shard(target, tensors[name])


def optimizer_tensors(optimizers):
    """State of torch optimizers by parameter name.

    Args:
      optimizers: list from `optimizer.build`, whose groups carry `param_names`.
    Returns: dict "key/parameter name" -> Tensor; parameters that never had a gradient have no state.
    """
    return {f"{key}/{name}": optimizer.state[parameter][key] for optimizer, parameter, name in _named(optimizers)
            for key in STATE_KEYS[type(optimizer).__name__] if parameter in optimizer.state}


def optimizer_places(optimizers):
    """Where the state of fresh optimizers belongs: dict "key/parameter name" -> Parameter, for all that there can be."""
    return {f"{key}/{name}": parameter for optimizer, parameter, name in _named(optimizers)
            for key in STATE_KEYS[type(optimizer).__name__]}


def load_optimizer(optimizers, tensors):
    """Give freshly built optimizers their saved state.

    Args:
      optimizers: list from `optimizer.build`, of the same stage and model.
      tensors: dict from `optimizer_tensors`.
    Raises: CheckpointError naming the keys that are missing or left over.
    """
    tensors = dict(tensors)
    missing = []
    for optimizer, parameter, name in _named(optimizers):
        keys = STATE_KEYS[type(optimizer).__name__]
        found = {key: tensors.pop(f"{key}/{name}") for key in keys if f"{key}/{name}" in tensors}
        missing += [f"{key}/{name}" for key in keys if found and key not in found]
        if found:
            optimizer.state[parameter] = {key: shard_of(tensor, parameter) for key, tensor in found.items()}
    if missing or tensors:
        raise CheckpointError(f"the optimizer's state does not fit: missing {missing}, left over {sorted(tensors)}")


def _named(optimizers):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter, name in zip(group["params"], group["param_names"]):
                yield optimizer, parameter, name


def difference(saved, now, where=""):
    """Find where two settings differ.

    Args:
      saved, now: JSON values.
      where: str, the path so far.
    Returns: str naming the first difference ("stages.instruct.steps was 100, is now 200"), or None if they are equal.
    """
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in [*saved, *(key for key in now if key not in saved)]:
            path = f"{where}.{key}" if where else key
            if key not in saved or key not in now:
                return f"{path} was {saved.get(key, 'absent')!r}, is now {now.get(key, 'absent')!r}"
            found = difference(saved[key], now[key], path)
            if found:
                return found
        return None
    return None if saved == now else f"{where} was {saved!r}, is now {now!r}"


# How checkpoints are written: whole or not at all, at once or while training goes on.
#
# The folder is written under a temporary name, every file is forced to the disk, then the folder is renamed: a rename
# happens or does not, so a kill or a full disk at any moment leaves the previous checkpoint in place. Of several processes
# the main one writes; where they hold shards, each writes its own, and the main one renames when all are done. What fails
# in one of them has failed in all.


def save(out, step, tensors, state, processes=Processes(), keep=1):
    """Write a checkpoint, then remove the older ones.

    Args:
      out: Path, the run's output folder.
      step: int, optimizer steps of the whole run that are done.
      tensors: dict of dicts, file name without ending -> tensor name -> Tensor.
      state: JSON-able dict.
      processes: all of them call this. keep: int, checkpoints that stay, this one included.
    Returns: Path of the checkpoint's folder.
    Raises: CheckpointError if the disk is full or the folder cannot be written; the previous checkpoint stays.
    """
    return begin(out, step, tensors, state, processes, keep)()


def begin(out, step, tensors, state, processes, keep, copy=False):
    """`save` in two parts: what must happen before the next step.

    Args:
      copy: bool, the tensors may change before the rest has happened.
    Returns: a function for the rest, with `save`'s result.
    """
    folder = out / "state" / f"{PREFIX}{step:08d}"
    temporary = folder.with_name(folder.name + TEMPORARY)

    def attempt(action, here):
        """Try something in this process, if it is its turn; if it fails anywhere, it has failed everywhere."""
        error = result = None
        try:
            result = action() if here else None
        except (OSError, SafetensorError) as raised:
            error = raised
        try:
            processes.agree(error, processes.saving)
        except (OSError, SafetensorError) as error:
            if processes.main:
                shutil.rmtree(temporary, ignore_errors=True)  # gives the space back; the next save sweeps up what is left
            raise CheckpointError(f"the checkpoint of step {step} could not be written to {out / 'state'} ({error}). "
                                  f"{_intact(out)} Make room, then continue with --resume.") from error
        return result

    def make_room():
        remove_unfinished(out)
        temporary.mkdir(parents=True)

    def write():
        for name, content in tensors.items():
            write_tensors(temporary / f"{name}.safetensors", content)

    def complete_it():
        write_text(temporary / "state.json", json.dumps(state, indent=1))
        sync(temporary)
        os.rename(temporary, folder)
        sync(folder.parent)
        remove_old(out, keep)

    if processes.first(folder.exists() or None):
        return lambda: folder  # the same step of the same run: the same content
    attempt(make_room, processes.main)
    if processes.mode == "fsdp":
        write = begin_sharded(temporary, tensors, processes)  # from here on its thread talks to the others
    elif copy and processes.main:
        tensors = {name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in content.items()}
                   for name, content in tensors.items()}

    def rest():
        attempt(write, processes.main or processes.mode == "fsdp")
        attempt(complete_it, processes.main)
        return folder

    return rest


def remove_old(out, keep):
    """Remove all but the last `keep` checkpoints."""
    for old in complete(out)[:-keep]:
        doomed = old.with_name(old.name + TEMPORARY)  # a half-removed folder must not look complete
        os.rename(old, doomed)
        shutil.rmtree(doomed)


class Writer:
    """Writes one checkpoint after the other, at once or, with `background`, by a thread while training goes on."""

    def __init__(self, background):
        self.background = background
        self.thread = None
        self.error = None

    def save(self, out, step, tensors, state, processes, keep):
        """As `save`; in the background, what goes wrong is raised by the next call."""
        self.wait()
        rest = begin(out, step, tensors, state, processes, keep, copy=self.background)
        if not self.background:
            rest()
            return

        def work():
            try:
                rest()
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=work)
        self.thread.start()

    def wait(self):
        """Until what was begun is written. Raises: CheckpointError if it could not be."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def _intact(out):
    found = complete(out)
    return f"The checkpoint {found[-1].name} is intact." if found else "There is no earlier checkpoint."


def remove_unfinished(out):
    """Delete what a killed or failed write has left behind."""
    for path in (out / "state").glob(f"*{TEMPORARY}"):
        shutil.rmtree(path)


# Checkpoints whose tensors are spread over processes: each writes its own shards, any number of them reads them again.
#
#     OUT/state/step-00001234/shard-00001-model-00001-of-00001.safetensors   shards of the first process, of all tensors:
#                             shard-00002-...                                "model/vision.positions", "optimizer/exp_avg/..."
#                             state.json                                     as in any other checkpoint
#
# Files and the places of the shards, which stand in the files' headers, are those of torch.distributed.checkpoint's
# safetensors writer; it also finds the pieces that a run of another number of processes needs.


SHARDS = "shard-{:05d}-*.safetensors"


def begin_sharded(folder, tensors, processes):
    """Copy the shards of this process to the CPU and begin to write them; all processes do.

    Args:
      folder: Path, exists. tensors: as in checkpoint.save; DTensors are sharded, what is not is equal everywhere.
    Returns: a function that waits until all is written, and raises OSError if it could not be.
    """
    flat = {f"{kind}/{name}": tensor.detach() for kind, content in tensors.items() for name, tensor in content.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writing = dcp.async_save(flat, storage_writer=writer, process_group=processes.saving)

    def end():
        try:
            writing.result()
        except CheckpointException as failed:
            raise OSError("; ".join(sorted({str(error) for error, _ in failed.failures.values()}))) from failed
        for path in folder.glob(SHARDS.format(processes.rank + 1)):
            sync(path)

    return end


def is_sharded(folder):
    """Whether the checkpoint in a folder is spread over processes."""
    return any(folder.glob("shard-*.safetensors"))


def read_sharded(folder, targets, processes=Processes()):
    """Read the tensors of a checkpoint, sharded or not.

    Args:
      folder: Path. targets: {kind: {name: Tensor}}; where a target is a DTensor, only its own shards are read.
    Returns: {kind: {name: Tensor}}, all that the checkpoint holds.
    Raises: checkpoint.CheckpointError if it is damaged.
    """
    if not is_sharded(folder):
        return read(folder)[0]
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        flat = {key: _empty(data, targets, *key.split("/", 1)) for key, data in found.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process is no surprise
            dcp.load(flat, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=processes.saving,
                     no_dist=processes.size == 1)
    except (OSError, ValueError, KeyError, SafetensorError, CheckpointException) as error:
        raise damaged(folder, error) from error
    result = {kind: {} for kind in targets}
    for key, tensor in flat.items():
        kind, name = key.split("/", 1)
        result.setdefault(kind, {})[name] = tensor
    return result


def _empty(data, targets, kind, name):
    target = targets.get(kind, {}).get(name)
    if isinstance(target, DTensor) and target.shape == data.size:
        return torch.empty_like(target)
    return torch.empty(data.size, dtype=data.properties.dtype)


def consolidate(out):
    """Write the model of a run's newest checkpoint as whole files, as the end of the run would.

    Args:
      out: Path, output folder of train.py.
    Returns: list of str, what was written.
    Raises: checkpoint.CheckpointError if there is no checkpoint; OSError.
    """
    folders = complete(out)
    if not folders:
        raise CheckpointError(f"{out} holds no checkpoint; give the output folder of train.py")
    state, tensors = read_state(folders[-1]), read_sharded(folders[-1], {})
    config = json.loads((out / "config.json").read_text())
    for name in ("text_tower", "model"):
        if tensors.get(name):
            replace_tensors(out / f"{name}.safetensors", tensors[name])
    replace_json(out / "config.json", config | {"image_size": state["image_size"]})
    size = sum(tensor.numel() for tensor in tensors["model"].values())
    return [f"{out / 'model.safetensors'}: {len(tensors['model'])} tensors, {size:,} parameters, of step {state['step']}"]
