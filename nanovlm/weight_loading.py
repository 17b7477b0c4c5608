"""Fill a model from a checkpoint: everything fits or nothing is loaded, straight to the wanted type and device.

The model is built without memory (on torch's meta device) and compared with the names and shapes of the files. Then
it is given memory of the wanted type on the wanted device, and filled tensor by tensor, one shard open at a time.
"""

import math

import torch
from torch import nn

from nanovlm.vit import resize_positions
from nanovlm.weight_errors import WeightsError, explain
from nanovlm.weight_files import TYPES
from nanovlm.weights import differs, plan


def load_model(build, table, checkpoint, dtype=torch.float32, device="cpu", resizable=()):
    """Build a model and fill it: straight to type and device, with the memory of one shard beside the model's.

    Args:
      build: function() -> nn.Module, called on the meta device.
      table: tuple of entries. checkpoint: Checkpoint.
      dtype: torch.dtype. device: where the model shall stand.
      resizable: our names of position tables that are stretched if the file's have another number of rows.
    Returns: (nn.Module in evaluation mode, weights.Plan).
    Raises: WeightsError; then no model is returned at all.
    """
    with torch.device("meta"):
        model = build()
    found = fit(model, table, checkpoint, resizable)
    materialise(model, dtype, device)
    fill(model, found, checkpoint)
    return model.eval(), found


def fit(model, table, checkpoint, resizable=(), wanted=lambda name: True):
    """The Plan of filling a model, or of those tensors of it that are wanted.

    Raises: WeightsError naming everything that does not fit.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if wanted(name)}
    found = plan(table, checkpoint.shapes, ours, resizable)
    if not found.fits:
        raise WeightsError(explain(found, checkpoint.where))
    foreign = sorted({checkpoint.dtypes[name] for name in found.consumed} - TYPES.keys())
    if foreign:
        raise WeightsError(f"{checkpoint.where} holds weights of type {', '.join(foreign)} (quantised?); take the "
                           f"original in one of {', '.join(TYPES)}")
    return found


def materialise(model, dtype, device):
    """Give memory to the parameters of a model on the meta device; their values are whatever lies there."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


@torch.no_grad()
def fill(model, found, checkpoint):
    """Copy the tensors of a checkpoint into a model, one after the other.

    Args:
      model: nn.Module with memory. found: Plan that fits. checkpoint: Checkpoint.
    Raises: WeightsError for a tensor that is there twice with different values.
    """
    targets = model.state_dict()
    for name, tensor in checkpoint.read(found.consumed):
        entry, names = found.consumed[name]
        for part, piece in zip(names, entry.split(tensor)):
            if part in found.resized:
                piece = resize_positions(piece, math.isqrt(len(targets[part])) ** 2)
            if part is not None:
                targets[part].copy_(piece)
    for name, tensor in checkpoint.read(found.twice):
        entry, names = found.twice[name]
        for part, piece in zip(names, entry.split(tensor)):
            if part is not None and not torch.equal(targets[part], piece.to(targets[part])):
                raise WeightsError(differs(checkpoint.where, name, part))
