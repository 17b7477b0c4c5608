"""The stage that is training: what it is made of, and how all that is kept in a checkpoint."""

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from nanovlm import checkpoint, sharded_checkpoint
from nanovlm.data.batching import Report
from nanovlm.data.damage import DamageReport
from nanovlm.data.feed import Feed
from nanovlm.run import text_side
from nanovlm.stages import Stage
from nanovlm.watching import Watch


@dataclass
class Later:
    """A source that begins at record `start`, so that a stage reads on where the stage before it stopped."""

    source: Any
    start: int

    def __len__(self):
        return len(self.source)

    def record(self, n):
        """Record start + n of the source."""
        return self.source.record(self.start + n)


@dataclass
class Current:
    """The stage that is training."""

    index: int  # among run.stages
    stage: Stage
    optimizers: list
    feed: Feed
    damage: DamageReport
    watch: Watch
    report: Report = field(default_factory=Report)  # rows cut to max_tokens
    frozen: dict = field(default_factory=dict)  # tensor name -> digest at the start of the stage
    step: int = 0  # updates of this stage that are done
    skipped: int = 0  # of them, the last ones, without a step, as the loss or gradient was not finite

    def tensors(self, run):
        """What a checkpoint keeps of it: dict file name -> dict name -> Tensor."""
        return {"model": run.model.state_dict(), "text_tower": text_side(run.contrastive),
                "optimizer": checkpoint.optimizer_tensors(self.optimizers), "movement": self.watch.movement.start}

    def state(self, run):
        """What else a checkpoint keeps of it: dict of JSON values. All processes call this."""
        return {"stage": self.index, "stage_step": self.step, "report": asdict(run.processes.sum_up(self.report)),
                "frozen": self.frozen, "skipped": self.skipped, "image_size": run.model.vision.image_size}

    def restore(self, run, folder, state):
        """Put what a checkpoint holds back in its place, in a stage that has just begun.

        Args:
          folder: Path of the checkpoint. state: dict of its state.json.
        """
        targets = self.tensors(run) | {"optimizer": checkpoint.optimizer_places(self.optimizers)}
        tensors = sharded_checkpoint.read(folder, targets, run.processes)
        checkpoint.copy_into(run.model.state_dict(), tensors["model"], "model.safetensors")
        checkpoint.copy_into(text_side(run.contrastive), tensors["text_tower"], "text_tower.safetensors")
        checkpoint.load_optimizer(self.optimizers, tensors["optimizer"])
        torch.set_rng_state(tensors["random"]["cpu"])
        if run.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random"]["cuda"], run.device)
        self.watch.movement.start = tensors["movement"]
        self.feed.load_state(state["feed"])
        self.report = Report(**state["report"]) if run.processes.main else Report()  # the others' counts are in it
        self.frozen, self.step, self.skipped = state["frozen"], state["stage_step"], state["skipped"]


def digests(tensors):
    """A fingerprint of the bytes of each tensor, sharded or not: dict name -> Tensor to dict name -> str."""
    def digest(tensor):
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return hashlib.sha256(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()

    return {name: digest(tensor) for name, tensor in tensors.items()}


def random_state(device):
    """torch's random states: dict of uint8 Tensors, "cpu" and, on a GPU, "cuda"."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state
