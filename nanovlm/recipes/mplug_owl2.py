"""mPLUG-Owl2: pictures and words share one language model, but not its norms, keys and values.

  vision   CLIP ViT-L/14 at 448 pixels: last layer, its norm, class token kept, 1025 features     Sec. 3.2
  bridge   visual abstractor of 6 layers: 64 queries and a learned end, 65 tokens a picture       Sec. 3.2
  decoder  LLaMA-2-7B, every layer modality-adaptive                                              Sec. 3.3
  stages   align tower, abstractor and image copies at 224 pixels; then everything at 448         Sec. 3.4, 4.1

"mPLUG-Owl2: Revolutionizing Multi-modal Large Language Model with Modality Collaboration", arXiv:2311.04257; code
X-PLUG/mPLUG-Owl 0f3068f. The released code decides what loads, the paper what trains. Where the two differ:
- modality 0 is text and 1 vision, and both norms of a layer are split (the code);
- every norm has eps 1e-6 and the context is 2048, although CLIP has 1e-5 and LLaMA-2 1e-5 and 4096 (the code);
- both stages train the tower, with layer-wise decay 0.9, and AdamW has betas 0.9, 0.98 and eps 1e-6 (the paper); the
  released fine-tuning script freezes the tower and takes AdamW's defaults;
- no system sentence (the code, at inference; its fine-tuning script writes Vicuna's);
- pictures are stretched to a square (the code, for the reported results; its other scripts pad or crop).
The paper trains "a part of" the modality-adaptive module in its first stage: the image copies, which are what is new.
"""

import dataclasses

from nanovlm.abstractor import Abstractor
from nanovlm.data.templates import MPLUG_OWL2
from nanovlm.decoder import Decoder, LayerOptions
from nanovlm.generation.sampler import Decoding
from nanovlm.published.language import LLAMA, complete, expect, llama_config
from nanovlm.published.vision import clip_config
from nanovlm.published.weights import Entry, Unread, prefixed
from nanovlm.recipes.papers import SIZES, Expected, published_recipe, shrinking, stage
from nanovlm.vit import ViT
from nanovlm.vlm import VLM

CONFIGS = SIZES["mplug_owl2"]


def sizes(config):
    """A config in one form, with vision, abstractor and llm, completed as released; the file lays out the last."""
    if "visual_config" in config:
        visual = config["visual_config"]
        config = {"llm": config, "vision": visual.get("visual_model"), "abstractor": visual.get("visual_abstractor")}
    vision = config.get("vision") or {}
    return complete(config | {"vision": {"layer_norm_eps": vision.get("eps")} | vision}, CONFIGS["full"])


def build(config):
    """mPLUG-Owl2 of a dict with vision, abstractor and llm, or of the released config.json: vlm.VLM.

    What it leaves out is as released. Raises: ValueError for sizes that do not go together.
    """
    config = sizes(config)
    vision, queries, llm = ViT(clip_config(config["vision"])), config["abstractor"], llama_config(config["llm"])
    expect(queries, grid_size=vision.config.image_size // vision.config.patch_size)
    abstractor = Abstractor(
        vision.config.width, llm.width, queries["num_learnable_queries"], queries["num_hidden_layers"],
        queries["num_attention_heads"], queries["intermediate_size"], ffn_norm_eps=queries["layer_norm_eps"],
    )  # fmt: skip
    layers = (LayerOptions(modality_adaptive=True),) * len(llm.layers)
    return VLM(vision, abstractor, Decoder(dataclasses.replace(llm, layers=layers)))


def vision_layout(num_heads):
    """The tower's table: CLIP's, rewritten, with q, k and v in one matrix, interleaved head by head."""
    qkv = tuple(f"blocks.{{i}}.attention.{name}.{{p}}" for name in "qkv")
    return (
        Entry("embeddings.cls_token", "class_token", unit_axes=(0, 1)),
        Entry("embeddings.position_embedding", "positions", unit_axes=(0,)),
        ("embeddings.patch_embed.weight", "patch_embedding.weight"),
        ("embeddings.pre_layernorm.{p}", "pre_norm.{p}"),
        ("encoder.layers.{i}.input_layernorm.{p}", "blocks.{i}.norm_1.{p}"),
        Entry("encoder.layers.{i}.self_attn.query_key_value.{p}", qkv, num_heads),
        ("encoder.layers.{i}.self_attn.dense.{p}", "blocks.{i}.attention.o.{p}"),
        ("encoder.layers.{i}.post_attention_layernorm.{p}", "blocks.{i}.norm_2.{p}"),
        ("encoder.layers.{i}.mlp.fc{j}.{p}", "blocks.{i}.fc_{j}.{p}"),
        ("post_layernorm.{p}", "post_norm.{p}"),
    )


ABSTRACTOR = (
    Entry("query_embeds", "queries", unit_axes=(0,)),
    ("encoder.layers.{i}.crossattention.norm1.{p}", "layers.{i}.norm_queries.{p}"),
    ("encoder.layers.{i}.crossattention.normk.{p}", "layers.{i}.norm_patches.{p}"),
    ("encoder.layers.{i}.crossattention.attention.query.{p}", "layers.{i}.q.{p}"),
    ("encoder.layers.{i}.crossattention.attention.key.{p}", "layers.{i}.k.{p}"),
    ("encoder.layers.{i}.crossattention.attention.value.{p}", "layers.{i}.v.{p}"),
    ("encoder.layers.{i}.crossattention.output.out_proj.{p}", "layers.{i}.o.{p}"),
    ("encoder.layers.{i}.crossattention.output.norm2.{p}", "layers.{i}.norm_ffn.{p}"),
    ("encoder.layers.{i}.crossattention.output.mlp.w{j}.{p}", "layers.{i}.w{j}.{p}"),
    ("encoder.layers.{i}.crossattention.output.mlp.ffn_ln.{p}", "layers.{i}.ffn_norm.{p}"),
    ("visual_fc.{p}", "project.{p}"),
    Entry("vit_eos", "end", unit_axes=(0, 1)),
    Unread("encoder.layers.{i}.crossattention.attention.q_pos_embed", "sines and cosines of the queries"),
    Unread("encoder.layers.{i}.crossattention.attention.k_pos_embed", "sines and cosines of rows and columns"),
)
COPIES = tuple(
    (f"model.layers.{{i}}.{theirs}.multiway.{number}.{{p}}", f"layers.{{i}}.{ours}.{modality}.{{p}}")
    for theirs, ours in (
        ("input_layernorm", "norm_1"), ("self_attn.k_proj", "attention.k"), ("self_attn.v_proj", "attention.v"),
        ("post_attention_layernorm", "norm_2"),
    )
    for number, modality in enumerate(("text", "vision"))  # the paper numbers them the other way round
)  # fmt: skip


def LAYOUT(config):
    """Published names on the left, ours on the right: the layout of MAGAer13/mplug-owl2-llama2-7b."""
    return (
        *prefixed(vision_layout(sizes(config)["vision"]["num_attention_heads"]), "model.vision_model.", "vision."),
        *prefixed(ABSTRACTOR, "model.visual_abstractor.", "bridge."),
        *prefixed((*COPIES, *LLAMA), "", "decoder."),
    )


SETTINGS = dict(  # Sec. 4.1
    betas=(0.9, 0.98), eps=1e-6, schedule="cosine", layer_decay={"vision": 0.9}, start_lr_factor=0.0,
    image_fit="squash",  # as its evaluation scripts do
)  # fmt: skip
STAGES = (
    # Sec. 4.1: 348 million pairs, augmented as BLIP-2's; the paper names the sets without their shares, and two decays
    # come from the authors' tracker
    stage("align", dict.fromkeys(("vision", "bridge", "vision_branch"), 1e-4),
          dict.fromkeys(("CC3M", "CC12M", "COCO", "LAION-en", "COYO", "DataComp"), 1.0), 42_500, 8192,
          warmup_steps=1_000, weight_decay=0.05, image_size=224, max_tokens=256, copy_vision_branch=True,
          augmentation="crop_flip", **SETTINGS),
    # Sec. 4.1: one epoch; the 1.23 million examples are not stated, the warm-up is the fine-tuning script's 3%
    stage("instruct",
          dict.fromkeys(("vision", "bridge", "embedding", "language_model", "vision_branch", "lm_head"), 2e-5),
          dict.fromkeys(("TextCaps", "COCO", "VQAv2", "OKVQA", "OCR-VQA", "GQA", "A-OKVQA", "RefCOCO", "VisualGenome",
                         "LLaVA-instruct-150K", "ShareGPT-80K", "SlimOrca"), 1.0),
          4_800, 256, warmup_steps=144, image_size=448, max_tokens=2048, **SETTINGS),
)  # fmt: skip


DECODINGS = {
    "default": Decoding(max_new_tokens=512, do_sample=True, temperature=0.2),  # the released command line
    "sample": Decoding(max_new_tokens=512, do_sample=True, temperature=0.7),  # its README
    "vqa": Decoding(max_new_tokens=10, min_new_tokens=1),  # VQA, MME, MMBench, MMMU
    "caption": Decoding(max_new_tokens=60, min_new_tokens=8),  # Flickr30k
}

RECIPE = published_recipe(
    "mplug_owl2", build, LAYOUT, CONFIGS, "the released files hold the whole model; position tables are computed",
    stages=shrinking(STAGES, {224: 28, 448: 56}), template=MPLUG_OWL2, decodings=DECODINGS,
    expected={"align": Expected(25, num_gpus=64), "instruct": Expected(250, num_gpus=64)},  # the paper states no time
)  # fmt: skip
