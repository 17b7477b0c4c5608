"""How much memory training takes, before it is asked for: weights, gradients, optimizer, activations.

  weights      4 bytes a parameter, whether it trains or not
  gradients    4 bytes a parameter that trains
  optimizer    8 more for AdamW (two running averages), 4 for Muon (one)
  copies       2 bytes a weight in bfloat16, as long as the backward pass may ask for it
  activations  what autograd keeps, per example of a micro-batch (rehearsal.py)
  working      the scores of the loss, a few hundred rows at a time

With several processes, `ddp` keeps all of this in each of them, and `fsdp` shares weights, gradients and optimizer out
evenly and brings one layer together at a time: while it computes with one layer it fetches the next, hence two.
Activations are never shared. Left out: the allocator's waste, a few hundred MB of the driver, and, with several
processes, their buffers for messages.

Gradients and activations are added up although a backward pass frees the one while it makes the other: with more than
one micro-batch both are there at once.
"""

from collections import Counter
from dataclasses import dataclass

from nanovlm import optimizer
from nanovlm.rehearsal import Cost

FLOAT32 = 4  # bytes
GB = 1e9
PARALLEL = ("none", "ddp", "fsdp")


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the top of a step."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # layers that are brought together, with fsdp
    copies: float
    activations: float  # of one example
    working: float

    def total(self, examples):
        """Bytes with a micro-batch of so many examples."""
        return self.total_without() + examples * self.activations

    def total_without(self):
        """Bytes that are taken whatever the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.copies + self.working

    def fitting(self, capacity):
        """The most examples a micro-batch can have on a GPU of `capacity` bytes: int, 0 = not even one."""
        return max(0, int((capacity - self.total_without()) // max(self.activations, 1)))


def stage_memory(parts, stage, costs, parallel="none", num_processes=1):
    """What a stage takes.

    Args:
      parts: dict part -> dict name -> Parameter, of all models in memory. stage: Stage.
      costs: dict part -> Cost of an example, from rehearsal.py.
      parallel: one of PARALLEL. num_processes: GPUs; 1 with "none".
    Returns: Memory.
    """
    cost = sum(costs.values(), Cost())
    everything = FLOAT32 * sum(one.numel() for parameters in parts.values() for one in parameters.values())
    trained = state = 0
    for group in optimizer.groups(parts, stage):
        size = FLOAT32 * sum(parameter.numel() for parameter in group["params"])
        muon = stage.optimizer == "muon" and group["name"].endswith("/matrix")
        trained, state = trained + size, state + size * (1 if muon else 2)
    share, gathered, copies = 1, 0, cost.copies
    if parallel == "fsdp":
        share = 1 / num_processes
        gathered = 2 * FLOAT32 * largest_layer(parts)
        copies = 0  # what was brought together is let go
    return Memory(everything * share, trained * share, state * share, gathered, copies, cost.kept, cost.working)


def largest_layer(parts):
    """Parameters of the largest block, or of the largest part among what lies outside the blocks."""
    sizes = Counter()
    for part, parameters in parts.items():
        for name, parameter in parameters.items():
            block = optimizer.BLOCK.search(name)
            sizes[name[: block.end()] if block else part] += parameter.numel()
    return max(sizes.values())
