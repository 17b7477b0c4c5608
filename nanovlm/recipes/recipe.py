"""What a recipe is: one model, its stages, its data and how it is judged, as functions and data."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanovlm.data.templates import Template


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


def from_file(path):
    """Load the recipe of a Python file.

    Args:
      path: str or Path of a file that defines RECIPE.
    Returns: Recipe.
    Raises: FileNotFoundError; ValueError if the file defines no RECIPE.
    """
    specification = importlib.util.spec_from_file_location("recipe_from_file", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if not isinstance(vars(module).get("RECIPE"), Recipe):
        raise ValueError(f"{path} defines no RECIPE; write RECIPE = Recipe(...), see nanovlm/recipes/nano.py")
    return module.RECIPE
