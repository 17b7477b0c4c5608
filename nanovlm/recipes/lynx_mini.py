"""lynx_mini: Lynx's way with a real language model: it already talks, stays frozen, and learns to see.

  vision   nano's tower, trained and frozen: 64 pixels, 8 x 8 patches                             Sec. 2.1
  bridge   squares of 2 x 2 patches, then one linear map, which begins with words: 16 image tokens
  decoder  SmolLM2-135M-Instruct, frozen, with an adapter of width 64 behind every layer          Sec. 2.1
  rows     the 16 image tokens, then the chat as SmolLM2 was taught it, without its system turn   Table 13
  stages   align on captions, look single things up, then instruct                                Table 8
  prompts  each question in one of six wordings, and tested in ten others                         Sec. 2.3
  memory   some rows are what the language model replied to questions about anything before

Lynx, arXiv:2307.02469. Start from `--init language=FOLDER`; nano's tower comes along, or `vision=FOLDER` names another.
Differs from the paper:
- a linear map in place of the resampler: 64 patches that know their places need no latents to gather them;
- no stage raises the resolution or trains the tower, which is taken as nano ends with it;
- the adapters would write answers about shapes to any question: in place of the paper's texts they rehearse replies;
- nothing is lower-cased: the language model shall go on answering what it was taught.
Forgetting is not solved, and one run is all there is: notebooks/RESULTS.md tells what was tried and found.
"""

import dataclasses
import functools
import math

import torch

from nanovlm.data.batching import pixels_of
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
    "full": {"vision": {"size": "full"}, "llm": SMOLLM2_135M, "adapter_width": 64},
    "tiny": {"vision": {"size": "tiny"}, "llm": tiny_language(layers=3), "adapter_width": 8},
}


def build(config):
    """lynx_mini: vlm.VLM. config: size of nano's tower, the language model's config.json, adapters."""
    vision, llm = nano.tower(config["vision"]["size"]), llama_config(config["llm"])
    layers = (LayerOptions(adapter_width=config["adapter_width"]),) * len(llm.layers)
    bridge = PixelShuffleProjector(vision.config.width, llm.width, merge=2, plain=True)
    return VLM(vision, bridge, Decoder(dataclasses.replace(llm, layers=layers)))


def LAYOUT(config):
    """Nobody has published one: our own names."""
    return (("{rest}", "{rest}"),)


# 16 image tokens are too few to read from
LOOKING = {kind: weight for kind, weight in nano.QUESTIONS.items() if kind != "reading"}
DRAWN = dict(string_share=0.0, questions_per_picture=4)
ONE = dict(min_objects=1, max_objects=1)
SOURCES = {name: lambda seed, make=make: diversified(make(seed), seed) for name, make in {
    "easy_vqa_captions": lambda seed: nano.EasyVQA(kind="captions", seed=seed),
    "scenes_captions": lambda seed: nano.Scenes(kind="captions", seed=seed + 2, string_share=0.0,
                                                weights={"short_caption": 1.0}, **ONE),
    "scenes_one": lambda seed: nano.Scenes(seed=seed + 3, weights=nano.ATTRIBUTES, **ONE, **DRAWN),
    "scenes_few": lambda seed: nano.Scenes(seed=seed + 4, weights=nano.ATTRIBUTES, **nano.FEW, **DRAWN),
    "scenes": lambda seed: nano.Scenes(seed=seed + 5, max_objects=4, weights=LOOKING, **DRAWN),
    "easy_vqa": lambda seed: nano.EasyVQA(seed=seed + 1, questions_per_picture=4),
    "easy_vqa_denials": lambda seed: nano.EasyVQA(kind="denials", seed=seed + 2, questions_per_picture=4),
}.items()} | {"rehearsal": lambda seed: rehearsed(nano.Scenes("train", seed=seed + 9))}
RATES = {"bridge": 1e-4, "adapters": 1.5e-3}  # a bridge that begins with words soon forgets them at a higher rate
TOLD = dict(warmup_steps=5, max_tokens=192)
STAGES = (
    stage("align", RATES, {"easy_vqa_captions": 4, "scenes_captions": 4, "rehearsal": 1}, 40, 9, schedule="constant",
          summary="align: scenes {scenes_new}, easy-VQA {easy_vqa_test}", **TOLD),
    stage("look", RATES, {"scenes_one": 2, "scenes_few": 3, "easy_vqa": 3, "rehearsal": 1}, 120, 9, schedule="constant",
          summary="look: scenes {scenes_new}, easy-VQA {easy_vqa_test}", **TOLD),
    stage("instruct", RATES, {"scenes": 6, "easy_vqa": 1.5, "easy_vqa_denials": 0.5, "rehearsal": 1}, 440, 9,
          summary="instruct: scenes {scenes_new}, easy-VQA {easy_vqa_test}", **TOLD),
)  # fmt: skip
PICTURES, BATCH = 2000, 100  # that the bridge's words are learned from
STRENGTH, EMPTY, RIDGE = 0.6, 0.01, 1.0  # of each word; weight of a square without a thing; of the ridge


@torch.no_grad()
def begin_with_words(model, tokenizer):
    """Let the bridge write, for every square, the words of the thing whose centre is there: "small blue ring top left".

    No step is needed: ridge regression of the sum of the words' embeddings on what the bridge reads of a square. So the
    language model is shown something that it already reads, and learns to look in far fewer updates.
    """
    bridge, embedding = model.bridge, model.decoder.embedding.weight
    words = functools.cache(lambda text: STRENGTH * embedding[tokenizer.encode(text)].sum(0))
    sources = nano.Scenes(kind="names", seed=8, string_share=0.0), nano.EasyVQA(kind="names", seed=8)
    nothing, squares, products = words("\n") / STRENGTH, 0, 0
    for start in range(0, PICTURES, BATCH):
        records = [sources[n % 3 == 0].record(n) for n in range(start, start + BATCH)]
        pixels = pixels_of([record.visuals[0] for record in records], 64, "crop", PARTS.preprocessing)
        read = bridge.squares(model.vision(pixels)).double()  # M N 4D
        side = math.isqrt(read.shape[1])
        said, weight = nothing.repeat(*read.shape[:2], 1), torch.full(read.shape[:2], EMPTY)
        for picture, record in enumerate(records):
            things = {}
            for (x, y), (*_, name) in zip(record.regions, record.conversations):
                things.setdefault(int(side * y) * side + int(side * x), []).append(name.text.replace(" at the ", " "))
            for place, names in things.items():
                said[picture, place] = words("".join(f" {word}" for word in dict.fromkeys(" ".join(names).split())))
                weight[picture, place] = 1.0
        weighted = (read * weight[..., None]).flatten(0, 1).T
        squares, products = squares + weighted @ read.flatten(0, 1), products + weighted @ said.flatten(0, 1).double()
    ridge = RIDGE * torch.eye(len(squares), dtype=squares.dtype)
    bridge.mlp.weight.copy_(torch.linalg.solve(squares + ridge, products).T)
    return model


def start(recipe, init, size, seed):
    """The recipe from what stands after --init; if that is a language model alone, the tower is nano's."""
    parts = {one.partition("=")[0] for one in init}
    if parts == {"language"}:
        init = [*init, f"vision={folder_of('nano')}"]
    opened = PARTS.open_init(recipe, init, size, seed)
    if not parts <= {"language", "vision"}:  # a bridge that was trained
        return opened
    return dataclasses.replace(opened, load=lambda: begin_with_words(opened.load(), opened.tokenizer()))


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
