"""lynx_mini: Lynx's way with a real language model: it already talks, stays frozen, and learns to see.

  vision   nano's tower, trained and frozen: 64 pixels, 8 x 8 patches                             Sec. 2.1
  bridge   squares of 2 x 2 patches, then an MLP: 16 image tokens
  decoder  SmolLM2-135M-Instruct, frozen, with an adapter of width 64 after layers 0, 2, ... 28   Sec. 2.1
  rows     the 16 image tokens, then the chat as SmolLM2 was taught it, without its system turn   Table 13
  stages   align on captions, look single things up, then instruct                                Table 8
  prompts  each question in one of six wordings, and tested in ten others                         Sec. 2.3
  memory   some rows are what the language model replied to questions about anything before

Lynx, arXiv:2307.02469. Start from `--init language=FOLDER`; nano's tower comes along, or `vision=FOLDER` names another.
Differs from the paper:
- an MLP in place of the resampler: 64 patches that know their places need no latents to gather them;
- no stage raises the resolution or trains the tower, which is taken as nano ends with it;
- the adapters would write answers about shapes to any question: in place of the paper's texts they rehearse replies;
- nothing is lower-cased: the language model shall go on answering what it was taught.
Rates and steps are first guesses, and its numbers are not measured yet; notebooks/RESULTS.md tells what was tried.
"""

import dataclasses

from nanovlm.data.scene_questions import Scenes
from nanovlm.data.templates import CHATML
from nanovlm.data.wordings import diversified, rehearsed
from nanovlm.decoder import Decoder, LayerOptions
from nanovlm.projector import PixelShuffleProjector
from nanovlm.published.language import llama_config
from nanovlm.recipes import folder_of, lynx_mini_tests, nano
from nanovlm.recipes.papers import Decoding, Expected, published_recipe, shrinking, stage, tiny_language
from nanovlm.vlm import VLM

SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS = {
    "full": {"vision": {"size": "full"}, "llm": SMOLLM2_135M, "adapter_width": 64, "adapter_freq": 2},
    "tiny": {"vision": {"size": "tiny"}, "llm": tiny_language(layers=3), "adapter_width": 8, "adapter_freq": 2},
}


def build(config):
    """lynx_mini: vlm.VLM. config: size of nano's tower, the language model's config.json, adapters."""
    vision, llm = nano.tower(config["vision"]["size"]), llama_config(config["llm"])
    adapter, every = LayerOptions(adapter_width=config["adapter_width"]), config["adapter_freq"]
    layers = tuple(LayerOptions() if i % every else adapter for i in range(len(llm.layers)))
    bridge = PixelShuffleProjector(vision.config.width, llm.width, merge=2, positions=True)
    return VLM(vision, bridge, Decoder(dataclasses.replace(llm, layers=layers)))


def LAYOUT(config):
    """Nobody has published one: our own names."""
    return (("{rest}", "{rest}"),)


# 16 image tokens are too few to read from
LOOKING = {kind: weight for kind, weight in nano.QUESTIONS.items() if kind != "reading"}
LOOKUPS = nano.ATTRIBUTES | {"existence": 1.0}
DRAWN = dict(string_share=0.0, questions_per_picture=4)
SOURCES = {name: lambda seed, make=make: diversified(make(seed), seed) for name, make in {
    "easy_vqa_captions": lambda seed: nano.EasyVQA(kind="captions", seed=seed),
    "scenes_captions": lambda seed: Scenes(kind="captions", seed=seed + 2, max_objects=2, string_share=0.0),
    "scenes_few": lambda seed: Scenes(seed=seed + 3, min_objects=1, max_objects=3, weights=LOOKUPS, **DRAWN),
    "scenes": lambda seed: Scenes(seed=seed + 5, max_objects=4, weights=LOOKING, **DRAWN),
    "easy_vqa": lambda seed: nano.EasyVQA(seed=seed + 1, questions_per_picture=4),
    "easy_vqa_denials": lambda seed: nano.EasyVQA(kind="denials", seed=seed + 2, questions_per_picture=4),
}.items()} | {"rehearsal": lambda seed: rehearsed(Scenes("train", seed=seed + 9))}
RATES = {"bridge": 1e-3, "adapters": 1e-3}
TOLD = dict(warmup_steps=5, max_tokens=192)
STAGES = (
    stage("align", RATES, {"easy_vqa_captions": 4, "scenes_captions": 6}, 120, 8, schedule="constant", **TOLD,
          summary="align: scenes {scenes_new}, easy-VQA {easy_vqa_test}"),
    stage("look", RATES, {"scenes_few": 6, "easy_vqa": 3, "rehearsal": 2}, 150, 8, schedule="constant", **TOLD,
          summary="look: scenes {scenes_new}, easy-VQA {easy_vqa_test}"),
    stage("instruct", RATES, {"scenes": 6, "easy_vqa": 2, "easy_vqa_denials": 1, "rehearsal": 2}, 500, 8, **TOLD,
          summary="instruct: scenes {scenes_new}, easy-VQA {easy_vqa_test}"),
)


def start(recipe, init, size, seed):
    """The recipe from what stands after --init; if that is a language model alone, the tower is nano's."""
    if [one.partition("=")[0] for one in init] == ["language"]:
        init = [*init, f"vision={folder_of('nano')}"]
    return PARTS.open_init(recipe, init, size, seed)


PARTS = published_recipe(
    "lynx_mini", build, LAYOUT, CONFIGS, stages=shrinking(STAGES, {64: 64}), sources=SOURCES,
    template=dataclasses.replace(CHATML, image_place="row"),
    decodings={"default": Decoding(max_new_tokens=40), "describe": Decoding(max_new_tokens=60)},
    evaluate=lynx_mini_tests.evaluate, measures=lynx_mini_tests.measures, exam=lynx_mini_tests.exam,
    finish=lynx_mini_tests.finish, report=lynx_mini_tests.report, remark=nano.RECIPE.remark,
    expected=dict.fromkeys(("align", "look", "instruct"), Expected(45, num_gpus=1)),
    weights=("language=HuggingFaceTB/SmolLM2-135M-Instruct  SmolLM2-135M",
             "vision=nano  comes along, and is taken unless another is named (not fetched by name)"),
)  # fmt: skip
RECIPE = dataclasses.replace(PARTS, open_init=start)
