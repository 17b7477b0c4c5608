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
