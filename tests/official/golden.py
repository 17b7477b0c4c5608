"""Golden files: a small model with its weights under published names, inputs, and what the official code made of them.

A safetensors file with `weights/NAME`, `in/NAME`, `out/NAME`, and its sizes as JSON in the metadata under "config". What
the config leaves out is read off the shapes of the weights. Counts of heads leave no trace there, unless a buffer of
rotary angles tells them; where the config is silent too, they are the released model's.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nanovlm.published.weights import grouped

KINDS = ("weights/", "in/", "out/")
MARKS = {  # family -> a name that only its weights have
    "lynx": r"vision_encoder\..*|LLM\..*|absolute_frame_pos_embed",
    "mplug_owl2": r"model\.visual_abstractor\..*",
    "llava_phi": r"model\.(mm_projector|vision_tower)\..*",
    "open_flamingo": r"(perceiver|lang_encoder)\..*",
    "smolvlm": r"model\.connector\..*",
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
    Raises: GoldenError for what is missing or damaged.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise GoldenError(f"{path}: not a safetensors file, or cut short or damaged: {error}") from error
    except (KeyError, ValueError) as error:
        raise GoldenError(f"the metadata have no 'config' that is JSON: {error}") from error
    if not isinstance(config, dict):
        raise GoldenError(f"the metadata's config is {config!r}; an object with the model's sizes was expected")
    parts = [{name[len(kind):]: tensor for name, tensor in tensors.items() if name.startswith(kind)} for kind in KINDS]
    if not all(parts) or sum(map(len, parts)) != len(tensors):
        raise GoldenError(f"names that begin with {', '.join(KINDS)}, each of them and no other, were expected")
    found = [family for family, sign in MARKS.items() if any(re.fullmatch(sign, name) for name in parts[0])]
    if len(found) != 1:
        raise GoldenError(f"weights/ has names of {' and '.join(found) or 'no family'}: {'; '.join(grouped(parts[0])[:3])}")
    return Golden(found[0], config, *parts)


# family -> part of the config -> (beginning of the names, {key: (name, axis of its length, or what else is read off)}):
# "count", how many numbers stand at {i}; "step", from one number to the next; "pixels", the side of the pictures
SIZES = json.loads(Path(__file__).with_name("golden_sizes.json").read_text())


def settled(golden, config):
    """A config with what it leaves out read off the shapes: dict; config: the golden file's, in the recipe's own form."""
    config, shapes = json.loads(json.dumps(config)), {name: tuple(tensor.shape) for name, tensor in golden.weights.items()}
    mpt = next((kind for kind, norm in (("mosaic_gpt", "ln_f"), ("mpt", "norm_f"))
                if f"lang_encoder.transformer.{norm}.weight" in shapes), None)
    for part, (prefix, table) in SIZES[f"{golden.family} on mpt" if mpt else golden.family].items():
        told = config.setdefault(part, {}) if part else config
        if not isinstance(told, dict):
            raise GoldenError(f"config: {part} is {told!r}; an object with sizes was expected")
        for key, (name, what) in table.items():
            value = measured(shapes, prefix + name, what, told)
            if told.get(key) is None and value is not None:
                told[key] = value
        if mpt and part == "llm":
            told.setdefault("model_type", mpt)
        if f"{prefix}embed_positions.weight" in shapes:  # OPT's two unused rows
            told.setdefault("max_position_embeddings", shapes[f"{prefix}embed_positions.weight"][0] - 2)
        angles = shapes.get(f"{prefix}layers.0.self_attn.rotary_emb.inv_freq")
        if part == "llm" and angles and "hidden_size" in told:
            told.setdefault("num_attention_heads", told["hidden_size"] // (2 * angles[0]))
        if prefix == "bridge." and "bridge.layers.0.0.to_q.weight" in shapes:  # 64 channels each, if nothing else is said
            inner = shapes["bridge.layers.0.0.to_q.weight"][0]
            told.setdefault("head_width", inner // told["heads"] if "heads" in told else 64)
            told.setdefault("heads", inner // told["head_width"])
    return config


def measured(shapes, name, what, told):
    """A size: int, None where the tensor is absent, which is for the layout to report."""
    head = re.escape(name).replace(r"\{i\}", r"(\d+)")
    numbers = sorted({int(found[1]) for other in shapes if "{i}" in name and (found := re.match(head, other))})
    if what == "count":
        return len(numbers) or None
    if what == "step":
        return numbers[1] - numbers[0] if len(numbers) > 1 else numbers[0] + 1 if numbers and numbers[0] else 10**6
    if name not in shapes or what == "pixels" and not isinstance(patch := patch_of(shapes, name), int):
        return None
    return math.isqrt(shapes[name][-2] - 1) * patch if what == "pixels" else shapes[name][what]


def patch_of(shapes, positions):
    """Side of the patches of the tower that has this position table: int or None."""
    tower = positions.split("pos")[0].removesuffix("embeddings.")
    found = [shape for name, shape in shapes.items() if name.startswith(tower) and len(shape) == 4]
    return found[0][-1] if found else None
