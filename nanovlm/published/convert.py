"""Published weights into our folder, separate towers into a model to train, and our folder into the published layout.

    python -m nanovlm.recipes convert --family lynx finetune_lynx.pt --vision eva_vit_g.pth --language vicuna/ OUT
    python -m nanovlm.recipes convert --family lynx --vision eva_vit_g.pth --language vicuna/ OUT   a start to train
    python -m nanovlm.recipes convert BASE ADAPTER OUT              an adapter of PEFT's or LLaVA's is added to its base
    python -m nanovlm.recipes convert --to published out/llava OUT  or --to adapter, for what --lora learned alone

Towers and language models fill their parts first; SOURCE, which holds what was trained, is laid over them. What no
file holds is an error beside a SOURCE, and initialised from a seed without one. .pt and .bin files are read with
weights_only=True.
"""

import copy
import json
import shutil
from pathlib import Path

import torch

import nanovlm
from nanovlm.files import new_folder
from nanovlm.published.adapters import write_adapter
from nanovlm.published.hub import find
from nanovlm.published.language import complete, read_json, with_vocabulary
from nanovlm.published.load import KNOWN, family_of, find_family, open_trained, read_config, with_weights
from nanovlm.published.parts import config_beside, kept, put_together, sizes_of, with_tokenizer
from nanovlm.published.processor import side
from nanovlm.published.vision import vision_of
from nanovlm.published.weights import OURS, count, open_checkpoint, shapes_of, write_checkpoint


def convert(args, families, recipes):
    """Run `convert` with the values of its flags: list of lines to print.

    families: {family: Published}. recipes: {name: Recipe}.
    Raises: ValueError or OSError, in words for the user; OUT then does not exist.
    """
    paths, out = [find(path) for path in args.paths[:-1]], Path(args.paths[-1])
    if args.to != "ours":
        if len(paths) != 1 or args.vision or args.language:
            raise ValueError(f"--to {args.to} takes one folder and OUT")
        return (export if args.to == "published" else export_adapter)(paths[0], out, args, families, recipes)
    if not paths and not (args.vision and args.language):
        raise ValueError("name a checkpoint before OUT, or both --vision and --language")
    places = {part: find(place) for part, place in (("vision", args.vision), ("language", args.language)) if place}
    published, config = choose_config(args, places, paths, families)
    family = published.family
    recipe = next((recipe for recipe in recipes.values() if recipe.published is published), None)
    held, config = with_tokenizer(recipe, config, places, paths)
    wanted = vars(torch)[args.dtype] if args.dtype else None
    model, lines, rest = put_together(published, config, places, paths, args.image_size, args.seed, wanted)
    state, shapes = model.state_dict(), shapes_of(model)
    told = "no tokenizer found: put the model's tokenizer files into OUT before it is asked anything"
    with new_folder(out) as folder:
        if held and held[0] in paths:
            for path in kept(held[0]):
                shutil.copyfile(path, folder / path.name)
        elif held:
            held[1].save(folder / "tokenizer.json")
        if held:
            told = f"tokenizer of {held[0]}: {held[1].vocab_size} tokens"
        write_checkpoint(folder, OURS, state, int(args.max_shard_gb * 1e9))
        settings = {"family": family, "config": config, "sources": [str(one) for one in (*places.values(), *paths)],
                    "initialised": sorted(rest), "seed": args.seed, "version": nanovlm.__version__}
        if recipe is not None:
            settings["image_size"] = vision_of(model).image_size if vision_of(model) else 0
        (folder / "config.json").write_text(json.dumps(settings, indent=1))
    dtype = next(iter(state.values())).dtype
    return [*lines, told, f"written: {out} ({family}, {count(shapes.values()):,} parameters, {dtype})"]


def choose_config(args, places, paths, families):
    """Family and sizes of the model: (Published, dict); --config, then --size, then the source's config.json."""
    path, beside = next(((path, config_beside(path)) for path in paths if config_beside(path)), (None, {}))
    if "recipe" in beside or "family" in beside:
        raise ValueError(f"{path} is in our layout already; --to published writes a published model's back")
    if not args.family and not beside:
        raise ValueError("no config.json says what this is: give --family NAME")
    published = find_family(args.family or family_of(beside, path, families), families)
    return published, read_json(Path(args.config)) if args.config else sizes_of(published, places, paths, args.size)[0]


def export(source, out, args, families, recipes):
    """Write a folder in the layout of its paper's weights, with LoRA merged, for other programs to load; as `convert`.

    source: Path of a folder that train.py or `convert` wrote, or of a published one (.bin becomes safetensors).
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
        model, sizes = loaded.model, config.get("published")
        sizes = sizes or with_vocabulary(published.configs[config["size"]], loaded.tokenizer.vocab_size)
    else:
        published = find_family(args.family or family_of(config, folder / "config.json", families), families)
        model, _ = with_weights(published, config, checkpoint, dtype, "cpu")
        sizes = config["config"] if "family" in config else config
    sizes = published_config(published.family, sizes, vision_of(model), dtype)
    with new_folder(out) as temporary:
        names = write_checkpoint(temporary, published.layout(sizes), model.state_dict(), int(args.max_shard_gb * 1e9))
        (temporary / "config.json").write_text(json.dumps(sizes, indent=2))
        for path in kept(folder):
            shutil.copyfile(path, temporary / path.name)
        fit_processor(temporary, vision_of(model))
    return [f"written: {out} ({published.family}, {len(names)} files, {dtype}, published layout)",
            f"copied: {', '.join(path.name for path in kept(folder)) or 'no tokenizer files'}"]


def export_adapter(source, out, args, families, recipes):
    """Write what `train.py --lora` has learned, without its base; as `export`."""
    config = read_config(source)
    published = getattr(recipes.get(str(config.get("recipe"))), "published", None)
    if published is None or "lora" not in config:
        raise ValueError(f"{source} is no folder of a published model that train.py --lora wrote")
    sizes = config.get("published") or published.configs[config["size"]]
    memory = KNOWN["families"].get(published.family, {}).get("memory", {})
    return write_adapter(source, out, config, published, sizes, memory)


def fit_processor(folder, tower):
    """Write a tower's picture size, if it was trained at another, into the sizes of its folder's processor."""
    for path in filter(Path.exists, (folder / "preprocessor_config.json", folder / "processor_config.json")):
        content = read_json(path)
        told = content.get("image_processor", content)
        found = side(told.get("crop_size") or told.get("size"))
        for size in filter(None, (told.get("size"), told.get("crop_size"))):
            if tower and found and "max_image_size" not in told and isinstance(size, dict):
                size.update({key: value * tower.image_size // found for key, value in size.items()})
        if tower and found not in (None, tower.image_size):
            path.write_text(json.dumps(content, indent=2))


def published_config(family, sizes, tower, dtype):
    """config.json of a published folder: the sizes, what transformers wants to know, and the present picture size."""
    config = complete(copy.deepcopy(sizes), KNOWN["families"][family].get("header", {"model_type": family}))
    if "image_token_id" in config:
        config.pop("image_token_index", None)  # transformers 4's name
    owl = config.get("visual_config", {}).get("visual_model")
    for part in (config.get("vision_config"), config.get("vision"), owl):
        if part and tower:
            part["image_size"] = tower.image_size
    return config | {"dtype" if "dtype" in config else "torch_dtype": str(dtype).removeprefix("torch.")}
