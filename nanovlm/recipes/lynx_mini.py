"""lynx_mini: Lynx's way with a real language model: it already talks, stays frozen, and learns to see.

  vision   nano's tower, trained and frozen: 64 pixels, 8 x 8 patches                             Sec. 2.1
  bridge   each square of 2 x 2 patches says four words, "small blue ring left": 64 image tokens
  decoder  SmolLM2-135M-Instruct, frozen, with an adapter of width 64 behind every layer          Sec. 2.1
  rows     the 64 image tokens, then the chat as SmolLM2 was taught it, without its system turn   Table 13
  stages   align on whether a thing is there, look single things up, then instruct                Table 8
  prompts  each question in one of many wordings, and tested in ten others                        Sec. 2.3
  memory   some rows are what the language model replied to questions about anything before

Lynx, arXiv:2307.02469. Start from `--init language=FOLDER`; nano's tower comes along, or `vision=FOLDER` names another.
Differs from the paper:
- image tokens that lie among words in place of the resampler's: the frozen model reads them as it reads text;
- existence in place of captions comes first: yes or no is learned alone, or, among other questions, hardly at all;
- an adapter of width 64 stands behind every layer, in place of half the model's width behind every second;
- no stage raises the resolution or trains the tower, which is taken as nano ends with it;
- the adapters would write answers about shapes to any question: in place of the paper's texts they rehearse replies;
- nothing is lower-cased: the language model shall go on answering what it was taught.
Forgetting is not quite solved, and one run is all there is: notebooks/RESULTS.md tells what was tried and found.
"""

import dataclasses
import math

import torch
from tqdm import tqdm

from nanovlm.data.batching import pixels_of
from nanovlm.data.templates import CHATML
from nanovlm.data.wordings import SAID, WORDS, diversified, rehearsed, said_of
from nanovlm.decoder import Decoder, LayerOptions
from nanovlm.projector import WordProjector
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
    bridge = WordProjector(vision.config.width, llm.width, 2, len(SAID), len(WORDS))
    return VLM(vision, bridge, Decoder(dataclasses.replace(llm, layers=layers)))


def LAYOUT(config):
    """Nobody has published one: our own names."""
    return (("{rest}", "{rest}"),)


# a square says nothing of a string
LOOKING = {kind: weight for kind, weight in nano.QUESTIONS.items() if kind != "reading"}
FEW = dict(string_share=0.0, questions_per_picture=8, **nano.FEW)  # a picture costs as much as six of them
SOURCES = {name: lambda seed, make=make: diversified(make(seed), seed) for name, make in {
    "scenes_matched": lambda seed: nano.Scenes(seed=seed + 3, weights={"existence": 1.0}, **FEW),
    "scenes_few": lambda seed: nano.Scenes(seed=seed + 4, kind="both", **FEW, weights=nano.ATTRIBUTES | {
        "existence": 2.0, "caption": 0.2, "short_caption": 0.2}),
    "scenes": lambda seed: nano.Scenes(seed=seed + 5, weights=LOOKING, string_share=0.0, max_objects=4,
                                       questions_per_picture=6),
    "easy_vqa": lambda seed: nano.EasyVQA(kind="balanced", seed=seed + 1),
}.items()} | {"rehearsal": lambda seed: rehearsed(nano.Scenes("train", seed=seed + 9))}
RATES = {"bridge": 1e-4, "adapters": 1.5e-3}  # the bridge knows its words before the first step
TOLD = dict(warmup_steps=5, max_tokens=192, micro_batch_size=4)
STAGES = (
    stage("align", RATES, {"scenes_matched": 3, "rehearsal": 3}, 60, 6, schedule="constant",
          summary="align: scenes {scenes_new}, easy-VQA {easy_vqa_test}", **TOLD),
    stage("look", RATES, {"scenes_few": 2, "easy_vqa": 3, "rehearsal": 6}, 60, 11, schedule="constant",
          summary="look: scenes {scenes_new}, easy-VQA {easy_vqa_test}", **TOLD),
    stage("instruct", RATES | {"adapters": 1e-3}, {"scenes": 2, "easy_vqa": 2, "rehearsal": 8}, 160, 12,
          summary="instruct: scenes {scenes_new}, easy-VQA {easy_vqa_test}", **TOLD),
)  # fmt: skip
PICTURES, BATCH, STEPS, SQUARES, RATE = 8000, 100, 1000, 4096, 3e-3  # that the bridge learns its words by


def begin_with_words(model, tokenizer):
    """Teach the bridge, without the language model, to say of every square what stands there: "small blue ring top left".

    So the language model is shown from the first step what it already reads, and learns to look in far fewer updates.
    """
    bridge, embedding = model.bridge, model.decoder.embedding.weight
    sources = nano.Scenes(kind="names", seed=8, string_share=0.0), nano.EasyVQA(kind="names", seed=8)
    read, said = [], []
    with torch.no_grad():
        bridge.words.copy_(torch.stack([embedding[tokenizer.encode(f" {word}" if word else "\n")].sum(0) for word in WORDS]))
        for start in tqdm(range(0, PICTURES, BATCH), "words of squares", leave=False):
            records = [sources[n % 3 == 0].record(n) for n in range(start, start + BATCH)]
            pixels = pixels_of([record.visuals[0] for record in records], 64, "crop", PARTS.preprocessing)
            read.append(bridge.squares(model.vision(pixels)))
            said.append(torch.zeros(*read[-1].shape[:2], len(SAID), dtype=torch.long))
            for picture, record in zip(said[-1], records):
                for square, words in said_of(record, math.isqrt(len(picture))).items():
                    picture[square] = torch.tensor(words)
    read, said, draws = torch.cat(read).flatten(0, 1), torch.cat(said).flatten(0, 1), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(bridge.scores.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    for _ in range(STEPS):
        squares = torch.randint(len(read), (SQUARES,), generator=draws)
        scores = bridge.say(read[squares]).flatten(0, 1)
        torch.nn.functional.cross_entropy(scores, said[squares].flatten(), ignore_index=-1).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
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
