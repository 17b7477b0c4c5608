"""What a model is made of, as JSON in config.json, so that a folder opens whatever becomes of its recipe's sizes."""

import dataclasses
import importlib
import json

from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

BRIDGES = {  # class -> its file, imported where a folder names it
    "LinearProjector": "projector", "MLPProjector": "projector", "PixelShuffleProjector": "projector",
    "WordProjector": "projector", "Resampler": "resampler", "Abstractor": "abstractor", "QFormer": "qformer",
}  # fmt: skip
# what building from values of the wrong types may raise
UNBUILT = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError)


def architecture(model, contrastive):
    """What `rebuild` takes: dict of JSON values; None for a model of classes that only a recipe file knows.

    Args: model: vlm.VLM. contrastive: contrastive.ContrastiveModel or None.
    """
    kind, parts = type(model.bridge), [model.vision, model.decoder]
    parts += [contrastive, contrastive.text] if contrastive else []
    ours = kind.__module__ == f"nanovlm.{BRIDGES.get(kind.__name__)}"
    if not ours or any(type(part) not in (ViT, Decoder, ContrastiveModel, TextTower) for part in parts):
        return None
    found = {
        "vision": dataclasses.asdict(model.vision.config),
        "bridge": {"class": kind.__name__} | model.bridge.arguments,
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
        kind = bridge.pop("class")
        make_bridge = getattr(importlib.import_module(f"nanovlm.{BRIDGES[kind]}"), kind)
        layers = tuple(LayerOptions(**options) for options in decoder.pop("layers"))
        decoder["alibi"] = tuple(decoder.get("alibi", ()))
        vision = ViT(ViTConfig(**found["vision"]))
        decoder = Decoder(DecoderConfig(**decoder, layers=layers))
        model = VLM(vision, make_bridge(**bridge), decoder, found["media_token"])
        if "text_tower" not in found:
            return model, None
        text = TextTower(**found["text_tower"])
        widths = vision.config.width, text.arguments["width"]
        return model, ContrastiveModel(vision, widths[0], text, widths[1], found["joint_width"])
    except UNBUILT as error:
        raise ValueError(f"config.json: no model has this architecture ({type(error).__name__}: {error})") from error
