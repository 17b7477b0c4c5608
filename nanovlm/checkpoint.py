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
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError

from nanovlm.parallel import copy_shard, shard_of

TEMPORARY = ".tmp"
PREFIX = "step-"
STATE_KEYS = {  # what each of torch's optimizers keeps per parameter
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Muon": ("momentum_buffer",),
    "ShardedMuon": ("momentum_buffer",),
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
