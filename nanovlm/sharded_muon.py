"""Muon where matrices are sharded: torch's own, given each matrix whole.

Orthogonalising the rows that one process holds would be another algorithm. Momentum is elementwise and stays sharded;
only the direction is gathered, made orthogonal by every process in the same way, and each keeps its own rows of it.
"""

import torch

from nanovlm.training.processes import shard_of


class ShardedMuon(torch.optim.Optimizer):
    """As torch.optim.Muon(params, momentum=, nesterov=True, adjust_lr_fn="original"), for DTensors.

    Args:
      groups: list of dict with params, lr and weight_decay. momentum: float.
    """

    def __init__(self, groups, momentum):
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self):
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter, group):
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - group["momentum"])
        direction = parameter.grad.lerp(buffer, group["momentum"]).full_tensor()
        whole = torch.nn.Parameter(torch.zeros_like(direction))
        whole.grad = direction
        torch.optim.Muon([whole], group["lr"], weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="original").step()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(shard_of(whole.detach(), parameter))
