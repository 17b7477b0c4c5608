"""What a recipe is: one model, its stages, its data and how it is judged, as functions and data.

A recipe of a published model brings no data and no tokenizer of its own: the stages name the paper's datasets, which
`--datasets FILE.json` lists, and `--init FOLDER` holds tokenizer and weights. Such a run reports its losses.
"""

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovlm.data.images import CLIP, Preprocessing
from nanovlm.data.templates import NANO, Template
from nanovlm.data.tokenizer import Tokenizer
from nanovlm.generation.sampler import Decoding
from nanovlm.training.stages import Stage


@dataclass(frozen=True)
class Expected:
    """What a stage's examples are like, and what its paper says of the time it took."""

    text_tokens: int                    # of an example on average, beside its image tokens; our estimate
    num_frames: int = 1                 # pictures of an example; 0 = text
    num_gpus: int = 8
    gpu: str = "A100"                   # a key of cost.PEAKS
    hours: float | None = None          # as published; None = not stated
    source: str = ""                    # of hours and GPUs; "" = neither is stated, 8 A100 are ours


@dataclass(frozen=True)
class Recipe:
    """One way to make a model. A recipe file defines one, called RECIPE."""

    name: str
    sizes: tuple[str, ...]              # what --size may name; the first is the default
    build: Callable                     # (size, vocab_size) -> vlm.VLM
    stages: Callable[[str, bool], tuple[Stage, ...]]  # (size, smoke)
    tokenizer: Callable                 # () -> data.tokenizer.Tokenizer of a run from nothing
    template: Template = NANO
    load_tokenizer: Callable = lambda folder: Tokenizer(Path(folder) / "tokenizer.json")  # (folder) -> Tokenizer
    contrastive: Callable | None = None  # (size, model) -> contrastive.ContrastiveModel around model.vision
    sources: dict[str, Callable] = field(default_factory=dict)  # name in the stages' mixtures -> (seed) -> source
    decodings: dict[str, Decoding] = field(default_factory=dict)  # by the preset's name
    forms: dict[str, Any] = field(default_factory=dict)  # preset name -> chat.Form, how benchmarks ask
    evaluate: Callable = lambda run, stage: {}  # -> {measure: share}, quick, before and after every stage
    measures: Callable = lambda stage: ()  # -> names of what evaluate finds, those that the stage's summary may name
    exam: Callable = lambda run: []     # -> list of lines, the answers to a few held-out questions
    finish: Callable = lambda run: {}   # -> {key: value}, the full evaluation; becomes results.json
    report: Callable = lambda run, results: [  # -> list of lines printed last
        f"the losses are in {run.out / 'log.jsonl'}, their curves in curves.png"]
    remark: str = ""                    # said beside an answer about a picture unlike the training's; "" = nothing
    save_every: int = 100               # optimizer steps between checkpoints
    exam_every: int = 50                # optimizer steps between exams
    published: Any = None               # published.weights.Published of a model whose weights others have published
    stage_templates: dict[str, Template] = field(default_factory=dict)  # stage -> its own template instead
    preprocessing: Preprocessing = CLIP  # its mean and deviation; size and fit are the stage's
    prompts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # data set -> ways to ask, see data/datasets.py
    log: Callable | None = None         # (entry) -> None, is told every line of the log, see progress.py
    expected: dict[str, Expected] = field(default_factory=dict)  # stage -> what it costs
    open_init: Callable | None = None   # (this recipe, what stands after --init, size, seed) -> it as it is there
    load: Callable | None = None        # () -> vlm.VLM with the weights after --init
    source: dict[str, Any] = field(default_factory=dict)  # config.json of the published model after --init
    finished: bool = False              # whether that model needs only the last stage, on data of one's own
    files: tuple[Path, ...] = ()        # of that model, kept in the run's folder: tokenizer, processor, chat template
    weights: tuple[str, ...] = ()       # to start from: `PART=NAME  what it is`, NAME as published/hub.py finds it

    def expects(self, stage):
        """What is known or assumed of a Stage's examples: Expected."""
        return self.expected.get(stage.name, Expected(min(64, stage.max_tokens // 2), num_gpus=1))

    def home(self, dataset):
        """Examples and page of a data set of some paper: str, for a list of what to fetch."""
        known = papers_datasets().get(dataset, {})
        return f"{known.get('examples', '?'):>7}  {known.get('page', 'its paper names no source')}"


@functools.cache
def papers_datasets():
    """The papers' data sets, for people to read: {name: {"page": where it lived, "examples": as its paper counts}}."""
    return json.loads(Path(__file__).with_name("datasets.json").read_text())


def from_file(path):
    """Run a Python file, in whose folder it may find others to import, and take its RECIPE: Recipe.

    path: one that the user has named, never one that a model's folder names.
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
