"""The tiny recipe with room for conversations: one stage that trains everything on whatever --data brings."""

import dataclasses
import json
from pathlib import Path

import tiny_recipe

from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.projector import MLPProjector
from nanovlm.training.stages import Stage
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

CAPTIONS = json.loads((Path(__file__).parent / "golden/vlit/captions_photos.json").read_text())["annotations"]
WORDS = [one["caption"] for one in CAPTIONS] * 4
EVERY_PART = {"vision": 3e-3, "bridge": 3e-3, "embedding": 3e-3, "language_model": 3e-3}


def build(size, vocab_size):
    """A vision-language model of some twenty thousand parameters with a context of 512 tokens."""
    vision = ViT(ViTConfig(16, 8, 16, num_layers=1, num_heads=2, mlp_width=24, class_token=False))
    decoder = Decoder(DecoderConfig(vocab_size, 32, 2, 2, 64, 512, (LayerOptions(), LayerOptions()), tied_head=True))
    return VLM(vision, MLPProjector(16, 32), decoder)


RECIPE = dataclasses.replace(
    tiny_recipe.RECIPE,
    name="vlit",
    build=build,
    contrastive=None,
    stages=lambda size, smoke: (
        Stage("instruct", "language", EVERY_PART, {"pictures": 1}, steps=40, batch_size=8, image_size=16, max_tokens=512),
    ),
    tokenizer=lambda: train_tokenizer(WORDS, 400),
    exam=lambda run: [],
)
