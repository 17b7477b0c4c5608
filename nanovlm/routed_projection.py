"""Two weights, and every token meets its own: one product, whose tiles of rows are sorted by modality.

mPLUG-Owl2's keys and values (modality_adaptive.py, Eq. 6 and 7) could compute both projections for all tokens, which
doubles the work, or copy the tokens of each modality together, which needs their number on the host. Here the tokens
stay where they are. `order` lists the row numbers, text first, each modality filled up to whole tiles; a program
takes one tile of that list, reads its rows from wherever they stand, and multiplies them by the one weight that the
whole tile shares. Neither a copy nor a wait for the GPU, so that CUDA can replay it as a graph.

The derivative for the input is the same product with the transposed weights, that for a weight a sum over its tiles.

T tokens, W width, V width of the output
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# compute capability -> product, weight gradient: (columns of the output, summed at a time, warps, stages)
TILES = {90: ((256, 64, 8, 3), (256, 64, 8, 3)), 80: ((128, 32, 8, 3), (128, 32, 8, 3))}
EXACT = (64, 32, 8, 1)  # float32


@triton.jit
def product_kernel(x, text, vision, out, order, text_end, num_rows, num_in, num_out, x_stride, row_stride,
                   column_stride, out_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr):  # fmt: skip
    """One tile of out[row] = weight of its modality @ x[row]; weights have row_stride over V, column_stride over W."""
    # neighbours share rows and columns of weights, so that the cache serves them
    tile, column = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    rows = tl.load(order + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if tile * BLOCK_M < tl.load(text_end):
        weight = text
    else:
        weight = vision
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, num_in, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        some = tl.load(x + rows[:, None] * x_stride + channels[None, :],
                       mask=(rows[:, None] < num_rows) & (channels[None, :] < num_in), other=0.0)  # fmt: skip
        part = tl.load(weight + columns[None, :] * row_stride + channels[:, None] * column_stride,
                       mask=(columns[None, :] < num_out) & (channels[:, None] < num_in), other=0.0)  # fmt: skip
        acc = tl.dot(some, part, acc, input_precision="ieee")
    places = out + rows[:, None] * out_stride + columns[None, :]
    tl.store(places, acc.to(out.dtype.element_ty), mask=(rows[:, None] < num_rows) & (columns[None, :] < num_out))


@triton.jit
def weight_kernel(dy, x, text, vision, order, text_end, length, num_rows, num_in, num_out, dy_stride, x_stride,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """One tile of one weight's gradient float[V, W]: dy^T x over the rows of its modality; length of order."""
    outs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ins = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = 0, tl.load(text_end).to(tl.int32)
    weight = text
    if tl.program_id(2) == 1:
        begin, end = end, length
        weight = vision
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = tl.load(order + start + tl.arange(0, BLOCK_K))
        left = tl.load(dy + rows[None, :] * dy_stride + outs[:, None],
                       mask=(rows[None, :] < num_rows) & (outs[:, None] < num_out), other=0.0)  # fmt: skip
        right = tl.load(x + rows[:, None] * x_stride + ins[None, :],
                        mask=(rows[:, None] < num_rows) & (ins[None, :] < num_in), other=0.0)  # fmt: skip
        acc = tl.dot(left, right, acc, input_precision="ieee")
    places = weight + outs[:, None] * num_in + ins[None, :]
    tl.store(places, acc.to(weight.dtype.element_ty), mask=(outs[:, None] < num_out) & (ins[None, :] < num_in))


def options(x, order, number):
    """How the kernel of that number in TILES cuts its work, as a launch wants it; a row of order is a tile of rows."""
    kind = 90 if x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0) else 80
    exact = x.dtype == torch.float32 or not x.is_cuda
    columns, summed, warps, stages = EXACT if exact else TILES[kind][number]
    fusion = {} if INTERPRETED else dict(enable_fp_fusion=True)
    return dict(BLOCK_M=order.shape[1], BLOCK_N=columns, BLOCK_K=summed, num_warps=warps, num_stages=stages, **fusion)


@torch.library.custom_op("nanovlm::routed_product", mutates_args=())
def routed_product(x: Tensor, text: Tensor, vision: Tensor, order: Tensor, text_end: Tensor) -> Tensor:
    """x float[T, W] by text or vision float[V, W] -> float[T, V]; the rest is from modality_adaptive.sort."""
    x = x if x.stride(1) == 1 else x.contiguous()
    text, vision = (text, vision) if text.stride() == vision.stride() else (text.contiguous(), vision.contiguous())
    out, cut = x.new_empty(x.shape[0], text.shape[0]), options(x, order, 0)
    if out.numel():
        product_kernel[len(order), triton.cdiv(len(text), cut["BLOCK_N"])](
            x, text, vision, out, order, text_end, *x.shape, len(text), x.stride(0), *text.stride(), out.stride(0),
            **cut,
        )  # fmt: skip
    return out


@routed_product.register_fake
def _(x, text, vision, order, text_end):
    return x.new_empty(x.shape[0], text.shape[0])


@torch.library.custom_op("nanovlm::routed_weight_gradient", mutates_args=())
def weight_gradient(dy: Tensor, x: Tensor, order: Tensor, text_end: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients float[V, W] of both weights: the sum of dy[row]^T x[row] over the rows of each modality."""
    dy, x = (part if part.stride(1) == 1 else part.contiguous() for part in (dy, x))
    text, vision = (x.new_empty(dy.shape[1], x.shape[1]) for _ in range(2))
    cut = options(x, order, 1)
    weight_kernel[triton.cdiv(dy.shape[1], cut["BLOCK_M"]), triton.cdiv(x.shape[1], cut["BLOCK_N"]), 2](
        dy, x, text, vision, order, text_end, order.numel(), *x.shape, dy.shape[1], dy.stride(0), x.stride(0), **cut,
    )  # fmt: skip
    return text, vision


@weight_gradient.register_fake
def _(dy, x, order, text_end):
    return tuple(x.new_empty(dy.shape[1], x.shape[1]) for _ in range(2))


def differentiate(ctx, dy):
    """Gradients for routed_product's arguments, those that are wanted."""
    x, text, vision, order, text_end = ctx.saved_tensors
    dx = d_text = d_vision = None
    if ctx.needs_input_grad[0]:
        dx = routed_product(dy, text.t(), vision.t(), order, text_end)
    if any(ctx.needs_input_grad[1:3]):
        d_text, d_vision = weight_gradient(dy, x, order, text_end)
    return dx, d_text, d_vision, None, None


routed_product.register_autograd(
    differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def project(x, text, vision, order, text_end):
    """Every row by the weight of its modality.

    Args:
      x: float[T, W]. text, vision: float[V, W]. order, text_end: as modality_adaptive.sort returns them.
    Returns: float[T, V]; under autocast in its type.
    Raises: ValueError for a device without kernel.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        x, text, vision = (part.to(torch.get_autocast_dtype(kind)) for part in (x, text, vision))
    if kind != "cuda" and not INTERPRETED:
        raise ValueError(f"x is on {x.device}: this kernel needs a GPU, or (slow) TRITON_INTERPRET=1 set before it")
    return routed_product(x, text, vision, order, text_end)
