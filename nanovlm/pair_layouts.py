"""Published layouts of pairs of towers, picture and caption: CLIP and SigLIP, each beside what builds it."""

from nanovlm import contrastive, siglip
from nanovlm.layouts import activation, number, section, size
from nanovlm.vision_layouts import BLOCKS, CLIP, SIGLIP, clip_config, siglip_config
from nanovlm.vit import ViT
from nanovlm.weight_tables import Alias, Computed, Fused, Reshaped, prefixed

TEXT = prefixed(
    (
        ("embeddings.token_embedding.weight", "embedding.weight"),
        ("embeddings.position_embedding.weight", "positions"),
        *BLOCKS,
        ("final_layer_norm.{p}", "norm.{p}"),
        Computed("embeddings.position_ids", "0, 1, 2 ..."),
    ),
    published="text_model.",
    ours="text.",
)


def vision_side(table):
    """A tower's table inside a pair, where its prefix is never left out."""
    return prefixed([entry for entry in table if not isinstance(entry, Alias)], ours="vision.")


CLIP_PAIR = (
    *vision_side(CLIP),
    *TEXT,
    ("visual_projection.weight", "project_image.weight"),
    ("text_projection.weight", "project_text.weight"),
    ("logit_scale", "log_scale"),
)
POOL = (
    Reshaped("vision_model.head.probe", "pool.probe", unit_axes=(0, 1)),
    Fused("vision_model.head.attention.in_proj_weight", ("pool.q.weight", "pool.k.weight", "pool.v.weight")),
    Fused("vision_model.head.attention.in_proj_bias", ("pool.q.bias", "pool.k.bias", "pool.v.bias")),
    ("vision_model.head.attention.out_proj.{p}", "pool.o.{p}"),
    ("vision_model.head.layernorm.{p}", "pool.norm.{p}"),
    ("vision_model.head.mlp.fc1.{p}", "pool.fc_1.{p}"),
    ("vision_model.head.mlp.fc2.{p}", "pool.fc_2.{p}"),
)
SIGLIP_PAIR = (
    *vision_side(SIGLIP),
    *POOL,
    *TEXT,
    ("text_model.head.{p}", "project_text.{p}"),
    Reshaped("logit_scale", "log_scale", unit_axes=(0,)),
    Reshaped("logit_bias", "bias", unit_axes=(0,)),
)


def is_pair(config):
    """bool, whether a config describes both towers."""
    return any(key in config for key in ("text_config", "text"))


def text_of(config):
    """The text side of a pair's config: dict."""
    return section(config, "text_config" if "text_config" in config else "text")


def text_sizes(config, **defaults):
    """Sizes that every text tower states: dict of TextTower's arguments; defaults: vocab_size, width ..."""
    names = {"vocab_size": "vocab_size", "width": "hidden_size", "num_layers": "num_hidden_layers",
             "num_heads": "num_attention_heads", "mlp_width": "intermediate_size",
             "context_length": "max_position_embeddings"}
    return {ours: size(config, name, defaults[ours]) for ours, name in names.items()}


def clip_pair(config):
    """CLIP, both towers.

    Args:
      config: dict of a dual config.json, or a manifest's with "vision" and "text".
    Returns: contrastive.CLIP.
    Raises: ValueError for what is not built.
    """
    vision, text = clip_config(config), text_of(config)
    sizes = text_sizes(text, vocab_size=49408, width=512, num_layers=12, num_heads=8, mlp_width=2048, context_length=77)
    eps = number(text, "layer_norm_eps", 1e-5)
    tower = contrastive.TextTower(**sizes, activation=activation(text, "hidden_act", "quick_gelu"),
                                  norm_eps=eps, last_norm_eps=eps)
    joint_width = size(config, "projection_dim", 512)
    return contrastive.CLIP(ViT(vision), vision.width, tower, sizes["width"], joint_width)


def siglip_pair(config):
    """SigLIP, both towers. Arguments and errors as `clip_pair`; returns siglip.SigLIP."""
    vision, text = siglip_config(config), text_of(config)
    defaults = dict(vocab_size=32000, width=768, num_layers=12, num_heads=12, mlp_width=3072, context_length=64)
    sizes = text_sizes(text, **defaults)
    pad_id = text.get("pad_token_id")
    tower = siglip.BidirectionalTextTower(
        **sizes, pad_id=1 if pad_id is None else pad_id, norm_eps=number(text, "layer_norm_eps", 1e-6),
        activation=activation(text, "hidden_act", "gelu_pytorch_tanh"),
    )
    return siglip.SigLIP(ViT(vision), tower, sizes["width"])
