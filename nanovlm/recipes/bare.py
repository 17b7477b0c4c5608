"""Published towers and language models by themselves: what the papers' models are put together from.

They have no recipe, since nothing is trained here with one of them alone; they are opened, converted, inspected and
checked like the papers' models.
"""

from torch import nn

from nanovlm import pair_layouts, vision_layouts
from nanovlm.decoder import Decoder
from nanovlm.layouts import LLAMA, OPT, PHI, QWEN2, llama_config, opt_config, phi_config, qwen2_config
from nanovlm.recipes.recipe import Published
from nanovlm.siglip import AttentionPool
from nanovlm.vit import ViT


class PooledTower(nn.Module):
    """SigLIP's tower with the attention pooling that its files hold."""

    def __init__(self, config):
        super().__init__()
        self.vision = ViT(config)
        self.pool = AttentionPool(config.width, config.num_heads, config.mlp_width, config.activation, config.norm_eps)


def language_model(family, read, table):
    """A bare decoder's Published; read: config -> DecoderConfig."""
    return Published(family, lambda config: Decoder(read(config)), lambda config: table, {})


def build_clip(config):
    """CLIP of a config: contrastive.CLIP if it describes both towers, else the ViT."""
    return pair_layouts.clip_pair(config) if pair_layouts.is_pair(config) else ViT(vision_layouts.clip_config(config))


def layout_clip(config):
    """The table of `build_clip`."""
    return pair_layouts.CLIP_PAIR if pair_layouts.is_pair(config) else vision_layouts.CLIP


def build_siglip(config):
    """SigLIP of a config: siglip.SigLIP if it describes both towers, else the tower with its pooling."""
    if pair_layouts.is_pair(config):
        return pair_layouts.siglip_pair(config)
    return PooledTower(vision_layouts.siglip_config(config))


def layout_siglip(config):
    """The table of `build_siglip`."""
    if pair_layouts.is_pair(config):
        return pair_layouts.SIGLIP_PAIR
    return (*pair_layouts.vision_side(vision_layouts.SIGLIP), *pair_layouts.POOL, vision_layouts.PREFIX)


BARE = {
    "llama": language_model("llama", llama_config, LLAMA),  # Vicuna and SmolLM2 too
    "qwen2": language_model("qwen2", qwen2_config, QWEN2),
    "phi": language_model("phi", phi_config, PHI),
    "opt": language_model("opt", opt_config, OPT),
    "clip": Published("clip", build_clip, layout_clip, {}),
    "siglip": Published("siglip", build_siglip, layout_siglip, {}),
    "eva": Published(
        "eva", lambda config: ViT(vision_layouts.eva_config(config)), lambda config: vision_layouts.EVA, {}
    ),
}  # fmt: skip
