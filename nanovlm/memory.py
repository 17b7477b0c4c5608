"""How much memory training takes, before it is asked for: weights, gradients, optimizer, activations.

  weights      4 bytes a parameter, whether it trains or not
  gradients    4 bytes a parameter that trains
  optimizer    8 more for AdamW (two running averages), 4 for Muon (one)
  copies       2 bytes a weight in bfloat16, as long as the backward pass may ask for it
  activations  what autograd keeps, per example of a micro-batch (rehearsal.py)
  working      the scores of the loss, a few hundred rows at a time

With several processes, `ddp` keeps all of this in each of them, and every gradient once more, in the buckets that
travel. `fsdp` (wrapping.py) shares weights, gradients and optimizer out evenly. Gathered again are the root, that is all
outside the blocks, with its gradients, and two blocks at a time, the one that computes and the next. Activations are
never shared. Left out: the allocator's waste and a few hundred MB of the driver.

Gradients and activations are added up although a backward pass frees the one while it makes the other: with more than
one micro-batch both are there at once.
"""

from collections import Counter
from dataclasses import dataclass

from nanovlm import optimizer
from nanovlm.rehearsal import Cost
from nanovlm.wrapping import BLOCK

FLOAT32 = 4  # bytes
GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the top of a step."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # with fsdp: the root and two blocks; with ddp: gradients on their way
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
      parallel: one of parallel.MODES. num_processes: GPUs; 1 with "none".
    Returns: Memory.
    """
    cost = sum(costs.values(), Cost())
    everything = FLOAT32 * sum(one.numel() for parameters in parts.values() for one in parameters.values())
    trained = state = 0
    for group in optimizer.groups(parts, stage):
        size = FLOAT32 * sum(parameter.numel() for parameter in group["params"])
        muon = stage.optimizer == "muon" and group["name"].endswith("/matrix")
        trained, state = trained + size, state + size * (1 if muon else 2)
    gathered, copies, share = 0, cost.copies, 1
    if parallel == "ddp":
        gathered = trained
    if parallel == "fsdp":
        share = 1 / num_processes
        blocks, root = outside_and_inside(parts)
        gathered = FLOAT32 * (2 * max(blocks.values(), default=0) + root + sum(root_of(parts, part) for part in stage.learning_rates))
        copies = costs["bridge"].copies if "bridge" in costs else 0  # a block's are let go with it
    return Memory(everything * share, trained * share, state * share, gathered, copies, cost.kept, cost.working)


def outside_and_inside(parts):
    """(Counter block -> parameters, parameters outside all blocks) of a model's parts."""
    blocks = Counter()
    for parameters in parts.values():
        for name, parameter in parameters.items():
            block = BLOCK.match(name)
            if block:
                blocks[block.group()] += parameter.numel()
    return blocks, sum(root_of(parts, part) for part in parts)


def root_of(parts, part):
    """Parameters of a part that lie outside all blocks: int."""
    return sum(parameter.numel() for name, parameter in parts[part].items() if not BLOCK.match(name))
