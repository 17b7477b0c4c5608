"""What the attention benchmark measures, and the time below which no kernel can come.

A case's least time is the largest of three: products on the tensor cores, exponentials, and numbers on their way
from memory and back. Masked pairs cost nothing: a kernel may skip them.
"""

from dataclasses import dataclass

import torch

from nanovlm.attention import causal, causal_rows, full

FLOPS, BYTES, EXPONENTIALS = 790e12, 4.3e12, 3.7e12  # an H200's per second: dense bfloat16 as reached, memory, exp2
BACKWARD_FLOPS = 2.5  # of the forward's: five products instead of two


@dataclass(frozen=True)
class Case:
    """One attention to measure."""

    mask: str  # "causal", "full" or "packed": eight documents
    tokens: int
    head_width: int
    rows: int
    heads: int = 16

    def visible(self, device):
        """attention.Visible of the mask."""
        if self.mask == "full":
            return full(self.tokens, self.tokens, device)
        if self.mask == "causal":
            return causal_rows(1, self.tokens, device)
        return causal((torch.arange(self.tokens, device=device) * 8 // self.tokens)[None])

    def flops(self):
        """Of the forward pass: two products for every pair of query and key."""
        visible = self.visible("cpu")
        return 4 * self.rows * self.heads * self.head_width * int((visible.stop - visible.first).sum())

    def floor(self, backward):
        """Seconds that the pass takes at least, by arithmetic, exponentials and memory: the largest of the three."""
        flops, size = self.flops(), self.rows * self.heads * self.tokens * self.head_width * 2
        exponentials = flops / 4 / self.head_width
        if backward:
            return max(flops * BACKWARD_FLOPS / FLOPS, 8 * size / BYTES, exponentials / EXPONENTIALS)
        return max(flops / FLOPS, 4 * size / BYTES, exponentials / EXPONENTIALS)


CASES = [
    Case(mask, tokens, width, max(1, 8192 // tokens))
    for tokens in (577, 2048, 8192) for width in (64, 88, 128) for mask in ("causal", "full", "packed")
]  # fmt: skip


def floors():
    """The table of what is impossible to undercut: list of str."""
    head = [f"floors of one H200 ({FLOPS / 1e12:.0f} TFLOP/s, {BYTES / 1e12} TB/s, {EXPONENTIALS:.1e} exponentials/s), ms",
            f"{'attention':<44}{'forward':>10}{'backward':>10}"]  # fmt: skip
    return head + [
        f"{f'{c.mask}, {c.rows} x {c.tokens} tokens, {c.heads} heads of {c.head_width}':<44}"
        f"{1e3 * c.floor(False):>10.3f}{1e3 * c.floor(True):>10.3f}"
        for c in CASES
    ]
