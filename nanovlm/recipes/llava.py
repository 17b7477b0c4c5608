"""LLaVA: a CLIP tower, one projector, a Vicuna. Every later composition is measured against this simplest one.

            LLaVA, arXiv:2304.08485, size "linear"    LLaVA-1.5, arXiv:2310.03744, size "full"
  vision    CLIP ViT-L/14, 224 pixels                 CLIP ViT-L/14, 336 pixels
            output of block 23 of 24, without the class token, without CLIP's last norm
  bridge    one linear layer, 256 tokens              linear, GELU, linear, 576 tokens
  decoder   Vicuna-7B v1.1, 32000 words               Vicuna-7B v1.5, 32064 words (2 added, then padded)
  stages    align (bridge), then instruct (bridge and language model); the tower stays frozen
  layout    the original's                            llava-1.5-7b-hf's: 7,063,427,072 parameters

LLaVA-1.5's stages are those of its released scripts (haotian-liu/LLaVA c121f04), LLaVA's `align` is its paper's, its
`instruct` Table 6 of "Vision-Language Instruction Tuning: A Review and Analysis", which tunes LLaVA-7B on eight GPUs.
Differs from them: bfloat16 for float16, which would need its loss scaled.
"""

import math

from nanovlm.data.templates import LLAVA, PLAIN
from nanovlm.decoder import Decoder
from nanovlm.generation.sampler import Decoding
from nanovlm.projector import LinearProjector, MLPProjector
from nanovlm.published.language import LLAMA, expect, llama_config, text_section
from nanovlm.published.vision import CLIP, clip_config
from nanovlm.published.weights import Alias, prefixed
from nanovlm.recipes.papers import SIZES, Expected, features, published_recipe, shrinking, stage
from nanovlm.vit import ViT
from nanovlm.vlm import VLM

CONFIGS = SIZES["llava"]  # a language model's missing sizes are LLaMA-7B's
CLIP_L = CONFIGS["full"]["vision_config"]
PROJECTORS = {"linear": LinearProjector, "mlp2x_gelu": MLPProjector}


def nested(config):
    """Either form of config.json as Hugging Face's; the original's is Vicuna's with `mm_...` added."""
    if "vision_config" not in config and {"mm_hidden_size", "mm_vision_tower"} & config.keys():
        tower = str(config.get("mm_vision_tower", "openai/clip-vit-large-patch14"))
        config = {
            "vision_config": CLIP_L | {"image_size": 336 if tower.endswith("336") else 224},
            "text_config": config,
            "vision_feature_layer": config.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": config.get("mm_vision_select_feature", "patch"),
            "mm_projector_type": config.get("mm_projector_type", "linear"),
        }
    kind = config.get("mm_projector_type", "mlp2x_gelu")
    if kind not in PROJECTORS:
        raise ValueError(f"config: mm_projector_type is {kind!r}; only {' and '.join(PROJECTORS)} can be built")
    return {"vision_config": CLIP_L, "mm_projector_type": kind} | config


def build(config):
    """LLaVA or LLaVA-1.5, of Hugging Face's config.json or the original's: vlm.VLM.

    In the first, `mm_projector_type` "linear" asks for one layer; what it leaves out is LLaVA-1.5-7B's. Raises:
    ValueError for what cannot be built.
    """
    config = nested(config)
    expect(config, projector_hidden_act="gelu", multimodal_projector_bias=True)
    llm = llama_config(text_section(config))
    tower = features(clip_config(config["vision_config"]), config.get("vision_feature_layer", -2),
                     config.get("vision_feature_select_strategy", "default"))
    projector = PROJECTORS[config["mm_projector_type"]](tower.width, llm.width)
    return VLM(ViT(tower), projector, Decoder(llm))


HUGGING_FACE = (
    *prefixed(CLIP, "vision_tower.", "vision."),
    ("multi_modal_projector.linear_1.{p}", "bridge.linear.{p}"),
    ("multi_modal_projector.linear_2.{p}", "bridge.linear_2.{p}"),
    *prefixed(LLAMA, "language_model.", "decoder."),
    # transformers 4.52 and later, in memory
    Alias("model.vision_tower.vision_model.{rest}", "vision_tower.vision_model.{rest}"),
    Alias("model.vision_tower.{rest}", "vision_tower.vision_model.{rest}"),
    Alias("model.multi_modal_projector.{rest}", "multi_modal_projector.{rest}"),
    Alias("model.language_model.{rest}", "language_model.model.{rest}"),
    Alias("lm_head.weight", "language_model.lm_head.weight"),
    # the original
    Alias("model.vision_tower.vision_tower.{rest}", "vision_tower.{rest}"),
    Alias("model.mm_projector.0.{p}", "multi_modal_projector.linear_1.{p}"),
    Alias("model.mm_projector.2.{p}", "multi_modal_projector.linear_2.{p}"),
    Alias("model.mm_projector.{p}", "multi_modal_projector.linear_1.{p}"),
    Alias("model.{rest}", "language_model.model.{rest}"),
)
ORIGINAL = (
    *prefixed(CLIP, "model.vision_tower.vision_tower.", "vision."),
    ("model.mm_projector.{p}", "bridge.linear.{p}"),
    *prefixed(LLAMA, "", "decoder."),
)


def LAYOUT(config):
    """Published names on the left, ours on the right.

    Hugging Face's layout, which also reads the original's names; one linear layer has no place in it, so that LLaVA is
    written as the original.
    """
    return ORIGINAL if nested(config)["mm_projector_type"] == "linear" else HUGGING_FACE


def epoch(name, learning_rate, parts, source, examples, batch_size, **others):
    """One epoch of a data set: AdamW at a cosine after 3% of warm-up, as in all of LLaVA's scripts."""
    steps = math.ceil(examples / batch_size)
    return stage(name, dict.fromkeys(parts, learning_rate), {source: 1.0}, steps, batch_size, betas=(0.9, 0.999),
                 schedule="cosine", warmup_steps=math.ceil(0.03 * steps), start_lr_factor=0.0, max_tokens=2048,
                 **others)


CAPTIONS, MIX = ("llava_pretrain_558k", 558_128), ("llava_mix_665k", 665_298)
BRIDGE, BOTH = ("bridge",), ("bridge", "embedding", "language_model", "lm_head")
STAGES = {
    "full": (
        epoch("align", 1e-3, BRIDGE, *CAPTIONS, 256, image_size=336, clip=None),
        epoch("instruct", 2e-5, BOTH, *MIX, 128, image_size=336, image_fit="pad", clip=None),
    ),
    "linear": (
        epoch("align", 2e-3, BRIDGE, *CAPTIONS, 128, image_size=224),
        # Table 6: 4 examples, twice, on 8 GPUs
        epoch("instruct", 2e-5, BOTH, "llava_instruct_158k", 158_000, 64, image_size=224),
    ),
}


def stages(size, smoke):
    """The two stages of LLaVA or LLaVA-1.5."""
    pixels = {224: 28, 336: 28}  # in the paper: at a tiny size
    return shrinking(STAGES["linear" if "linear" in size else "full"], pixels)(size, smoke)


DECODINGS = {  # what ends a reply is the template's, see templates.end_ids
    "default": Decoding(max_new_tokens=128),  # all of its evaluations are greedy
    "long": Decoding(max_new_tokens=1024),
    "demo": Decoding(max_new_tokens=1024, do_sample=True, temperature=0.2),
}

RECIPE = published_recipe(
    "llava", build, LAYOUT, CONFIGS, stages=stages, template=LLAVA, decodings=DECODINGS,
    stage_templates={"align": PLAIN},
    expected={"align": Expected(text_tokens=20), "instruct": Expected(text_tokens=300)},
)  # fmt: skip
