"""What a checkpoint holds: family, sizes, type, parts, and what would be missing if it were loaded.

    python -m nanovlm.recipes inspect FILE_OR_FOLDER
    python -m nanovlm.recipes inspect MANIFEST.json      names and shapes alone; status 1 if they do not fit

Only headers are read. The family stands in config.json, or is told by names that no other family has; without
config.json the sizes are those of the published model of that family which fits best. A manifest is a JSON object with
`family`, `config` and `tensors` {name: shape}; `computed_or_extra_tensors` may list what some files carry beside them.
"""

import re
from collections import Counter

from nanovlm.published.hub import find
from nanovlm.published.language import read_json
from nanovlm.published.load import KNOWN, family_of, find_family
from nanovlm.published.weights import OURS, by_part, count, grouped, open_checkpoint, plan, shapes_of

SIZE_KEYS = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
             "ffn_dim", "vocab_size", "image_size", "patch_size", "width", "depth", "num_latents", "num_query_tokens",
             "d_model", "n_layers", "n_heads"}


def recognise(names):
    """The family whose names these are: str, or None."""
    signs = {family: re.compile(told["sign"]) for family, told in KNOWN["families"].items()}
    return next((family for family, sign in signs.items() if any(map(sign.search, names))), None)


def inspect(path, family, families, recipes):
    """Describe a checkpoint, or check a manifest: list of lines to print.

    path: str or Path of a safetensors, .pt or .bin file, a folder, or a manifest; or a model's name, see hub.py.
    family: str or None = find out. families: {family: Published}. recipes: {name: Recipe}.
    Raises: ValueError or OSError, in words for the user; WeightsError for a manifest that does not fit its model.
    """
    path = find(path)
    if path.suffix == ".json":
        return check_manifest(path, families)
    checkpoint = open_checkpoint(path)
    shapes, beside = checkpoint.shapes, (path if path.is_dir() else path.parent) / "config.json"
    config = read_json(beside) if beside.exists() else {}
    family, sizes, ours, source = describe(shapes, config, family, families, recipes)
    kinds = Counter(str(header.dtype).removeprefix("torch.") for header in checkpoint.headers.values())
    lines = [*checkpoint.notes, f"{path}: {len(shapes):,} tensors, {count(shapes.values()):,} numbers",
             f"  family   {family or 'unknown'} ({source})",
             f"  type     {', '.join(f'{kind} ({number:,})' for kind, number in kinds.most_common())}",
             f"  files    {len(set(checkpoint.files.values()))}"]
    published = families.get(family)
    choices = [sizes] if sizes else [*published.configs.values()] if published else []
    if not choices:
        told = "its recipe's, which has no published model to compare with" if ours else "unknown without config.json"
        return [*lines, f"  sizes    {told}", "  tensors  " + "; ".join(grouped(shapes)[:20])]

    def fitted(config):
        model, layout = published.on_meta(config)
        table, resizable = OURS if ours else layout, ("vision.positions", "positions")
        return config, model, plan(table, shapes, shapes_of(model), resizable)

    sizes, model, found = min(map(fitted, choices), key=lambda one: len(one[2].unexpected) + len(one[2].misshaped))
    lines += [f"  sizes    {'; '.join(told_sizes(sizes)) or 'the defaults of its class'}", *held(model, found)]
    for part, names in by_part(model, found.missing).items():
        shown = "; ".join(grouped([found.missing[name] for name in names])[:4])
        lines.append(f"  missing  {part:20} {len(names):,} tensors: {shown}")
    if found.missing:
        lines.append(f"  note     {published.contents}")
    if found.unexpected:
        lines.append(f"  no place {len(found.unexpected):,} tensors: {'; '.join(grouped(found.unexpected)[:8])}")
    lines += [f"  shape    {line}" for line in found.wrong_shapes()[:8]]
    return lines if found.missing or found.unexpected or found.misshaped else [*lines, "  missing  nothing"]


def describe(names, config, family, families, recipes):
    """What a checkpoint is: (family or None, config or None = as published, bool names are ours, how it is known)."""
    if family:
        return find_family(family, families).family, config if "model_type" in config else None, False, "as given"
    if "recipe" in config:
        published = getattr(recipes.get(str(config["recipe"])), "published", None)
        known = (published.family, published.configs.get(config.get("size"))) if published else (config["recipe"], None)
        return *known, True, "config.json of train.py"
    if "family" in config:
        return family_of(config, "config.json", families), config.get("config"), True, "config.json of convert"
    told = recognise(names)
    if "model_type" not in config:
        return told, None, False, "by its names; sizes as published, since there is no config.json"
    try:
        named = family_of(config, "config.json", families)
    except ValueError as error:
        return told, None, False, f"by its names; {error}"
    alike = told in (None, named) or {told, named} <= {"llama", "qwen2"}
    return named, config, False, "config.json" if alike else f"config.json, though its names look like {told}"


def check_manifest(path, families):
    """The report on a manifest that fits: list of lines. Raises: ValueError naming what is wrong."""
    content = {"computed_or_extra_tensors": {}} | read_json(path)
    parts = [content.get(key) for key in ("config", "tensors", "computed_or_extra_tensors")]
    if "family" not in content or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} is no manifest: family, and as objects config and tensors, are expected")
    published, shapes = find_family(content["family"], families), parts[1] | parts[2]
    for name, shape in shapes.items():
        if not isinstance(shape, list) or any(type(length) is not int or length < 0 for length in shape):
            raise ValueError(f"{path}: {name} has the shape {shape!r}, expected a list of whole numbers")
    model, table = published.on_meta(parts[0])
    ours = shapes_of(model)
    found = plan(table, shapes, ours)
    found.check(str(path))
    zeros = sum(entry.parts.count(None) * count([shapes[name]]) // len(entry.parts)
                for name, entry in found.consumed.items())
    held_numbers = count(shapes[name] for name in found.consumed.keys() - found.skipped)
    note = f" ({zeros:,} of them zeros, which only the file holds)" if zeros else ""
    return [f"{content.get('name', path.stem)}: family {published.family}, {len(shapes):,} tensors",
            *held(model, found), f"  parameters of the file  {held_numbers:15,}",
            f"  parameters of the model {count(ours.values()) + zeros:15,}{note}"]


def told_sizes(config, where=""):
    """The sizes of a config, nested parts behind one another: list of str."""
    own = [f"{key} {value}" for key, value in config.items() if key in SIZE_KEYS]
    lines = [f"{where}{', '.join(own)}"] if own else []
    for key, value in config.items():
        if isinstance(value, dict):
            lines += told_sizes(value, f"{where}{key}: ")
    return lines


def held(model, found):
    """The parts that are there, and what is not read: list of lines."""
    ours = shapes_of(model)
    return [f"  part     {part:20} {count(ours[name] for name in names):15,} parameters, {len(names):,} tensors"
            for part, names in by_part(model, found.filled()).items()] + found.remarks()
