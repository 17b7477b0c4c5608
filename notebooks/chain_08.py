"""Lesson 08's ablation: the papers' chain of stages in miniature, whole and with one stage left out.

  tower       pictures against captions          ViT                        48 pixels   (CLIP, ready-made in the papers)
  words       questions about scenes in words    language model                         (Vicuna, ready-made too)
  align       questions about pictures           bridge alone               32 pixels
  resolution  the same                           ViT and bridge             48 pixels, position table resized
  instruct    the same                           everything                 48 pixels

A stage that is left out gives its steps to instruct, so that all runs are equally long.

    python notebooks/ablation_08.py        writes notebooks/ablation_08.csv
"""

import csv
import sys
import time
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ablation_04
import torch
import torch.nn.functional as F
from ablation_04 import KINDS, NUM_HEADS, WIDTH, captions, records, train

from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.data.batching import build_batch, contrastive_batch
from nanovlm.data.scene_source import Scenes
from nanovlm.data.scene_texts import SceneTexts
from nanovlm.data.templates import NANO
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.movement import Movement
from nanovlm.projector import PixelShuffleProjector
from nanovlm.stages import Stage
from nanovlm.vlm import IGNORE, VLM

CSV_PATH = Path(__file__).with_suffix(".csv")
LARGE, SMALL = 48, 32  # pixels
EVERYTHING = ("vision", "bridge", "embedding", "language_model")
RATE = 4e-3
COMMON = dict(optimizer="muon", warmup_steps=5, max_tokens=96)
STAGES = (
    Stage("tower", "contrastive", dict.fromkeys(("vision", "text_tower"), RATE), {"captions": 1}, 90, 48, image_size=LARGE, **COMMON),
    Stage("words", "language", dict.fromkeys(EVERYTHING[2:], RATE), {"words": 1}, 90, 32, image_size=LARGE, **COMMON),
    Stage("align", "language", {"bridge": RATE}, {"pictures": 1}, 40, 16, image_size=SMALL, **COMMON),
    Stage("resolution", "language", dict.fromkeys(EVERYTHING[:2], RATE), {"pictures": 1}, 40, 16, image_size=LARGE, **COMMON),
    Stage("instruct", "language", dict.fromkeys(EVERYTHING, RATE), {"pictures": 1}, 120, 16, image_size=LARGE, **COMMON),
)  # fmt: skip
SKIPPED = (None, "tower", "align")
EXAM = 250  # pictures


@dataclass(frozen=True)
class Result:
    """One row of the table; shares right between 0 and 1."""

    skipped: str  # "none", or a stage's name
    seed: int
    color: float
    shape: float
    place: float
    size: float


def sources(seed):
    """What each stage reads, by name."""
    pictures = dict(questions_per_picture=2, weights=dict.fromkeys(KINDS, 1.0), max_objects=1, string_share=0.0, canvas=LARGE)
    return {
        "captions": captions(seed),
        "words": SceneTexts("train", seed, max_objects=1, string_share=0.0, weights={"described": 1.0}),
        "pictures": Scenes("train", seed=seed, **pictures),
        "exam": Scenes("new", seed=1000, **pictures),
    }


def make_tokenizer():
    """A tokenizer of the words of captions and questions: the same for all seeds."""
    made = [record for source in sources(0).values() for record in records(source, 0, 300)]
    return train_tokenizer(["user: \nbot:", *(f" {turn.text}" for record in made for turns in record.conversations for turn in turns)], 400)


def make_models(tokenizer, seed):
    """(vlm.VLM, the ViT of it beside a text tower), untrained."""
    vision = ablation_04.make_vision(seed)
    text = TextTower(tokenizer.vocab_size, WIDTH, 1, NUM_HEADS, 2 * WIDTH, context_length=24)
    decoder = Decoder(DecoderConfig(tokenizer.vocab_size, WIDTH, NUM_HEADS, NUM_HEADS, 2 * WIDTH, 96, (LayerOptions(),) * 2, tied_head=True))
    model = VLM(vision, PixelShuffleProjector(WIDTH, WIDTH, merge=1), decoder)
    return model, ContrastiveModel(vision, WIDTH, text, WIDTH, joint_width=WIDTH)


def batch_of(some_records, model, tokenizer, image_size):
    """Records as a Batch, a row per question."""
    return build_batch(some_records, NANO, tokenizer, model.num_image_tokens, image_size, "crop", 96)


def train_stage(stage, model, towers, tokenizer, source, start):
    """Train one stage; returns how far each part of the model has come: dict part -> |w - w0| / |w0|, 0 = frozen.

    Args: start: int, the record of the source that comes first.
    """
    model.vision.resize(stage.image_size)  # before anything remembers the table
    parts = {part: own for part, own in (model.parts() | {"text_tower": towers.parts()["text_tower"]}).items() if own}
    for part, own in parts.items():
        for parameter in own.values():
            parameter.requires_grad_(part in stage.learning_rates)
    movement = Movement(parts, stage)

    def loss_of(step):
        chosen = records(source, start + step * stage.batch_size, stage.batch_size)
        if stage.objective == "contrastive":
            return towers.loss(*contrastive_batch(chosen, tokenizer, stage.image_size, "crop", 24))
        loss, count = model.loss(batch_of(chosen, model, tokenizer, stage.image_size))
        return loss / count

    train(parts, stage, loss_of)
    return dict.fromkeys((part for part in parts if part != "text_tower"), 0.0) | {
        part: moved for part, moved in movement.measure(parts).items() if part != "text_tower"
    }


@torch.no_grad()
def examine(model, tokenizer, source, number=EXAM):
    """{kind of question: share answered right in every token} over new pictures."""
    asked = records(source, 0, number)
    batch = batch_of(asked, model, tokenizer, model.vision.image_size)
    labels = batch.labels[:, 1:]
    right = ((model(batch)[:, :-1].argmax(-1) == labels) | (labels == IGNORE)).all(dim=1)
    kinds = [kind for record in asked for kind in record.kinds]
    return {kind: right[torch.tensor([one == kind for one in kinds])].float().mean().item() for kind in KINDS}


@torch.no_grad()
def loss_on(model, tokenizer, some_records):
    """Loss in nats per answer token."""
    batch = batch_of(some_records, model, tokenizer, model.vision.image_size)
    return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE).item()


def chain(skipped):
    """The stages without one, whose steps go to the last: tuple of Stage."""
    extra = sum(stage.steps for stage in STAGES if stage.name == skipped)
    kept = [stage for stage in STAGES if stage.name != skipped]
    return (*kept[:-1], replace(kept[-1], steps=kept[-1].steps + extra))


def run(skipped, seed, watch=lambda stage, model, moved: None):
    """Train a chain from nothing.

    Args: skipped: name of a stage, or None. watch: told of every stage when it is over.
    Returns: (vlm.VLM, its tokenizer, Result).
    """
    torch.manual_seed(seed)
    tokenizer, found = make_tokenizer(), sources(seed)
    model, towers = make_models(tokenizer, seed)
    read = dict.fromkeys(found, 0)
    for stage in chain(skipped):
        (name,) = stage.mixture
        moved = train_stage(stage, model, towers, tokenizer, found[name], read[name])
        read[name] += stage.steps * stage.batch_size
        watch(stage, model, moved)
    return model, tokenizer, Result(skipped or "none", seed, **examine(model, tokenizer, found["exam"]))


def read(path=CSV_PATH):
    """(note, list of Result) of a written table."""
    with open(path, encoding="utf-8", newline="") as file:
        note = file.readline().removeprefix("# ").strip()
        rows = list(csv.DictReader(file))
    return note, [Result(**{field.name: field.type(row[field.name]) for field in fields(Result)}) for row in rows]


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = []
    for seed in (0, 1, 2):
        for skipped in SKIPPED:
            results.append(run(skipped, seed)[2])
            print(results[-1], f"{time.process_time():.0f} CPU-s", flush=True)
    ablation_04.write(results, CSV_PATH, (
        f"python notebooks/ablation_08.py, {date.today()}, torch {torch.__version__}, one core, "
        f"{time.process_time():.0f} CPU-seconds, seeds 0 to 2"
    ))  # fmt: skip
