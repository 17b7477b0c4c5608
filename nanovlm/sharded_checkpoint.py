"""Checkpoints whose tensors are spread over processes: each writes its own shards, any number of them reads them again.

    OUT/state/step-00001234/shard-00001-model-00001-of-00001.safetensors   shards of the first process, of all tensors:
                            shard-00002-...                                "model/vision.positions", "optimizer/exp_avg/..."
                            state.json                                     as in any other checkpoint

Files and the places of the shards, which stand in the files' headers, are those of torch.distributed.checkpoint's
safetensors writer; it also finds the pieces that a run of another number of processes needs.
"""

import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from nanovlm import checkpoint
from nanovlm.parallel import Processes

SHARDS = "shard-{:05d}-*.safetensors"


def begin(folder, tensors, processes):
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
            checkpoint.sync(path)

    return end


def is_sharded(folder):
    """Whether the checkpoint in a folder is spread over processes."""
    return any(folder.glob("shard-*.safetensors"))


def read(folder, targets, processes=Processes()):
    """Read the tensors of a checkpoint, sharded or not.

    Args:
      folder: Path. targets: {kind: {name: Tensor}}; where a target is a DTensor, only its own shards are read.
    Returns: {kind: {name: Tensor}}, all that the checkpoint holds.
    Raises: checkpoint.CheckpointError if it is damaged.
    """
    if not is_sharded(folder):
        return checkpoint.read(folder)[0]
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        flat = {key: _empty(data, targets, *key.split("/", 1)) for key, data in found.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process is no surprise
            dcp.load(flat, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=processes.saving,
                     no_dist=processes.size == 1)
    except (OSError, ValueError, KeyError, checkpoint.SafetensorError, CheckpointException) as error:
        raise checkpoint.damaged(folder, error) from error
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
    folders = checkpoint.complete(out)
    if not folders:
        raise checkpoint.CheckpointError(f"{out} holds no checkpoint; give the output folder of train.py")
    state, tensors = checkpoint.read_state(folders[-1]), read(folders[-1], {})
    for name in ("text_tower", "model"):
        if tensors.get(name):
            checkpoint.replace_tensors(out / f"{name}.safetensors", tensors[name])
    checkpoint.replace_json(out / "config.json", state["identity"] | {"image_size": state["image_size"]})
    size = sum(tensor.numel() for tensor in tensors["model"].values())
    return [f"{out / 'model.safetensors'}: {len(tensors['model'])} tensors, {size:,} parameters, of step {state['step']}"]
