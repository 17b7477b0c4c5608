"""Golden files: a small model with its weights under published names, inputs, and what the official code made of them.

A safetensors file with `weights/NAME`, `in/NAME`, `out/NAME`, and its sizes as JSON in the metadata under "config".
This file reads one; golden_sizes.py completes its config, compare.py runs it.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanovlm.published.weights import grouped

KINDS = ("weights/", "in/", "out/")
MARKS = {  # family -> a name that only its weights have
    "lynx": r"vision_encoder\..*|LLM\..*|absolute_frame_pos_embed",
    "mplug_owl2": r"model\.(visual_abstractor|vision_model)\..*",
    "llava_phi": r"model\.(mm_projector|vision_tower)\..*",
    "open_flamingo": r"(perceiver|lang_encoder)\..*",
}


class GoldenError(ValueError):
    """A golden file that cannot be compared: damaged, incomplete, or contradicting itself."""


@dataclass(frozen=True)
class Golden:
    """A golden file: its config, and tensors by the names behind `weights/`, `in/` and `out/`."""

    family: str  # of MARKS
    config: dict
    weights: dict
    inputs: dict
    outputs: dict


def read(path):
    """Read a golden file.

    Args:
      path: str or Path.
    Returns: Golden.
    Raises: GoldenError for what is missing or damaged, with names.
    """
    path = Path(path)
    if not path.is_file():
        raise GoldenError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise GoldenError(f"{path}: not a safetensors file, or cut short or damaged: {error}") from error
    strange = [name for name in tensors if not name.startswith(KINDS)]
    if strange:
        raise GoldenError(f"names that begin with none of {', '.join(KINDS)}: {'; '.join(grouped(strange))}")
    weights, inputs, outputs = (
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)} for kind in KINDS
    )
    for kind, found in zip(KINDS, (weights, inputs, outputs)):
        if not found:
            raise GoldenError(f"there is no tensor under {kind}; a golden file holds weights, inputs and outputs")
    check_numbers(tensors)
    return Golden(family_of(weights), read_config(metadata), weights, inputs, outputs)


def read_config(metadata):
    """The config out of a file's metadata: dict. Raises: GoldenError."""
    if "config" not in metadata:
        raise GoldenError("the metadata have no 'config': it holds the sizes of the model as JSON")
    try:
        config = json.loads(metadata["config"])
    except ValueError as error:
        raise GoldenError(f"the metadata's config is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise GoldenError(f"the metadata's config is {config!r}; an object with the model's sizes was expected")
    return config


def check_numbers(tensors):
    """Raise GoldenError for weights and outputs that are no floating-point numbers, and for any that is not finite."""
    for name, tensor in tensors.items():
        if name.startswith(("weights/", "out/")) and not tensor.is_floating_point():
            raise GoldenError(f"{name} is of type {tensor.dtype}; floating-point numbers were expected")
        if not bool(torch.isfinite(tensor.float()).all()):
            count = int((~torch.isfinite(tensor.float())).sum())
            raise GoldenError(f"{name} has {count} of {tensor.numel()} values that are NaN or infinite")


def family_of(weights):
    """The family by the names of its weights: str. Raises: GoldenError for none, or several."""
    found = [family for family, pattern in MARKS.items() if any(re.fullmatch(pattern, name) for name in weights)]
    if len(found) != 1:
        which = "names of several families: " + ", ".join(found) if found else "no family's names"
        raise GoldenError(f"weights/ has {which}; known are {', '.join(MARKS)}; found e.g. {'; '.join(grouped(weights)[:3])}")
    return found[0]
