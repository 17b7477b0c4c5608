"""nano with Lynx's bridge: a Perceiver resampler of 64 latents in place of the projector's 64 patches.

Everything else is nano's, so the two runs differ by the bridge alone. It is also the shortest example of a recipe of
one's own: take nano's, replace a part.
"""

import dataclasses

from nanovlm.recipes import nano
from nanovlm.resampler import Resampler


def resampler(width):
    """The bridge: 64 latents look at all patches (Lynx, arXiv:2307.02469, Sec. 2.1)."""
    heads = width // nano.HEAD_WIDTH
    return Resampler(width, width, num_latents=64, num_layers=1, num_heads=heads, head_width=nano.HEAD_WIDTH,
                     ffn_width=4 * width)


def build(size, vocab_size):
    """The vision-language model: vlm.VLM."""
    return nano.build(size, vocab_size, resampler)


RECIPE = dataclasses.replace(nano.RECIPE, name="nano_resampler", build=build)
