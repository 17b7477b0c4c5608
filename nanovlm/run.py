"""A training run: everything it is made of, in one place that the trainer and a recipe's hooks share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanovlm.data.images import CLIP, Preprocessing
from nanovlm.parallel import Processes
from nanovlm.stages import Stage


def all_parts(model, contrastive):
    """Parts of a vision-language model and of the text tower beside it.

    Args:
      model: vlm.VLM. contrastive: contrastive.ContrastiveModel or None.
    Returns: dict part -> dict name -> Parameter; the ViT, which both models share, stands in it once.
    """
    if contrastive is None:
        return model.parts()
    return model.parts() | {"text_tower": contrastive.parts()["text_tower"]}


def text_side(contrastive):
    """State of a contrastive model without its ViT, which belongs to the vision-language model.

    Args:
      contrastive: contrastive.ContrastiveModel or None.
    Returns: dict name -> Tensor, the model's own memory; empty for None.
    """
    if contrastive is None:
        return {}
    return {name: tensor for name, tensor in contrastive.state_dict().items() if not name.startswith("vision.")}


@dataclass
class Run:
    """Everything a training run is made of. The hooks of a recipe receive it."""

    out: Path                     # output folder
    identity: dict                # JSON values that a resumed run must share: recipe, size, seed, stages, data
    model: Any                    # vlm.VLM
    contrastive: Any              # contrastive.ContrastiveModel around the same ViT; None without contrastive stages
    tokenizer: Any                # data.tokenizer.Tokenizer
    template: Any                 # data.templates.Template
    stages: tuple[Stage, ...]
    sources: dict[str, Any]       # name -> source, at least those that the stages' mixtures name
    seed: int
    device: torch.device
    smoke: bool                   # a run of seconds: hooks should measure on a handful of examples
    save_every: int               # optimizer steps between checkpoints
    exam_every: int               # optimizer steps between exams
    max_minutes: float | None     # of this process; then a checkpoint is written and the run stops
    evaluate: Callable            # (run, stage) -> {measure: share}, quick and held-out; {} = nothing to measure
    exam: Callable                # (run) -> list of lines: held-out questions with the model's present answers
    finish: Callable              # (run) -> {key: value} for results.json
    report: Callable              # (run, results) -> list of lines printed last
    stage_templates: dict = field(default_factory=dict)  # stage name -> its own template instead of `template`
    log: Callable | None = None   # (entry) -> None, is told every line of the log, see progress.py
    held_out: bool = False        # one record in a hundred is never trained on, but asked, see held_out.py
    workers: int = 0              # processes that read and decode ahead; 0 = none
    max_damaged: float = 0.01     # share of the records that may be unusable and replaced by the next
    preprocessing: Preprocessing = CLIP  # mean and deviation of its pixels; size and fit are the stage's
    processes: Processes = field(default_factory=Processes)  # that train together
    skeleton: Any = None          # (model, contrastive) on the meta device, for sharded copies; None unless fsdp
    training: Any = None          # module whose forward is the stage's loss, see wrapping.lay_out; None = the model's own
    recompute: bool = False       # run every block again in the backward pass instead of remembering its inside
    compiled: bool = False        # torch.compile around every block
    keep: int = 1                 # checkpoints that stay
    background: bool = False      # a thread writes the checkpoints

    def template_of(self, stage):
        """The data.templates.Template that a stage writes its rows with."""
        return self.stage_templates.get(stage.name, self.template)

    def parts(self):
        """`all_parts` of this run's models."""
        return all_parts(self.model, self.contrastive)

    def frozen(self, stage):
        """Every tensor that a stage must leave alone: dict name -> Tensor."""
        trained = {name for part in stage.learning_rates for name in self.parts()[part]}
        everything = self.model.state_dict() | text_side(self.contrastive)
        return {name: tensor for name, tensor in everything.items() if name not in trained}
