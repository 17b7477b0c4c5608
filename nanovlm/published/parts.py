"""A model put together from files: tower, language model and bridge fill their parts, what was trained lies over them.

`convert` writes such a model into a folder; `train.py --init vision=... language=... [bridge=...] [trained=...]` starts
from it at once.
"""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import torch

from nanovlm.architecture import architecture, rebuild
from nanovlm.generation.chat import Assistant
from nanovlm.machine import check_memory
from nanovlm.names import check_known
from nanovlm.published.adapters import Adapter, base_of, is_adapter
from nanovlm.published.hub import find
from nanovlm.published.language import LANGUAGE_MODELS, read_json, with_vocabulary
from nanovlm.published.load import (
    KNOWN, MODEL_TYPES, PADDED_ROWS, added_tokens, as_told, family_of, load_tokenizer, open_published, open_trained,
    ready,
)
from nanovlm.published.vision import (
    BEHIND, BLIP2_REST, CLIP, EVA, OPEN_CLIP, OPEN_CLIP_PAIR, OTHER_SIDE, TRAINED_HERE, eva_original, part_of_pair,
    resize, vision_of,
)
from nanovlm.published.weights import (
    Checkpoint, Plan, WeightsError, by_part, count, grouped, open_checkpoint, plan, prefixed, read_weights, shapes_of,
)
from nanovlm.training.progress import say

PARTS = ("vision", "language", "bridge")
WORDS = ("decoder.embedding.weight", "decoder.lm_head.weight", "decoder.lm_head.bias")
BRANCH = re.compile(r"\.(text|vision)\.")  # in the decoder: a modality-adaptive copy of what language models have once
TOWER_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size",
               "image_size")


class Source(NamedTuple):
    """A checkpoint and what it fills; names: {our name: the name under which the Plan has it}."""

    checkpoint: Checkpoint
    found: Plan
    names: dict


def find_sources(places, paths, model, published, config, image_size=None):
    """Everything that will be read, in order: list of Source. Raises: WeightsError for what has no place."""
    ours, sources, table = shapes_of(model), [], published.layout(config)

    def best(part, tables, prefix, names, resizable):
        """A tower or language model in that of the known layouts which fits it best."""
        checkpoint = open_checkpoint(places[part])
        shapes = {theirs: ours[name] for name, theirs in names.items() if name.startswith(prefix)}
        plans = [plan(prefixed(one, ours=prefix), checkpoint.shapes, shapes, resizable) for one in tables]
        found = min(plans, key=lambda one: len(one.unexpected) + len(one.misshaped) + len(one.missing))
        sources.append(Source(checkpoint, found, names))

    same = {name: name for name in ours}
    if "language" in places:
        plain = {name: BRANCH.sub(".", name) for name in ours}  # both copies start equal: mPLUG-Owl2, Sec. 3.3
        best("language", [one.layout({}) for one in LANGUAGE_MODELS.values()], "decoder.", plain, WORDS)
    if "vision" in places:
        original = eva_original(vision_of(model).config.num_layers)
        tables = (*CLIP, *OTHER_SIDE), (*EVA, *BLIP2_REST), original, OPEN_CLIP, OPEN_CLIP_PAIR, TRAINED_HERE
        tables = [(*one, *BEHIND) for one in tables]
        best("vision", tables, "vision.", same, ("vision.positions",))
    if "bridge" in places:
        checkpoint = open_checkpoint(places["bridge"])
        found = plan(table, checkpoint.shapes, {name: one for name, one in ours.items() if name.startswith("bridge.")})
        if not found.consumed:
            raise WeightsError(f"{checkpoint.where} holds no {', '.join(grouped(found.missing))}")
        found.skipped, found.unexpected = dict.fromkeys(found.unexpected, "no tensor of the bridge"), []
        sources.append(Source(checkpoint, found, same))
    opened = [Adapter(path).beside if is_adapter(path) else [open_checkpoint(path)] for path in paths]
    resizable = ("vision.positions", "positions") if image_size else ()
    for checkpoint in sum(opened, []):
        sources.append(Source(checkpoint, plan(table, checkpoint.shapes, ours, resizable), same))
    for source in sources:
        source.found.check(source.checkpoint.where, partly=True)
    return sources


def put_together(published, config, places, paths, image_size=None, seed=0, dtype=None, device="cpu"):
    """A model of these files: (model, list of lines to print, names of the tensors that come from the seed).

    config: dict, its sizes. places: {part of PARTS: Path}. paths: list of Path, what was trained.
    image_size: pixels, to which the position table is resized; None = as the sizes say.
    seed: of what no file holds, which is an error beside `paths`. dtype: None = the files'.
    Raises: WeightsError naming all that does not fit or is missing.
    """
    model, _ = published.on_meta(config)
    resize(model, image_size)
    ours, sources = shapes_of(model), find_sources(places, paths, model, published, config, image_size)
    filled = [source.found.filled() for source in sources]
    rest = [name for name in ours if not any(one.names.get(name) in names for one, names in zip(sources, filled))]
    if rest and paths:
        parts = [f"  {part}: {len(names)} tensors, from {names[0]}" for part, names in by_part(model, rest).items()]
        raise WeightsError("\n".join([
            f"no file holds {len(rest)} of the model's {len(ours)} tensors:", *parts, f"  {published.contents}",
            "  name the tower's and the language model's own: convert --vision PATH --language PATH, or train.py "
            "--init vision=PLACE language=PLACE"]))
    kinds = {source.checkpoint.headers[name].dtype for source in sources for name in source.found.consumed}
    dtype = dtype or (kinds.pop() if len(kinds) == 1 else torch.float32)
    number = count(ours.values())
    check_memory(number * dtype.itemsize, device, f"the {number:,} parameters of this {published.family}")
    state, lines = initialised(published, config, image_size, seed, dtype, device, rest) if rest else {}, []
    for checkpoint, found, names in sources:
        tensors = read_weights(found, checkpoint, dtype, device)
        for name in [name for name in ours if names.get(name) in tensors]:
            state[name] = tensors[name] if name in tensors else tensors[names[name]].clone()
        number = len(found.consumed.keys() - found.skipped)
        lines += [*checkpoint.notes, f"{checkpoint.where}: {number} tensors", *found.remarks()]
    for path in filter(is_adapter, paths):
        lines.append(f"{path}: LoRA, added to {Adapter(path).add_to(state, published.layout(config))} weights")
    model.load_state_dict(state, assign=True)
    lines += [f"initialised from seed {seed}: {part}, {len(names)} tensors, "
              f"{count(ours[name] for name in names):,} parameters" for part, names in by_part(model, rest).items()]
    return model, lines, rest


def initialised(published, config, image_size, seed, dtype, device, names):
    """These tensors of a new model, from the seed: {name: Tensor}; the others are let go before anything is read."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = published.build(config)
    torch.set_default_dtype(before)
    resize(model, image_size)
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def with_sizes_of(config, places):
    """A recipe's sizes with those that the config.json beside a tower or a language model states: dict."""
    for part, keys in (("vision", ("vision_config", "vision")), ("language", ("text_config", "llm"))):
        beside, key = config_beside(places.get(part)), next(key for key in keys if key in config)
        if part == "language" and beside:
            config = config | {key: beside}
        elif beside and "hidden_size" in config[key]:
            side = part_of_pair(beside, "vision")
            config = config | {key: config[key] | {name: side[name] for name in TOWER_SIZES if name in side}}
    return config


def size_of(configs, places, default):
    """The first size of a recipe whose language model is that of `places`, but for its words: str; else `default`."""
    beside = config_beside(places.get("language"))

    def fits(config):
        told = config.get("text_config") or config.get("llm") or {}
        return all(beside.get(key) == value for key, value in told.items() if key != "vocab_size")

    return next((size for size in (default, *configs) if size in configs and fits(configs[size])), default)


def sizes_of(published, places, paths, size=None):
    """A model's sizes: (dict, Path of the published folder among `paths` that states them, None where none does).

    places, paths: as of `put_together`. size: str, of `published`; None = what the files state, else its first.
    Raises: ValueError for an unknown size.
    """
    homes = [path for path in paths if MODEL_TYPES.get(str(config_beside(path).get("model_type"))) == published.family]
    if homes and not size:
        return config_beside(homes[0]), homes[0]
    default = next(iter(published.configs), "full")
    told = size or size_of(published.configs, places, default)
    if told not in published.configs:
        raise ValueError(f"family {published.family!r} has no size {told!r}; there are "
                         f"{', '.join(published.configs) or 'none'}; give --config FILE.json")
    config = published.configs[told]
    return config if size or told != default else with_sizes_of(config, places), None


def config_beside(path):
    """The config.json of a folder, or beside a file: dict, empty if there is none."""
    path = path and (path if path.is_dir() else path.parent) / "config.json"
    return read_json(path) if path and path.exists() else {}


def with_tokenizer(recipe, config, places, paths):
    """(Path, tokenizer) of the first file that has one, or None; and the config with its id of a picture's token."""
    for place in (one for one in (places.get("language"), *paths) if one and one.is_dir()):
        try:
            tokenizer = load_tokenizer(place, added=added_tokens(recipe))
        except FileNotFoundError:
            continue
        if recipe is not None and recipe.template.media_token:
            config = config | {"media_token_id": tokenizer.special_id(recipe.template.media_token)}
        return (place, tokenizer), config
    return None, config


# ---- train.py --init


class Start(NamedTuple):
    """What --init names, opened: the model and how it is asked, its published sizes, the files to keep beside it."""

    assistant: Assistant
    config: dict
    files: tuple[Path, ...] = ()
    whole: bool = False  # whether it is a published model, whose pictures are read as its own files say


def start(recipe, init, size, seed):
    """A published model's Recipe with the sizes, pictures, tokenizer and weights of what --init names.

    init: list of str, one model's folder or name, as published or as train.py or `convert` wrote it; or PART=PLACE
      each, and [trained=]PLACE of what was trained on top. size: where parts do not say theirs.
    Raises: ValueError or OSError, in words for the user.
    """
    places, paths = {}, []
    for one in init:
        part, equals, place = one.partition("=")
        if not equals or part == "trained" or Path(one).exists():
            paths.append(find(place if part == "trained" and equals else one))
        else:
            check_known(f"--init {one}: there is no part", part, (*PARTS, "trained"))
            places[part] = find(place)
    absent = [str(place) for place in (*places.values(), *paths) if not place.exists()]
    if absent:
        raise FileNotFoundError(f"--init: {absent[0]} is no folder, no file and no name of a model")
    beside = config_beside(paths[0]) if paths and not places else {}
    if beside and not is_adapter(paths[0]) and not beside.keys() & {"recipe", "family", "model_type"}:
        return recipe  # our names, and the recipe's sizes

    def opened(device):
        if beside and len(paths) == 1 and not is_adapter(paths[0]):
            return open_whole(recipe, paths[0], beside, device)
        return open_parts(recipe, recipe.published, *with_base(places, paths), size, seed, torch.float32, device)

    found = opened("meta")
    say("\n".join((*found.assistant.notes, *found.assistant.differs)))
    assistant, made_of = found.assistant, architecture(found.assistant.model, None)
    pictures = {"image_size": assistant.image_size, "image_fit": assistant.image_fit} if found.whole else {}
    context = assistant.model.decoder.config.context_length

    def stages(*of):
        return tuple(dataclasses.replace(stage, max_tokens=min(stage.max_tokens, context), **pictures,
                                         tiles=stage.tiles and assistant.tiles) for stage in recipe.stages(*of))

    return dataclasses.replace(
        recipe, build=lambda size, vocab_size: rebuild(made_of)[0], tokenizer=lambda: assistant.tokenizer,
        stages=stages, template=assistant.template, preprocessing=assistant.preprocessing, source=found.config,
        files=found.files, finished=found.whole, load=lambda: opened("cpu").assistant.model.train())


def open_whole(recipe, folder, config, device):
    """A whole model's folder: Start."""
    family = recipe.published.family
    if "recipe" in config:
        assistant = open_trained(folder, config, recipe, torch.float32, device)
        return Start(assistant, config.get("published", {}), kept(folder), "published" in config)
    kind = config.get("family", MODEL_TYPES.get(str(config.get("model_type"))))
    if kind != family:
        raise ValueError(f"{folder} is of the family {kind or config.get('model_type')}, recipe {recipe.name!r} "
                         f"trains {family}; name its recipe, or give it as a part: --init language={folder}")
    assistant = open_published(folder, config, recipe.published, recipe, torch.float32, device)
    if "family" in config:
        return Start(assistant, config["config"], kept(folder))
    return Start(assistant, config, kept(folder), True)


def kept(folder):
    """What a run's folder keeps of the model that it starts from: tuple of Path."""
    return tuple(folder / name for name in KNOWN["beside"] if (folder / name).exists())


def with_base(places, paths):
    """The places and paths of `put_together`, where an adapter stands alone with its base before it."""
    if places or len(paths) != 1 or not is_adapter(paths[0]):
        return places, paths
    base, config = base_of(paths[0]), config_beside(paths[0])
    if config.get("model_type", "") in ("", config_beside(base).get("model_type")):
        return places, [base, *paths]
    tower = config.get("mm_vision_tower")  # LLaVA's scripts: the base is the language model, the tower CLIP's own
    return {"language": base} | ({"vision": find(tower)} if tower else {}), paths


def open_parts(recipe, published, places, paths, size, seed, dtype, device):
    """A model put together: Start. recipe: None for a bare language model."""
    config, home = sizes_of(published, places, paths, size)
    held, config = with_tokenizer(recipe, config, places, paths)
    if held is None:
        raise ValueError("none of these holds a tokenizer; give language=FOLDER_OR_NAME")
    config = config if home else with_vocabulary(config, held[1].vocab_size)
    model, lines, _ = put_together(published, config, places, paths, None, seed, dtype, device)
    template, shown = as_told(home, recipe, published)
    assistant = ready(model, held[1], recipe, template, tuple(lines), PADDED_ROWS, **shown)
    return Start(assistant, config, kept(home) if home else (), home is not None)


def open_adapter(folder, families, recipes, dtype, device):
    """The folder of an adapter, with its base: Assistant. recipes: {family: Recipe}. Raises: as `put_together`."""
    places, paths = with_base({}, [folder])
    home = next(path for path in reversed(paths) if config_beside(path))
    family = family_of(config_beside(home), str(home), families)
    return open_parts(recipes.get(family), families[family], places, paths, None, 0, dtype, device).assistant
