"""What moves while a stage trains: each part's share of the gradient, and how far its weights have come.

    part             gradient   moved
    bridge            0.8123    12.41%      |g| of the part's gradient; |w - w0| / |w0|, w0 = weights when the stage began
    language_model    frozen     0.00%

A copy of all weights would double their memory, so at most SAMPLE evenly spaced numbers of every tensor are kept and
compared; small tensors are compared whole.
"""

import torch
from torch.distributed.tensor import DTensor

SAMPLE = 4096  # numbers of a tensor


def sample(tensor):
    """At most SAMPLE evenly spaced numbers of a tensor, sharded or not, as a copy on the CPU: float32[S]."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    flat = tensor.detach().reshape(-1)
    return flat[:: -(-flat.numel() // SAMPLE)].float().cpu().clone()


class Movement:
    """Remembers where the parts that train began.

    Args: parts: dict part -> dict name -> Parameter. stage: Stage.
    """

    def __init__(self, parts, stage):
        self.names = {part: list(parts[part]) for part in stage.learning_rates if parts[part]}
        self.start = {name: sample(parts[part][name]) for part in self.names for name in self.names[part]}

    def measure(self, parts):
        """How far each part has come: dict part -> |w - w0| / |w0|. parts: as at the beginning, of the present model."""
        found = {}
        for part, names in self.names.items():
            moved = length = 0.0
            for name in names:
                before, weight = self.start[name], parts[part][name].numel() / self.start[name].numel()
                moved += weight * (sample(parts[part][name]) - before).square().sum().item()
                length += weight * before.square().sum().item()
            found[part] = (moved / length) ** 0.5 if length else float(moved > 0)  # what began at zero: all of it is new
        return found


def gradient_norms(parts, stage, norm_of, factor=1.0):
    """The norm of each part's gradient as it stands in the parameters: dict part -> float; 0 where nothing was reached.

    Args:
      norm_of: function(list of Tensor) -> float[], their common norm (update.total_norm).
      factor: float, what clipping has shortened the gradient to.
    """
    found = {}
    for part in stage.learning_rates:
        gradients = [parameter.grad for parameter in parts[part].values() if parameter.grad is not None]
        found[part] = norm_of(gradients).item() / factor if gradients else 0.0
    return found


def movement_table(entries, parts):
    """The table at the end of a stage.

    Args:
      entries: list of dict, the log's lines of this stage that have "parts": part -> {"gradient", "moved"}.
      parts: all parts of the model that hold a parameter, by name.
    Returns: list of str, lines; gradients are the middle one of those that were logged.
    """
    lines = [f"{'part':<18}{'gradient':>10}{'moved':>10}"]
    for part in parts:
        seen = [entry["parts"][part] for entry in entries if part in entry["parts"]]
        if not seen:
            lines.append(f"{part:<18}{'frozen':>10}{0:>10.2%}")
            continue
        gradients = sorted(one["gradient"] for one in seen)
        lines.append(f"{part:<18}{gradients[len(gradients) // 2]:>10.4f}{seen[-1]['moved']:>10.2%}")
    return lines
