"""Published layouts of vision towers: CLIP, SigLIP, and EVA-g in two spellings, each beside what its config means.

`clip_config`, `siglip_config` and `eva_config` build the whole published tower. Which of its features a
vision-language model takes is the recipe's choice (`dataclasses.replace(config, feature_layer=23)`).
"""

from nanovlm import contrastive
from nanovlm.published.language import activation, expect, number, section, size
from nanovlm.published.weights import Alias, Computed, Fused, prefixed, Reshaped, Unused
from nanovlm.vit import ViT, ViTConfig


BLOCKS = (
    ("encoder.layers.{i}.layer_norm1.{p}", "blocks.{i}.norm_1.{p}"),
    ("encoder.layers.{i}.self_attn.q_proj.{p}", "blocks.{i}.attention.q.{p}"),
    ("encoder.layers.{i}.self_attn.k_proj.{p}", "blocks.{i}.attention.k.{p}"),
    ("encoder.layers.{i}.self_attn.v_proj.{p}", "blocks.{i}.attention.v.{p}"),
    ("encoder.layers.{i}.self_attn.out_proj.{p}", "blocks.{i}.attention.o.{p}"),
    ("encoder.layers.{i}.layer_norm2.{p}", "blocks.{i}.norm_2.{p}"),
    ("encoder.layers.{i}.mlp.fc1.{p}", "blocks.{i}.fc_1.{p}"),
    ("encoder.layers.{i}.mlp.fc2.{p}", "blocks.{i}.fc_2.{p}"),
)
PREFIX = Alias("{rest}", "vision_model.{rest}")  # a tower saved alone by transformers 5 has no prefix

CLIP = (
    *prefixed(
        (
            ("embeddings.class_embedding", "class_token"),
            ("embeddings.patch_embedding.weight", "patch_embedding.weight"),
            ("embeddings.position_embedding.weight", "positions"),
            ("pre_layrnorm.{p}", "pre_norm.{p}"),  # published with this spelling
            *BLOCKS,
            ("post_layernorm.{p}", "post_norm.{p}"),
            Computed("embeddings.position_ids", "0, 1, 2 ..."),
        ),
        published="vision_model.",
    ),
    PREFIX,
)

SIGLIP = (
    *prefixed(
        (
            ("embeddings.patch_embedding.{p}", "patch_embedding.{p}"),
            ("embeddings.position_embedding.weight", "positions"),
            *BLOCKS,
            ("post_layernorm.{p}", "post_norm.{p}"),
            Computed("embeddings.position_ids", "0, 1, 2 ..."),
        ),
        published="vision_model.",
    ),
    PREFIX,
)
OTHER_SIDE = tuple(  # what a dual file holds beside the tower
    Unused(name, reason)
    for name, reason in (
        ("text_model.{rest}", "the text side of a dual file"),
        ("text_projection.weight", "the text side of a dual file"),
        ("visual_projection.weight", "leads to the space shared with the text side"),
        ("logit_scale", "belongs to the pair's own loss"),
        ("logit_bias", "belongs to the pair's own loss"),
        ("vision_model.head.{rest}", "attention pooling, which serves SigLIP's own loss"),
    )
)

BLIP2_REST = (  # what BLIP-2's file holds beside the tower
    Unused("query_tokens", "BLIP-2's own bridge"),
    Unused("qformer.{rest}", "BLIP-2's own bridge"),
    Unused("language_projection.{p}", "BLIP-2's own bridge"),
    Unused("language_model.{rest}", "BLIP-2's own language model"),
)
BEHIND = (Unused("vision_model.post_layernorm.{p}", "a norm behind the features that this model takes"),)

# EVA-g inside BLIP-2's file; the third of the bias that belongs to the keys is zero and has no effect on a softmax
EVA = (
    *prefixed(
        (
            Reshaped("embeddings.class_embedding", "class_token", unit_axes=(0, 1)),
            ("embeddings.patch_embedding.{p}", "patch_embedding.{p}"),
            Reshaped("embeddings.position_embedding", "positions", unit_axes=(0,)),
            ("encoder.layers.{i}.layer_norm1.{p}", "blocks.{i}.norm_1.{p}"),
            Fused("encoder.layers.{i}.self_attn.qkv.weight",
                  ("blocks.{i}.attention.q.weight", "blocks.{i}.attention.k.weight", "blocks.{i}.attention.v.weight")),
            Fused("encoder.layers.{i}.self_attn.qkv.bias",
                  ("blocks.{i}.attention.q.bias", None, "blocks.{i}.attention.v.bias")),
            ("encoder.layers.{i}.self_attn.projection.{p}", "blocks.{i}.attention.o.{p}"),
            ("encoder.layers.{i}.layer_norm2.{p}", "blocks.{i}.norm_2.{p}"),
            ("encoder.layers.{i}.mlp.fc1.{p}", "blocks.{i}.fc_1.{p}"),
            ("encoder.layers.{i}.mlp.fc2.{p}", "blocks.{i}.fc_2.{p}"),
            ("post_layernorm.{p}", "post_norm.{p}"),
        ),
        published="vision_model.",
    ),
    PREFIX,
)  # fmt: skip


def eva_original(num_blocks):
    """EVA-g as its authors' .pt file spells it (eva_vit_g.pth, EVA01_g_psz14.pt).

    Args:
      num_blocks: blocks that the model builds. The public tower's 40th lies behind the features that the papers take.
    Returns: tuple of entries.
    """
    behind = "a block behind the features that are used"
    reason = "serves EVA's own loss"
    return (
        Reshaped("cls_token", "class_token", unit_axes=(0, 1)),
        Reshaped("pos_embed", "positions", unit_axes=(0,)),
        ("patch_embed.proj.{p}", "patch_embedding.{p}"),
        ("blocks.{i}.norm1.{p}", "blocks.{i}.norm_1.{p}"),
        Fused("blocks.{i}.attn.qkv.weight",
              ("blocks.{i}.attention.q.weight", "blocks.{i}.attention.k.weight", "blocks.{i}.attention.v.weight")),
        ("blocks.{i}.attn.q_bias", "blocks.{i}.attention.q.bias"),
        ("blocks.{i}.attn.v_bias", "blocks.{i}.attention.v.bias"),
        ("blocks.{i}.attn.proj.{p}", "blocks.{i}.attention.o.{p}"),
        ("blocks.{i}.norm2.{p}", "blocks.{i}.norm_2.{p}"),
        ("blocks.{i}.mlp.fc1.{p}", "blocks.{i}.fc_1.{p}"),
        ("blocks.{i}.mlp.fc2.{p}", "blocks.{i}.fc_2.{p}"),
        *(Unused(f"blocks.{num_blocks}.{name}", behind)
          for name in ("norm1.{p}", "attn.qkv.weight", "attn.q_bias", "attn.v_bias", "attn.proj.{p}", "norm2.{p}",
                       "mlp.fc1.{p}", "mlp.fc2.{p}")),
        ("norm.{p}", "post_norm.{p}"),
        *(Unused(name, reason) for name in ("norm.{p}", "fc_norm.{p}", "head.{p}", "lm_head.{p}", "mask_token")),
        Alias("visual.{rest}", "{rest}"),
        Alias("module.{rest}", "{rest}"),
    )  # fmt: skip


def vision_only(config):
    """The part of a config that describes the vision tower: a dual config's, a nested one's, or the config itself."""
    for key in ("vision_config", "vision"):
        if key in config:
            return section(config, key)
    return config


def tower_sizes(config, **defaults):
    """The sizes that every tower states: dict of ViTConfig's fields; defaults: image_size, patch_size, width ..."""
    names = {"image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size",
             "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "mlp_width": "intermediate_size"}
    return {ours: size(config, name, defaults[ours]) for ours, name in names.items()}


def clip_config(config):
    """CLIP's vision tower.

    Args:
      config: dict of a config.json (dual, or the tower's own), or its vision_config.
    Returns: ViTConfig.
    Raises: ValueError for what is not built.
    """
    config = vision_only(config)
    sizes = tower_sizes(config, image_size=224, patch_size=32, width=768, num_layers=12, num_heads=12, mlp_width=3072)
    return ViTConfig(**sizes, pre_norm=True, patch_bias=False, norm_eps=number(config, "layer_norm_eps", 1e-5),
                     activation=activation(config, "hidden_act", "quick_gelu"))


def siglip_config(config):
    """SigLIP's vision tower: no class token. Arguments and errors as `clip_config`."""
    config = vision_only(config)
    sizes = tower_sizes(config, image_size=224, patch_size=16, width=768, num_layers=12, num_heads=12, mlp_width=3072)
    return ViTConfig(**sizes, class_token=False, norm_eps=number(config, "layer_norm_eps", 1e-6),
                     activation=activation(config, "hidden_act", "gelu_pytorch_tanh"))


def eva_config(config):
    """EVA-g as BLIP-2 uses it: biases on queries and values alone. Arguments and errors as `clip_config`."""
    config = vision_only(config)
    expect(config, "qkv_bias", True, "a tower without biases on queries and values")
    sizes = tower_sizes(config, image_size=224, patch_size=14, width=1408, num_layers=39, num_heads=16, mlp_width=6144)
    return ViTConfig(**sizes, qkv_bias="qv", norm_eps=number(config, "layer_norm_eps", 1e-6),
                     activation=activation(config, "hidden_act", "gelu"))


# Published layouts of pairs of towers, picture and caption: CLIP and SigLIP, each beside what builds it.


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
    """SigLIP, both towers. Arguments and errors as `clip_pair`; returns contrastive.SigLIP."""
    vision, text = siglip_config(config), text_of(config)
    defaults = dict(vocab_size=32000, width=768, num_layers=12, num_heads=12, mlp_width=3072, context_length=64)
    sizes = text_sizes(text, **defaults)
    pad_id = text.get("pad_token_id")
    tower = contrastive.BidirectionalTextTower(
        **sizes, pad_id=1 if pad_id is None else pad_id, norm_eps=number(text, "layer_norm_eps", 1e-6),
        activation=activation(text, "hidden_act", "gelu_pytorch_tanh"),
    )
    return contrastive.SigLIP(ViT(vision), tower, sizes["width"])
