"""A tiny recipe with what makes many processes hard: text alone, clips, a block without use, a rising resolution.

With `--size float64` everything is computed in float64, so that sums taken in another order show nothing.
"""

import dataclasses

from PIL import Image

import tiny_recipe
from many import READ
from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.data.records import Record, Visual
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.resampler import Resampler
from nanovlm.training.stages import Stage
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

WIDTH = tiny_recipe.WIDTH


class Squares(tiny_recipe.Squares):
    """Squares that write down what was read; of kind "clips" every third is a clip of two frames."""

    def record(self, n):
        READ.append((self.kind, n))
        if self.kind == "text":
            return super().record(n)
        color = list(tiny_recipe.COLORS.values())[n % 4]
        picture = dataclasses.replace(tiny_recipe.Squares(self.seed).record(n).visuals[0], key=f"{self.kind}-{n}")
        if self.kind == "clips" and n % 3 == 0:
            picture = Visual(f"clip-{n}", (*picture.frames, Image.new("RGB", (8, 8), color)))
        conversations = tiny_recipe.Squares(self.seed).record(n).conversations
        regions = ((0.7, 0.2),) * len(conversations) if n % 2 else ()
        return Record(f"{self.kind}-{n}", (picture,), conversations, regions=regions)


class Tower(ViT):
    """A ViT that takes pixels of any precision."""

    def forward(self, pixels):
        return super().forward(pixels.to(self.positions.dtype))


def build(size, vocab_size):
    """A model of which the ViT's last block is never computed."""
    vision = Tower(ViTConfig(8, 4, WIDTH, num_layers=2, num_heads=2, mlp_width=24, qkv_bias="qv", feature_layer=1))
    layers = (LayerOptions(adapter_width=4, modality_adaptive=True), LayerOptions())
    decoder = Decoder(DecoderConfig(vocab_size, WIDTH, 2, 1, 24, 64, layers))
    bridge = Resampler(WIDTH, WIDTH, 3, 1, 2, 8, 24, max_frames=4)
    model = VLM(vision, bridge, decoder)
    return model.double() if size == "float64" else model


def contrastive(size, model):
    """The ViT beside a text tower."""
    text = TextTower(model.decoder.config.vocab_size, WIDTH, 1, 2, 24, context_length=24)
    found = ContrastiveModel(model.vision, WIDTH, text, WIDTH, 8)
    return found.double() if size == "float64" else found


def stages(size, smoke):
    """Contrastive, then everything at once at twice the resolution, in micro-batches, with layer-wise decay."""
    common = dict(eps=1e-6, weight_decay=0.1, warmup_steps=1)
    return (
        Stage("tower", "contrastive", {"vision": 2e-3, "text_tower": 2e-3}, {"pictures": 1}, steps=20, batch_size=6,
              image_size=8, max_tokens=24, **common),
        Stage("tune", "language", {"vision": 1e-3, "bridge": 2e-3, "adapters": 1e-3, "vision_branch": 2e-3,
                                   "language_model": 1e-3, "lm_head": 1e-3},
              {"clips": 2, "words": 3}, steps=40, batch_size=6, micro_batch_size=2, image_size=16, max_tokens=40,
              layer_decay={"vision": 0.9}, clip=0.5, **common),
    )


RECIPE = dataclasses.replace(
    tiny_recipe.RECIPE, name="many", sizes=("float32", "float64"), build=build, contrastive=contrastive, stages=stages,
    sources={name: lambda seed, kind=kind: Squares(seed, kind)
             for name, kind in {"pictures": "pictures", "clips": "clips", "words": "text"}.items()},
    evaluate=lambda run, stage: {"sum": float(sum(p.double().sum() for p in run.model.parameters()))},
    exam=lambda run: [], finish=lambda run: {}, save_every=1000,
)  # fmt: skip
