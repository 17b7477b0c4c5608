"""What share of a GPU's peak a training step reaches (MFU, model FLOPs utilisation: PaLM, arXiv:2204.02311, App. B).

Counted is what the model needs, not what the machine did: recomputing activations, padding and the scores of words that
train nothing count for nothing. The operations of an example are those of rehearsal.py: so many for each picture, and
for a row of T tokens a T + b T^2, which two rehearsals of different length settle.
"""

import copy
from dataclasses import dataclass

import torch

from nanovlm.gpus import peak_flops
from nanovlm.rehearsal import example_cost

SHORT, LONG = 64, 128  # tokens of text in the two rehearsals


@dataclass(frozen=True)
class Meter:
    """Operations of a step, against the peak of all GPUs."""

    per_picture: float
    per_token: float  # a
    per_pair: float  # b
    peak: float  # operations per second

    def share(self, pictures, rows, tokens, seconds):
        """The share of the peak: float. pictures, rows, tokens (image tokens included): of the step."""
        flops = pictures * self.per_picture + tokens * self.per_token + self.per_pair * tokens**2 / max(rows, 1)
        return flops / seconds / self.peak


def without_numbers(model):
    """A copy of a model on the meta device, whatever holds its weights."""
    memo = {id(one): torch.nn.Parameter(torch.empty(one.shape, device="meta"), one.requires_grad) for one in model.parameters()}
    return copy.deepcopy(model, memo)


def make_meter(model, stage, device, number):
    """The Meter of a stage; None where the peak is not known (a CPU), or without a language loss.

    Args: model: vlm.VLM. stage: Stage. device: torch.device. number: int, GPUs.
    """
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None or stage.objective != "language":
        return None
    return measure(without_numbers(model), stage, number * peak)


def measure(model, stage, peak):
    """A Meter from two rehearsals of a model on the meta device."""
    short, long = (example_cost(model, stage, length) for length in (SHORT, LONG))
    image_tokens = model.num_image_tokens(stage.image_size)
    first, second = SHORT + image_tokens, LONG + image_tokens
    a, b = short["decoder"].flops / first, long["decoder"].flops / second  # each a + b T
    per_pair = (b - a) / (second - first)
    return Meter(short["vision"].flops + short["bridge"].flops, a - per_pair * first, per_pair, peak)
