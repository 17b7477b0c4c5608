"""OpenFlamingo: pictures are not put into the row; a frozen language model looks at them through gated cross-attention.

  vision   CLIP ViT-L/14, 224 pixels: the patches as they leave the last block, without CLIP's last norm, 256 features
  bridge   resampler of 6 layers whose latents also attend to one another; 64 tokens that keep the tower's width
  decoder  MPT-1B ("mpt1b") or MPT-7B ("mpt7b"), as published: 50280 words, <|endofchunk|>, <image> and an unused row
           added; OPT-1.3B ("full"), as the review's text has it; gated cross-attention before every n-th layer (1; in
           "mpt7b" 4)
  rows     <image> is one word of the row; the text behind it sees that picture and no other
  layout   the resampler under `perceiver.`, each layer with its cross-attention, and both listed once more

OpenFlamingo, arXiv:2308.01390; Flamingo, arXiv:2204.14198; code mlfoundations/open_flamingo 655f693. `instruct` is
Table 8 of "Vision-Language Instruction Tuning: A Review and Analysis" with the rates of OpenFlamingo's training script.
Differs:
- the review's text names OPT-1.3B, its checkpoint OpenFlamingo-3B-vitl-mpt1b: both are here, trained alike;
- MPT's LayerNorms run in float32 under autocast, where its code casts to half precision first;
- weight decay reaches all matrices that train; the script spares the resampler's;
- "every n" counts layers n-1, 2n-1 ...: 1, 3, 5 for n = 2, where Lynx's adapters stand at 0, 2, 4.
"""

import dataclasses

from nanovlm.data.templates import OPEN_FLAMINGO, OPEN_FLAMINGO_CAPTION, OPEN_FLAMINGO_VQA
from nanovlm.decoder import Decoder, LayerOptions
from nanovlm.generation.chat import Form
from nanovlm.generation.sampler import Decoding
from nanovlm.published.language import (
    OPT_LAYER, OPT_REST, complete, expect, mpt_config, mpt_tables, opt_config, with_vocabulary,
)
from nanovlm.published.vision import OPEN_CLIP, clip_config
from nanovlm.published.weights import Entry, prefixed
from nanovlm.recipes.papers import RESAMPLER, SIZES, Expected, published_recipe, shrinking, stage
from nanovlm.resampler import Resampler
from nanovlm.vit import ViT
from nanovlm.vlm import VLM

CONFIGS = SIZES["open_flamingo"]
LANGUAGE = {"opt": ("full", opt_config), "mosaic_gpt": ("mpt1b", mpt_config), "mpt": ("mpt7b", mpt_config)}


def kind_of(config):
    """model_type of a config's language model: a key of LANGUAGE. Raises: ValueError for any other."""
    kind = (config.get("llm") or {}).get("model_type") or "opt"
    if kind not in LANGUAGE:
        raise ValueError(f"config: llm is of model_type {kind!r}; OpenFlamingo can be built on {', '.join(LANGUAGE)}")
    return kind


def build(config):
    """OpenFlamingo on OPT or MPT: vlm.VLM. Raises: ValueError for what cannot be built.

    config: dict with vision (CLIP's config.json; absent: no tower, the model starts from features of vision_width
      channels), resampler, cross_attn_every_n_layers, media_token_id and llm (the language model's config.json, OPT's
      if it names no model_type). What it leaves out is as released.
    """
    size, read = LANGUAGE[kind_of(config)]
    defaults = {key: value for key, value in CONFIGS[size].items() if key != "vision"}
    config = complete(config, defaults)
    vision, width, latents = None, config["vision_width"], config["resampler"]
    if config.get("vision") is not None:
        vision = ViT(dataclasses.replace(clip_config(config["vision"]), post_norm=False, drop_class_token=True))
        expect(config, vision_width=vision.config.width)
    bridge = Resampler(width, width, latents["num_latents"], latents["depth"], num_heads=8, head_width=64,
                       ffn_width=4 * width, attend_to_latents=True)
    llm = read(config["llm"])
    every = config["cross_attn_every_n_layers"]
    layers = tuple(LayerOptions(cross_attention=(i + 1) % every == 0) for i in range(len(llm.layers)))
    decoder = Decoder(dataclasses.replace(llm, layers=layers, cross_attention_width=width))
    return VLM(vision, bridge, decoder, media_token=config["media_token_id"])


def build_for_tokenizer(size, vocab_size):
    """OpenFlamingo of a size: vlm.VLM; the last two of `vocab_size` words are <|endofchunk|> and <image>."""
    config = with_vocabulary(CONFIGS[size], vocab_size)
    return build(config | {"media_token_id": vocab_size - 1} if vocab_size else config)


CROSS_ATTENTION = (
    ("attn_gate", "attention_gate"),
    ("attn.norm.{p}", "norm.{p}"),
    ("attn.to_q.weight", "q.weight"),
    Entry("attn.to_kv.weight", ("k.weight", "v.weight")),  # keys first
    ("attn.to_out.weight", "o.weight"),
    ("ff_gate", "ffn_gate"),
    ("ff.{j}.{p}", "ffn.{j}.{p}"),
)


def LAYOUT(config):
    """Published names on the left, ours on the right; the second places of layers and cross-attention are only read."""
    layers, names, rest = "lang_encoder.model.decoder.layers.{i}.", OPT_LAYER, OPT_REST
    if kind_of(config) != "opt":
        layers, (names, rest) = "lang_encoder.transformer.blocks.{i}.", mpt_tables(config["llm"])
    ours = "decoder.layers.{i}."
    return (
        *prefixed(OPEN_CLIP, "vision_encoder.", "vision."),
        *prefixed(RESAMPLER, "perceiver.", "bridge."),
        *prefixed(rest, "lang_encoder.", "decoder."),
        *prefixed(CROSS_ATTENTION, f"{layers}gated_cross_attn_layer.", f"{ours}cross_attention."),
        *prefixed(names, f"{layers}decoder_layer.", ours),
        *prefixed(CROSS_ATTENTION, "lang_encoder.gated_cross_attn_layers.{i}.", f"{ours}cross_attention."),
        *prefixed(names, "lang_encoder.old_decoder_blocks.{i}.", ours),
    )


EXAMPLES, EPOCHS, GPUS = 158_000, 6, 8
STAGES = (
    stage(  # the loss multiplier of 0.2 scales all gradients alike, which AdamW does not notice; embeddings are frozen
        "instruct", dict.fromkeys(("bridge", "cross_attention"), 1e-4), {"vlit_158k": 1.0}, EXAMPLES * EPOCHS // GPUS,
        GPUS, warmup_steps=1_000, schedule="constant", start_lr_factor=0.0, image_size=224, betas=(0.9, 0.999),
        weight_decay=0.1,
    ),
)


DECODINGS = {  # what ends a reply is the template's; "caption" and "vqa" are those of OpenFlamingo's evaluation script
    "default": Decoding(max_new_tokens=64),
    "caption": Decoding(max_new_tokens=20, num_beams=3, length_penalty=0.0),
    "vqa": Decoding(max_new_tokens=5, num_beams=3, length_penalty=0.0),
}
FORMS = {  # of its evaluation script; without shots two examples stand in front, their pictures taken away
    "caption": Form(OPEN_FLAMINGO_CAPTION, "", ("Output",), text_shots=2),
    "vqa": Form(OPEN_FLAMINGO_VQA, "{question}", ("Question", "Answer", "Short", ", "), text_shots=2),
}

CONTENTS = ("released files hold the resampler, the cross-attention and MPT's words; CLIP's tower and the language "
            "model come from their own files")
RECIPE = published_recipe(
    "open_flamingo", build, LAYOUT, CONFIGS, CONTENTS, build=build_for_tokenizer, stages=shrinking(STAGES, {224: 28}),
    template=OPEN_FLAMINGO, decodings=DECODINGS, forms=FORMS, expected={"instruct": Expected(150)},
)  # fmt: skip
