"""Open a folder that holds a model: one that train.py wrote, one that `convert` wrote, or a published one."""

import json
from pathlib import Path

import torch

from nanovlm import lora
from nanovlm.architecture import rebuild
from nanovlm.data.tokenizer import Tokenizer, check_vocabulary
from nanovlm.generation.chat import Assistant
from nanovlm.names import check_known, nearest
from nanovlm.published.language import LANGUAGE_MODELS, decoder_of, read_json
from nanovlm.published.processor import pictures_of, template_of
from nanovlm.published.tokenizers import PADDED_ROWS, load_tokenizer
from nanovlm.published.vision import TOWERS, resize, vision_of
from nanovlm.published.weights import INDEX, OURS, SINGLE, WeightsError, load_weights, open_checkpoint, refuse_adapter
from nanovlm.vlm import VLM

# Of each family: the model_types of its config.json, a pattern that stands in one of its tensors' names and in none of
# the families further down, and what transformers wants to read in config.json beside the sizes.
KNOWN = json.loads(Path(__file__).with_name("families.json").read_text())
MODEL_TYPES = {kind: family for family, told in KNOWN["families"].items() for kind in told["model_types"]}
# What the papers' models are put together from. These have no recipe, since nothing is trained here with one of them
# alone; they are opened, converted and inspected like the papers' models.
BARE = LANGUAGE_MODELS | TOWERS


def read_config(folder):
    """config.json of a folder: dict. Raises: FileNotFoundError, ValueError."""
    if not (folder / "config.json").exists():
        refuse_adapter(folder)
        raise FileNotFoundError(f"{folder} holds no config.json; give the output folder of train.py or a published "
                                "model's; `python -m nanovlm.recipes convert --family NAME` writes one")
    return read_json(folder / "config.json")


def family_of(config, where, families):
    """The family of a config.json, which stands at `where`: str. Raises: ValueError with the nearest known name."""
    if "family" in config:
        return find_family(config["family"], families).family
    kind = str(config.get("model_type"))
    if kind in KNOWN["refused"]:
        raise ValueError(f"{where}: model_type {kind!r} is not read: {KNOWN['refused'][kind]}")
    if MODEL_TYPES.get(kind) not in families:
        raise ValueError(f"{where} names no recipe, and model_type {kind} cannot be built.{nearest(kind, MODEL_TYPES)}")
    return MODEL_TYPES[kind]


def find_family(name, families):
    """The Published of a family. Raises: ValueError with the nearest known name."""
    check_known("unknown family", str(name), families)
    return families[name]


def open_trained(folder, config, recipe, dtype, device):
    """A folder of train.py: chat.Assistant; see `recipes.load`."""
    missing = [key for key in ("recipe", "size", "image_size", "stages") if key not in config]
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(missing)}; it is not what train.py wrote")
    if not any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise FileNotFoundError(f"{folder} holds no {SINGLE}: its training has not finished; go on with --resume")
    published = recipe.published is not None
    tokenizer = load_tokenizer(folder, added_tokens(recipe)) if published else Tokenizer(folder / "tokenizer.json")
    with torch.device("meta"):
        found = config.get("architecture")  # which earlier versions did not write
        model = rebuild(found)[0] if found else recipe.build(config["size"], tokenizer.vocab_size)
        model.vision.resize(config["image_size"])
        if "lora" in config:
            lora.add(model, **config["lora"])
    checkpoint = open_checkpoint(folder)
    try:
        load_weights(model, OURS, checkpoint, dtype, device)
    except WeightsError as error:
        raise ValueError(f"{folder} does not fit recipe {recipe.name!r}: {error}") from error
    lora.merge(model)
    last, settings = list(config["stages"].items())[-1]
    template, shown = as_told(folder, recipe, recipe.published)
    template = recipe.stage_templates.get(last, template)  # a model that is only aligned knows no other form
    shown |= {"image_fit": settings["image_fit"], "tiles": settings.get("tiles")}
    return ready(model, tokenizer, recipe, template, checkpoint.notes, PADDED_ROWS if published else 0, **shown)


def open_published(folder, config, published, recipe, dtype, device, image_size=None):
    """A published folder, or one that `convert` wrote: chat.Assistant. recipe: None for a tower or a language model."""
    checkpoint = open_checkpoint(folder)
    model, found = with_weights(published, config, checkpoint, dtype, device, image_size)
    notes = [f"{name}: {has[-2]} rows resized to {wants[-2]}" for name, (has, wants) in found.resized.items()]
    tokenizer = load_tokenizer(folder, added_tokens(recipe)) if decoder_of(model) else None
    template, shown = as_told(folder, recipe, published)
    return ready(model, tokenizer, recipe, template, (*checkpoint.notes, *notes), PADDED_ROWS, **shown)


def as_told(folder, recipe, published):
    """How a model is asked and shown pictures, by its folder where transformers reads one, else by its recipe.

    Returns: (Template, {"image_fit", "tiles", "preprocessing" and "differs" of its Assistant}).
    """
    last = recipe.stages(recipe.sizes[0], False)[-1] if recipe else None
    shown = {"image_fit": last.image_fit, "tiles": last.tiles, "preprocessing": recipe.preprocessing} if recipe else {
        name: getattr(Assistant, name) for name in ("image_fit", "tiles", "preprocessing")}
    template = recipe.template if recipe else None
    if published is None or folder is None:
        return template, shown
    theirs = "header" in KNOWN["families"].get(published.family, {})  # else the authors' own code prepares pictures
    shown, notes = pictures_of(folder, shown, not theirs)
    template, named = template_of(folder, template) if theirs else (template, [])
    return template, shown | {"differs": (*notes, *named)}


def with_weights(published, config, checkpoint, dtype, device, image_size=None):
    """(model, Plan of a checkpoint that fills it); image_size: as for `open_published`."""
    ours = "family" in config  # `convert` wrote it
    model, layout = published.on_meta(config["config"] if ours else config)
    resize(model, image_size or ours and config.get("image_size"))
    resizable = ("vision.positions", "positions") if image_size else ()
    return model, load_weights(model, OURS if ours else layout, checkpoint, dtype, device, resizable)


def ready(model, tokenizer, recipe, template, notes, spare_rows, **shown):
    """Assistant, after tokenizer and model were compared; spare_rows: of the embedding, that may belong to no token;
    shown: its image_fit, tiles and preprocessing, and in what these differ."""
    if tokenizer is not None:
        rows = decoder_of(model).config.vocab_size
        check_vocabulary(tokenizer, rows, spare_rows)
        spare, media_token = rows - tokenizer.vocab_size, vars(model).get("media_token")
        if spare:
            notes += (f"{rows} embedding rows for {tokenizer.vocab_size} tokens: {spare} only fill up the table",)
        if media_token is not None and media_token != tokenizer.special_id(template.media_token):
            raise ValueError(f"media_token_id {media_token} is not the id of {template.media_token!r} in the tokenizer")
    image_size = vision_of(model).image_size if vision_of(model) else 0
    model = (VLM(None, None, model) if model is decoder_of(model) else model).eval()  # sees nothing
    own = {name: getattr(recipe, name) for name in ("decodings", "forms", "remark", "preprocessing")} if recipe else {}
    return Assistant(model, tokenizer, template, image_size, notes=notes, **own | shown)


def added_tokens(recipe):
    """Special tokens that a recipe's template adds to its language model's tokenizer: tuple of str."""
    if recipe is None:
        return ()
    template = recipe.template
    return tuple(dict.fromkeys(token for token in (*template.specials, template.media_token) if token))
