"""What the recipes of published models share: sizes, stages that shrink to a rehearsal, and the recipe around both."""

import dataclasses
import json
from pathlib import Path

from nanovlm.published.language import with_vocabulary
from nanovlm.published.load import added_tokens, load_tokenizer
from nanovlm.published.parts import start
from nanovlm.published.weights import Entry, Published
from nanovlm.recipes.recipe import Decoding, Expected, Recipe
from nanovlm.training.stages import Stage

__all__ = ["RESAMPLER", "SIZES", "Decoding", "Expected", "features", "published_recipe", "shrinking", "stage",
           "tiny_language"]

# recipe -> size -> its config.json; what a published class takes by itself may be left out
SIZES = json.loads(Path(__file__).with_name("sizes.json").read_text())
START_FROM = json.loads(Path(__file__).with_name("start_from.json").read_text())  # recipe -> lines, as Recipe.weights
RESAMPLER = (  # Lynx's and OpenFlamingo's
    ("latents", "latents"),
    ("layers.{i}.0.norm_media.{p}", "layers.{i}.norm_patches.{p}"),
    ("layers.{i}.0.norm_latents.{p}", "layers.{i}.norm_latents.{p}"),
    ("layers.{i}.0.to_q.weight", "layers.{i}.q.weight"),
    Entry("layers.{i}.0.to_kv.weight", ("layers.{i}.k.weight", "layers.{i}.v.weight")),  # keys first
    ("layers.{i}.0.to_out.weight", "layers.{i}.o.weight"),
    ("layers.{i}.1.{j}.{p}", "layers.{i}.ffn.{j}.{p}"),
    ("norm.{p}", "norm.{p}"),
)
SMOKE_STEPS, TINY_STEPS = 4, 100  # optimizer steps of a stage in a smoke run, and at the tiny size
TINY_BATCH = 4  # examples


def tiny_language(layers):
    """A language model's config.json at the tiny size: dict."""
    return {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2,
            "max_position_embeddings": 256, "intermediate_size": 64}


def features(tower, layer, kind):
    """A ViTConfig that gives what LLaVA's config.json names: a layer's output, -1 is the last, and which tokens."""
    without_class = {"default": True, "patch": True, "full": False, "cls_patch": False}
    if kind not in without_class or not isinstance(layer, int):
        known = " or ".join(without_class)
        raise ValueError(f"config: {kind!r} of layer {layer!r}; of one layer, like -2, {known} can be built")
    layer = layer if layer >= 0 else tower.num_layers + 1 + layer
    return dataclasses.replace(tower, feature_layer=layer, drop_class_token=without_class[kind])


def stage(name, learning_rates, mixture, steps, batch_size, **others):
    """A Stage that learns the next token, in the precision that the machine is fast in; others: further fields."""
    return Stage(name, "language", learning_rates, mixture, steps, batch_size, precision="auto", **others)


def shrinking(stages, tiny_images):
    """A paper's stages as they stand, or shrunk to what a laptop rehearses: function(size, smoke) -> tuple of Stage.

    Parts, rates and mixtures are never touched. tiny_images: {pixels in the paper: pixels at a tiny size}.
    """

    def at_size(size, smoke):
        shrunk, tiny = stages, size.startswith("tiny")
        if tiny:
            shrunk = [dataclasses.replace(one, image_size=tiny_images[one.image_size], precision="float32",
                                          max_tokens=min(one.max_tokens, 256)) for one in shrunk]
        if tiny or smoke:
            steps, warmup_steps = (SMOKE_STEPS, 1) if smoke else (TINY_STEPS, TINY_STEPS // 20)
            shrunk = [dataclasses.replace(one, steps=steps, warmup_steps=warmup_steps, micro_batch_size=None,
                                          batch_size=TINY_BATCH) for one in shrunk]
        return tuple(shrunk)

    return at_size


def published_recipe(family, build, layout, configs, contents="", /, **fields):
    """A published model's recipe, whose runs are judged by their losses alone; fields: at least stages and template."""
    published = Published(family, build, layout, configs, contents)

    def no_tokenizer():
        raise ValueError(f"recipe {family!r} has no tokenizer of its own: give --init FOLDER with the model's "
                         "tokenizer.json")

    def sized(size, vocab_size):
        return build(with_vocabulary(configs[size], vocab_size))

    fields = {"build": sized, "weights": tuple(START_FROM.get(family, ()))} | fields
    recipe = Recipe(family, tuple(configs), tokenizer=no_tokenizer, published=published, **fields)
    return dataclasses.replace(recipe, load_tokenizer=lambda folder: load_tokenizer(folder, added_tokens(recipe)),
                               open_init=start)
