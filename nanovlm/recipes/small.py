"""small: a composition of this project's own, the largest model that one GPU of 24 GB trains in every part.

  vision   SigLIP-B/16: 512 pixels, 1024 patches (size "full_224": 224 pixels, 196 patches)
  bridge   squares of 4 x 4 patches, then linear, GELU, linear: 64 image tokens (2 x 2 and 49)
  decoder  SmolLM2-135M: 30 layers of width 576, 49152 words
  stages   align (bridge), then instruct (everything)

It is no paper's model; every choice has one reason:
- SigLIP: every patch is a feature of its own, since the tower has no class token to which it could leave the work; 512
  pixels show text and small things that 224 do not;
- the squares: a language model of width 576 would spend nearly all its time on 1024 image tokens. 4 x 4 patches behind
  one another are 12288 channels, from which the MLP picks 576; nothing is averaged (arXiv:2408.12637 and
  arXiv:2504.05299 do so too);
- SmolLM2-135M: the smallest language model that was trained to talk, so that tower (86 million parameters) and language
  model (135) are of one size. Its context of 8192 holds a hundred pictures;
- memory: 228 million parameters take 16 bytes each with gradient, float32 copy and AdamW, 3.4 GiB; 16 rows of a picture
  and 512 tokens at a time keep about 10 GiB of activations (34 bytes a token, channel and layer, arXiv:2205.05198,
  Sec. 4.1; calculated, not measured).
The stages take LLaVA-1.5's data, batches and steps, for a beginning that can be compared. Their rates are higher, as
small models want them: a guess, not tried at this size here.
"""

import dataclasses
import math

from nanovlm.data import images
from nanovlm.data.templates import CHATML, PLAIN
from nanovlm.decoder import Decoder
from nanovlm.generation.sampler import Decoding
from nanovlm.projector import PixelShuffleProjector
from nanovlm.published.language import LLAMA, complete, llama_config, text_section
from nanovlm.published.vision import SIGLIP, siglip_config
from nanovlm.published.weights import prefixed
from nanovlm.recipes.papers import Expected, published_recipe, shrinking, stage, tiny_language, tiny_vision
from nanovlm.vit import ViT
from nanovlm.vlm import VLM

FULL = {
    "vision_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 512, "patch_size": 16,
    },
    "text_config": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
    "merge": 4,  # side of the squares, patches
}  # fmt: skip
CONFIGS = {
    "full": FULL,
    "full_224": FULL | {"vision_config": FULL["vision_config"] | {"image_size": 224}, "merge": 2},
    "tiny": {
        "vision_config": tiny_vision(64),
        "text_config": tiny_language(36, heads=3, intermediate_size=96, num_key_value_heads=1),
        "merge": 2,
    },
}  # fmt: skip


def build(config):
    """SigLIP, pixel shuffle, SmolLM2.

    Args:
      config: dict with vision_config and text_config, the config.json of tower and language model, and merge, the side of
        the squares in patches; what it leaves out is the "full" size's.
    Returns: vlm.VLM.
    Raises: ValueError for patches that do not divide into such squares, or for what cannot be built.
    """
    config = complete(config, FULL)
    vision, llm = ViT(siglip_config(config["vision_config"])), llama_config(text_section(config))
    bridge = PixelShuffleProjector(vision.config.width, llm.width, config["merge"])
    bridge.num_image_tokens(vision.num_tokens(vision.image_size))  # raises before the first picture does
    return VLM(vision, bridge, Decoder(llm))


def LAYOUT(config):
    """Our own names for the bridge; tower and language model keep the names of their own files behind a prefix."""
    return (
        *prefixed(SIGLIP, "vision_tower.", "vision."),
        ("multi_modal_projector.linear_1.{p}", "bridge.mlp.linear.{p}"),
        ("multi_modal_projector.linear_2.{p}", "bridge.mlp.linear_2.{p}"),
        *prefixed(LLAMA, "language_model.", "decoder."),
    )


SETTINGS = dict(weight_decay=0.01, schedule="cosine", start_lr_factor=0.0, image_size=512, image_fit="stretch", max_tokens=512,
                micro_batch_size=16)
ALIGN, INSTRUCT = math.ceil(558_128 / 256), math.ceil(665_298 / 128)  # steps of one epoch each
STAGES = (
    stage("align", {"bridge": 2e-3}, {"llava_pretrain_558k": 1.0}, ALIGN, 256, warmup_steps=ALIGN // 33, **SETTINGS),
    stage(  # the tower has the most to lose, the bridge the most to learn
        "instruct", {"vision": 2e-5, "bridge": 5e-4, "embedding": 1e-4, "language_model": 1e-4}, {"llava_mix_665k": 1.0},
        INSTRUCT, 128, warmup_steps=INSTRUCT // 33, **SETTINGS,
    ),
)


def stages(size, smoke):
    """The two stages; "full_224" shows smaller pictures."""
    pixels = 224 if size == "full_224" else 512
    return shrinking([dataclasses.replace(stage, image_size=pixels) for stage in STAGES], {512: 64})(size, smoke)


DECODINGS = {  # what ends a reply is the template's, see templates.end_ids
    "default": Decoding(max_new_tokens=256),
    "sample": Decoding(max_new_tokens=256, do_sample=True, temperature=0.6, top_p=0.9),
}

RECIPE = published_recipe(
    "small", build, LAYOUT, CONFIGS, "nobody has published it: it starts from the files of its two halves",
    stages=stages, template=CHATML, decodings=DECODINGS, stage_templates={"align": PLAIN},
    preprocessing=images.SIGLIP,  # pixels between -1 and 1
    expected={"align": Expected(20, num_gpus=1), "instruct": Expected(300, num_gpus=1)},
    weights=("vision=google/siglip-base-patch16-512  SigLIP-B/16, 512 pixels",
             "language=HuggingFaceTB/SmolLM2-135M-Instruct  SmolLM2-135M"),
)  # fmt: skip
