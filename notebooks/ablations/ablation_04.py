"""Lesson 04's ablation: what does a bridge keep of a picture, and what is a tower that has seen captions worth?

A small ViT first learns by matching pictures and captions, as CLIP did. Then a bridge and a decoder learn to answer
questions about pictures of one object. Two tables in one:

- bridges: the tower stays frozen, so that all bridges read the same features; MLP over squares of patches, resampler
  and abstractor, at several numbers of image tokens;
- starts: one bridge; with the tower stage and without, the ViT frozen or training along, and once without the tower
  stage but longer, by as many steps.

    python notebooks/ablations/ablation_04.py        writes notebooks/ablations/ablation_04.csv
"""

import functools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

import torch
from ablations import ablation_table

from nanovlm.training import optimizer
from nanovlm.abstractor import Abstractor
from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.data.batching import build_batch, contrastive_batch
from nanovlm.data.scene_questions import Scenes
from nanovlm.data.templates import NANO
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.projector import PixelShuffleProjector
from nanovlm.recipes.nano_tests import majority_baseline
from nanovlm.resampler import Resampler
from nanovlm.training.stages import Stage
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

CSV_PATH = Path(__file__).with_suffix(".csv")
KINDS = ("color", "shape", "place", "size")
IMAGE_SIZE, PATCH_SIZE, WIDTH, NUM_HEADS = 48, 8, 64, 4
SIDE = IMAGE_SIZE // PATCH_SIZE  # patches; 6 x 6 of them divide into squares of 1, 2, 3 and 6 a side
CONTEXT = 96  # tokens


@dataclass(frozen=True)
class Arm:
    """One bridge and one way to begin."""

    bridge: str  # one of BRIDGES
    num_tokens: int  # image tokens of a picture
    tower: bool = True  # the ViT has learned from captions first
    frozen: bool = True  # and stays as it is while bridge and decoder learn
    longer: bool = False  # as many steps more as the tower stage takes


def mlp(num_tokens):
    """Squares of patches side by side, as many as tokens are wanted; with one patch each it is LLaVA's MLP."""
    return PixelShuffleProjector(WIDTH, WIDTH, merge=int((SIDE**2 / num_tokens) ** 0.5))


def resampler(num_tokens):
    """Lynx's: latents look at the patches."""
    return Resampler(WIDTH, WIDTH, num_tokens, 1, NUM_HEADS, WIDTH // NUM_HEADS, 2 * WIDTH)


def abstractor(num_tokens):
    """mPLUG-Owl2's: the last token is its end of the picture, so one query less."""
    return Abstractor(WIDTH, WIDTH, num_tokens - 1, 1, NUM_HEADS, 2 * WIDTH)


BRIDGES = {"MLP": mlp, "resampler": resampler, "abstractor": abstractor}
BRIDGE_ARMS = tuple(
    Arm(bridge, number)
    for bridge, numbers in (("resampler", (1, 4, 36)), ("MLP", (1, 4, 36)), ("abstractor", (4, 36)))
    for number in numbers  # an abstractor's only token would be its end, which sees nothing
)
START_ARMS = (
    Arm("resampler", 4, tower=True, frozen=False),
    Arm("resampler", 4, tower=False, frozen=True),
    Arm("resampler", 4, tower=False, frozen=False),
    Arm("resampler", 4, tower=False, frozen=False, longer=True),
)
ARMS = BRIDGE_ARMS + START_ARMS  # the fifth start, tower and frozen, is among the bridges


@dataclass(frozen=True)
class Settings:
    """Lengths of a run."""

    tower_steps: int = 100  # optimizer steps on captions
    answer_steps: int = 160  # optimizer steps on questions
    pictures: int = 20  # per step of answers, with up to two questions each; a step on captions has 64
    exam: int = 300  # pictures of the exam

    @property
    def most_steps(self):
        """Steps on questions of the arms that take longer."""
        return self.answer_steps + self.tower_steps


@dataclass(frozen=True)
class Result:
    """One row of the table; shares right between 0 and 1, by kind of question."""

    bridge: str
    num_tokens: int
    tower: bool
    frozen: bool
    longer: bool
    seed: int
    bridge_parameters: int
    color: float
    shape: float
    place: float
    size: float


ONE_OBJECT = dict(max_objects=1, canvas=IMAGE_SIZE, string_share=0.0)


def questions(split, seed):
    """Source of pictures of one object with two questions each."""
    return Scenes(split, seed=seed, questions_per_picture=2, weights=dict.fromkeys(KINDS, 1.0), **ONE_OBJECT)


@functools.lru_cache(maxsize=1)
def learning(seed, settings):
    """The pictures to learn from, with their questions: drawn once, shown to every arm of a seed."""
    return records(questions("train", seed), 0, settings.most_steps * settings.pictures)


def captions(seed):
    """Source of pictures with a caption, such as "teal star" or "a small teal star at the top"."""
    return Scenes("train", "captions", seed=seed + 100, weights={"short_caption": 2.0, "caption": 1.0}, **ONE_OBJECT)


def records(source, start, number):
    """Records start to start + number of a source."""
    return [source.record(n) for n in range(start, start + number)]


@functools.lru_cache(maxsize=1)
def make_tokenizer():
    """A tokenizer of the words of captions and questions: the same for all seeds."""
    return ablation_table.tokenizer_of(records(questions("train", 0), 0, 300) + records(captions(0), 0, 300))


def make_vision(seed):
    """An untrained ViT of one block behind a convolutional stem."""
    torch.manual_seed(seed)
    return ViT(ViTConfig(IMAGE_SIZE, PATCH_SIZE, WIDTH, 1, NUM_HEADS, 2 * WIDTH, conv_stem=True, class_token=False))


def make_model(arm, vision, seed):
    """Bridge and decoder of an arm behind a copy of a ViT."""
    own = make_vision(seed)
    own.load_state_dict(vision.state_dict())
    torch.manual_seed(seed)
    tokenizer, layers = make_tokenizer(), (LayerOptions(),) * 2
    decoder = Decoder(
        DecoderConfig(tokenizer.vocab_size, WIDTH, NUM_HEADS, NUM_HEADS, 2 * WIDTH, CONTEXT, layers, tied_head=True)
    )
    return VLM(own, BRIDGES[arm.bridge](arm.num_tokens), decoder)


def train(parts, stage, loss_of):
    """Some steps on the parts that a stage trains; loss_of: step -> loss."""
    optimizers = optimizer.build(parts, stage)
    trained = [parameter for part in stage.learning_rates for parameter in parts[part].values()]
    for step in range(stage.steps):
        optimizer.set_lr(optimizers, optimizer.lr_factor(step, stage))
        loss_of(step).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)


def learn_captions(seed, settings):
    """The tower stage: a ViT that has matched pictures and captions."""
    return learn_towers(seed, settings).vision


def learn_towers(seed, settings):
    """The ViT and the text tower that have matched pictures and captions."""
    vision, tokenizer, source = make_vision(seed), make_tokenizer(), captions(seed)
    text = TextTower(tokenizer.vocab_size, WIDTH, 1, NUM_HEADS, 2 * WIDTH, context_length=24)
    tower = ContrastiveModel(vision, WIDTH, text, WIDTH, joint_width=WIDTH)
    stage = Stage(
        "tower", "contrastive", {"vision": 4e-3, "text_tower": 4e-3}, {source.name: 1.0}, settings.tower_steps, 64,
        optimizer="muon", warmup_steps=min(10, settings.tower_steps - 1),
    )  # fmt: skip
    train(tower.parts(), stage, lambda step: tower.loss(
        *contrastive_batch(records(source, 64 * step, 64), tokenizer, IMAGE_SIZE, "crop", max_tokens=24)
    ))  # fmt: skip
    return tower


def rows(some_records, model):
    """Records as a Batch, a row per question."""
    return build_batch(some_records, NANO, make_tokenizer(), model.num_image_tokens, IMAGE_SIZE, "crop", CONTEXT)


def learn_answers(arm, vision, seed, settings):
    """The model of an arm, after it has learned to answer; the ViT given stays as it is."""
    model = make_model(arm, vision, seed)
    parts = {part: parameters for part, parameters in model.parts().items() if parameters}
    rates = dict.fromkeys((part for part in parts if not (arm.frozen and part == "vision")), 4e-3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (arm.frozen and name.startswith("vision.")))
    steps = settings.most_steps if arm.longer else settings.answer_steps
    shown, size = learning(seed, settings), settings.pictures
    stage = Stage(
        "answers", "language", rates, {"questions": 1.0}, steps, size, optimizer="muon", warmup_steps=min(10, steps - 1),
    )  # fmt: skip
    train(parts, stage, lambda step: ablation_table.mean_loss(model, rows(shown[step * size : (step + 1) * size], model)))
    return model


def examine(model, exam):
    """{kind of question: share answered right in every token} over records."""
    return ablation_table.shares_right(model, rows(exam, model), exam, KINDS)


@functools.lru_cache(maxsize=1)
def exam_records(number):
    """The exam: the same new pictures for all arms and seeds."""
    return records(questions("new", 1000), 0, number)


def blind(settings):
    """{kind: share} that can be had without looking, see majority_baseline."""
    return majority_baseline(exam_records(settings.exam))


def run_arm(arm, vision, seed, settings):
    """(the trained model, Result) of one arm; vision: the ViT it starts from."""
    model = learn_answers(arm, vision, seed, settings)
    size = sum(parameter.numel() for parameter in model.bridge.parameters())
    return model, Result(**asdict(arm), seed=seed, bridge_parameters=size, **examine(model, exam_records(settings.exam)))


def run(seeds, settings, arms=ARMS):
    """Results of every arm and seed; one tower per seed, for all arms that start from one."""
    for seed in seeds:
        starts = {True: learn_captions(seed, settings), False: make_vision(seed)}
        for arm in arms:
            yield run_arm(arm, starts[arm.tower], seed, settings)[1]


def read(path=CSV_PATH):
    """(note, list of Result) of a written table."""
    return ablation_table.read(path, Result)


if __name__ == "__main__":
    ablation_table.collect(run((0, 1, 2), Settings()), CSV_PATH)
