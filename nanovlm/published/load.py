"""Open a folder that holds a model: one that train.py wrote, one that `convert` wrote, or a published one."""

import dataclasses
import json
from dataclasses import dataclass

import torch
from torch import nn

from nanovlm import lora
from nanovlm.abstractor import Abstractor
from nanovlm.contrastive import AttentionPool, ContrastiveModel, TextTower
from nanovlm.data.images import CLIP, Preprocessing
from nanovlm.data.templates import PLAIN, Template
from nanovlm.data.tokenizer import check_vocabulary, Tokenizer
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.generation.sampler import Decoding
from nanovlm.names import nearest
from nanovlm.projector import LinearProjector, MLPProjector, PixelShuffleProjector
from nanovlm.published import vision
from nanovlm.published.language import LLAMA, llama_config, OPT, opt_config, PHI, phi_config, QWEN2, qwen2_config
from nanovlm.published.tokenizers import load_tokenizer, PADDED_ROWS
from nanovlm.published.weights import INDEX, load_model, open_checkpoint, OURS, SINGLE, WeightsError
from nanovlm.qformer import QFormer
from nanovlm.recipes.recipe import Published
from nanovlm.resampler import Resampler
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM


MODEL_TYPES = {  # model_type of a published config.json -> family
    "llama": "llama", "qwen2": "qwen2", "phi": "phi", "opt": "opt",
    "clip": "clip", "clip_vision_model": "clip", "siglip": "siglip", "siglip_vision_model": "siglip",
    "blip_2_vision_model": "eva", "blip-2": "blip2", "llava": "llava", "llava_llama": "llava", "llava_phi": "llava_phi",
    "mplug_owl2": "mplug_owl2", "lynx": "lynx", "open_flamingo": "open_flamingo",
}  # fmt: skip
REFUSED = {  # model_type -> why not
    "phi-msft": "Phi-2's layout of before January 2024 (fused Wqkv); download the present files of microsoft/phi-2",
    "mixformer-sequential": "Phi-2's layout of before January 2024 (fused Wqkv); download the present files",
    "instructblip": "its bridge reads the instruction, which no bridge here does",
    "mpt": "ALiBi and norms on queries and keys, which are out of scope",
}
BRIDGES = {
    one.__name__: one for one in (LinearProjector, MLPProjector, PixelShuffleProjector, Resampler, Abstractor, QFormer)
}

# what building from a config of the wrong types may raise
UNBUILT = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Loaded:
    """A model and all that is needed to talk to it."""

    model: nn.Module  # vlm.VLM; of a bare folder a Decoder, a ViT or a pair of towers
    tokenizer: Tokenizer | None  # None beside a vision tower
    template: Template
    decodings: dict  # preset name -> sampler.Decoding
    image_size: int  # pixels; 0 = reads no pictures
    image_fit: str  # how a picture becomes square, as in images.to_pixels
    remark: str  # what to say beside an answer about a picture unlike the training's; "" = nothing
    notes: tuple[str, ...] = ()  # what was unusual about the files
    preprocessing: Preprocessing = CLIP  # mean and deviation of its pixels; size and fit are those above


def read_config(folder):
    """config.json of a folder: dict. Raises: FileNotFoundError, ValueError."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no config.json; give the output folder of train.py, for example "
                                "out/nano, or a published model's; `python -m nanovlm.recipes convert --family NAME` "
                                "writes one")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); train again or restore the file") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no object; train again or restore the file")
    return config


def family_of(config, where, families):
    """The family that a config.json belongs to: str.

    Args:
      config: dict. where: str, for messages. families: the known ones.
    Raises: ValueError with the nearest known name.
    """
    if "family" in config:
        if config["family"] not in families:
            raise ValueError(f"{where}: family {config['family']!r} is unknown.{nearest(config['family'], families)}")
        return config["family"]
    kind = config.get("model_type")
    if kind is None:
        missing = [key for key in ("recipe", "size", "image_size", "stages") if key not in config]
        raise ValueError(f"{where} lacks {', '.join(missing)}; it is not what train.py wrote, and without model_type "
                         "no published model's either")
    if kind in REFUSED:
        raise ValueError(f"{where}: model_type {kind!r} is not read: {REFUSED[kind]}")
    if not isinstance(kind, str) or MODEL_TYPES.get(kind) not in families:
        raise ValueError(f"{where}: model_type {kind!r} is none that can be built.{nearest(kind, MODEL_TYPES)}")
    return MODEL_TYPES[kind]


def build_on_meta(published, config):
    """A model without memory. Raises: WeightsError if its config describes none."""
    try:
        with torch.device("meta"):
            return published.build(config), published.layout(config)
    except UNBUILT as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise WeightsError(f"no {published.family} can be built from this config: {what}") from error


def architecture(model, contrastive):
    """What config.json says of a model, so that the folder opens whatever becomes of its recipe's sizes.

    Args: model: vlm.VLM. contrastive: contrastive.ContrastiveModel or None.
    Returns: dict of JSON values, which `rebuild` takes; None for a model of classes that only a recipe file knows.
    """
    kinds = [(model.vision, ViT), (model.bridge, BRIDGES.get(type(model.bridge).__name__)), (model.decoder, Decoder)]
    if contrastive is not None:
        kinds += [(contrastive, ContrastiveModel), (contrastive.text, TextTower)]
    if any(type(one) is not kind for one, kind in kinds):
        return None
    found = {
        "vision": dataclasses.asdict(model.vision.config),
        "bridge": {"class": type(model.bridge).__name__} | model.bridge.arguments,
        "decoder": dataclasses.asdict(model.decoder.config),
        "media_token": model.media_token,
    }
    if contrastive is not None:
        found["text_tower"] = contrastive.text.arguments
        found["joint_width"] = contrastive.project_image.out_features
    return json.loads(json.dumps(found))


def rebuild(found):
    """The models of an `architecture`: (vlm.VLM, contrastive.ContrastiveModel or None).

    Raises: ValueError if it describes none.
    """
    try:
        bridge, decoder = dict(found["bridge"]), dict(found["decoder"])
        layers = tuple(LayerOptions(**options) for options in decoder.pop("layers"))
        vision = ViT(ViTConfig(**found["vision"]))
        bridge = BRIDGES[bridge.pop("class")](**bridge)
        model = VLM(vision, bridge, Decoder(DecoderConfig(**decoder, layers=layers)), found["media_token"])
        if "text_tower" not in found:
            return model, None
        text = TextTower(**found["text_tower"])
        widths = vision.config.width, text.arguments["width"]
        return model, ContrastiveModel(vision, widths[0], text, widths[1], found["joint_width"])
    except UNBUILT as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"config.json: no model can be built from this architecture ({what})") from error


def open_trained(folder, config, recipe, dtype, device):
    """A folder of train.py: Loaded; see `recipes.load`."""
    missing = [key for key in ("recipe", "size", "image_size", "stages") if key not in config]
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(missing)}; it is not what train.py wrote")
    if not any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise FileNotFoundError(f"{folder} holds no {SINGLE}: its training has not finished; go on with --resume")
    published = recipe.published is not None
    tokenizer = load_tokenizer(folder, added_tokens(recipe)) if published else Tokenizer(folder / "tokenizer.json")

    def build():
        found = config.get("architecture")  # which earlier versions did not write
        model = rebuild(found)[0] if found else recipe.build(config["size"], tokenizer.vocab_size)
        model.vision.resize(config["image_size"])
        if "lora" in config:
            lora.add(model, **config["lora"])
        return model

    try:
        model, _ = load_model(build, OURS, open_checkpoint(folder), dtype, device)
    except WeightsError as error:
        raise ValueError(f"{folder} does not fit recipe {recipe.name!r}: {error}") from error
    lora.merge(model)
    last, settings = list(config["stages"].items())[-1]
    template = recipe.stage_templates.get(last, recipe.template)  # a model that is only aligned knows no other form
    check_media_token(model, tokenizer, template)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        template=template,
        decodings=recipe.decodings,
        image_size=config["image_size"],
        image_fit=settings["image_fit"],
        remark=recipe.remark,
        notes=spare_rows(tokenizer, model.decoder, PADDED_ROWS if published else 0),
        preprocessing=recipe.preprocessing,
    )


def open_published(folder, config, published, recipe, dtype, device, image_size=None):
    """A published folder, or one that `convert` wrote: Loaded; see `recipes.load`.

    published: recipe.Published. recipe: Recipe of that family, None for a bare tower or language model.
    """
    ours = "family" in config
    sizes = config["config"] if ours else config
    _, layout = build_on_meta(published, sizes)

    def build():
        model = published.build(sizes)
        size = image_size or (config.get("image_size") if ours else None)
        if size:
            vision_of(model).resize(size)
        return model

    resizable = ("vision.positions", "positions") if image_size else ()
    model, found = load_model(build, OURS if ours else layout, open_checkpoint(folder), dtype, device, resizable)
    notes = [f"{name}: {has[-2]} rows resized to {wanted[-2]}" for name, (has, wanted) in found.resized.items()]
    decoder = model if isinstance(model, Decoder) else vars(model)["_modules"].get("decoder")
    tokenizer = None
    if decoder is not None:
        tokenizer = load_tokenizer(folder, added=added_tokens(recipe))
        notes += spare_rows(tokenizer, decoder, PADDED_ROWS)
        check_media_token(model, tokenizer, recipe.template if recipe else PLAIN)
    stages = recipe.stages("full", False) if recipe else ()
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        template=recipe.template if recipe else PLAIN,
        decodings=recipe.decodings if recipe else {"default": Decoding()},
        image_size=vision_of(model).image_size if has_vision(model) else 0,
        image_fit=stages[-1].image_fit if stages else "crop",
        remark=recipe.remark if recipe else "",
        notes=tuple(notes),
        preprocessing=recipe.preprocessing if recipe else CLIP,
    )


def has_vision(model):
    """bool, whether a model reads pictures (an OpenFlamingo may start from features)."""
    return isinstance(model, ViT) or vars(model)["_modules"].get("vision") is not None


def vision_of(model):
    """The ViT of a model, or the model itself if it is one. Raises: ValueError if there is none."""
    if not has_vision(model):
        raise ValueError("image_size was given, but this model reads no pictures")
    return model if isinstance(model, ViT) else model.vision


def added_tokens(recipe):
    """Special tokens that a recipe's template adds to its language model's tokenizer: tuple of str."""
    if recipe is None:
        return ()
    template = recipe.template
    return tuple(dict.fromkeys(token for token in (*template.specials, template.media_token) if token))


def check_media_token(model, tokenizer, template):
    """Raise ValueError if the model looks for its pictures at another id than the tokenizer gives their token."""
    media_token = vars(model).get("media_token")
    known = None if media_token is None else tokenizer.special_id(template.media_token)
    if known != media_token:
        raise ValueError(f"the model's media token has id {media_token}, but in the tokenizer {template.media_token!r} "
                         f"has {known}; correct media_token_id in config.json")


def spare_rows(tokenizer, decoder, most):
    """Notes on rows of the embedding that belong to no token: tuple of str.

    Raises: ValueError if tokenizer and embedding belong to different models.
    """
    rows = decoder.config.vocab_size
    check_vocabulary(tokenizer, rows, most)
    spare = rows - tokenizer.vocab_size
    note = f"{rows} embedding rows for {tokenizer.vocab_size} tokens: {spare} only fill up the table"
    return (note,) if spare else ()


# Published towers and language models by themselves: what the papers' models are put together from.
#
# They have no recipe, since nothing is trained here with one of them alone; they are opened, converted, inspected and
# checked like the papers' models.


class PooledTower(nn.Module):
    """SigLIP's tower with the attention pooling that its files hold."""

    def __init__(self, config):
        super().__init__()
        self.vision = ViT(config)
        self.pool = AttentionPool(config.width, config.num_heads, config.mlp_width, config.activation, config.norm_eps)


def language_model(family, read, table):
    """A bare decoder's Published; read: config -> DecoderConfig."""
    return Published(family, lambda config: Decoder(read(config)), lambda config: table, {})


def build_clip(config):
    """CLIP of a config: contrastive.CLIP if it describes both towers, else the ViT."""
    return vision.clip_pair(config) if vision.is_pair(config) else ViT(vision.clip_config(config))


def layout_clip(config):
    """The table of `build_clip`."""
    return vision.CLIP_PAIR if vision.is_pair(config) else vision.CLIP


def build_siglip(config):
    """SigLIP of a config: siglip.SigLIP if it describes both towers, else the tower with its pooling."""
    if vision.is_pair(config):
        return vision.siglip_pair(config)
    return PooledTower(vision.siglip_config(config))


def layout_siglip(config):
    """The table of `build_siglip`."""
    if vision.is_pair(config):
        return vision.SIGLIP_PAIR
    return (*vision.vision_side(vision.SIGLIP), *vision.POOL, vision.PREFIX)


BARE = {
    "llama": language_model("llama", llama_config, LLAMA),  # Vicuna and SmolLM2 too
    "qwen2": language_model("qwen2", qwen2_config, QWEN2),
    "phi": language_model("phi", phi_config, PHI),
    "opt": language_model("opt", opt_config, OPT),
    "clip": Published("clip", build_clip, layout_clip, {}),
    "siglip": Published("siglip", build_siglip, layout_siglip, {}),
    "eva": Published(
        "eva", lambda config: ViT(vision.eva_config(config)), lambda config: vision.EVA, {}
    ),
}  # fmt: skip
