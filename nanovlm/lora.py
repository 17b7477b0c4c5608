"""LoRA: a frozen linear layer learns through two thin matrices beside it.

Fine-tuning moves a weight by a matrix of low rank, so only that matrix is learned, a few per cent of the parameters.
Nothing changes at the start; at the end the update is added to the weight, and the model is as fast as before.

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

DECODER_LAYERS = r"^decoder\.layers\.\d+\.(attention|ffn)\."


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update; weight and bias are the given layer's own, under their old names."""

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
        return linear.requires_grad_(True).train(self.training)


def add(model, rank, alpha, where=DECODER_LAYERS):
    """Give linear layers a low-rank update, in place; the model's function stays the same.

    Args:
      model: nn.Module. rank: r, columns of the update's factors. alpha: the update counts alpha / rank times.
      where: regular expression found in the dotted names of the layers, such as r"attention\\.[qv]$"; "" = all.
    Returns: list of str, the names of the layers.
    Raises: ValueError for a rank or alpha too small, no such layer, or one that already has an update.
    """
    if rank < 1 or rank != int(rank) or not alpha > 0:
        raise ValueError(f"rank is {rank} and alpha {alpha}; expected a whole number from 1, and a number above 0")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = [name for name in linears if re.search(where, name)]
    adapted = [name for name in chosen if isinstance(linears[name], LoRALinear)]
    if not chosen or adapted:
        raise ValueError(f"{where!r} names no linear layer, or {adapted} with an update; known: {', '.join(linears)}")
    for name in chosen:
        model.set_submodule(name, LoRALinear(linears[name], rank, alpha).train(linears[name].training))
    return chosen


def merge(model):
    """Add every low-rank update to its weight and take it away, in place; the names of the layers: list of str."""
    names = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    for name in names:
        model.set_submodule(name, model.get_submodule(name).merged())
    return names
