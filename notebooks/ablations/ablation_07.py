"""Lesson 07's ablation: what becomes of the words when a language model learns to see?

A small decoder first learns to answer questions about scenes told in words. Then it learns the same questions about
pictures alone, with no text beside them, and its words are examined again. Keys, values and norms are either shared by
both modalities or kept separate; what trains is either these alone, or the whole decoder.

    python notebooks/ablations/ablation_07.py        writes notebooks/ablations/ablation_07.csv
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

import torch
import torch.nn.functional as F
from ablations import ablation_04, ablation_table
from ablations.ablation_04 import records

from nanovlm.data.batching import build_batch
from nanovlm.data.scene_questions import Scenes, SceneTexts
from nanovlm.data.templates import NANO
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.resampler import Resampler
from nanovlm.training.stages import Stage
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import IGNORE, VLM

CSV_PATH = Path(__file__).with_suffix(".csv")
KINDS = ("color", "place", "size")  # asked about words and about pictures alike
IMAGE_SIZE, WIDTH, NUM_HEADS, NUM_LAYERS = 40, 64, 4, 2


@dataclass(frozen=True)
class Arm:
    """One way to learn to see."""

    name: str
    separate: bool  # image tokens have their own norms, keys and values
    everything: bool  # the whole decoder trains, not only the norms, keys and values that image tokens meet


ARMS = (
    Arm("shared, only K/V and norms train", separate=False, everything=False),
    Arm("separate, only K/V and norms train", separate=True, everything=False),
    Arm("shared, whole decoder trains", separate=False, everything=True),
    Arm("separate, whole decoder trains", separate=True, everything=True),
)


@dataclass(frozen=True)
class Settings:
    """Lengths of a run."""

    language_steps: int = 120  # optimizer steps on words
    picture_steps: int = 150  # optimizer steps on pictures
    batch_size: int = 64  # records per step
    exam: int = 200  # questions per exam


@dataclass(frozen=True)
class Result:
    """One row of the table; losses in nats per answer token, shares between 0 and 1."""

    arm: str
    seed: int
    trained: int  # parameters of the decoder that learned from pictures
    text_loss_before: float
    text_loss_after: float
    text_right_before: float
    text_right_after: float
    picture_right: float


def sources(seed):
    """Words and pictures to learn from, and others for the exams."""
    both = dict(max_objects=1, string_share=0.0)
    words = dict(**both, weights={"described": 1.0})
    pictures = dict(**both, weights=dict.fromkeys(KINDS, 1.0), canvas=IMAGE_SIZE, questions_per_picture=1)
    return {
        "words": SceneTexts("train", seed, **words),
        "pictures": Scenes("train", seed=seed, **pictures),
        "words_exam": SceneTexts("new", 1000, **words),
        "pictures_exam": Scenes("new", seed=1000, **pictures),
    }


def make_tokenizer(words):
    """A tokenizer of the words that both kinds of questions use."""
    return ablation_table.tokenizer_of(records(words, 0, 400))


def make_model(tokenizer, seed):
    """A ViT, a resampler of four latents, and a plain decoder."""
    torch.manual_seed(seed)
    vision = ViT(ViTConfig(IMAGE_SIZE, 8, WIDTH, 1, NUM_HEADS, 2 * WIDTH, conv_stem=True, class_token=False))
    bridge = Resampler(WIDTH, WIDTH, 4, 1, NUM_HEADS, WIDTH // NUM_HEADS, 2 * WIDTH)
    layers = (LayerOptions(),) * NUM_LAYERS
    sizes = DecoderConfig(tokenizer.vocab_size, WIDTH, NUM_HEADS, NUM_HEADS, 2 * WIDTH, 64, layers, tied_head=True)
    return VLM(vision, bridge, Decoder(sizes))


def separate(decoder):
    """The same decoder with an image copy of every norm, key and value layer; the copies start out equal."""
    layers = (LayerOptions(modality_adaptive=True),) * len(decoder.config.layers)
    result = Decoder(replace(decoder.config, layers=layers))
    weights = {}
    for name in result.state_dict():
        weights[name] = decoder.state_dict()[name.replace(".text.", ".").replace(".vision.", ".")]
    result.load_state_dict(weights)
    return result


def trained_parts(model, arm):
    """{part: {name: parameter}} of what learns from pictures: tower, bridge, and the arm's share of the decoder."""
    parts = model.parts()
    chosen = {part: parts[part] for part in ("vision", "bridge")}
    decoder = {**parts["vision_branch"], **(parts["embedding"] if arm.everything else {})}
    for name, parameter in parts["language_model"].items():
        meets_images = any(f".{layer}." in name for layer in ("norm_1", "norm_2", "k", "v"))
        if arm.everything or (meets_images and not arm.separate):
            decoder[name] = parameter
    return {**chosen, "language_model": decoder}


def train(model, parts, source, tokenizer, settings, steps):
    """Answer a source's questions for some steps."""
    stage = Stage(
        "ablation", "language", dict.fromkeys(parts, 3e-3), {source.name: 1.0}, steps, settings.batch_size,
        optimizer="muon", warmup_steps=min(10, steps - 1),
    )  # fmt: skip
    model.requires_grad_(False)
    for part in parts.values():
        for parameter in part.values():
            parameter.requires_grad_(True)

    def loss_of(step):
        chosen = records(source, step * settings.batch_size, settings.batch_size)
        return ablation_table.mean_loss(model, rows(chosen, model, tokenizer))

    ablation_04.train(parts, stage, loss_of)


def rows(some_records, model, tokenizer):
    """Records as a Batch."""
    return build_batch(some_records, NANO, tokenizer, model.num_image_tokens, IMAGE_SIZE, "crop", 64)


@torch.no_grad()
def examine(model, batch):
    """(loss in nats per answer token, share of answers right in every token)."""
    logits, labels = model(batch)[:, :-1], batch.labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    right = ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(dim=1)
    return loss.item(), right.float().mean().item()


def learn_words(seed, settings):
    """(model, tokenizer, sources) after the first half: a decoder that answers questions about words."""
    found = sources(seed)
    tokenizer = make_tokenizer(found["words"])
    model = make_model(tokenizer, seed)
    parts = model.parts()
    language = {part: parts[part] for part in ("embedding", "language_model")}
    train(model, language, found["words"], tokenizer, settings, settings.language_steps)
    return model, tokenizer, found


def learn_to_see(model, arm, tokenizer, found, settings, seed):
    """Continue a copy of the model on pictures, as the arm says.

    Returns: (the model that sees, Result).
    """
    torch.manual_seed(seed)
    seeing = make_model(tokenizer, seed)
    seeing.load_state_dict(model.state_dict())
    if arm.separate:
        seeing.decoder = separate(seeing.decoder)
    words, pictures = (
        rows(records(found[name], 0, settings.exam), seeing, tokenizer) for name in ("words_exam", "pictures_exam")
    )
    loss_before, right_before = examine(seeing, words)
    parts = trained_parts(seeing, arm)
    train(seeing, parts, found["pictures"], tokenizer, settings, settings.picture_steps)
    loss_after, right_after = examine(seeing, words)
    trained = sum(parameter.numel() for parameter in parts["language_model"].values())
    picture_right = examine(seeing, pictures)[1]
    return seeing, Result(arm.name, seed, trained, loss_before, loss_after, right_before, right_after, picture_right)


def run(seeds, settings):
    """Results of every arm and seed."""
    for seed in seeds:
        model, tokenizer, found = learn_words(seed, settings)
        for arm in ARMS:
            yield learn_to_see(model, arm, tokenizer, found, settings, seed)[1]


def read(path=CSV_PATH):
    """(note, list of Result) of a written table."""
    return ablation_table.read(path, Result)


if __name__ == "__main__":
    ablation_table.collect(run((0, 1, 2), Settings()), CSV_PATH)
