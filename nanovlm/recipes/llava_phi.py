"""LLaVA-Phi: LLaVA-1.5 with a language model of 2.7 billion parameters, Phi-2.

  vision   CLIP ViT-L/14 at 336 pixels: output of the 23rd of 24 blocks, class token dropped, 576 features   Sec. 3.1
  bridge   linear, GELU, linear: every patch a token                                                        Sec. 3.1
  decoder  Phi-2                                                                                            Sec. 3.2
  stages   (tune Phi-2 on ShareGPT,) align the projector, instruct                                          Sec. 3.2

"LLaVA-Phi: Efficient Multi-Modal Assistant with Small Language Model", arXiv:2401.02330; code zhuyiche/llava-phi
2b42029. The released code decides what loads and, here, most of what trains. Where paper and code differ:
- the second stage trains the tower too, with 128 examples a step and no weight decay (the code); the paper has it
  frozen, 256 and 0.1;
- the first stage trains the projector alone (the paper); the code's freezing misses the output head;
- the data are LLaVA-1.5's, 558K and 665K (the code, and the paper elsewhere), not 595K and 150K;
- the first tuning of Phi-2 is the paper's; it is optional, and the released model starts from plain Phi-2:
  `--without tune_phi`;
- Phi-2's residual dropout of 0.1 is left out;
- the code masked the first token of every answer until 2024-03-23, and end tokens as keys: neither is repeated.
End and padding are the tokenizer's <|endoftext|>, 50256; the released config.json says 1 and 2, which are other words.
"""

from nanovlm.data.templates import LLAVA_PHI, PLAIN
from nanovlm.decoder import Decoder
from nanovlm.generation.sampler import Decoding
from nanovlm.projector import MLPProjector
from nanovlm.published.language import complete, expect, phi_config, phi_fused
from nanovlm.published.vision import CLIP, clip_config
from nanovlm.published.weights import prefixed
from nanovlm.recipes.papers import SIZES, Expected, features, published_recipe, shrinking, stage
from nanovlm.vit import ViT
from nanovlm.vlm import VLM

CONFIGS = SIZES["llava_phi"]


def sizes(config):
    """A config in one form, with vision and llm; the released config.json lays out the second.

    The tower is completed as released, Phi as its class has it (half of a head turns, not 0.4).
    """
    if "vision_config" in config:
        parts = config["vision_config"]
        expect(parts.get("mm_projector", {}), mm_projector_type="mlp2x_gelu")
        config = {"vision": parts.get("vision_tower"), "llm": config}
    vision = config.get("vision") or {}
    config = config | {"vision": {"mm_vision_select_layer": vision.get("select_layer")} | vision}
    return complete(config, {"vision": CONFIGS["full"]["vision"], "llm": {}})


def build(config):
    """LLaVA-Phi of a dict with vision and llm, or of the released config.json: vlm.VLM.

    What it leaves out of `vision` is as released. Raises: ValueError for sizes that do not go together.
    """
    config = sizes(config)
    vision, llm = config["vision"], phi_config(config["llm"])
    tower = features(clip_config(vision), vision["mm_vision_select_layer"], vision["mm_vision_select_feature"])
    return VLM(ViT(tower), MLPProjector(tower.width, llm.width), Decoder(llm))


def LAYOUT(config):
    """Published names on the left, ours on the right: the layout of zxmonent/llava-phi."""
    return (
        *prefixed(CLIP, "model.vision_tower.", "vision."),
        ("model.mm_projector.0.{p}", "bridge.linear.{p}"),
        ("model.mm_projector.2.{p}", "bridge.linear_2.{p}"),
        *prefixed(phi_fused(phi_config(sizes(config)["llm"]).num_heads), "", "decoder."),
    )


WORDS = ("embedding", "language_model", "lm_head")
# Sec. 3.2: betas and eps; no decay and no clipping as in the code
SETTINGS = dict(betas=(0.9, 0.98), eps=1e-7, weight_decay=0.0, clip=None, start_lr_factor=0.0, max_tokens=2048,
                image_size=336)
STAGES = (
    # Sec. 3.2: two epochs (of about 80,000 dialogues), 3e-5, linear; optional there too. The batch size is not stated
    stage("tune_phi", dict.fromkeys(WORDS, 3e-5), {"ShareGPT": 1.0}, 1_250, 128, schedule="linear", **SETTINGS),
    # Sec. 3.2: one epoch, 1e-3, 256; schedule, warm-up of 3% and 558,128 examples from the code
    stage("align", {"bridge": 1e-3}, {"blip_laion_cc_sbu_558k": 1.0}, 2_181, 256, warmup_steps=66, schedule="cosine",
          **SETTINGS),
    # Sec. 3.2: one epoch, 2e-5; batch, schedule, warm-up of 3% and 665,298 examples from the code
    stage("instruct", dict.fromkeys(("vision", "bridge", *WORDS), 2e-5), {"llava_v1_5_mix665k": 1.0}, 5_198, 128,
          warmup_steps=156, schedule="cosine", image_fit="pad", **SETTINGS),
)


DECODINGS = {  # what ends a reply is the tokenizer's <|endoftext|>, see templates.end_ids
    "default": Decoding(max_new_tokens=1024),  # greedy, as in all its evaluations
    "short": Decoding(max_new_tokens=128),  # VQAv2, MME, POPE, TextVQA, VizWiz
    "sample": Decoding(max_new_tokens=1024, do_sample=True, temperature=0.2),  # its demonstration
}

CONTENTS = "the released files hold the whole model, the tower too; q, k and v are one matrix, interleaved head by head"
COST = 'Sec. 3.2, "Computational Cost"'
EXPECTED = {
    "tune_phi": Expected(1000, num_frames=0),
    "align": Expected(20, hours=1.5, source=COST),
    "instruct": Expected(300, hours=8, source=COST),
}
RECIPE = published_recipe(
    "llava_phi", build, LAYOUT, CONFIGS, CONTENTS, stages=shrinking(STAGES, {336: 56}), template=LLAVA_PHI,
    decodings=DECODINGS, stage_templates={"align": PLAIN}, expected=EXPECTED,
)  # fmt: skip
