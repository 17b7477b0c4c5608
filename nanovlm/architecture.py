"""What a model is made of, as JSON in config.json, so that a folder opens whatever becomes of its recipe's sizes."""

import dataclasses
import json

from nanovlm.abstractor import Abstractor
from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.projector import LinearProjector, MLPProjector, PixelShuffleProjector
from nanovlm.qformer import QFormer
from nanovlm.resampler import Resampler
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

KINDS = (LinearProjector, MLPProjector, PixelShuffleProjector, Resampler, Abstractor, QFormer)
BRIDGES = {kind.__name__: kind for kind in KINDS}
# what building from values of the wrong types may raise
UNBUILT = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError)


def architecture(model, contrastive):
    """What `rebuild` takes: dict of JSON values; None for a model of classes that only a recipe file knows.

    Args: model: vlm.VLM. contrastive: contrastive.ContrastiveModel or None.
    """
    parts = [model.vision, model.bridge, model.decoder, *([contrastive, contrastive.text] if contrastive else [])]
    if any(type(part) not in (ViT, Decoder, ContrastiveModel, TextTower, *KINDS) for part in parts):
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
        decoder["alibi"] = tuple(decoder.get("alibi", ()))
        vision = ViT(ViTConfig(**found["vision"]))
        bridge = BRIDGES[bridge.pop("class")](**bridge)
        model = VLM(vision, bridge, Decoder(DecoderConfig(**decoder, layers=layers)), found["media_token"])
        if "text_tower" not in found:
            return model, None
        text = TextTower(**found["text_tower"])
        widths = vision.config.width, text.arguments["width"]
        return model, ContrastiveModel(vision, widths[0], text, widths[1], found["joint_width"])
    except UNBUILT as error:
        raise ValueError(f"config.json: no model has this architecture ({type(error).__name__}: {error})") from error
