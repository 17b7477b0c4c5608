"""A recipe of two stages that trains in a second: coloured squares and their names. Also a file for `train.py FILE.py`."""

import torch
from PIL import Image

from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.templates import NANO
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.projector import MLPProjector
from nanovlm.recipes.recipe import Recipe
from nanovlm.training.stages import Stage
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

COLORS = {"red": (220, 30, 30), "green": (40, 180, 40), "blue": (40, 60, 220), "white": (250, 250, 250)}
WIDTH = 16


class Squares:
    """Record n: a picture of one colour and the question for it, or (kind "text") only words."""

    def __init__(self, seed, kind="picture"):
        self.name = kind
        self.seed = seed
        self.kind = kind

    def __len__(self):
        return 10

    def record(self, n):
        color = list(COLORS)[(n * 7 + n // 4 + self.seed) % len(COLORS)]
        answer = (Turn("assistant", (color if self.kind == "picture" else f"{color} {color} {color}",)),)
        if self.kind == "text":
            return Record(f"text-{n}", (), ((Turn("user", (f"say {color}",)), *answer),))
        picture = Visual(f"{color}-{n}", (Image.new("RGB", (8, 8), COLORS[color]),))
        return Record(f"square-{n}", (picture,), ((Turn("user", (0, "colour?" * (1 + n % 3))), *answer), answer))


def build(size, vocab_size):
    """A vision-language model of about ten thousand parameters."""
    vision = ViT(ViTConfig(8, 4, WIDTH, num_layers=1, num_heads=2, mlp_width=24, class_token=False))
    layers = (LayerOptions(adapter_width=4, modality_adaptive=True), LayerOptions())
    decoder = Decoder(DecoderConfig(vocab_size, WIDTH, 2, 1, 24, 64, layers, tied_head=True))
    return VLM(vision, MLPProjector(WIDTH, WIDTH), decoder)


def contrastive(size, model):
    """The ViT beside a text tower."""
    text = TextTower(model.decoder.config.vocab_size, WIDTH, 1, 2, 24, context_length=24)
    return ContrastiveModel(model.vision, WIDTH, text, WIDTH, 8)


def stages(size, smoke):
    """A tower of contrastive learning, then language with the pictures four times as large."""
    return (
        Stage("tower", "contrastive", {"vision": 2e-3, "text_tower": 2e-3}, {"pictures": 1}, steps=6, batch_size=6,
              image_size=8, max_tokens=24, summary="tower: colours told apart {color}"),
        Stage("align", "language", {"bridge": 2e-3, "adapters": 1e-3, "vision_branch": 2e-3},
              {"pictures": 2, "words": 1}, steps=6, batch_size=6, micro_batch_size=4, image_size=16, max_tokens=40,
              optimizer="muon", weight_decay=0.1, warmup_steps=2, schedule="cosine"),
    )


def evaluate(run, stage):
    """A number that depends on the weights and draws from torch's random state, as a careless hook might."""
    torch.rand(3)
    return {"color": float(sum(p.double().abs().sum() for p in run.model.parameters()) % 1)}


def exam(run):
    """One line that changes, one that does not."""
    return [f"bias {run.model.bridge.linear.bias[0].item():.6f}", "constant"]


def finish(run):
    """A result."""
    return {"color": evaluate(run, run.stages[-1])["color"]}


def report(run, results):
    """A line."""
    return [f"results: {sorted(results)}"]


RECIPE = Recipe(
    name="tiny", sizes=("full", "tiny"), build=build, contrastive=contrastive, stages=stages,
    sources={"pictures": Squares, "words": lambda seed: Squares(seed, "text")},
    tokenizer=lambda: train_tokenizer(["say colour? user: bot:", *COLORS], 300), template=NANO, decodings={},
    measures=lambda stage: ("color",),
    evaluate=evaluate, exam=exam, finish=finish, report=report, save_every=4, exam_every=5,
)
