"""What a recipe is: one model, its stages, its data and how it is judged, as functions and data.

A recipe of a published model brings no data and no tokenizer of its own: the stages name the paper's datasets, which
`--datasets FILE.json` lists, and `--init FOLDER` holds tokenizer and weights. Such a run reports its losses.
"""

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovlm.data.images import CLIP, Preprocessing
from nanovlm.data.templates import Template
from nanovlm.published.language import with_vocabulary
from nanovlm.published.load import Published


SMOKE_STEPS, TINY_STEPS = 4, 100  # optimizer steps of a stage in a smoke run, and at the tiny size
TINY_BATCH = 4  # examples


@dataclass(frozen=True)
class Expected:
    """What a stage's examples are like, and what its paper says of the time it took."""

    text_tokens: int                    # of an example on average, beside its image tokens; our estimate
    num_frames: int = 1                 # pictures of an example; 0 = text
    num_gpus: int = 8
    gpu: str = "A100"                   # a key of gpus.PEAKS
    hours: float | None = None          # as published; None = not stated
    source: str = ""                    # of hours and GPUs; "" = neither is stated, 8 A100 are ours


@dataclass(frozen=True)
class Recipe:
    """One way to make a model. A recipe file defines one, called RECIPE."""

    name: str
    sizes: tuple[str, ...]              # what --size may name; the first is the default
    build: Callable                     # (size, vocab_size) -> vlm.VLM
    contrastive: Callable | None        # (size, model) -> contrastive.ContrastiveModel around model.vision
    stages: Callable                    # (size, smoke) -> tuple of Stage
    sources: dict[str, Callable]        # name in the stages' mixtures -> (seed) -> source
    tokenizer: Callable                 # () -> data.tokenizer.Tokenizer
    template: Template
    decodings: dict[str, Any]           # preset name -> sampler.Decoding
    evaluate: Callable                  # (run, stage) -> {measure: share}, quick, before and after every stage
    exam: Callable                      # (run) -> list of lines, the answers to a few held-out questions
    finish: Callable                    # (run) -> {key: value}, the full evaluation; becomes results.json
    report: Callable                    # (run, results) -> list of lines printed last
    remark: str = ""                    # said beside an answer about a picture unlike the training's; "" = nothing
    save_every: int = 100               # optimizer steps between checkpoints
    exam_every: int = 50                # optimizer steps between exams
    published: Published | None = None  # of a model whose weights others have published
    stage_templates: dict[str, Template] = field(default_factory=dict)  # stage -> its own template instead
    preprocessing: Preprocessing = CLIP  # its mean and deviation; size and fit are the stage's
    prompts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # data set -> ways to ask, see data/datasets.py
    log: Callable | None = None         # (entry) -> None, is told every line of the log, see progress.py
    expected: dict[str, Expected] = field(default_factory=dict)  # stage -> what it costs
    weights: tuple[str, ...] = ()       # files to start from, which --init FOLDER unites


def digest(path):
    """The SHA-256 of a file: str."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def from_file(path):
    """Run a Python file, in whose folder it may find others to import, and take its recipe.

    Args:
      path: str or Path of a file that defines RECIPE; one that the user has named, never one that a model's folder names.
    Returns: Recipe.
    Raises: FileNotFoundError; ValueError if the file defines no RECIPE.
    """
    specification = importlib.util.spec_from_file_location("recipe_from_file", path)
    module = importlib.util.module_from_spec(specification)
    folder = str(Path(path).resolve().parent)
    sys.path.insert(0, folder)
    try:
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    if not isinstance(vars(module).get("RECIPE"), Recipe):
        raise ValueError(f"{path} defines no RECIPE; write RECIPE = Recipe(...), see nanovlm/recipes/nano.py")
    return module.RECIPE


def complete(config, defaults):
    """A config with what it leaves out: dict; nested parts are completed one by one, other keys are kept."""
    filled = dict(config)
    for key, default in defaults.items():
        given = config.get(key)
        if isinstance(default, dict):
            if given is not None and not isinstance(given, dict):
                raise ValueError(f"config: {key} is {given!r}, expected an object with {', '.join(default)}")
            filled[key] = complete(given or {}, default)
        elif given is None:
            filled[key] = default
    return filled


def at_size(stages, size, smoke, tiny_images):
    """The paper's stages as they stand, or shrunk to what a laptop rehearses.

    Args:
      stages: tuple of Stage. size: str; "tiny" shrinks pictures, rows and steps.
      smoke: bool, a few steps of a few examples.
      tiny_images: {pixels in the paper: pixels at the tiny size}.
    Returns: tuple of Stage; parts, rates and mixtures are never touched.
    """
    if size == "tiny":
        stages = [
            dataclasses.replace(
                stage, image_size=tiny_images[stage.image_size], steps=TINY_STEPS, batch_size=TINY_BATCH,
                warmup_steps=TINY_STEPS // 20, max_tokens=min(stage.max_tokens, 256), precision="float32",
                micro_batch_size=None,
            )
            for stage in stages
        ]  # fmt: skip
    if smoke:
        stages = [
            dataclasses.replace(
                stage, steps=SMOKE_STEPS, warmup_steps=1, batch_size=min(stage.batch_size, TINY_BATCH), micro_batch_size=None,
            )
            for stage in stages
        ]  # fmt: skip
    return tuple(stages)


def published_recipe(name, published, stages, template, decodings, stage_templates=None, remark="", preprocessing=CLIP,
                     expected=None, weights=(), prompts=None):
    """The recipe of a published model; its runs are judged by their losses alone.

    Args:
      name: str. published: Published. stages: (size, smoke) -> tuple of Stage, over the paper's datasets.
      template, decodings, remark, preprocessing: as in Recipe. stage_templates: {stage: Template} where one has its own.
      expected, weights, prompts: as in Recipe.
    Returns: Recipe.
    """

    def no_tokenizer():
        raise ValueError(f"recipe {name!r} has no tokenizer of its own: give --init FOLDER with the model's tokenizer.json")

    return Recipe(
        name=name,
        sizes=tuple(published.configs),
        build=lambda size, vocab_size: published.build(with_vocabulary(published.configs[size], vocab_size)),
        contrastive=None,
        stages=stages,
        sources={},
        tokenizer=no_tokenizer,
        template=template,
        decodings=decodings,
        evaluate=lambda run, stage: {},
        exam=lambda run: [],
        finish=lambda run: {},
        report=lambda run, results: [f"the losses are in {run.out / 'log.jsonl'}, their curves in curves.png"],
        remark=remark,
        published=published,
        stage_templates=stage_templates or {},
        preprocessing=preprocessing,
        expected=expected or {},
        weights=weights,
        prompts=prompts or {},
    )
