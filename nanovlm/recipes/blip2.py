"""BLIP-2: EVA's tower and OPT, both ready-made, and between them a Q-Former of 107 million parameters.

  vision   EVA-CLIP ViT-g, 39 of its 40 blocks and a norm of BLIP-2's own, 257 features at 224 pixels   Sec. 3.4
  bridge   Q-Former: BERT-base with 32 queries that read the picture in layers 0, 2, ... 10, linear map  Sec. 3.1
  decoder  OPT-2.7B, 50304 words (its 50272, then <image> and padding)                                   Sec. 3.3
  rows     32 image tokens, then BOS and the text
  layout   blip2-opt-2.7b's: 3,744,761,856 numbers, 54,912 of them the zeros that stand where the keys' bias would

BLIP-2, arXiv:2301.12597. Its first stage teaches the Q-Former to look, against text that passes through a second half
of it (contrast, matching, captions): that half is not built, its result is in every published file. The second,
`align`, is the paper's; `instruct` is Table 7 of "Vision-Language Instruction Tuning: A Review and Analysis", which
begins with a model tuned on COCO captions at 364 pixels: size "full_364", the same weights with the position table
resized from 16 x 16 to 26 x 26 patches.
Differs from Table 7: answers are generated, not ranked among 128 candidates.
"""

from nanovlm.data.templates import BLIP2, BLIP2_CAPTION
from nanovlm.decoder import Decoder
from nanovlm.generation.sampler import Decoding
from nanovlm.published.language import OPT, complete, expect, opt_config
from nanovlm.published.vision import EVA, eva_config
from nanovlm.published.weights import Alias, Entry, Unread, prefixed
from nanovlm.qformer import QFormer
from nanovlm.recipes.papers import SIZES, Expected, published_recipe, shrinking, stage
from nanovlm.vit import ViT
from nanovlm.vlm import VLM

CONFIGS = SIZES["blip2"]


def build(config):
    """BLIP-2 on OPT, of Hugging Face's config.json: vlm.VLM.

    What it leaves out is as transformers' classes have it: tower and Q-Former of blip2-opt-2.7b, but OPT-125m. Raises:
    ValueError for what cannot be built, such as the versions on Flan-T5.
    """
    full = CONFIGS["full"]
    config = complete(config, {key: full[key] for key in ("vision_config", "qformer_config", "num_query_tokens")})
    former, text = config["qformer_config"], config.get("text_config", {})
    expect(text, model_type="opt")
    expect(former, hidden_act="gelu", use_qformer_text_input=False, layer_norm_eps=1e-12)
    vision, llm = eva_config(config["vision_config"]), opt_config(text)
    every = former["cross_attention_frequency"]
    looks = tuple(i % every == 0 for i in range(former["num_hidden_layers"]))  # 0, 2, 4 ...
    bridge = QFormer(vision.width, llm.width, former["hidden_size"], config["num_query_tokens"],
                     former["num_attention_heads"], former["intermediate_size"], looks)
    return VLM(ViT(vision), bridge, Decoder(llm))


ATTENTION = (
    ("attention.query.{p}", "q.{p}"),
    ("attention.key.{p}", "k.{p}"),
    ("attention.value.{p}", "v.{p}"),
    ("output.dense.{p}", "o.{p}"),
    ("output.LayerNorm.{p}", "norm.{p}"),
)
QFORMER = (
    Entry("query_tokens", "queries", unit_axes=(0,)),
    ("qformer.layernorm.{p}", "norm.{p}"),
    *prefixed(ATTENTION, "qformer.encoder.layer.{i}.attention.", "layers.{i}.attention."),
    *prefixed(ATTENTION, "qformer.encoder.layer.{i}.crossattention.", "layers.{i}.cross_attention."),
    ("qformer.encoder.layer.{i}.intermediate_query.dense.{p}", "layers.{i}.fc_1.{p}"),
    ("qformer.encoder.layer.{i}.output_query.dense.{p}", "layers.{i}.fc_2.{p}"),
    ("qformer.encoder.layer.{i}.output_query.LayerNorm.{p}", "layers.{i}.ffn_norm.{p}"),
    Unread("qformer.embeddings.position_ids", "0, 1, 2 ..."),
    ("language_projection.{p}", "project.{p}"),
    # LAVIS, which adds a half that reads text
    *(Alias(f"Qformer.bert.encoder.layer.{{i}}.{kind}.self.{{rest}}",
            f"qformer.encoder.layer.{{i}}.{kind}.attention.{{rest}}") for kind in ("attention", "crossattention")),
    Alias("Qformer.bert.embeddings.LayerNorm.{p}", "qformer.layernorm.{p}"),
    Alias("Qformer.bert.{rest}", "qformer.{rest}"),
    Alias("opt_proj.{p}", "language_projection.{p}"),
)


def LAYOUT(config):
    """Published names on the left, ours on the right: the layout of blip2-opt-2.7b and its siblings on OPT."""
    words = prefixed(OPT, "language_model.", "decoder.")
    return (*prefixed(EVA, "", "vision."), *prefixed(QFORMER, "", "bridge."), *words)


SETTINGS = dict(image_fit="stretch", augmentation="crop_flip", weight_decay=0.05, schedule="cosine", clip=None)
STAGES = (
    stage(  # Sec. 3.4: the second stage, whose learning rate does not fall below 5e-5
        "align", {"bridge": 1e-4}, {"blip2_captions_129m": 1.0}, 80_000, 1920, image_size=224, betas=(0.9, 0.98),
        warmup_steps=2_000, start_lr_factor=0.0, end_lr_factor=0.5, max_tokens=64, **SETTINGS,
    ),
    stage(  # Table 7: freeze_vit is False; OPT is frozen in all of BLIP-2; 4 examples on each of 8 GPUs, one epoch
        "instruct", {"vision": 1e-5, "bridge": 1e-5}, {"vlit_158k": 1.0}, 158_000 // 32, 32, image_size=364,
        betas=(0.9, 0.999), warmup_steps=1_000, start_lr_factor=1e-3, max_tokens=128, **SETTINGS,
    ),
)


DECODINGS = {  # what ends a reply is the template's, see templates.end_ids
    "default": Decoding(max_new_tokens=30, num_beams=5, min_new_tokens=1),  # LAVIS's for captions
    "table_7": Decoding(max_new_tokens=50, num_beams=3, min_new_tokens=1),
    "vqa": Decoding(max_new_tokens=10, num_beams=5, length_penalty=-1.0, min_new_tokens=1),  # Sec. 4.1
    "greedy": Decoding(max_new_tokens=30),
}

RECIPE = published_recipe(
    "blip2", build, LAYOUT, CONFIGS, stages=shrinking(STAGES, {224: 28, 364: 42}), template=BLIP2, decodings=DECODINGS,
    stage_templates={"align": BLIP2_CAPTION},
    expected={"align": Expected(15, num_gpus=16), "instruct": Expected(100)},  # days are stated for FlanT5-XXL alone
)  # fmt: skip
