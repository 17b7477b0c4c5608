"""LoRA: a frozen linear layer learns through two thin matrices beside it.

Fine-tuning moves a weight by a matrix of low rank, so only that matrix is learned: a few per cent of the parameters,
and of the optimizer's memory. Nothing changes at the start, and afterwards the update is added to the weight, so that
the trained model is as large and as fast as the one it began from.

LoRA, arXiv:2106.09685, Sec. 4.1. For W_0 of [d, k], A of [r, k], B of [d, r]:
  Eq. 3  h = W_0 x + (alpha / r) B A x        B = 0 at the start
Differs from the paper: A starts uniform as torch's linear layers do (Kaiming), not Gaussian, as the authors' own
loralib has it; every projection of the decoder's attention and feed-forward is chosen unless told otherwise, where
the paper adapts queries and values.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.names import nearest


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update; weight and bias are the given layer's own, under their old names.

    Args:
      linear: nn.Linear, which freezes. rank: r. alpha: the update counts alpha / r times.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        """x float[..., k] -> float[..., d]."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)  # Eq. 3

    @torch.no_grad()
    def merged(self):
        """The plain nn.Linear of the same function; it takes over the weight, which is changed in place."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dtype = torch.promote_types(self.weight.dtype, torch.float32)  # half precision would round twice
        update = self.scale * self.lora_b.to(dtype) @ self.lora_a.to(dtype)
        self.weight.copy_(self.weight.to(dtype) + update)
        linear.weight, linear.bias = self.weight, self.bias
        return linear.requires_grad_(True)


def in_decoder_layers(name):
    """Whether a linear layer of a VLM is a projection of the decoder's own attention or feed-forward: str -> bool."""
    return re.match(r"decoder\.layers\.\d+\.(attention|ffn)\.", name) is not None


def add(model, rank, alpha, where=in_decoder_layers):
    """Give linear layers a low-rank update, in place; the model's function stays the same.

    Args:
      model: nn.Module.
      rank: r, columns of the update's factors. alpha: the update counts alpha / rank times.
      where: which linear layers. Names, each one part of a dotted name or several in a row ("q", "attention.q",
        "bridge", "decoder.layers.0"), or a function from the whole dotted name to bool.
    Returns: list of str, the names of the layers.
    Raises: ValueError for a rank or alpha too small, a name that no linear layer bears, or a layer that already has one.
    """
    if rank < 1 or rank != int(rank):
        raise ValueError(f"rank is {rank}; it is a whole number from 1")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it is above 0")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = choose(linears, where)
    for name in chosen:
        if isinstance(linears[name], LoRALinear):
            raise ValueError(f"{name} already has a low-rank update; merge it before adding another")
    for name in chosen:
        replace(model, name, LoRALinear(linears[name], rank, alpha))
    return chosen


def choose(names, where):
    """The names that `where` means, as in `add`: list of str."""
    if callable(where):
        chosen = [name for name in names if where(name)]
        if not chosen:
            raise ValueError(f"no linear layer is chosen of: {', '.join(names)}")
        return chosen
    wanted = [where] if isinstance(where, str) else list(where)
    if not wanted:
        raise ValueError("no linear layer is named")
    for want in wanted:
        if not any(f".{want}." in f".{name}." for name in names):
            parts = [name.split(".") for name in names]
            known = {".".join(part[i:j]) for part in parts for i in range(len(part)) for j in range(i + 1, len(part) + 1)}
            raise ValueError(f"no linear layer is called {want!r}.{nearest(want, known)}")
    return [name for name in names if any(f".{want}." in f".{name}." for want in wanted)]


def merge(model):
    """Add every low-rank update to its weight and take it away; the model's function stays the same.

    Args:
      model: nn.Module, changed in place; one without updates stays as it is.
    Returns: list of str, the names of the layers.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    for name in names:
        replace(model, name, model.get_submodule(name).merged())
    return names


def replace(model, name, module):
    """Put a module in another's place, by its dotted name; it keeps training or evaluating as the old one did."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)
