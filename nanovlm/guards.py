"""What watches over a run's numbers: where one stopped being finite, and when the loss jumped.

A loss that is not a number spoils every weight with its first step, so no step is taken. The stage says what then:
non_finite="stop" ends the run with a checkpoint of the last good step, "skip" leaves out this one update; so many in a
row end the run all the same.

A spike is a loss far above the last ones: more than SPIKE times their usual distance from their median. It is written
down and nothing else; what to do about it (a smaller rate, other data) is for people to decide.
"""

import math
import statistics
from collections import deque

import torch
from torch.distributed.tensor import DTensor

from nanovlm.optimizer import BLOCK
from nanovlm.vlm import part_of

MOST_SKIPPED = 10  # updates in a row
WINDOW, FEWEST = 50, 20  # losses that a new one is compared with, at most and at least
SPIKE = 8.0  # times the median distance of the last losses from their median


class Spikes:
    """Looks at one loss after the other, over a sliding window.

    Args: losses: list of float, the last ones of the stage so far.
    """

    def __init__(self, losses=()):
        self.losses = deque(losses, WINDOW)

    def __call__(self, loss):
        """Whether a loss is a spike: None, or the limit it exceeds; then it joins the others."""
        limit = None
        if len(self.losses) >= FEWEST:
            middle = statistics.median(self.losses)
            limit = middle + SPIKE * statistics.median(abs(one - middle) for one in self.losses)
        self.losses.append(loss)
        return limit if limit is not None and loss > limit else None


def loss_origin(run, stage, batch):
    """Where a loss stopped being finite: str for an error's message.

    The batch goes through the model once more, and every module's output is looked at. Not with fsdp, where one
    process alone cannot run the model.
    Args: run: run.Run. stage: Stage. batch: as the stage's loss takes it.
    """
    if run.processes.mode == "fsdp":
        return ""
    autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=stage.precision == "bfloat16")
    for part, parameters in run.parts().items():
        for name, parameter in parameters.items():
            if not torch.isfinite(parameter).all():
                return f"; a weight of the part {part} is not finite itself: {name}"
    with autocast:
        if stage.objective == "contrastive":
            name = first_bad_output(run.contrastive, lambda: run.contrastive.loss(*(one.to(run.device) for one in batch)))
            part = name and ("vision" if name.startswith("vision.") else "text_tower")
        else:
            name = first_bad_output(run.model, lambda: run.model.loss(batch.to(run.device)))
            part = name and part_of(f"{name}.", run.model.vision_branches())
    return f"; it arose in the part {part}, first seen behind {name}" if name else "; it arose in the loss itself"


def first_bad_output(model, work):
    """The first module to give out what is not finite, an inner one before the one around it: its name, or None.

    Args: model: the module that work runs. work: function without arguments, a forward pass.
    """
    found, hooks = [], []

    def watch(name):
        def look(module, inputs, output):
            if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(name)
        return look

    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_hook(watch(name)))
    try:
        with torch.no_grad():
            work()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def gradient_origin(run):
    """Where a gradient stopped being finite: str for an error's message.

    The backward pass goes from the loss to the pixels and spoils all that comes behind it, so the bad gradient that is
    nearest to the loss is where it arose.
    """
    bad = [(nearness(name), part, name) for part, parameters in run.parts().items() for name, parameter in parameters.items()
           if parameter.grad is not None and not math.isfinite(norm_of(parameter.grad))]  # fmt: skip
    return f"; it arose in the part {max(bad)[1]}, at {max(bad)[2]}" if bad else ""


def norm_of(tensor):
    """The norm of a tensor, sharded or not: float."""
    norm = tensor.norm()
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def nearness(name):
    """Where a parameter stands on the way from the pixels to the loss: (tower, bridge, words, layers, head; which layer)."""
    order = ("vision.", "text.", "project_", "bridge.", "decoder.embedding.", "decoder.layers.", "decoder.")
    place = next((place for place, start in enumerate(order) if name.startswith(start)), len(order))
    block = BLOCK.search(name)
    return place, int(block.group(1)) if block else -1
