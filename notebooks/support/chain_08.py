"""Lesson 08's chain: the papers' stages in miniature, whole or with one of them left out.

  tower       pictures against captions          ViT                        48 pixels   (CLIP, ready-made in the papers)
  words       questions about scenes in words    language model                         (Vicuna, ready-made too)
  align       questions about pictures           bridge alone               32 pixels
  resolution  the same                           ViT and bridge             48 pixels, position table resized
  instruct    the same                           everything                 48 pixels

A stage that is left out gives its steps to instruct, so that all runs are equally long.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from ablations import ablation_04
import torch
import torch.nn.functional as F
from ablations.ablation_04 import KINDS, NUM_HEADS, WIDTH, captions, records, train
from ablations.ablation_table import mean_loss, shares_right, tokenizer_of

from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.data.batching import build_batch, contrastive_batch
from nanovlm.data.scene_questions import Scenes, SceneTexts
from nanovlm.data.templates import NANO
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.training.diagnostics import Movement
from nanovlm.projector import PixelShuffleProjector
from nanovlm.training.stages import Stage, all_parts
from nanovlm.vlm import IGNORE, VLM

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
EXAM = 250  # pictures


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
    return tokenizer_of(record for source in sources(0).values() for record in records(source, 0, 300))


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
    parts = {part: own for part, own in all_parts(model, towers).items() if own}
    for part, own in parts.items():
        for parameter in own.values():
            parameter.requires_grad_(part in stage.learning_rates)
    movement = Movement(parts, stage)

    def loss_of(step):
        chosen = records(source, start + step * stage.batch_size, stage.batch_size)
        if stage.objective == "contrastive":
            return towers.loss(*contrastive_batch(chosen, tokenizer, stage.image_size, "crop", 24))
        return mean_loss(model, batch_of(chosen, model, tokenizer, stage.image_size))

    train(parts, stage, loss_of)
    return dict.fromkeys((part for part in parts if part != "text_tower"), 0.0) | {
        part: moved for part, moved in movement.measure(parts).items() if part != "text_tower"
    }


def examine(model, tokenizer, source, number=EXAM):
    """{kind of question: share answered right in every token} over new pictures."""
    asked = records(source, 0, number)
    return shares_right(model, batch_of(asked, model, tokenizer, model.vision.image_size), asked, KINDS)


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


def begin(seed):
    """(model, towers, tokenizer, sources) of a seed, nothing trained yet."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    return *make_models(tokenizer, seed), tokenizer, sources(seed)


def run(stages, model, towers, tokenizer, found, watch=lambda stage, moved: None):
    """Train a model in some stages, one after the other.

    Args:
      stages: tuple of Stage. model, towers, tokenizer, found: as from `begin`; towers may be None for language alone.
      watch: told of every stage when it is over, with {part: how far it has come}.
    """
    read = dict.fromkeys(found, 0)
    for stage in stages:
        (name,) = stage.mixture
        moved = train_stage(stage, model, towers, tokenizer, found[name], read[name])
        read[name] += stage.steps * stage.batch_size
        watch(stage, moved)
