"""The model and the data of the ablations: nano's chain once more, small enough to be trained many times over.

A tower learns from names of things, a decoder from questions about texts; then bridge and all are aligned and instructed
with pictures of one object. What `--size` names here is not how large the model is but how it is built: with or
without mPLUG-Owl2's modality-adaptive parts, and which bridge. `variants.py` lists what is compared.

    python train.py notebooks/ablations/ablation_recipe.py --size mam
"""

from dataclasses import replace

from nanovlm.abstractor import Abstractor
from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.data.records import Changed
from nanovlm.data.scene_questions import Scenes
from nanovlm.data.scene_questions import SceneTexts
from nanovlm.data.templates import NANO
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from ablations.ablation_exam import PICTURE_KINDS, finish, in_wordings
from nanovlm.projector import PixelShuffleProjector
from nanovlm.recipes.recipe import Recipe
from nanovlm.generation.sampler import Decoding
from nanovlm.training.stages import Stage
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

WIDTH, HEADS, LAYERS, PATCH = 64, 2, 2, 8  # channels, heads and layers of vision and language; pixels
VOCABULARY, CONTEXT = 400, 256  # tokens
SIZES = {  # name -> (modality-adaptive, queries of an abstractor; None = MLP over squares of 2 x 2 patches)
    "mam": (True, None),
    "plain": (False, None),
    "queries_1": (True, 1),
    "queries_4": (True, 4),
    "queries_16": (True, 16),
}
TEXT_KINDS = {"described": 2.0, "listed": 1.0}
WORDINGS = (  # what stands around a question when prompts are diversified; "{}" is the question
    "{}", "look at the image. {}", "{} answer with few words.", "question: {}", "i would like to know: {}", "{} be short.",
)  # fmt: skip


def reworded(source, n):
    """Record n, its questions in WORDINGS, one after the other."""
    return in_wordings(source.record(n), WORDINGS, n)


def mismatched(source, n):
    """Record n; every second picture comes with what was said of the one after it: web data's noise."""
    record = source.record(n)
    return replace(record, conversations=source.record(n + 1).conversations) if n % 2 else record


def build(size, vocab_size):
    """The vision-language model: vlm.VLM."""
    adaptive, queries = SIZES[size]
    vision = ViT(ViTConfig(48, PATCH, WIDTH, LAYERS, HEADS, 2 * WIDTH, conv_stem=True, class_token=False))
    if queries is None:
        bridge = PixelShuffleProjector(WIDTH, WIDTH, merge=2, positions=True)
    else:
        bridge = Abstractor(WIDTH, WIDTH, queries, LAYERS, HEADS, 2 * WIDTH)
    layers = (LayerOptions(modality_adaptive=adaptive),) * LAYERS
    sizes = DecoderConfig(
        vocab_size, WIDTH, HEADS, HEADS, 2 * WIDTH, CONTEXT, layers, tied_head=True, rope_base=100.0, qkv_bias="qkv"
    )
    return VLM(vision, bridge, Decoder(sizes))


def contrastive(size, model):
    """The ViT beside a text tower of one layer."""
    text = TextTower(model.decoder.config.vocab_size, WIDTH, 1, HEADS, 2 * WIDTH, context_length=24)
    return ContrastiveModel(model.vision, WIDTH, text, WIDTH, joint_width=WIDTH)


def pictures(seed, kind, **more):
    """Source of pictures of one object."""
    return Scenes(seed=seed, kind=kind, max_objects=1, string_share=0.0, **more)


def questions(seed):
    """Source of pictures with a caption and three questions each."""
    return pictures(seed, "both", questions_per_picture=3, weights=dict.fromkeys((*PICTURE_KINDS, "caption"), 1.0))


def captions(seed):
    """Source of pictures with a caption each."""
    return pictures(seed + 1, "captions", weights={"caption": 1.0, "short_caption": 1.0})


def texts(seed, **weights):
    """Source of questions about scenes told in words."""
    return SceneTexts(seed=seed, max_objects=2, string_share=0.0, weights=weights or TEXT_KINDS, questions_per_text=3)


def sources():
    """Name in a mixture -> (seed) -> data source."""
    return {
        "names": lambda seed: pictures(seed + 2, "names"),
        "texts": texts,
        "plain_texts": lambda seed: texts(seed, plain_caption=1.0),
        "captions": captions,
        "noisy_captions": lambda seed: Changed(captions(seed + 3), mismatched),
        "questions": questions,
        "reworded": lambda seed: Changed(questions(seed), reworded),
    }


def stages(size, smoke):
    """Tower and language, which all variants start from, then align and instruct; `smoke`: a few steps of each."""
    steps = dict(tower=160, language=240, align=30, instruct=120)
    common = dict(optimizer="muon", warmup_steps=10, image_size=48)
    if smoke:
        steps, common = dict.fromkeys(steps, 4), common | dict(warmup_steps=1)
    rows = common | dict(max_tokens=160)
    language = ("embedding", "language_model")
    branch = ("vision_branch",) if SIZES[size][0] else ()
    rates = lambda rate, *parts, **others: dict.fromkeys(parts, rate) | others
    return (
        Stage(
            "tower", "contrastive", rates(4e-3, "vision", "text_tower"), {"names": 1}, steps["tower"], 48, max_tokens=24, **common,
        ),
        Stage("language", "language", rates(2e-3, *language), {"texts": 1}, steps["language"], 24, **rows),
        Stage(
            "align", "language", rates(2e-3, "bridge", *branch), {"captions": 1}, steps["align"], 16,
            copy_vision_branch=bool(branch), **rows,
        ),
        Stage(
            "instruct", "language", rates(2e-3, "bridge", *language, *branch, vision=1e-3),
            {"questions": 2, "texts": 1}, steps["instruct"], 16, **rows,
        ),
    )  # fmt: skip


def tokenizer():
    """A byte-level BPE trained on the words of the training data: always the same."""
    made = (source(0).record(n) for source in (questions, texts, captions) for n in range(500))
    words = [turn.text for record in made for turns in record.conversations for turn in turns]
    return train_tokenizer([*words, *WORDINGS, *["user: \nbot: \nuser: "] * 1000], VOCABULARY)


RECIPE = Recipe(
    name="notebooks/ablations/ablation_recipe.py",
    sizes=tuple(SIZES),
    build=build,
    contrastive=contrastive,
    stages=stages,
    sources=sources(),
    tokenizer=tokenizer,
    template=NANO,
    decodings={"default": Decoding(max_new_tokens=12), "describe": Decoding(max_new_tokens=50)},
    evaluate=lambda run, stage: {},
    exam=lambda run: [],
    finish=finish,
    report=lambda run, results: [f"{name:<24}{value:.3f}" for name, value in results.items()],
)
