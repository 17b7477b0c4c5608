"""Lynx: EVA's tower, a Perceiver resampler, and Vicuna-7B, frozen, with adapters that learn to read the pictures.

  vision   EVA-CLIP ViT-g, 39 of its 40 blocks and no norm behind them, 420 pixels, 901 features   Sec. 2.1
  bridge   resampler of 3 layers: 32 tokens for a picture or for a clip of 5 frames               Sec. 2.1
  decoder  Vicuna-7B v1.1 with an adapter after layers 0, 2, ... 30                               Sec. 2.1
  rows     the 32 image tokens, then BOS and the text, all of it in lower case                    Table 13
  stages   align at 224 pixels, raise the resolution, instruct                                    Table 8

"What Matters in Training a GPT4-Style Language Model with Multimodal Inputs?", arXiv:2307.02469; code
bytedance/lynx-llm 24680d1, which does not train. The released code decides what loads, the paper what trains.
Where the two differ:
- "after every 2 blocks" is after layers 0, 2, 4 ... (the code), not 1, 3, 5;
- the second stage trains the tower (the paper); the released config freezes it, and the released file probably holds
  no tower but only the resampler, the adapters and the frame embedding: the rest is EVA's and Vicuna's own;
- pictures are cropped at random, 90 to 100% of their area (the code's training transform, which nothing calls);
- the code keeps the last 40 tokens of a prompt, which cuts dialogues: no such limit here;
- the code pads between image tokens and text; here padding stands at an end of a row, its positions are explicit.
"""

import dataclasses
import json
import re
from pathlib import Path

from nanovlm.data.templates import LYNX
from nanovlm.decoder import Decoder, LayerOptions
from nanovlm.generation.sampler import Decoding
from nanovlm.published.language import LLAMA, complete, llama_config
from nanovlm.published.vision import EVA_AUTHORS
from nanovlm.published.weights import Alias, Entry, prefixed
from nanovlm.recipes.papers import RESAMPLER, SIZES, Expected, published_recipe, shrinking, stage
from nanovlm.resampler import Resampler
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

CONFIGS = SIZES["lynx"]


def build(config):
    """Lynx: vlm.VLM. Raises: ValueError for sizes that do not go together.

    config: dict with vision, bridge, llm (Vicuna's own config.json), adapter_freq, num_frames and, unless the adapters
      are half as wide as the model, adapter_width; what it leaves out is as released.
    """
    config = complete(config, CONFIGS["full"])
    eva, bridge, llm = config["vision"], config["bridge"], llama_config(config["llm"])
    mlp_width = eva.get("mlp_width", int(eva["width"] * eva["mlp_ratio"]))
    sizes = eva["image_size"], eva["patch_size"], eva["width"], eva["depth"], eva["heads"], mlp_width
    vision = ViT(ViTConfig(*sizes, post_norm=False, qkv_bias="qv", norm_eps=eva["eps"]))
    resampler = Resampler(
        eva["width"], llm.width, bridge["num_latents"], bridge["depth"], bridge["heads"], bridge["head_width"],
        ffn_width=bridge.get("ffn_width", 4 * llm.width), max_frames=config["num_frames"],
    )  # fmt: skip
    adapter = LayerOptions(adapter_width=config.get("adapter_width", llm.width // 2))
    every = config["adapter_freq"]  # after layers 0, 2, 4 ...
    layers = tuple(adapter if i % every == 0 else LayerOptions() for i in range(len(llm.layers)))
    return VLM(vision, resampler, Decoder(dataclasses.replace(llm, layers=layers)))


VISION = (  # the keys have no bias
    *EVA_AUTHORS, *((f"blocks.{{i}}.attn.{part}_proj.{{p}}", f"blocks.{{i}}.attention.{part}.{{p}}") for part in "qkv"),
)
ADAPTERS = (
    ("model.layers.{i}.output_adapter.adapter_norm_before.{p}", "layers.{i}.adapter.norm.{p}"),
    ("model.layers.{i}.output_adapter.adapter_down.{p}", "layers.{i}.adapter.down.{p}"),
    ("model.layers.{i}.output_adapter.adapter_up.{p}", "layers.{i}.adapter.up.{p}"),
    ("model.layers.{i}.output_adapter.scaling", "layers.{i}.adapter.scale"),
)


def LAYOUT(config):
    """Published names on the left, ours on the right: the layout of `pretrain_lynx.pt` and `finetune_lynx.pt`."""
    return (
        *prefixed(VISION, "vision_encoder.", "vision."),
        *prefixed(RESAMPLER, "bridge.", "bridge."),
        Entry("absolute_frame_pos_embed", "bridge.frame_embedding", unit_axes=(0, 2)),
        *prefixed((*ADAPTERS, *LLAMA), "LLM.", "decoder."),
        Alias("model.{rest}", "{rest}"),  # files that were saved from a wrapper
    )


DATASETS = json.loads(Path(__file__).with_name("lynx_mixture.json").read_text())["datasets"]
POOLS = json.loads(Path(__file__).with_name("lynx_prompts.json").read_text())  # the first of each as Table 13 has it


def mixture(column, *without):
    """Shares of Table 12 in percent: {dataset: share}; `without`: kinds of datasets to leave out."""
    return {data["name"]: data[column] for data in DATASETS if data[column] and data["kind"] not in without}


def sharp(*names):
    """Shares of data sets that join when pictures grow: as many a record as VQAv2's, which stays. {dataset: share}."""
    sizes = {data["name"]: data["size"] for data in DATASETS}
    thousands = {name: float(sizes[name].rstrip("K")) for name in (*names, "VQAv2")}
    rate = mixture("pretrain_percent")["VQAv2"] / thousands["VQAv2"]
    return {name: round(rate * thousands[name], 3) for name in names}


ALIGNED = ("adapters", "bridge")  # the frame embedding belongs to the bridge
TABLE_8 = dict(  # "warmup lr end" is a tenth of each rate: where the warm-up starts and the decay stops
    betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, schedule="linear", start_lr_factor=0.1, end_lr_factor=0.1,
    image_fit="crop", augmentation="crop",  # the code's training transform
    clip=None, max_tokens=1024,  # neither is stated
)
STAGES = (
    # Sec. 2.2: 224 pixels, batch 1536; steps, warm-up and rate of Table 8, shares of Table 12
    stage("align", dict.fromkeys(ALIGNED, 1e-4), mixture("pretrain_percent"), 100_000, 1536, warmup_steps=5_000,
          image_size=224, **TABLE_8),
    # Sec. 2.2 leaves out the "large-scale noise image-text pairs" and adds "table reading and OCR", without shares:
    # ours are the first stage's, and for what Table 12 has of these two kinds in its last column alone, see `sharp`
    stage("resolution", dict.fromkeys((*ALIGNED, "vision"), 1e-5),
          mixture("pretrain_percent", "image-text pair") | sharp("WebSRC", "TextVQA", "STVQA"), 10_000, 448,
          warmup_steps=500, image_size=420, **TABLE_8),
    # Sec. 2.2: batch 480, of text, pictures and clips
    stage("instruct", dict.fromkeys(ALIGNED, 2e-5), mixture("finetune_percent"), 20_000, 480, warmup_steps=1_000,
          image_size=420, **TABLE_8),
)


def table_9(tokens, beams, top_p, top_k, length_penalty, ngram, do_sample):
    """One row of Table 9; at least one token before the end, and lengths counted as its transformers 4.28 does."""
    return Decoding(
        max_new_tokens=tokens, num_beams=beams, top_p=top_p, top_k=top_k, length_penalty=length_penalty,
        no_repeat_ngram_size=ngram, do_sample=do_sample, min_new_tokens=1, counts_dummy_token=True,
    )  # fmt: skip


SHORT = table_9(64, 5, 1.0, 1, -2.0, 2, False)
DESCRIBE = table_9(128, 1, 0.9, 3, 1.0, 3, True)  # the first round of describe-first
OPEN = table_9(256, 3, 0.9, 3, 1.0, 3, True)
DECODINGS = {
    "default": OPEN, "image_description": SHORT, "open_vqa_image": SHORT, "video_description": DESCRIBE,
    "open_vqa_video": table_9(128, 3, 1.0, 1, -1.0, 3, False), "owleval_description": DESCRIBE, "owleval": OPEN,
    "visit_bench_description": DESCRIBE, "visit_bench": OPEN, "mme": SHORT, "demo": OPEN, "describe": DESCRIBE,
    "released": table_9(64, 5, 0.9, 3, -2.0, 2, True),  # the repository's own default, which no table of the paper uses
}  # fmt: skip

# How Lynx asks: at least three prompts for each task, one of which is drawn for every record (Sec. 2.3). GPT-4
# continued them on "Here are some instructions that define a visual-language task. Continue to write 15 instructions
# with the same meaning: 1) PROMPT1; 2) PROMPT2; 3) PROMPT3;". Published is one prompt of each data set: it comes first
# in each pool. The others are ours; `python -m nanovlm.vlit` asks a language model for more.
AS_THEY_ARE = ("[QUESTION]", "[INSTRUCTION]", "[DIALOG]")  # the data set's own words
SLOT = re.compile(r"\[[A-Z]+\](?: Options: \[OPTIONS\])?")  # a file writes a question and its options as one text


def ask(data):
    """A data set's prompts in the form that data/datasets.py takes: tuple of str; a question alone gets its mark."""
    pool = next(pool for pool in POOLS if pool[0] == data["prompt"])
    if data["kind"].startswith("video"):
        pool = [prompt.replace("the image", "the video") for prompt in pool]
    mark = lambda place: "{question?}" if place[0] == "[QUESTION]" else "{question}"
    return tuple(SLOT.sub(mark, prompt) for prompt in pool)


PROMPTS = {data["name"]: ask(data) for data in DATASETS if data["prompt"] not in AS_THEY_ARE}

CONTENTS = (
    "the released files probably hold bridge.*, the adapters and absolute_frame_pos_embed alone; EVA's tower and "
    "Vicuna-7B v1.1 come from their own files"
)
RECIPE = published_recipe(
    "lynx", build, LAYOUT, CONFIGS, CONTENTS, stages=shrinking(STAGES, {224: 28, 420: 56}), template=LYNX,
    decodings=DECODINGS, prompts=PROMPTS,
    expected={
        "align": Expected(40, num_gpus=32, hours=72, source="Table 8"),
        "resolution": Expected(40, num_gpus=32, hours=8, source="Table 8"),
        "instruct": Expected(100, num_gpus=24, hours=16, source="Table 8"),
    },
)  # fmt: skip
