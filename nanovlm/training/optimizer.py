"""Optimizer groups, learning rates over time, and the table that shows them.

A group is part x depth x {matrix, other, scalar} and carries its name, so that its learning rate can be read off and
its state saved by parameter name. Matrices are the 2-D weights inside blocks; embeddings, convolutions, latents,
positions, norms, biases and heads are "other"; single numbers, which cannot be sharded, stand apart. Only matrices see
weight decay and, when a stage asks for it, Muon.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) averages gradients as SGD with momentum does, and then
makes the average orthogonal: of G = U S V^T it takes U V^T, a step of the same length in every direction in which the
matrix can move, however small the gradient there. Newton-Schulz iterations get there by products alone:

    X = G / |G|                               all singular values between 0 and 1
    X = a X + b (X X^T) X + c (X X^T)^2 X     five times: each singular value s becomes a s + b s^3 + c s^5

This polynomial is steep at 0 and near 1 elsewhere: all but the smallest singular values land between 0.7 and 1.2. A
direction need not be more exact, and bfloat16 does for it. The learning rate of such a step lives on another scale than
Adam's, which `Stage.muon_factor` bridges.
"""

import math
import re

import torch
from torch.distributed.tensor import DTensor

from nanovlm.machine import DTYPES
from nanovlm.training.processes import shard_of, threads
from nanovlm.training.stages import unsharded

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c: Keller Jordan's
NEWTON_SCHULZ_STEPS = 5
BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.")  # the numbered blocks of a tower, bridge or decoder


def orthogonalised(matrix, dtype):
    """A matrix with singular values near 1 and, about, the singular vectors it had: float[N, M] -> dtype[N, M]."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if tall else x  # the smaller of X X^T and X^T X
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov's momentum, its direction made orthogonal; for matrices, whole ones or DTensors.

    Momentum is elementwise and stays sharded; the direction is gathered, every process makes it orthogonal in the same
    way, and each keeps its own rows. dtype: torch.dtype of the iterations.
    """

    def __init__(self, groups, momentum, dtype):
        super().__init__(groups, {"momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in (one for one in group["params"] if one.grad is not None):
                state, gradient, (rows, columns) = self.state[parameter], parameter.grad, parameter.shape
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                direction = unsharded(gradient.lerp(state["momentum_buffer"], momentum))
                direction = shard_of(orthogonalised(direction, self.dtype), parameter)
                parameter.mul_(1 - lr * group["weight_decay"])
                # a tall matrix's entries are smaller
                parameter.add_(direction, alpha=-lr * math.sqrt(max(1, rows / columns)))


def lr_factor(step, stage):
    """Learning rate as a share of the peak after `step` optimizer steps of a stage: float.

    It rises to 1 at warmup_steps, then falls so that it would meet end_lr_factor one past the last update.
    """
    if step < stage.warmup_steps:
        return stage.start_lr_factor + (1 - stage.start_lr_factor) * step / stage.warmup_steps
    if stage.schedule == "constant":
        return 1.0
    decay_steps = stage.steps - stage.warmup_steps
    if stage.schedule == "trapezoid":
        decay_steps = min(stage.decay_share * stage.steps, decay_steps)
    progress = max(0.0, 1 - (stage.steps - step) / decay_steps)
    height = (1 + math.cos(math.pi * progress)) / 2 if stage.schedule == "cosine" else 1 - progress
    return stage.end_lr_factor + (1 - stage.end_lr_factor) * height


def depths_from_top(names):
    """Depth of every parameter of a part, counted from its top: name -> int; names in the order of registration.

    With L blocks: 0 behind the last, L - i in block i, L + 1 before the first (BEiT, arXiv:2106.08254, its code).
    """
    blocks = [BLOCK.search(name) for name in names]
    numbers = sorted({int(block[1]) for block in blocks if block}, reverse=True)  # the top one first
    depth, result = len(numbers) + bool(numbers), {}
    for name, block in zip(names, blocks):
        if block:
            depth = numbers.index(int(block[1])) + 1
        elif depth <= len(numbers):
            depth = 0
        result[name] = depth
    return result


def is_matrix(name, parameter):
    """True for the 2-D weights inside blocks, which weight decay and Muon are meant for."""
    return parameter.ndim == 2 and name.endswith(".weight") and BLOCK.search(name) is not None


def groups(parts, stage):
    """Sort what a stage trains of `VLM.parts()` into named groups, a list of dict for torch's optimizers.

    "name" is "vision/2/matrix": part, depth from the top, kind. Raises: ValueError for a part that the model lacks.
    """
    missing = sorted((stage.learning_rates.keys() | stage.layer_decay.keys()) - parts.keys())
    if missing:
        raise ValueError(f"stage {stage.name!r} names the part {missing[0]!r}, which this model does not have. "
                         f"It has: {', '.join(parts)}")
    result = {}
    for part, rate in stage.learning_rates.items():
        depths = depths_from_top(list(parts[part]))
        for name, parameter in parts[part].items():
            matrix = is_matrix(name, parameter)
            muon = matrix and stage.optimizer == "muon"
            group_name = f"{part}/{depths[name]}/{'matrix' if matrix else 'other' if parameter.ndim else 'scalar'}"
            peak = rate * (stage.muon_factor if muon else 1.0) * stage.layer_decay.get(part, 1.0) ** depths[name]
            group = result.setdefault(group_name, {
                "name": group_name, "muon": muon, "peak_lr": peak, "lr": peak, "params": [], "param_names": [],
                "weight_decay": stage.weight_decay if matrix else 0.0})  # fmt: skip
            group["params"].append(parameter)
            group["param_names"].append(name)
    return list(result.values())


def portions(groups, number):
    """Groups in at most `number` lists of about as many parameters each."""
    lists, size = [[] for _ in range(number)], lambda group: sum(parameter.numel() for parameter in group["params"])
    for group in sorted(groups, key=size, reverse=True):
        min(lists, key=lambda found: sum(map(size, found))).append(group)
    return [one for one in lists if one]


def build(parts, stage, num_threads=1):
    """The optimizers of a stage: list of Muon (the matrices, dealt out to num_threads of them), then AdamW."""
    found = groups(parts, stage)
    to_muon, to_adamw = ([group for group in found if group["muon"] is muon] for muon in (True, False))
    if any(isinstance(parameter, DTensor) for group in to_muon for parameter in group["params"]):
        num_threads = 1  # what processes say to one another keeps its order
    optimizers = [Muon(one, stage.momentum, DTYPES[stage.precision]) for one in portions(to_muon, num_threads)]
    rest = [torch.optim.AdamW(to_adamw, betas=stage.betas, eps=stage.eps, fused=True)] if to_adamw else []
    return optimizers + rest


def set_lr(optimizers, factor):
    """Set every group's learning rate to its peak times a factor from `lr_factor`; optimizers: list from `build`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class Together:
    """The optimizers of a stage as one. On a CPU each has one thread: Muon's products are too small for several."""

    def __init__(self, optimizers, device):
        self.all, self.device = optimizers, device
        groups = [group for one in optimizers for group in one.param_groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]

    def zero_grad(self):
        """Forget the gradients of the last update."""
        for parameter in self.parameters:
            parameter.grad = None

    def lr(self):
        """The largest learning rate."""
        return max(group["lr"] for one in self.all for group in one.param_groups)

    def step(self, factor):
        """Move the weights, at learning rates that are their peaks times a factor."""
        set_lr(self.all, factor)
        if self.device.type == "cpu":
            with threads(min(torch.get_num_threads(), len(self.all))) as pool:
                list(pool.map(lambda one: one.step(), self.all))
        else:
            for one in self.all:
                one.step()


def table(parts, stage):
    """The table printed before a stage, list of str: which part trains, how large it is, and how fast it moves."""
    lines, trained = [f"{'part':<16}{'parameters':>14}  {'trained':<8}peak learning rate"], 0
    sizes = {part: sum(parameter.numel() for parameter in held.values()) for part, held in parts.items()}
    for part, size in sizes.items():
        peaks = sorted(group["peak_lr"] for group in groups(parts, stage) if group["name"].startswith(f"{part}/"))
        trained += size if peaks else 0
        rates = " to ".join(f"{rate:.3g}" for rate in dict.fromkeys(peaks[:1] + peaks[-1:]))
        lines.append(f"{part:<16}{size:>14,}  {'yes' if peaks else 'frozen':<8}{rates or '-'}")
    total = sum(sizes.values())
    lines.append(f"{'all':<16}{total:>14,}  {trained:,} trained ({trained / total:.0%})")
    return lines
