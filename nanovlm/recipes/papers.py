"""What the recipes of published models share: sizes, stages that shrink to a rehearsal, and the recipe around both."""

import dataclasses

from nanovlm.published.language import with_vocabulary
from nanovlm.published.load import added_tokens, load_tokenizer
from nanovlm.recipes.recipe import Recipe

CLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
LLAMA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip
SMOKE_STEPS, TINY_STEPS = 4, 100  # optimizer steps of a stage in a smoke run, and at the tiny size
TINY_BATCH = 4  # examples


def tiny_vision(image_size, layers=2, **others):
    """A tower's config.json at the tiny size: dict."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    return sizes | {"image_size": image_size} | others


def tiny_language(width=32, layers=2, heads=2, **others):
    """A language model's config.json at the tiny size, but for the width of its feed-forward if `others` names it: dict."""
    sizes = {"vocab_size": 512, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"max_position_embeddings": 256} | (others or {"intermediate_size": 2 * width})


def complete(config, defaults):
    """A config with what it leaves out: dict; nested parts are completed one by one, other keys are kept."""
    filled = dict(config)
    for key, default in defaults.items():
        given = config.get(key)
        if isinstance(default, dict):
            if not isinstance(given, dict | None):
                raise ValueError(f"config: {key} is {given!r}, expected an object with {', '.join(default)}")
            filled[key] = complete(given or {}, default)
        elif given is None:
            filled[key] = default
    return filled


def shrinking(stages, tiny_images):
    """A paper's stages as they stand, or shrunk to what a laptop rehearses; parts, rates and mixtures are never touched.

    Args: stages: tuple of Stage. tiny_images: {pixels in the paper: pixels at a tiny size}.
    Returns: function(size, smoke) -> tuple of Stage; smoke: a few steps of a few examples.
    """

    def at_size(size, smoke):
        shrunk = stages
        if size.startswith("tiny"):
            less = dict(steps=TINY_STEPS, batch_size=TINY_BATCH, warmup_steps=TINY_STEPS // 20, precision="float32")
            shrunk = [
                dataclasses.replace(stage, image_size=tiny_images[stage.image_size], max_tokens=min(stage.max_tokens, 256),
                                    micro_batch_size=None, **less)
                for stage in shrunk
            ]  # fmt: skip
        if smoke:
            less = dict(steps=SMOKE_STEPS, warmup_steps=1, micro_batch_size=None)
            shrunk = [dataclasses.replace(stage, batch_size=min(stage.batch_size, TINY_BATCH), **less) for stage in shrunk]
        return tuple(shrunk)

    return at_size


def published_recipe(published, **fields):
    """The recipe of a published model; its runs are judged by their losses alone.

    Args: published: Published. fields: of Recipe, at least stages, template and decodings.
    """

    def no_tokenizer():
        raise ValueError(f"recipe {published.family!r} has no tokenizer of its own: give --init FOLDER with the model's "
                         "tokenizer.json")

    def build(size, vocab_size):
        return published.build(with_vocabulary(published.configs[size], vocab_size))

    recipe = Recipe(published.family, tuple(published.configs), tokenizer=no_tokenizer, published=published,
                    **{"build": build} | fields)
    return dataclasses.replace(recipe, load_tokenizer=lambda folder: load_tokenizer(folder, added_tokens(recipe)))
