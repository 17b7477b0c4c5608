"""Published weights into our folder, separate towers into a model to train, and our folder into the published layout.

    python -m nanovlm.recipes convert --family lynx finetune_lynx.pt --vision eva_vit_g.pth --language vicuna/ OUT
    python -m nanovlm.recipes convert --family lynx --vision eva_vit_g.pth --language vicuna/ OUT   a start to train
    python -m nanovlm.recipes convert --to published out/llava OUT

Towers and language models fill their parts first; SOURCE, which holds what was trained, is laid over them. What no
file holds is an error beside a SOURCE, and initialised from a seed without one. .pt and .bin files are read with
weights_only=True.
"""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

import nanovlm
from nanovlm.files import new_folder
from nanovlm.published.hub import find
from nanovlm.published.language import LANGUAGE_MODELS, complete, read_json, with_vocabulary
from nanovlm.published.load import (
    KNOWN, MODEL_TYPES, added_tokens, family_of, find_family, load_tokenizer, open_trained, read_config, with_weights,
)
from nanovlm.published.vision import (
    BEHIND, BLIP2_REST, CLIP, EVA, OPEN_CLIP, OPEN_CLIP_PAIR, OTHER_SIDE, eva_original, resize, vision_of,
)
from nanovlm.published.weights import (
    OURS, Checkpoint, Plan, WeightsError, by_part, count, open_checkpoint, plan, prefixed, read_weights, shapes_of,
    write_checkpoint,
)

WORDS = ("decoder.embedding.weight", "decoder.lm_head.weight", "decoder.lm_head.bias")
BRANCH = re.compile(r"\.(text|vision)\.")  # in the decoder: a modality-adaptive copy of what language models have once


class Source(NamedTuple):
    """A checkpoint and what it fills; names: {our name: the name under which the Plan has it}."""

    checkpoint: Checkpoint
    found: Plan
    names: dict


def convert(args, families, recipes):
    """Run `convert`.

    Args:
      args: the values of the command's flags. families: {family: Published}. recipes: {name: Recipe}.
    Returns: list of lines to print.
    Raises: ValueError or OSError, in words for the user; OUT then does not exist.
    """
    paths, out = [find(path) for path in args.paths[:-1]], Path(args.paths[-1])
    args.vision, args.language = (place and find(place) for place in (args.vision, args.language))
    if args.to == "published":
        if len(paths) != 1 or args.vision or args.language:
            raise ValueError("--to published takes one folder and OUT")
        return export(paths[0], out, args, families, recipes)
    if not paths and not (args.vision and args.language):
        raise ValueError("name a checkpoint before OUT, or both --vision and --language")
    family, config = choose_config(args, paths, families)
    published = families[family]
    recipe = next((recipe for recipe in recipes.values() if recipe.published is published), None)
    model, table = published.on_meta(config)
    resize(model, args.image_size)
    ours = shapes_of(model)
    sources = find_sources(args, paths, model, table)
    filled = [source.found.filled() for source in sources]
    rest = [name for name in ours if not any(one.names.get(name) in names for one, names in zip(sources, filled))]
    if rest and paths:
        parts = [f"  {part}: {len(names)} tensors, from {names[0]}" for part, names in by_part(model, rest).items()]
        raise WeightsError("\n".join([
            f"no file holds {len(rest)} of the model's {len(ours)} tensors:", *parts, f"  {published.contents}",
            "  give a checkpoint of the tower with --vision, of the language model with --language"]))
    kinds = {source.checkpoint.headers[name].dtype for source in sources for name in source.found.consumed}
    dtype = vars(torch)[args.dtype] if args.dtype else kinds.pop() if len(kinds) == 1 else torch.float32
    state, lines = {}, []
    for checkpoint, found, names in sources:
        tensors = read_weights(found, checkpoint, dtype, "cpu")
        for name in [name for name in ours if names.get(name) in tensors]:
            state[name] = tensors[name] if name in tensors else tensors[names[name]].clone()
        number = len(found.consumed.keys() - found.skipped)
        lines += [*checkpoint.notes, f"{checkpoint.where}: {number} tensors", *found.remarks()]
    state = initialised(published, config, args, dtype) | state if rest else state
    lines += [f"initialised from seed {args.seed}: {part}, {len(names)} tensors, "
              f"{count(ours[name] for name in names):,} parameters" for part, names in by_part(model, rest).items()]
    with new_folder(out) as folder:
        told, config = write_tokenizer(folder, [*filter(None, [args.language]), *paths], recipe, config)
        write_checkpoint(folder, OURS, {name: state[name] for name in ours}, int(args.max_shard_gb * 1e9))
        settings = {"family": family, "config": config, "sources": [source.checkpoint.where for source in sources],
                    "initialised": sorted(rest), "seed": args.seed, "version": nanovlm.__version__}
        if recipe is not None:
            settings["image_size"] = vision_of(model).image_size if vision_of(model) else 0
        (folder / "config.json").write_text(json.dumps(settings, indent=1))
    return [*lines, told, f"written: {out} ({family}, {count(ours.values()):,} parameters, {dtype})"]


def choose_config(args, paths, families):
    """Family and sizes of the model: (str, dict); --config, then --size, then the source's config.json."""
    path = next((path / "config.json" for path in paths if (path / "config.json").exists()), None)
    beside = read_json(path) if path else {}
    if "recipe" in beside or "family" in beside:
        raise ValueError(f"{path.parent} is in our layout already; --to published writes it back")
    if not args.family and not beside:
        raise ValueError("no config.json says what this is: give --family NAME")
    family = args.family or family_of(beside, path, families)
    configs = find_family(family, families).configs
    if args.config:
        return family, read_json(Path(args.config))
    if not args.size and MODEL_TYPES.get(str(beside.get("model_type"))) == family:
        return family, beside
    size = args.size or "full"
    if size not in configs:
        raise ValueError(f"family {family!r} has no size {size!r}; there are {', '.join(configs) or 'none'}; give "
                         "--config FILE.json")
    return family, configs[size]


def find_sources(args, paths, model, table):
    """Everything that will be read, in order: list of Source. Raises: WeightsError for what has no place."""
    ours, sources = shapes_of(model), []

    def best(path, tables, prefix, names, resizable):
        """A tower or language model in that of the known layouts which fits it best."""
        checkpoint = open_checkpoint(path)
        shapes = {theirs: ours[name] for name, theirs in names.items() if name.startswith(prefix)}
        plans = [plan(prefixed(table, ours=prefix), checkpoint.shapes, shapes, resizable) for table in tables]
        found = min(plans, key=lambda one: len(one.unexpected) + len(one.misshaped) + len(one.missing))
        sources.append(Source(checkpoint, found, names))

    same = {name: name for name in ours}
    if args.language:
        plain = {name: BRANCH.sub(".", name) for name in ours}  # both copies start equal: mPLUG-Owl2, Sec. 3.3
        best(args.language, [one.layout({}) for one in LANGUAGE_MODELS.values()], "decoder.", plain, WORDS)
    if args.vision:
        original = eva_original(vision_of(model).config.num_layers)
        tables = (*CLIP, *OTHER_SIDE), (*EVA, *BLIP2_REST), original, OPEN_CLIP, OPEN_CLIP_PAIR
        tables = [(*one, *BEHIND) for one in tables]
        best(args.vision, tables, "vision.", same, ("vision.positions",))
    for path in paths:
        checkpoint = open_checkpoint(path)
        resizable = ("vision.positions", "positions") if args.image_size else ()
        sources.append(Source(checkpoint, plan(table, checkpoint.shapes, ours, resizable), same))
    for source in sources:
        source.found.check(source.checkpoint.where, partly=True)
    return sources


def initialised(published, config, args, dtype):
    """A new model's tensors, from the seed: {name: Tensor}."""
    torch.manual_seed(args.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model = published.build(config)
    torch.set_default_dtype(before)
    resize(model, args.image_size)
    return model.state_dict()


def write_tokenizer(folder, places, recipe, config):
    """Write the tokenizer of the first place that has one.

    Returns: (line to print, config with the id that this tokenizer gives the token of a picture, if the model has one).
    """
    for place in places:
        try:
            tokenizer = load_tokenizer(place, added=added_tokens(recipe))
        except FileNotFoundError:
            continue
        tokenizer.save(folder / "tokenizer.json")
        if recipe is not None and recipe.template.media_token:
            config = config | {"media_token_id": tokenizer.special_id(recipe.template.media_token)}
        return f"tokenizer of {place}: {tokenizer.vocab_size} tokens", config
    return "no tokenizer found: put the model's tokenizer files into OUT before it is asked anything", config


def export(source, out, args, families, recipes):
    """Write a folder in the layout of its paper's weights, with LoRA merged, for other programs to load.

    Args:
      source: Path of a folder that train.py or `convert` wrote, or of a published one (.bin becomes safetensors).
      out: Path that does not exist yet. args, families, recipes: as for `convert`.
    Returns: list of lines to print.
    Raises: ValueError or OSError, in words for the user.
    """
    checkpoint = open_checkpoint(source)
    folder = source if source.is_dir() else source.parent
    config, kinds = read_config(folder), [header.dtype for header in checkpoint.headers.values()]
    dtype = vars(torch)[args.dtype] if args.dtype else max(set(kinds), key=kinds.count)
    if "recipe" in config:
        recipe = recipes.get(config["recipe"])
        if recipe is None or recipe.published is None:
            raise ValueError(f"recipe {config['recipe']!r} is nobody's published model, so there is no layout to write")
        published, loaded = recipe.published, open_trained(folder, config, recipe, dtype, "cpu")
        model, sizes = loaded.model, with_vocabulary(published.configs[config["size"]], loaded.tokenizer.vocab_size)
    else:
        published = find_family(args.family or family_of(config, folder / "config.json", families), families)
        model, _ = with_weights(published, config, checkpoint, dtype, "cpu")
        sizes = config["config"] if "family" in config else config
    sizes = published_config(published.family, sizes, vision_of(model), dtype)
    with new_folder(out) as temporary:
        names = write_checkpoint(temporary, published.layout(sizes), model.state_dict(), int(args.max_shard_gb * 1e9))
        (temporary / "config.json").write_text(json.dumps(sizes, indent=2))
        beside = [name for name in KNOWN["beside"] if (folder / name).exists()]
        for name in beside:
            shutil.copyfile(folder / name, temporary / name)
    return [f"written: {out} ({published.family}, {len(names)} files, {dtype}, published layout)",
            f"copied: {', '.join(beside) or 'no tokenizer files'}"]


def published_config(family, sizes, tower, dtype):
    """config.json of a published folder: the sizes, what transformers wants to know, and the present picture size."""
    config = complete(copy.deepcopy(sizes), KNOWN["families"][family].get("header", {"model_type": family}))
    owl = config.get("visual_config", {}).get("visual_model")
    for part in (config.get("vision_config"), config.get("vision"), owl):
        if part and tower:
            part["image_size"] = tower.image_size
    return config | {"torch_dtype": str(dtype).removeprefix("torch.")}
