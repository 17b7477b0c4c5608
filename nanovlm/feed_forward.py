"""A decoder's feed-forward: LLaMA's with a gate, and the plain one of Phi-2 and OPT.

Each token alone is widened, bent by a non-linearity and narrowed again.

  gated  W_down (f(W_gate x) * (W_up x))     SwiGLU with f = SiLU; Shazeer, arXiv:2002.05202, Eq. 6
  plain  W_2 f(W_1 x + b_1) + b_2            Attention Is All You Need, arXiv:1706.03762, Eq. 2
"""

from functools import partial

import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # "gelu_new" of transformers
    "relu": F.relu,
}


class GatedFeedForward(nn.Module):
    """One projection gates the other.

    Args:
      width, ffn_width: channels outside and inside. activation: a name of ACTIVATIONS. bias: on all three projections.
    """

    def __init__(self, width, ffn_width, activation="silu", bias=False):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(width, ffn_width, bias)
        self.up = nn.Linear(width, ffn_width, bias)
        self.down = nn.Linear(ffn_width, width, bias)

    @property
    def output(self):
        """The projection that writes into the residual stream."""
        return self.down

    def forward(self, x):
        """x float[..., W] -> the same shape."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


class PlainFeedForward(nn.Module):
    """Two projections with a non-linearity between them; arguments as above."""

    def __init__(self, width, ffn_width, activation, bias):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc_1 = nn.Linear(width, ffn_width, bias)
        self.fc_2 = nn.Linear(ffn_width, width, bias)

    @property
    def output(self):
        """The projection that writes into the residual stream."""
        return self.fc_2

    def forward(self, x):
        """x float[..., W] -> the same shape."""
        return self.fc_2(self.activation(self.fc_1(x)))
