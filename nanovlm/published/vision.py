"""Published layouts of vision towers: CLIP, SigLIP, and EVA-g in two spellings; alone, or as a pair with a text tower.

`clip_config`, `siglip_config` and `eva_config` build the whole published tower. Which of its features a
vision-language model takes is the recipe's choice (`dataclasses.replace(config, feature_layer=23)`).
"""

from torch import nn

from nanovlm import contrastive
from nanovlm.published.language import activation, expect, number, sizes
from nanovlm.published.weights import Alias, Entry, Published, Unread, prefixed
from nanovlm.vit import ViT, ViTConfig

QKV = tuple(f"blocks.{{i}}.attention.{part}" for part in "qkv")
NORMS_AND_MLP = (
    ("encoder.layers.{i}.layer_norm{j}.{p}", "blocks.{i}.norm_{j}.{p}"),
    ("encoder.layers.{i}.mlp.fc{j}.{p}", "blocks.{i}.fc_{j}.{p}"),
)
BLOCKS = (
    *((f"encoder.layers.{{i}}.self_attn.{part[-1]}_proj.{{p}}", f"{part}.{{p}}") for part in QKV),
    ("encoder.layers.{i}.self_attn.out_proj.{p}", "blocks.{i}.attention.o.{p}"),
    *NORMS_AND_MLP,
    ("embeddings.position_embedding.weight", "positions"),
    Unread("embeddings.position_ids", "0, 1, 2 ..."),
)
PREFIX = Alias("{rest}", "vision_model.{rest}")  # a tower saved alone by transformers 5 has no prefix
CLIP = SIGLIP = (
    *prefixed((
        ("embeddings.class_embedding", "class_token"),  # CLIP alone, as the first norm; its patches have no bias
        ("embeddings.patch_embedding.{p}", "patch_embedding.{p}"),
        ("pre_layrnorm.{p}", "pre_norm.{p}"),  # published with this spelling
        *BLOCKS,
        ("post_layernorm.{p}", "post_norm.{p}"),
    ), "vision_model."),
    PREFIX,
)
FUSED_QKV = tuple(f"{part}.weight" for part in QKV)
# EVA-g inside BLIP-2's file; the third of the bias that belongs to the keys is zero and has no effect on a softmax
EVA = (
    *prefixed((
        Entry("embeddings.class_embedding", "class_token", unit_axes=(0, 1)),
        ("embeddings.patch_embedding.{p}", "patch_embedding.{p}"),
        Entry("embeddings.position_embedding", "positions", unit_axes=(0,)),
        Entry("encoder.layers.{i}.self_attn.qkv.weight", FUSED_QKV),
        Entry("encoder.layers.{i}.self_attn.qkv.bias", (f"{QKV[0]}.bias", None, f"{QKV[2]}.bias")),
        ("encoder.layers.{i}.self_attn.projection.{p}", "blocks.{i}.attention.o.{p}"),
        *NORMS_AND_MLP,
        ("post_layernorm.{p}", "post_norm.{p}"),
    ), "vision_model."),
    PREFIX,
)


EVA_AUTHORS = (  # as the authors of EVA spell it, and Lynx after them
    Entry("cls_token", "class_token", unit_axes=(0, 1)),
    Entry("pos_embed", "positions", unit_axes=(0,)),
    ("patch_embed.proj.{p}", "patch_embedding.{p}"),
    ("blocks.{i}.norm{j}.{p}", "blocks.{i}.norm_{j}.{p}"),
    ("blocks.{i}.attn.proj.{p}", "blocks.{i}.attention.o.{p}"),
    ("blocks.{i}.mlp.fc{j}.{p}", "blocks.{i}.fc_{j}.{p}"),
)


def eva_original(num_blocks):
    """EVA-g as its authors spell it (eva_vit_g.pth, EVA01_g_psz14.pt); the papers take nothing behind block 39."""
    return (
        *EVA_AUTHORS,
        Entry("blocks.{i}.attn.qkv.weight", FUSED_QKV),
        *((f"blocks.{{i}}.attn.{part}_bias", f"blocks.{{i}}.attention.{part}.bias") for part in "qv"),
        ("norm.{p}", "post_norm.{p}"),
        Unread(f"blocks.{num_blocks}.{{rest}}", "a block behind the features that are used"),
        *(Unread(name, "serves EVA's own loss")
          for name in ("norm.{p}", "fc_norm.{p}", "head.{p}", "lm_head.{p}", "mask_token")),
        Alias("visual.{rest}", "{rest}"),
    )


OPEN_CLIP = (  # CLIP's tower as open_clip and OpenAI spell it
    ("class_embedding", "class_token"),
    ("positional_embedding", "positions"),
    ("conv1.weight", "patch_embedding.weight"),
    ("ln_pre.{p}", "pre_norm.{p}"),
    ("transformer.resblocks.{i}.ln_{j}.{p}", "blocks.{i}.norm_{j}.{p}"),
    *(Entry(f"transformer.resblocks.{{i}}.attn.in_proj_{p}", tuple(f"{part}.{p}" for part in QKV))
      for p in ("weight", "bias")),
    ("transformer.resblocks.{i}.attn.out_proj.{p}", "blocks.{i}.attention.o.{p}"),
    ("transformer.resblocks.{i}.mlp.c_fc.{p}", "blocks.{i}.fc_1.{p}"),
    ("transformer.resblocks.{i}.mlp.c_proj.{p}", "blocks.{i}.fc_2.{p}"),
    *(Unread(name, "serves CLIP's own loss") for name in ("ln_post.{p}", "proj")),
)
OPEN_CLIP_PAIR = (  # the same in a file that holds the text tower as well
    *prefixed(OPEN_CLIP, "visual."),
    *(Unread(name, "serves the pair with a text tower") for name in (
        "transformer.{rest}", "positional_embedding", "token_embedding.weight", "ln_final.{p}", "text_projection",
        "logit_scale")),
)
TRAINED_HERE = (("vision.{rest}", "{rest}"), *(  # a folder of train.py
    Unread(f"{part}.{{rest}}", "serves the model that the tower was trained in") for part in ("bridge", "decoder")))

# What a file may hold beside its tower
OTHER_SIDE = tuple(Unread(name, "serves the pair with a text tower") for name in (
    "text_model.{rest}", "text_projection.weight", "visual_projection.weight", "logit_scale", "logit_bias",
    "vision_model.head.{rest}"))
BLIP2_REST = tuple(Unread(name, "BLIP-2's own bridge and language model") for name in (
    "query_tokens", "qformer.{rest}", "language_projection.{p}", "language_model.{rest}"))
BEHIND = (Unread("vision_model.post_layernorm.{p}", "a norm behind the features that this model takes"),)

TEXT = prefixed((
    ("embeddings.token_embedding.weight", "embedding.weight"), *BLOCKS, ("final_layer_norm.{p}", "norm.{p}")
), "text_model.", "text.")
CLIP_PAIR = (
    *prefixed(CLIP, ours="vision."),
    *TEXT,
    ("visual_projection.weight", "project_image.weight"),
    ("text_projection.weight", "project_text.weight"),
    ("logit_scale", "log_scale"),
)
SIGLIP_PAIR = (  # of a tower alone, too, whose files hold its attention pooling
    *prefixed(SIGLIP, ours="vision."),
    Entry("vision_model.head.probe", "pool.probe", unit_axes=(0, 1)),
    *(Entry(f"vision_model.head.attention.in_proj_{p}", tuple(f"pool.{part}.{p}" for part in "qkv"))
      for p in ("weight", "bias")),
    ("vision_model.head.attention.out_proj.{p}", "pool.o.{p}"),
    ("vision_model.head.layernorm.{p}", "pool.norm.{p}"),
    ("vision_model.head.mlp.fc{j}.{p}", "pool.fc_{j}.{p}"),
    *TEXT,
    ("text_model.head.{p}", "project_text.{p}"),
    Entry("logit_scale", "log_scale", unit_axes=(0,)),
    Entry("logit_bias", "bias", unit_axes=(0,)),
)


def part_of_pair(config, side):
    """What a config says of its "vision" or "text" side: a dual or nested config's, or the config itself."""
    return next((config[key] for key in (f"{side}_config", side) if key in config), config)


VIT_B_16 = {"image_size": 224, "patch_size": 16, "width": 768, "num_layers": 12, "num_heads": 12, "mlp_width": 3072}


def tower_config(config, named, eps, defaults=VIT_B_16, **options):
    """A ViTConfig; named: the default activation, eps: of the norms, defaults: the sizes of the family's class."""
    return ViTConfig(**sizes(config, **defaults), norm_eps=number(config, "layer_norm_eps", eps),
                     activation=activation(config, "hidden_act", named), **options)


def clip_config(config):
    """CLIP's vision tower: ViTConfig of a config.json, dual or its own, or of its vision_config. Raises: ValueError."""
    defaults = VIT_B_16 | {"patch_size": 32}
    return tower_config(part_of_pair(config, "vision"), "quick_gelu", 1e-5, defaults, pre_norm=True, patch_bias=False)


def siglip_config(config):
    """SigLIP's vision tower: no class token; as `clip_config`."""
    return tower_config(part_of_pair(config, "vision"), "gelu_pytorch_tanh", 1e-6, class_token=False)


def eva_config(config):
    """EVA-g as BLIP-2 uses it: biases on queries and values alone; as `clip_config`."""
    config = part_of_pair(config, "vision")
    expect(config, qkv_bias=True)
    defaults = {"image_size": 224, "patch_size": 14, "width": 1408, "num_layers": 39, "num_heads": 16,
                "mlp_width": 6144}
    return tower_config(config, "gelu", 1e-6, defaults, qkv_bias="qv")


def is_pair(config):
    """bool, whether a config describes both towers."""
    return "text_config" in config or "text" in config


def clip_pair(config):
    """CLIP, both towers, of a dual config.json, or a manifest's with "vision" and "text": contrastive.CLIP."""
    vision, text = clip_config(config), part_of_pair(config, "text")
    known = sizes(text, vocab_size=49408, width=512, num_layers=12, num_heads=8, mlp_width=2048, context_length=77)
    eps = number(text, "layer_norm_eps", 1e-5)
    tower = contrastive.TextTower(**known, activation=activation(text, "hidden_act", "quick_gelu"),
                                  norm_eps=eps, last_norm_eps=eps)
    return contrastive.CLIP(ViT(vision), vision.width, tower, known["width"], number(config, "projection_dim", 512))


def siglip_pair(config):
    """SigLIP, both towers, as `clip_pair`: contrastive.SigLIP."""
    vision, text = siglip_config(config), part_of_pair(config, "text")
    known = sizes(text, vocab_size=32000, width=768, num_layers=12, num_heads=12, mlp_width=3072, context_length=64)
    tower = contrastive.BidirectionalTextTower(
        **known, pad_id=text.get("pad_token_id", 1), norm_eps=number(text, "layer_norm_eps", 1e-6),
        activation=activation(text, "hidden_act", "gelu_pytorch_tanh"),
    )
    return contrastive.SigLIP(ViT(vision), tower, known["width"])


def build_siglip(config):
    """SigLIP of a config: contrastive.SigLIP if it describes both towers, else the tower with its pooling."""
    if is_pair(config):
        return siglip_pair(config)
    one = siglip_config(config)
    pool = contrastive.AttentionPool(one.width, one.num_heads, one.mlp_width, one.activation, one.norm_eps)
    return nn.ModuleDict({"vision": ViT(one), "pool": pool})


TOWERS = {
    "clip": Published("clip", lambda config: clip_pair(config) if is_pair(config) else ViT(clip_config(config)),
                      lambda config: CLIP_PAIR if is_pair(config) else CLIP),
    "siglip": Published("siglip", build_siglip, lambda config: SIGLIP_PAIR),
    "eva": Published("eva", lambda config: ViT(eva_config(config)), lambda config: EVA),
}


def vision_of(model):
    """The tower of a model: ViT, None where it reads no pictures (an OpenFlamingo may start from features)."""
    return model if isinstance(model, ViT) else getattr(model, "vision", None)


def resize(model, image_size):
    """Make a model's tower read pictures of this many pixels; None, 0: as it is. Raises: ValueError without a tower."""
    if image_size and vision_of(model) is None:
        raise ValueError("image_size was given, but this model reads no pictures")
    if image_size:
        vision_of(model).resize(image_size)
