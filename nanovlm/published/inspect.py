"""What a checkpoint holds: family, sizes, type, parts, and what would be missing if it were loaded.

    python -m nanovlm.recipes inspect FILE_OR_FOLDER

Only headers are read. The family stands in config.json, or is told by names that no other family has; without
config.json the sizes are those of the published model of that family.
"""

import collections
import re
from pathlib import Path

from nanovlm.recipes import FAMILIES, RECIPES
from nanovlm.published.convert import WRAPPED, by_part
from nanovlm.published.convert import count, count_all, find_family
from nanovlm.published.load import build_on_meta, family_of, read_config
from nanovlm.vlm import VLM
from nanovlm.published.weights import grouped
from nanovlm.published.weights import OURS, open_checkpoint
from nanovlm.published.weights import shapes_of
from nanovlm.published.weights import plan

SIGNS = (  # family, and what stands in one of its names and in none of those further down; the first that is found
    ("lynx", r"output_adapter\.|^(model\.)?vision_encoder\.blocks\.\d+\.attn\.q_proj"),
    ("mplug_owl2", r"visual_abstractor\.|\.multiway\."),
    ("open_flamingo", r"gated_cross_attn_layer|^perceiver\."),
    ("blip2", r"^qformer\."),
    ("llava_phi", r"^model\.layers\.\d+\.self_attn\.query_key_value\."),
    ("llava", r"multi_modal_projector\.|mm_projector\."),
    ("siglip", r"^logit_bias$|head\.probe$|^text_model\.head\."),
    ("clip", r"pre_layrnorm\."),
    ("eva", r"self_attn\.qkv\.|attn\.q_bias$"),
    ("opt", r"decoder\.embed_positions\."),
    ("phi", r"final_layernorm\.|\.Wqkv\."),
    ("qwen2", r"self_attn\.q_proj\.bias$"),
    ("llama", r"mlp\.gate_proj\."),
)
SIZE_KEYS = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
             "ffn_dim", "vocab_size", "image_size", "patch_size", "width", "depth", "num_latents", "num_query_tokens"}


def recognise(names):
    """The family whose names these are: str, or None."""
    return next((family for family, sign in SIGNS if any(re.search(sign, name) for name in names)), None)


def inspect(path, family=None):
    """Describe a checkpoint.

    Args:
      path: str or Path of a safetensors, .pt or .bin file, or of a folder. family: str or None = find out.
    Returns: list of lines to print.
    Raises: ValueError or OSError, in words for the user.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path, pickled=True)
    folder = path if path.is_dir() else path.parent
    config = read_config(folder) if (folder / "config.json").exists() else {}
    family, published, sizes, table, source = describe(checkpoint, config, family, folder)
    kinds = collections.Counter(checkpoint.dtypes.values())
    lines = [f"{path}: {len(checkpoint.shapes):,} tensors, {count_all(checkpoint.shapes.values()):,} numbers",
             f"  family   {family or 'unknown'} ({source})",
             f"  type     {', '.join(f'{kind} ({number:,})' for kind, number in kinds.most_common())}",
             f"  files    {len(set(checkpoint.files.values()))}"]
    if published is None:
        return [*lines, "  tensors  " + "; ".join(grouped(checkpoint.shapes)[:20]), *pre_2024(checkpoint)]
    if not sizes and not published.configs:
        return [*lines, "  sizes    unknown without config.json", *tops(checkpoint), *pre_2024(checkpoint)]
    sizes = sizes or published.configs["full"]
    model, layout = build_on_meta(published, sizes)
    found = plan(table or (*layout, *WRAPPED), checkpoint.shapes, shapes_of(model), ("vision.positions", "positions"))
    lines.append(f"  sizes    {'; '.join(told_sizes(sizes)) or 'the defaults of its class'}")
    return [*lines, *held(model, found, checkpoint), *lacking(model, found, published)]


def describe(checkpoint, config, family, folder):
    """What a checkpoint is: (family or None, Published or None, config or None, table or None, how it is known)."""
    if "recipe" in config and not family:
        recipe = RECIPES.get(str(config["recipe"]))
        if recipe is None or recipe.published is None:
            return config["recipe"], None, None, None, "config.json of train.py"
        return recipe.published.family, recipe.published, recipe.published.configs.get(config.get("size")), OURS, \
            "config.json of train.py"
    if "family" in config and not family:
        family = family_of(config, str(folder / "config.json"), FAMILIES)
        return family, FAMILIES[family], config.get("config"), OURS, "config.json of convert"
    told = recognise(checkpoint.shapes)
    if family:
        return family, find_family(family), config if config.get("model_type") else None, None, "as given"
    if "model_type" in config:
        try:
            named = family_of(config, str(folder / "config.json"), FAMILIES)
        except ValueError as error:
            return told, FAMILIES.get(told), None, None, f"by its names; {error}"
        alike = told in (None, named) or {told, named} <= {"llama", "qwen2"}
        note = "" if alike else f", though its names look like {told}"
        return named, FAMILIES[named], config, None, f"config.json{note}"
    return told, FAMILIES.get(told), None, None, "by its names; sizes as published, since there is no config.json"


def told_sizes(config, where=""):
    """The sizes of a config, nested parts behind one another: list of str."""
    own = [f"{key} {value}" for key, value in config.items() if key in SIZE_KEYS]
    lines = [f"{where}{', '.join(own)}"] if own else []
    for key, value in config.items():
        if isinstance(value, dict):
            lines += told_sizes(value, f"{where}{key}: ")
    return lines


def tops(checkpoint):
    """Parts of a file whose sizes are unknown, by the beginning of their names: list of lines."""
    parts = collections.Counter()
    for name, shape in checkpoint.shapes.items():
        parts[name.split(".")[0]] += count(shape)
    return [f"  part     {name:20} {number:15,} parameters" for name, number in parts.items()]


def pre_2024(checkpoint):
    """A warning for Phi-2's first layout: list of lines."""
    if any("Wqkv" in name for name in checkpoint.shapes):
        return ["  note     Phi-2's layout of before January 2024 (fused Wqkv), which is not read"]
    return []


def parts_of(model, names):
    """{part: our names}; a bare tower's or language model's parts are its own modules."""
    if isinstance(model, VLM):
        return by_part(names)
    parts = {}
    for name in names:
        parts.setdefault(name.split(".")[0], []).append(name)
    return parts


def held(model, found, checkpoint):
    """The parts that are there, and what is passed over: list of lines."""
    ours = shapes_of(model)
    filled = [part for _, names in found.consumed.values() for part in names if part is not None]
    lines = [f"  part     {part:20} {count_all(ours[name] for name in names):15,} parameters, {len(names):,} tensors"
             for part, names in parts_of(model, filled).items()]
    skipped = found.computed | found.unused | dict.fromkeys(found.twice, "a second copy of a tied tensor")
    for reason, number in collections.Counter(skipped.values()).items():
        lines.append(f"  not read {number:,} tensors: {reason}")
    return lines


def lacking(model, found, published):
    """What would be missing or not fit: list of lines."""
    lines = []
    for part, names in parts_of(model, found.missing).items():
        shown = "; ".join(grouped([found.missing[name] for name in names])[:4])
        lines.append(f"  missing  {part:20} {len(names):,} tensors: {shown}")
    if found.unexpected:
        lines.append(f"  no place {len(found.unexpected):,} tensors: {'; '.join(grouped(found.unexpected)[:8])}")
    for name, (has, expected) in list(found.misshaped.items())[:8]:
        lines.append(f"  shape    {name} is {list(has)}, expected {list(expected)}")
    for name, (has, expected) in found.resized.items():
        lines.append(f"  shape    {name}: a table of {list(has)}, expected {list(expected)}: another resolution")
    if found.missing and published.contents:
        lines.append(f"  note     {published.contents}")
    return lines or ["  missing  nothing"]
