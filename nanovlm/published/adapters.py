"""LoRA adapters in PEFT's layout, and LLaVA's with non_lora_trainables.bin beside it: added to their base, and written.

    adapter_config.json          rank, alpha, which modules, the base's name
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight [r, k], lora_B.weight [d, r]; modules saved whole

LoRA, arXiv:2106.09685: W + alpha / r B A. PEFT's rank-stabilised kind divides by the root of r (arXiv:2312.03732).
"""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from nanovlm.files import new_folder
from nanovlm.published.hub import find
from nanovlm.published.language import read_json
from nanovlm.published.weights import (
    WeightsError, as_entry, grouped, homes, open_checkpoint, places, plan, renamed, to_published,
)
from nanovlm.vlm import part_of

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
UPDATE = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
UPDATED = re.compile(r"\.lora_[ab]$")  # the end of our own names
PLAIN = {"peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False}  # what alone is read
PREFIX = "base_model.model."


class Adapter:
    """An adapter's folder that is open; beside: list of Checkpoint of the tensors that were saved whole.

    Raises: WeightsError for a kind that is not read; FileNotFoundError.
    """

    def __init__(self, folder):
        self.folder, self.config = folder, read_json(folder / CONFIG)
        for key, value in PLAIN.items():
            if self.config.get(key) not in (value, None):
                raise WeightsError(f"{folder / CONFIG}: {key} is {self.config[key]!r}; only {value!r} is read")
        self.file = open_checkpoint(next(filter(Path.exists, map(folder.joinpath, FILES)), folder / FILES[0]))
        self.updates = {}  # name of a weight in the base -> {"A", "B": name in the file}
        for name, found in ((name, UPDATE.fullmatch(name)) for name in self.file.headers):
            if found:
                self.updates.setdefault(f"{found['module']}.weight", {})[found["side"]] = name
        halves = [name for name, sides in self.updates.items() if len(sides) < 2]
        if halves or not self.updates:
            raise WeightsError(f"{folder} holds no whole update of a weight{'; half of '.join(['', *grouped(halves)])}")
        whole = {name: header for name, header in self.file.headers.items() if not UPDATE.fullmatch(name)}
        self.beside = [open_checkpoint(path) for path in folder.glob("non_lora_trainables.*")]
        self.beside += [replace(self.file, headers=whole)] if whole else []

    def scale(self, name, rank):
        """By what the update of a weight counts."""
        alphas = self.config.get("alpha_pattern") or {}
        own = [one for key, one in alphas.items() if re.search(rf"(^|\.){key}$", name.removesuffix(".weight"))]
        alpha = [*own, self.config.get("lora_alpha", 8)][0]
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def add_to(self, state, table):
        """Add the updates to {our name: Tensor}, in place, weight by weight: their number. Raises: WeightsError."""
        held = self.file.headers
        shapes = {name: (len(held[sides["B"]]), held[sides["A"]].shape[1]) for name, sides in self.updates.items()}
        found = plan(table, shapes, {name: tuple(tensor.shape) for name, tensor in state.items()})
        found.check(str(self.folder), partly=True)
        read = dict(self.file.read([one for sides in self.updates.values() for one in sides.values()]))
        for name in found.consumed:
            a, b = (read[self.updates[name][side]].float() for side in "AB")
            for part, piece in renamed(found, [(name, self.scale(name, len(a)) * b @ a)], str(self.folder)).items():
                state[part] = (state[part].float() + piece.to(state[part].device)).to(state[part].dtype)
        return len(found.consumed)


def is_adapter(path):
    """Whether a path is an adapter's folder."""
    return (path / CONFIG).exists()


def base_of(adapter):
    """The Path of the model that an adapter's folder was trained on. Raises: WeightsError if it is not here."""
    config = read_json(adapter / CONFIG)
    name = str(config.get("base_model_name_or_path"))
    try:
        base = find(name)
    except FileNotFoundError as error:
        base, name = Path(name), str(error)
    if not base.exists():
        raise WeightsError(f"{adapter} is a LoRA adapter (rank {config.get('r')}, of {config.get('target_modules')}) "
                           f"and no model; its base is not here: {name}. `python -m nanovlm.recipes convert BASE "
                           f"{adapter} OUT` adds it; to a language model, --vision TOWER --language BASE {adapter} OUT")
    return base


def write_adapter(folder, out, config, published, sizes, memory):
    """Write the updates of a folder that `train.py --lora` wrote, and what trained beside them, in PEFT's layout.

    Args: config: of the run. published, sizes: of its layout. memory: {prefix in files: in transformers' memory}.
    Returns: list of lines to print. Raises: WeightsError for what PEFT's layout has no place for.
    """
    checkpoint, table, tensors = open_checkpoint(folder), published.layout(sizes), {}
    updates = [name for name in checkpoint.headers if UPDATED.search(name)]
    base = {name: header for name, header in checkpoint.headers.items() if name not in updates}
    entries = places(map(as_entry, table), base)
    known = homes(entries)

    def in_memory(name):
        return next((new + name.removeprefix(old) for old, new in memory.items() if name.startswith(old)), name)

    for name, tensor in checkpoint.read(updates):
        weight = known[UPDATED.sub(".weight", name)]
        if len(entries[weight].parts) > 1:
            raise WeightsError(f"{folder}: {weight} is several of our matrices in one, whose updates have no place in "
                               "PEFT's layout; write the merged model, --to published")
        tensors[f"{PREFIX}{in_memory(weight).removesuffix('.weight')}.lora_{name[-1].upper()}.weight"] = tensor
    modules = [name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors]
    kinds = "|".join(sorted({name.rpartition(".")[2] for name in modules}))
    targets = rf"{re.escape(os.path.commonprefix(modules))}.*\.({kinds})"  # a tower's layers may be called the same
    parts = {part for stage in config["stages"].values() for part in stage["learning_rates"]} - {"lora"}
    trained = dict(checkpoint.read([name for name in base if part_of(name) in parts]))
    whole = {in_memory(name): tensor for name, tensor in to_published(table, trained).items()}
    tensors |= {PREFIX + name: tensor for name, tensor in whole.items()}
    saved = sorted({name.removeprefix("model.").split(".")[0] for name in whole})
    told = {"peft_type": "LORA", "task_type": None, "r": config["lora"]["rank"], "lora_alpha": config["lora"]["alpha"],
            "lora_dropout": 0.0, "bias": "none", "target_modules": targets, "modules_to_save": saved or None,
            "base_model_name_or_path": config.get("init"), "inference_mode": True, "fan_in_fan_out": False}
    with new_folder(out) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / FILES[0])
        (temporary / CONFIG).write_text(json.dumps(told, indent=2))
    size = f"{len(updates) // 2} updates of rank {told['r']}, {len(whole)} tensors whole"
    return [f"written: {out} (PEFT's layout, {size})"]
