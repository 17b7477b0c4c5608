"""Open a folder that holds a model: one that train.py wrote, one that `convert` wrote, or a published one."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from nanovlm import lora
from nanovlm.architecture import UNBUILT, rebuild
from nanovlm.contrastive import AttentionPool
from nanovlm.data.templates import CHATML, CHATML_QWEN, CHATML_SMOLLM2, Template
from nanovlm.data.tokenizer import Tokenizer, check_vocabulary
from nanovlm.decoder import Decoder
from nanovlm.generation.chat import Assistant
from nanovlm.names import nearest
from nanovlm.published import language, vision
from nanovlm.published.language import read_json
from nanovlm.published.tokenizers import PADDED_ROWS, load_tokenizer
from nanovlm.published.weights import INDEX, OURS, SINGLE, WeightsError, load_weights, open_checkpoint, refuse_adapter
from nanovlm.vit import ViT
from nanovlm.vlm import VLM, part_of

# Of each family: the model_types of its config.json, a pattern that stands in one of its tensors' names and in none of
# the families further down, and what transformers wants to read in config.json beside the sizes.
KNOWN = json.loads(Path(__file__).with_name("families.json").read_text())
TEXT = Template("", "", "", "", turn_prefix="\n")  # of a language model that nobody taught to answer
MODEL_TYPES = {kind: family for family, told in KNOWN["families"].items() for kind in told["model_types"]}


@dataclass(frozen=True)
class Published:
    """How a published checkpoint becomes our model and back."""

    family: str                         # what --family calls it
    build: Callable                     # (config: dict of a config.json, manifest or golden file) -> nn.Module
    layout: Callable                    # (config) -> rename table, see weights.py
    configs: dict[str, dict] = field(default_factory=dict)  # size -> config; "full" is as published
    contents: str = ""                  # what the released files hold, where they are not the whole model


def read_config(folder):
    """config.json of a folder: dict. Raises: FileNotFoundError, ValueError."""
    if not (folder / "config.json").exists():
        refuse_adapter(folder)
        raise FileNotFoundError(f"{folder} holds no config.json; give the output folder of train.py, for example "
                                "out/nano, or a published model's; `python -m nanovlm.recipes convert --family NAME` "
                                "writes one")
    return read_json(folder / "config.json")


def family_of(config, where, families):
    """The family that a config.json belongs to: str.

    Args:
      config: dict. where: str, for messages. families: the known ones.
    Raises: ValueError with the nearest known name.
    """
    if "family" in config:
        return find_family(config["family"], families).family
    kind = config.get("model_type")
    if kind is None:
        missing = [key for key in ("recipe", "size", "image_size", "stages") if key not in config]
        raise ValueError(f"{where} lacks {', '.join(missing)}; it is not what train.py wrote, and without model_type "
                         "no published model's either")
    if kind in KNOWN["refused"]:
        raise ValueError(f"{where}: model_type {kind!r} is not read: {KNOWN['refused'][kind]}")
    if not isinstance(kind, str) or MODEL_TYPES.get(kind) not in families:
        raise ValueError(f"{where}: model_type {kind!r} is none that can be built.{nearest(kind, MODEL_TYPES)}")
    return MODEL_TYPES[kind]


def find_family(name, families):
    """The Published of a family. Raises: ValueError with the nearest known name."""
    if not isinstance(name, str) or name not in families:
        raise ValueError(f"unknown family {name!r}.{nearest(name, families)}")
    return families[name]


def build_on_meta(published, config):
    """A model without memory, and its rename table. Raises: WeightsError if its config describes none."""
    try:
        with torch.device("meta"):
            return published.build(config), published.layout(config)
    except UNBUILT as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise WeightsError(f"no {published.family} can be built from this config: {what}") from error


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
    template = recipe.stage_templates.get(last, recipe.template)  # a model that is only aligned knows no other form
    spare_rows = PADDED_ROWS if published else 0
    return ready(model, tokenizer, recipe, template, settings["image_fit"], checkpoint.notes, spare_rows)


def open_published(folder, config, published, recipe, dtype, device, image_size=None):
    """A published folder, or one that `convert` wrote: chat.Assistant; see `recipes.load`.

    published: Published. recipe: Recipe of that family, None for a bare tower or language model.
    """
    ours = "family" in config
    model, layout = build_on_meta(published, config["config"] if ours else config)
    resize(model, image_size or ours and config.get("image_size"))
    checkpoint = open_checkpoint(folder)
    resizable = ("vision.positions", "positions") if image_size else ()
    found = load_weights(model, OURS if ours else layout, checkpoint, dtype, device, resizable)
    notes = [f"{name}: {has[-2]} rows resized to {wants[-2]}" for name, (has, wants) in found.resized.items()]
    tokenizer = load_tokenizer(folder, added_tokens(recipe)) if decoder_of(model) else None
    image_fit = recipe.stages("full", False)[-1].image_fit if recipe else "crop"
    template = recipe.template if recipe else template_of(folder)
    return ready(model, tokenizer, recipe, template, image_fit, (*checkpoint.notes, *notes), PADDED_ROWS)


def ready(model, tokenizer, recipe, template, image_fit, notes, spare_rows):
    """Assistant, after tokenizer and model were compared; spare_rows: of the embedding, that may belong to no token."""
    if tokenizer is not None:
        rows = decoder_of(model).config.vocab_size
        check_vocabulary(tokenizer, rows, spare_rows)
        spare, media_token = rows - tokenizer.vocab_size, vars(model).get("media_token")
        if spare:
            notes += (f"{rows} embedding rows for {tokenizer.vocab_size} tokens: {spare} only fill up the table",)
        known = None if media_token is None else tokenizer.special_id(template.media_token)
        if known != media_token:
            raise ValueError(f"the model's media token has id {media_token}, but in the tokenizer "
                             f"{template.media_token!r} has {known}; correct media_token_id in config.json")
    tower = vision_of(model)
    image_size = tower.image_size if tower else 0
    model = (VLM(None, None, model) if isinstance(model, Decoder) else model).eval()  # sees nothing
    own = {name: getattr(recipe, name) for name in ("decodings", "remark", "preprocessing")} if recipe else {}
    return Assistant(model, tokenizer, template, image_size, image_fit, notes=notes, **own)


def template_of(folder):
    """How a bare language model is asked: as its chat template says if it is one of ours, which its text tells; else it
    goes on with the plain text."""
    files = [path.read_text() for name in ("chat_template.jinja", "tokenizer_config.json") if (path := folder / name).exists()]
    ours = {"named SmolLM": CHATML_SMOLLM2, "You are Qwen": CHATML_QWEN, "<|im_start|>": CHATML}
    told = "".join(text for text in files if "add_generation_prompt" in text)
    return next((template for words, template in ours.items() if words in told), TEXT)


def decoder_of(model):
    """The language model of a model: Decoder, None of towers alone."""
    return model if isinstance(model, Decoder) else getattr(model, "decoder", None)


def vision_of(model):
    """The tower of a model: ViT, None where it reads no pictures (an OpenFlamingo may start from features)."""
    return model if isinstance(model, ViT) else getattr(model, "vision", None)


def resize(model, image_size):
    """Make a model's tower read pictures of this many pixels; None, 0: as it is. Raises: ValueError without a tower."""
    if image_size and vision_of(model) is None:
        raise ValueError("image_size was given, but this model reads no pictures")
    if image_size:
        vision_of(model).resize(image_size)


def by_part(model, names):
    """{part: its names among these}; a bare tower's or language model's parts are its modules."""
    parts = {}
    for name in names:
        parts.setdefault(part_of(name) if isinstance(model, VLM) else name.split(".")[0], []).append(name)
    return parts


def count(shapes, names=None):
    """How many numbers are in tensors; shapes: {name: shape}, names: which of them, None = all."""
    return sum(math.prod(shapes[name]) for name in (shapes if names is None else names))


def added_tokens(recipe):
    """Special tokens that a recipe's template adds to its language model's tokenizer: tuple of str."""
    if recipe is None:
        return ()
    template = recipe.template
    return tuple(dict.fromkeys(token for token in (*template.specials, template.media_token) if token))


# Towers and language models by themselves, which the papers' models are put together from. They have no recipe, since
# nothing is trained here with one of them alone; they are opened, converted and inspected like the papers' models.


def language_model(family, read, table):
    """A bare decoder's Published; read: config -> DecoderConfig."""
    return Published(family, lambda config: Decoder(read(config)), lambda config: table)


def build_siglip(config):
    """SigLIP of a config: contrastive.SigLIP if it describes both towers, else the tower with its pooling."""
    if vision.is_pair(config):
        return vision.siglip_pair(config)
    one = vision.siglip_config(config)
    pool = AttentionPool(one.width, one.num_heads, one.mlp_width, one.activation, one.norm_eps)
    return nn.ModuleDict({"vision": ViT(one), "pool": pool})


BARE = {
    "llama": language_model("llama", language.llama_config, language.LLAMA),  # Vicuna and SmolLM2 too
    "qwen2": language_model("qwen2", language.qwen2_config, language.QWEN2),
    "phi": language_model("phi", language.phi_config, language.PHI),
    "opt": language_model("opt", language.opt_config, language.OPT),
    "clip": Published(
        "clip", lambda config: vision.clip_pair(config) if vision.is_pair(config) else ViT(vision.clip_config(config)),
        lambda config: vision.CLIP_PAIR if vision.is_pair(config) else vision.CLIP,
    ),
    "siglip": Published(
        "siglip", build_siglip, lambda config: vision.SIGLIP_PAIR if vision.is_pair(config) else vision.SIGLIP_POOLED,
    ),
    "eva": Published("eva", lambda config: ViT(vision.eva_config(config)), lambda config: vision.EVA),
}
