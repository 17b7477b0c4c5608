"""SmolVLM: a vision-language model for photographs that a laptop's CPU runs.

             256M                                                                 500M
  vision     SigLIP-B/16 at 512 pixels, 1024 patches, all of them behind the last norm
  bridge     squares of 4 x 4 patches, then one linear map without bias: 64 image tokens
  decoder    SmolLM2-135M: 30 layers of width 576, and a head of its own          SmolLM2-360M: 32 of 960
  rows       a large picture is cut into up to 16 tiles, and shown once as a whole behind them: 1127 tokens
  layout     HuggingFaceTB/SmolVLM-256M-Instruct's: 256,484,928 parameters        500M-Instruct's: 507,482,304

SmolVLM, arXiv:2504.05299; its layout is Idefics3's, arXiv:2408.12637. Why it is made so:
- 4 x 4 patches behind one another are 12288 channels, from which the linear map picks 576; nothing is averaged. A
  language model of width 576 would spend nearly all its time on 1024 image tokens;
- tower (86 million parameters) and language model (135) are of one size; the context of 8192 holds several pictures;
- memory: 256 million parameters take 16 bytes each with gradient, float32 copy and AdamW, 3.8 GiB; a row of 17 tiles
  keeps about as much again (`train.py smolvlm --print`).
Differs from the paper: the stages take LLaVA-1.5's data, batches and steps, for a beginning that can be compared. Their
rates are higher, as small models want them: a guess, not tried at this size here.
"""

import dataclasses
import math

from nanovlm.data import images
from nanovlm.data.templates import CHATML, PLAIN, SMOLVLM
from nanovlm.decoder import Decoder
from nanovlm.generation.sampler import Decoding
from nanovlm.projector import PixelShuffleProjector
from nanovlm.published.language import ANGLES, HEAD, LLAMA_BODY, complete, llama_config, text_section
from nanovlm.published.vision import SIGLIP, siglip_config
from nanovlm.published.weights import prefixed
from nanovlm.recipes.papers import SIZES, Expected, published_recipe, shrinking, stage
from nanovlm.vit import ViT
from nanovlm.vlm import VLM

CONFIGS = SIZES["smolvlm"]
CLASS = {  # what transformers' class takes where a config.json is silent
    "vision_config": {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12,
                      "num_attention_heads": 16, "image_size": 224, "patch_size": 32},
    "scale_factor": 2,
}  # fmt: skip


def build(config):
    """SmolVLM of an Idefics3's or SmolVLM's config.json: vlm.VLM.

    What it leaves out is as transformers' classes have it. Raises: ValueError where patches do not divide into squares.
    """
    config = complete(config, CLASS)
    vision, llm = ViT(siglip_config(config["vision_config"])), llama_config(text_section(config))
    bridge = PixelShuffleProjector(vision.config.width, llm.width, config["scale_factor"], plain=True)
    bridge.num_image_tokens(vision.num_tokens(vision.image_size))  # raises before the first picture does
    return VLM(vision, bridge, Decoder(llm))


def LAYOUT(config):
    """Published names on the left, ours on the right."""
    return (
        *prefixed(SIGLIP, "model.", "vision."),
        ("model.connector.modality_projection.proj.weight", "bridge.mlp.weight"),
        *prefixed(LLAMA_BODY, "model.text_model.", "decoder."),
        *prefixed(HEAD, "", "decoder."),
        ANGLES,
    )


SETTINGS = dict(weight_decay=0.01, schedule="cosine", start_lr_factor=0.0, image_size=512, image_fit="stretch")
ALIGN, INSTRUCT = math.ceil(558_128 / 256), math.ceil(665_298 / 128)  # steps of one epoch each
STAGES = (
    stage("align", {"bridge": 2e-3}, {"llava_pretrain_558k": 1.0}, ALIGN, 256, warmup_steps=ALIGN // 33, max_tokens=512,
          micro_batch_size=16, tiles=0, **SETTINGS),
    stage(  # the tower has the most to lose, the bridge the most to learn
        "instruct", {"vision": 2e-5, "bridge": 5e-4, "embedding": 1e-4, "language_model": 1e-4, "lm_head": 1e-4},
        {"llava_mix_665k": 1.0}, INSTRUCT, 128, warmup_steps=INSTRUCT // 33, max_tokens=2048, micro_batch_size=1,
        tiles=4, **SETTINGS,
    ),
)
DECODINGS = {  # what ends a reply is the template's, see templates.end_ids
    "default": Decoding(max_new_tokens=256),  # greedy, as published
    "sample": Decoding(max_new_tokens=256, do_sample=True, temperature=0.6, top_p=0.9),
}

RECIPE = published_recipe(
    "smolvlm", build, LAYOUT, CONFIGS, stages=shrinking(STAGES, {512: 64}), template=SMOLVLM, decodings=DECODINGS,
    preprocessing=images.SIGLIP,  # pixels between -1 and 1
    expected={"align": Expected(20, num_gpus=1), "instruct": Expected(300, num_gpus=1)},
)  # fmt: skip
# of folders that were trained when it was called small
FORMER = dataclasses.replace(RECIPE, template=CHATML, stage_templates={"align": PLAIN})
