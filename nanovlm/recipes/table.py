"""The models side by side: tokens, parameters, what trains when, what a picture costs, and how much memory it takes.

Every number is counted on the model itself, built on the meta device: shapes without storage, so that seven billion
parameters take a second. Floating-point operations are those of torch's own counter (a multiply-add is two) while the
model runs over one picture; causal attention counts as the full square, as it does there.

N image tokens, W width
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nanovlm.attention import causal_rows, full
from nanovlm.cross_attention import Media
from nanovlm.recipes import nano

GIB = 2**30  # bytes
FROZEN = 2  # bytes of a parameter in bfloat16
# Weight and gradient in bfloat16, then in float32 a master weight and AdamW's two moments: ZeRO, arXiv:1910.02054, Sec. 3.1.
# Weight, gradient and moments all in float32, as this trainer keeps them, are as many.
TRAINED = 2 + 2 + 4 + 4 + 4  # bytes of a parameter
HIDDEN = "text_tower"  # stands beside the model and is not loaded with it


@dataclass(frozen=True)
class Row:
    """One model at one size."""

    name: str  # recipe, and the size unless that is "full"
    image_size: int  # pixels, side of the square
    vision_tokens: int  # features of one picture as the bridge receives them
    image_tokens: int  # what the bridge makes of them
    parameters: dict[str, int]  # part -> parameters; parts that the model lacks are left out
    trained: dict[str, dict[str, int]]  # stage -> part -> parameters that it trains
    encode_flops: int  # vision tower and bridge, one picture
    language_flops: int  # decoder over what stands in the row for that picture, without the output head

    @property
    def total(self):
        """Parameters of the whole model: int."""
        return sum(self.parameters.values())

    @property
    def load_bytes(self):
        """Bytes of the weights in bfloat16."""
        return FROZEN * self.total

    def train_bytes(self, stage):
        """Bytes that a stage keeps for one copy of the model: weights, master weights, gradients and optimizer state.

        2 bytes for a frozen parameter and 16 for a trained one, see TRAINED; activations are not included.
        """
        trained = self.trained[stage]
        frozen = self.total - sum(number for part, number in trained.items() if part != HIDDEN)
        return FROZEN * frozen + TRAINED * sum(trained.values())


def count_flops(function, repeated):
    """Floating-point operations of one call, by torch's counter: int; repeated: {module: how often it counts}."""
    with FlopCounterMode(display=False) as counter:
        function()
    flops = counter.get_flop_counts()
    return counter.get_total_flops() + sum((times - 1) * sum(flops[name].values()) for name, times in repeated.items())


def unique(layers):
    """Equal layers cost the same: ModuleList -> (ModuleList with one of each kind, list of how many there were)."""
    kinds = {}
    for layer in layers:
        kinds.setdefault(tuple((name, p.shape) for name, p in layer.named_parameters()), []).append(layer)
    return nn.ModuleList(same[0] for same in kinds.values()), [len(same) for same in kinds.values()]


def encode_flops(model, device="meta"):
    """Operations of vision tower and bridge for one picture: int. Of the tower, one block of each kind is left behind.

    Args:
      model: vlm.VLM. device: where it stands; on "meta" nothing is computed but the count.
    """
    vision, size = model.vision, model.vision.image_size
    vision.blocks, times = unique(vision.blocks[: vision.config.feature_layer])
    repeated = {f"{type(vision).__name__}.blocks.{i}": number for i, number in enumerate(times)}
    pixels, frames = torch.zeros(1, 3, size, size, device=device), torch.ones(1, dtype=torch.long, device="cpu")
    return count_flops(lambda: model.encode(pixels, frames), repeated)


def language_flops(model, num_image_tokens, device="meta"):
    """Operations of the decoder for the N image tokens of one picture; with cross-attention for its one media token.

    Args: as in `encode_flops`, which treats the tower as this treats the decoder; num_image_tokens: N.
    Returns: int.
    """
    decoder, media, num_tokens = model.decoder, None, num_image_tokens
    if model.media_token is not None:
        tokens = torch.zeros(1, num_image_tokens, decoder.config.cross_attention_width, device=device)
        media, num_tokens = Media(tokens, full(1, num_image_tokens, device)), 1
    decoder.layers, times = unique(decoder.layers)
    repeated = {f"{type(decoder).__name__}.layers.{i}": number for i, number in enumerate(times)}
    embeddings = torch.zeros(1, num_tokens, decoder.config.width, device=device)
    positions = torch.zeros(1, num_tokens, dtype=torch.long, device=device)
    modality = torch.zeros(1, num_tokens, dtype=torch.long, device="cpu")  # each token meets one branch, whichever it is
    visible = causal_rows(1, num_tokens, device)
    return count_flops(lambda: decoder(embeddings, positions, visible, modality, media=media), repeated)


def count_parameters(parts):
    """{part: number of parameters} of VLM.parts(), without the empty ones."""
    return {part: sum(p.numel() for p in parameters.values()) for part, parameters in parts.items() if parameters}


def row(recipe, size):
    """Count one model.

    Args:
      recipe: recipe.Recipe. size: str, one of its sizes.
    Returns: Row.
    """
    with torch.device("meta"):
        published = recipe.published
        model = published.build(published.configs[size]) if published else recipe.build(size, nano.VOCABULARY)
        known = parameters = count_parameters(model.parts())
        if recipe.contrastive:
            both = sum(p.numel() for p in recipe.contrastive(size, model).parameters())
            known = parameters | {HIDDEN: both - parameters["vision"]}
    vision_tokens = model.vision.num_tokens(model.vision.image_size)
    image_tokens = model.bridge.num_image_tokens(vision_tokens)
    return Row(
        name=recipe.name if size == "full" else f"{recipe.name} {size}",
        image_size=model.vision.image_size,
        vision_tokens=vision_tokens,
        image_tokens=image_tokens,
        parameters=parameters,
        trained={
            stage.name: {part: known[part] for part in known if part in stage.learning_rates}
            for stage in recipe.stages(size, False)
        },
        encode_flops=encode_flops(model),
        language_flops=language_flops(model, image_tokens),
    )


def rows(recipes=None):
    """Every model at every size that is not tiny.

    Args:
      recipes: {name: recipe.Recipe}; None = all of recipes.RECIPES.
    Returns: list of Row.
    """
    if recipes is None:
        from nanovlm.recipes import RECIPES as recipes  # the recipes' package imports the table's command
    return [row(recipe, size) for recipe in recipes.values() for size in recipe.sizes if not size.startswith("tiny")]


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
    """What is printed, as data for any kind of table.

    Args:
      counted: list of Row.
    Returns: list of (title, list of headings, list of lists of str), the models first, then parts, then stages.
    """
    models = [
        [one.name, f"{one.image_size}", f"{one.vision_tokens:,}", f"{one.image_tokens:,}", f"{one.total:,}",
         short(one.encode_flops), short(one.language_flops), gib(one.load_bytes)]
        for one in counted
    ]  # fmt: skip
    parts = list(dict.fromkeys(part for one in counted for part in one.parameters))
    shares = [[one.name, *(short(one.parameters[part]) if part in one.parameters else "" for part in parts)] for one in counted]
    stages = [
        [one.name, stage, ", ".join(trained), short(sum(trained.values())), gib(one.train_bytes(stage))]
        for one in counted
        for stage, trained in one.trained.items()
    ]
    return [
        ("The models", ["model", "pixels", "vision tokens", "image tokens", "parameters", "FLOPs per image: tower, bridge",
                        "language model", "GiB to load (bfloat16)"], models),
        ("Parameters by part", ["model", *(part.replace("_", " ") for part in parts)], shares),
        ("What each stage trains", ["model", "stage", "parts", "parameters", "GiB to train, without activations"], stages),
    ]  # fmt: skip


def lines(title, headings, cells):
    """One table of `tables` for a terminal: list of str, numbers flush right."""
    widths = [max(map(len, column)) for column in zip(headings, *cells)]
    words = [any(cell[:1].isalpha() for cell in column) for column in zip(*cells)]
    laid = [
        "  ".join(cell.ljust(width) if word else cell.rjust(width) for cell, width, word in zip(line, widths, words)).rstrip()
        for line in [headings, *cells]
    ]
    return [title, "", *laid, ""]


def main():
    """Print the tables: exit code 0."""
    for table in tables(rows()):
        print("\n".join(lines(*table)))
    return 0
