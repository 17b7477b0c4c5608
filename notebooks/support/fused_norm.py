"""The smallest kernel worth writing: RMSNorm, read once and written once.

Eager torch computes a norm in steps, square, mean, root, product, and each step reads and writes the whole tensor.
None of them computes much, so the time is that of the memory. A kernel that takes one row into the chip, does all steps
there and writes the result moves each number twice and no more. It is the first rung of the ladder to
flash_attention.py: a program per row, a mask at the row's end, float32 within whatever the type outside.

With r = 1 / sqrt(mean(x^2) + eps) and n = x r:
  y = n g        dx = r (dy g - n mean(dy g n))        dg = sum over rows of dy n

`decoder.RMSNorm` is the same function in torch. Models use that one: torch.compile writes such kernels by itself.
"""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
MAX_WIDTH = 16384  # channels: a row must fit into one program's registers
PROGRAMS = 256  # of the backward pass: each sums dg over its own rows, so that the order of sums never changes


@triton.jit
def forward_kernel(x, gain, y, root, width, eps, BLOCK: tl.constexpr):
    """One row: y = x r g, and r for the backward pass."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    here = channels < width
    numbers = tl.load(x + row * width + channels, mask=here, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(numbers * numbers) / width + eps)
    normed = (numbers * r).to(x.dtype.element_ty)  # rounded before the gain, as LLaMA does
    tl.store(y + row * width + channels, normed * tl.load(gain + channels, mask=here, other=0.0), mask=here)
    tl.store(root + row, r)


@triton.jit
def backward_kernel(x, gain, root, dy, dx, dgain, num_rows, rows_each, width, BLOCK: tl.constexpr):
    """Some rows, one after the other: dx, and this program's share of dg."""
    channels = tl.arange(0, BLOCK)
    g = tl.load(gain + channels, mask=channels < width, other=0.0).to(tl.float32)
    share = tl.zeros([BLOCK], tl.float32)
    for step in range(rows_each):
        row = tl.program_id(0).to(tl.int64) * rows_each + step
        here = channels < tl.where(row < num_rows, width, 0)
        place = row * width + channels
        r = tl.load(root + tl.minimum(row, num_rows - 1))
        n = tl.load(x + place, mask=here, other=0.0).to(tl.float32) * r
        d = tl.load(dy + place, mask=here, other=0.0).to(tl.float32)
        share += d * n
        d_normed = d * g
        tl.store(dx + place, (r * (d_normed - n * (tl.sum(d_normed * n) / width))).to(dx.dtype.element_ty), mask=here)
    tl.store(dgain + tl.program_id(0) * width + channels, share, mask=channels < width)


def launch_options(width):
    """Block size and warps for rows of so many channels."""
    block = triton.next_power_of_2(width)
    return dict(BLOCK=block, num_warps=min(max(block // 512, 1), 16))


@torch.library.custom_op("nanovlm::rms_norm", mutates_args=())
def forward(x: torch.Tensor, gain: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y [R, W] and r float32[R] of x [R, W]."""
    x = x.contiguous()
    y, root = forward_shapes(x, gain, eps)
    if len(x):
        forward_kernel[(len(x),)](x, gain.contiguous(), y, root, x.shape[1], eps, **launch_options(x.shape[1]))
    return y, root


@forward.register_fake
def forward_shapes(x, gain, eps):
    """What `forward` returns, without its numbers."""
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("nanovlm::rms_norm_backward", mutates_args=())
def backward(dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor,
             root: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx [R, W] and dg [W]."""
    x, dy = x.contiguous(), dy.contiguous()
    (rows, width), rows_each = x.shape, -(-len(x) // PROGRAMS) or 1
    dx, shares = torch.empty_like(x), x.new_empty(-(-rows // rows_each), width, dtype=torch.float32)
    if rows:
        backward_kernel[(len(shares),)](
            x, gain.contiguous(), root, dy, dx, shares, rows, rows_each, width, **launch_options(width)
        )
    return dx, shares.sum(0).to(gain.dtype)


@backward.register_fake
def backward_shapes(dy, x, gain, root):
    """What `backward` returns, without its numbers."""
    return x.new_empty(x.shape), torch.empty_like(gain)


def keep(ctx, inputs, output):
    """What the backward pass needs."""
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx, dy, d_root):
    """Gradients for `forward`'s arguments."""
    return *backward(dy, *ctx.saved_tensors), None


forward.register_autograd(differentiate, setup_context=keep)


def rms_norm(x, gain, eps=1e-6):
    """RMSNorm over the last dimension, in float32 within.

    Args:
      x: float[..., W], W at most 16,384. gain: float[W], of the same type. eps: added to the mean square.
    Returns: float[..., W].
    Raises: ValueError that names the argument with a wrong shape, type or device.
    Source: arXiv:1910.07467, Eq. 4.
    """
    width = x.shape[-1]
    if gain.shape != (width,):
        raise ValueError(f"gain has shape {tuple(gain.shape)}; expected [{width}] for x {tuple(x.shape)}")
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"x has {width} channels; this kernel takes 1 to {MAX_WIDTH}: use decoder.RMSNorm")
    if gain.dtype != x.dtype or not x.is_floating_point():
        raise ValueError(f"gain is {gain.dtype} and x {x.dtype}; they must be of one floating type")
    if gain.device != x.device:
        raise ValueError(f"gain is on {gain.device}, but x on {x.device}; move it there")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"x is on {x.device}: this kernel needs a GPU, or (slow) TRITON_INTERPRET=1 set before it")
    return forward(x.reshape(-1, width), gain, eps)[0].view(x.shape)
