"""The models side by side: tokens, parameters, what trains when, what a picture costs, and how much memory it takes.

Every number is counted on the model itself, built on the meta device: shapes without storage, so that seven billion
parameters take a second. Floating-point operations are those of torch's own counter (a multiply-add is two) while the
model runs over one picture; causal attention counts as the full square, as it does there.

N image tokens
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from nanovlm.recipes import RECIPES
from nanovlm.training.cost import decode

GIB = 2**30  # bytes
FROZEN = 2  # bytes of a parameter in bfloat16
# Weight and gradient in bfloat16, then in float32 a master weight and AdamW's two moments: ZeRO, arXiv:1910.02054,
# Sec. 3.1. Weight, gradient and moments all in float32, as this trainer keeps them, are as many.
TRAINED = 2 + 2 + 4 + 4 + 4  # bytes of a parameter
VOCABULARY = 512  # tokens, of a recipe that trains its own tokenizer


@dataclass(frozen=True)
class Row:
    """One model at one size."""

    name: str  # recipe, and the size unless that is its first
    image_size: int  # pixels, side of the square
    vision_tokens: int  # features of one picture as the bridge receives them
    image_tokens: int  # what the bridge makes of them
    parameters: dict[str, int]  # part -> parameters; parts that the model lacks are left out
    trained: dict[str, dict[str, int]]  # stage -> part -> parameters that it trains, also in the text tower beside it
    encode_flops: int  # vision tower and bridge, one picture
    language_flops: int  # decoder over what stands in the row for that picture, without the output head

    @property
    def total(self):
        """Parameters of the whole model: int."""
        return sum(self.parameters.values())

    def train_bytes(self, stage):
        """Bytes that a stage keeps for one copy of the model: weights, master weights, gradients and optimizer state.

        2 bytes for a frozen parameter and 16 for a trained one, see TRAINED; activations are not included.
        """
        trained = self.trained[stage]
        frozen = self.total - sum(number for part, number in trained.items() if part != "text_tower")
        return FROZEN * frozen + TRAINED * sum(trained.values())


def count_flops(layers, function):
    """Operations of one call, by torch's counter: int; of layers of equal shapes one runs and counts for all."""
    known, repeated = {}, 0

    def once(layer, run):
        def forward(x, *rest):
            nonlocal repeated
            kind = tuple(parameter.shape for parameter in layer.parameters())
            if kind in known:
                repeated += known[kind]
                return x
            before = counter.get_total_flops()
            x = run(x, *rest)
            known[kind] = counter.get_total_flops() - before
            return x

        return forward

    for layer in layers:
        layer.forward = once(layer, layer.forward)
    with FlopCounterMode(display=False) as counter:
        function()
    for layer in layers:
        del layer.forward
    return counter.get_total_flops() + repeated


def encode_flops(model):
    """Operations of vision tower and bridge for one picture: int; model: vlm.VLM on the meta device."""
    size = model.vision.image_size
    pixels, frames = torch.empty(1, 3, size, size, device="meta"), torch.ones(1, dtype=torch.long, device="cpu")
    return count_flops(model.vision.blocks, lambda: model.encode(pixels, frames))


def language_flops(model, num_image_tokens):
    """Operations of the decoder for the N image tokens of a picture: int; with cross-attention, for its media token."""
    tokens = torch.empty(1, num_image_tokens, model.bridge.output_width, device="meta")
    return count_flops(model.decoder.layers, lambda: decode(model, tokens, int(model.media_token is not None)))


def count_parameters(parts):
    """{part: number of parameters} of VLM.parts(), without the empty ones."""
    return {part: sum(p.numel() for p in parameters.values()) for part, parameters in parts.items() if parameters}


def row(recipe, size):
    """Count one model: Row. recipe: Recipe. size: str, one of its sizes."""
    with torch.device("meta"):
        model = recipe.build(size, 0 if recipe.published else VOCABULARY).requires_grad_(False)
        parameters = known = count_parameters(model.parts())
        if recipe.contrastive:
            known = parameters | count_parameters(recipe.contrastive(size, model).parts())
    vision_tokens = model.vision.num_tokens(model.vision.image_size)
    image_tokens = model.bridge.num_image_tokens(vision_tokens)
    trained = {stage.name: {part: number for part, number in known.items() if part in stage.learning_rates}
               for stage in recipe.stages(size, False)}
    name = recipe.name if size == recipe.sizes[0] else f"{recipe.name} {size}"
    return Row(name, model.vision.image_size, vision_tokens, image_tokens, parameters, trained, encode_flops(model),
               language_flops(model, image_tokens))


def rows():
    """Every model at every size that is not tiny: list of Row."""
    return [row(recipe, size) for recipe in RECIPES.values() for size in recipe.sizes if not size.startswith("tiny")]


def short(number):
    """A large number in three digits: 8413647120 -> "8.41 B"."""
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * limit:  # so that nothing is rounded to "1e+03"
            return f"{number / limit:.3g}{unit}"
    return str(number)


def gib(number):
    """Bytes as GiB: "15.7"."""
    return f"{number / GIB:.1f}" if number >= GIB / 10 else f"{number / GIB:.3f}"


def tables(counted):
    """Models, parts and stages for any kind of table: list of (title, list of headings, list of lists of str)."""
    models = [
        [one.name, f"{one.image_size}", f"{one.vision_tokens:,}", f"{one.image_tokens:,}", f"{one.total:,}",
         short(one.encode_flops), short(one.language_flops), gib(FROZEN * one.total)]
        for one in counted
    ]  # fmt: skip
    parts = list(dict.fromkeys(part for one in counted for part in one.parameters))
    shares = [[one.name, *(short(one.parameters[part]) if part in one.parameters else "" for part in parts)]
              for one in counted]
    stages = [[one.name, stage, ", ".join(trained), short(sum(trained.values())), gib(one.train_bytes(stage))]
              for one in counted for stage, trained in one.trained.items()]  # fmt: skip
    return [
        ("The models", ["model", "pixels", "vision tokens", "image tokens", "parameters",
                        "FLOPs per image: tower, bridge", "language model", "GiB to load (bfloat16)"], models),
        ("Parameters by part", ["model", *(part.replace("_", " ") for part in parts)], shares),
        ("What each stage trains", ["model", "stage", "parts", "parameters", "GiB to train, without activations"],
         stages),
    ]  # fmt: skip


def lines(title, headings, cells):
    """One table of `tables` for a terminal: list of str, numbers flush right."""
    widths = [max(map(len, column)) for column in zip(headings, *cells)]
    words = [any(cell[:1].isalpha() for cell in column) for column in zip(*cells)]
    laid = [[cell.ljust(width) if word else cell.rjust(width) for cell, width, word in zip(line, widths, words)]
            for line in [headings, *cells]]
    return [title, "", *("  ".join(line).rstrip() for line in laid), ""]


def main():
    """Print the tables: exit code 0."""
    for table in tables(rows()):
        print("\n".join(lines(*table)))
    return 0
