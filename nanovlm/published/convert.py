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
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

import nanovlm
from nanovlm.files import new_folder
from nanovlm.modality_adaptive import ModalityAdaptive
from nanovlm.published import language
from nanovlm.published.language import read_json, with_vocabulary
from nanovlm.published.load import (
    added_tokens, build_on_meta, by_part, count, family_of, find_family, KNOWN, load_tokenizer, open_trained,
    read_config,
    resize, vision_of,
)
from nanovlm.published.vision import BEHIND, BLIP2_REST, CLIP, EVA, eva_original, OPEN_CLIP, OTHER_SIDE, SIGLIP
from nanovlm.published.weights import (
    Checkpoint, load_weights, open_checkpoint, OURS, Plan, plan, prefixed, read_weights, shapes_of, TYPES, WeightsError,
    write_checkpoint,
)

LANGUAGE_MODELS = {"LLaMA": language.LLAMA, "Qwen2": language.QWEN2, "Phi-2": language.PHI, "OPT": language.OPT}
WORDS = ("decoder.embedding.weight", "decoder.lm_head.weight", "decoder.lm_head.bias")


class Source(NamedTuple):
    """A checkpoint and what it fills; copies: {our name: names that receive the same values}."""

    checkpoint: Checkpoint
    found: Plan
    copies: dict


def convert(args, families, recipes):
    """Run `convert`.

    Args:
      args: the values of the command's flags. families: {family: Published}. recipes: {name: Recipe}.
    Returns: list of lines to print.
    Raises: ValueError or OSError, in words for the user; OUT then does not exist.
    """
    *paths, out = map(Path, args.paths)
    if args.to == "published":
        if len(paths) != 1 or args.vision or args.language:
            raise ValueError("--to published takes one folder and OUT")
        return export(paths[0], out, args, families, recipes)
    if not paths and not (args.vision and args.language):
        raise ValueError("name a checkpoint before OUT, or both --vision and --language")
    family, config = choose_config(args, paths, families)
    published = families[family]
    recipe = next((recipe for recipe in recipes.values() if recipe.published is published), None)
    model, table = build_on_meta(published, config)
    resize(model, args.image_size)
    sources, ours = find_sources(args, paths, model, table), shapes_of(model)
    filled = {name for source in sources for part in source.found.filled() for name in source.copies.get(part, (part,))}
    rest = [name for name in ours if name not in filled]
    check_rest(model, rest, filled, bool(paths), published)
    dtype = vars(torch)[args.dtype] if args.dtype else widest(sources)
    state = initialised(published, config, args, dtype) if rest else {}
    for checkpoint, found, copies in sources:
        for name, tensor in read_weights(found, checkpoint, dtype, "cpu").items():
            state |= {branch: tensor.clone() for branch in copies[name]} if name in copies else {name: tensor}
    lines = [line for source in sources for line in report(source)]
    lines += [f"initialised from seed {args.seed}: {part}, {len(names)} tensors, {count(ours, names):,} parameters"
              for part, names in by_part(model, rest).items()]
    with new_folder(out) as folder:
        told, config = write_tokenizer(folder, [args.language, *paths], recipe, config)
        write_checkpoint(folder, OURS, {name: state[name] for name in ours}, int(args.max_shard_gb * 1e9))
        settings = {"family": family, "config": config, "sources": [source.checkpoint.where for source in sources],
                    "initialised": sorted(rest), "seed": args.seed, "version": nanovlm.__version__}
        if recipe is not None:
            settings["image_size"] = vision_of(model).image_size if vision_of(model) else 0
        (folder / "config.json").write_text(json.dumps(settings, indent=1))
    return [*lines, told, f"written: {out} ({family}, {count(ours):,} parameters, {dtype})"]


def choose_config(args, paths, families):
    """Family and sizes of the model: (str, dict); --config, then --size, then the source's config.json."""
    path = next((path / "config.json" for path in paths if (path / "config.json").exists()), None)
    beside = path and read_json(path)
    if beside and ("recipe" in beside or "family" in beside):
        raise ValueError(f"{path.parent} is in our layout already; --to published writes it back")
    family = args.family or beside and family_of(beside, path, families)
    if family is None:
        raise ValueError("no config.json says what this is: give --family NAME")
    configs = find_family(family, families).configs
    if args.config:
        return family, read_json(Path(args.config))
    if args.size and args.size not in configs:
        raise ValueError(f"family {family!r} has no size {args.size!r}; there are {', '.join(configs) or 'none'}")
    if beside and not args.size:
        try:
            if family_of(beside, path, families) == family:
                return family, beside
        except ValueError:  # a config.json of something else, which --family overrules
            pass
    if not configs:
        raise ValueError(f"the sizes of {family!r} are unknown without config.json; give --config FILE.json")
    return family, configs[args.size or "full"]


def find_sources(args, paths, model, table):
    """Everything that will be read, in order: list of Source. Raises: WeightsError for what has no place."""
    ours, sources = shapes_of(model), []
    if args.language:
        names, copies = without_branches(model, ours)
        tables = {kind: prefixed(entries, ours="decoder.") for kind, entries in LANGUAGE_MODELS.items()}
        sources.append(best(args.language, tables, "decoder.", names, copies, WORDS))
    if args.vision:
        tables = {"CLIP": (*CLIP, *OTHER_SIDE), "SigLIP": (*SIGLIP, *OTHER_SIDE), "EVA of BLIP-2": (*EVA, *BLIP2_REST),
                  "EVA": eva_original(vision_of(model).config.num_layers), "OpenCLIP": OPEN_CLIP}
        tables = {kind: prefixed((*entries, *BEHIND), ours="vision.") for kind, entries in tables.items()}
        sources.append(best(args.vision, tables, "vision.", ours, {}, ("vision.positions",)))
    for path in paths:
        checkpoint = open_checkpoint(path, pickled=True)
        resizable = ("vision.positions", "positions") if args.image_size else ()
        sources.append(Source(checkpoint, plan(table, checkpoint.shapes, ours, resizable), {}))
    for source in sources:
        source.found.check(source.checkpoint.where, partly=True)
    return sources


def best(path, tables, prefix, ours, copies, resizable):
    """The Source of a tower or language model in that of the known layouts which fits it best."""
    checkpoint = open_checkpoint(path, pickled=True)
    ours = {name: shape for name, shape in ours.items() if name.startswith(prefix)}
    plans = [plan(table, checkpoint.shapes, ours, resizable) for table in tables.values()]
    found = min(plans, key=lambda one: len(one.unexpected) + len(one.misshaped) + len(one.missing))
    if not found.consumed:
        first = min(checkpoint.shapes)
        raise WeightsError(f"{checkpoint.where} is none of {', '.join(tables)}; its first tensor is {first}")
    return Source(checkpoint, found, copies)


def without_branches(model, ours):
    """The model's names as a plain language model has them.

    Returns: ({name: shape}, {name: names of the modality-adaptive copies that it fills}); mPLUG-Owl2, Sec. 3.3.
    """
    names, copies = dict(ours), {}
    for place, module in model.named_modules():
        if isinstance(module, ModalityAdaptive):
            for tensor in module.text.state_dict():
                copies[f"{place}.{tensor}"] = [f"{place}.{branch}.{tensor}" for branch in ("text", "vision")]
                names[f"{place}.{tensor}"] = ours[f"{place}.text.{tensor}"]
    return {name: shape for name, shape in names.items() if not any(name in both for both in copies.values())}, copies


def check_rest(model, rest, filled, has_source, published):
    """Raise WeightsError if more tensors remain without a source than may be initialised, listed by part."""
    if rest and has_source:
        lines = [f"no file holds {len(rest)} of the model's {len(rest) + len(filled)} tensors:"]
        lines += [f"  {part}: {len(names)} tensors, from {names[0]}" for part, names in by_part(model, rest).items()]
        lines += [f"  {published.contents or 'the file holds a part of the model'}",
                  "  give a checkpoint of the tower with --vision, of the language model with --language"]
        raise WeightsError("\n".join(lines))
    for part in ("vision.blocks.", "decoder.layers."):
        if any(name.startswith(part) for name in rest) and not any(name.startswith(part) for name in filled):
            raise WeightsError(f"neither --vision nor --language holds {part[:-1]}: tower or language model is missing")


def widest(sources):
    """The type of most bits among the tensors to be read, float32 for a mixture of halves: torch.dtype."""
    kinds = {source.checkpoint.headers[name].dtype for source in sources for name in source.found.consumed}
    if kinds in ({torch.float16}, {torch.bfloat16}):
        return kinds.pop()
    return torch.float32


def initialised(published, config, args, dtype):
    """A new model's tensors, from the seed: {name: Tensor}."""
    torch.manual_seed(args.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = published.build(config)
    finally:
        torch.set_default_dtype(before)
    resize(model, args.image_size)
    return model.state_dict()


def report(source):
    """What was read from a source, and what was passed over: list of lines."""
    found, reasons = source.found, {}
    number = len(found.consumed.keys() - found.skipped)
    lines = [*source.checkpoint.notes, f"{source.checkpoint.where}: {number} tensors"]
    for name, reason in found.skipped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        lines.append(f"  passed over: {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {reason}")
    return lines + [f"  {name}: {list(has)} became {list(wants)}" for name, (has, wants) in found.resized.items()]


def write_tokenizer(folder, places, recipe, config):
    """Write the tokenizer of the first place that has one.

    Returns: (line to print, config with the id that this tokenizer gives the token of a picture, if the model has one).
    """
    for place in places:
        if place is None or not Path(place).is_dir():
            continue
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
    checkpoint = open_checkpoint(source, pickled=True)
    folder = source if source.is_dir() else source.parent
    config, kinds = read_config(folder), [header.dtype for header in checkpoint.headers.values()]
    dtype = vars(torch)[args.dtype] if args.dtype else max(TYPES, key=kinds.count)
    if "recipe" in config:
        recipe = recipes.get(config["recipe"])
        if recipe is None or recipe.published is None:
            raise ValueError(f"recipe {config['recipe']!r} is nobody's published model, so there is no layout to write")
        published, loaded = recipe.published, open_trained(folder, config, recipe, dtype, "cpu")
        model = loaded.model
        sizes = with_vocabulary(published.configs[config["size"]], loaded.tokenizer.vocab_size)
    else:
        published = find_family(args.family or family_of(config, folder / "config.json", families), families)
        ours = "family" in config
        sizes = config["config"] if ours else config
        model, layout = build_on_meta(published, sizes)
        resize(model, ours and config.get("image_size"))
        load_weights(model, OURS if ours else layout, checkpoint, dtype)
    sizes = published_config(published.family, sizes, vision_of(model), dtype)
    with new_folder(out) as temporary:
        names = write_checkpoint(temporary, published.layout(sizes), model.state_dict(), int(args.max_shard_gb * 1e9))
        (temporary / "config.json").write_text(json.dumps(sizes, indent=2))
        beside = [name for name in KNOWN["beside"] if (folder / name).exists()]
        for name in beside:
            shutil.copyfile(folder / name, temporary / name)
    files = f"{len(names)} file{'s' * (len(names) > 1)}"
    return [f"written: {out} ({published.family}, {files}, {dtype}, published layout)",
            f"copied: {', '.join(beside) or 'no tokenizer files'}"]


def published_config(family, sizes, tower, dtype):
    """config.json of a published folder: the sizes, what transformers wants to know, and the present picture size."""
    config = merged(KNOWN["families"][family].get("header", {"model_type": family}), sizes)
    owl = (config.get("visual_config") or {}).get("visual_model")
    for part in (config.get("vision_config"), config.get("vision"), owl):
        if isinstance(part, dict) and tower:
            part["image_size"] = tower.image_size
    return config | {"torch_dtype": str(dtype).removeprefix("torch.")}


def merged(defaults, config):
    """A config with defaults for what it leaves out, nested parts one by one: a new dict."""
    result = copy.deepcopy(config)
    for key, value in defaults.items():
        if isinstance(value, dict):
            result[key] = merged(value, result.get(key) or {})
        else:
            result.setdefault(key, value)
    return result
