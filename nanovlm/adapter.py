"""Lynx's bottleneck adapter: a small residual network behind a frozen decoder layer.

It narrows the layer's output, passes it through one non-linearity, widens it again and adds the result,
scaled, to what it was given. Only the adapter trains; the language model behind it stays as it was.
"Adapter" here is never the bridge between vision and language, which some papers call so.

Lynx, arXiv:2307.02469, Sec. 2.1; Houlsby et al., arXiv:1902.00751.
Differs from the paper, as the released code does:
- a learned scale (one number, 1 at the start) multiplies the update;
- weights start at N(0, 0.02^2), not zero: the frozen model is disturbed from the first step.
"""

import torch
from torch import nn


class Adapter(nn.Module):
    """Bottleneck adapter.

    Args:
      width: channels of the decoder. bottleneck_width: channels of the narrow middle.
    """

    def __init__(self, width, bottleneck_width):
        super().__init__()
        self.norm = nn.LayerNorm(width)  # mean-subtracting with bias, also inside a decoder of RMSNorms
        self.down = nn.Linear(width, bottleneck_width)
        self.up = nn.Linear(bottleneck_width, width)
        self.scale = nn.Parameter(torch.ones(1))
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden):
        """hidden float[B, T, W], the whole output of a decoder layer -> the same shape."""
        return hidden + self.scale * self.up(nn.functional.silu(self.down(self.norm(hidden))))
