"""Fused attention as an operator of torch: `flash_attention(q, k, v, visible)`, differentiable.

The kernels stand in flash_kernels.py. Here they get their tiles, their launches and a place in torch: a custom
operator has a shape function for torch.compile and a derivative for autograd, and works under autocast and activation
checkpointing. `attention.reference` is the same function written out.

Heads of 8 to 128 channels, a multiple of 8, run as they are (64 and 128 best; 80 and 88 as 128 with zeros).

B batch, T queries, S keys, H heads, K key/value heads, D head width
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # read by Triton when the kernels were made
CHECK_INTERVALS = os.environ.get("NANOVLM_CHECK_INTERVALS", "0") == "1"  # debugging: every call reads its intervals
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_WIDTH = 128


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work."""

    queries: int  # of a tile
    keys: int
    warps: int  # of a program, 32 threads each
    stages: int  # tiles on their way from memory


# (compute capability, channels of a head at most) -> forward, dQ, dK and dV; none spills registers
TILES = {
    (90, 64): (Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (90, 96): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (90, 128): (Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (80, 64): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 2)),
    (80, 128): (Tile(64, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
}
EXACT = (Tile(32, 32, 4, 1),) * 3  # float32 does without tensor cores: right, and slow


def tiles_for(q):
    """The three tiles for queries q: by type, head width and the GPU's kind."""
    if q.dtype == torch.float32 or q.device.type != "cuda":
        return EXACT
    kind = 90 if torch.cuda.get_device_capability(q.device) == (9, 0) else 80  # newer ones understand these too
    return TILES[min(key for key in TILES if key[0] == kind and key[1] >= q.shape[-1])]


def launch(kernel, grid, tile, head_width, *arguments):
    """Start a kernel: one program for each tile (grid[0]) of each head of each row (grid[1])."""
    fusion = {} if INTERPRETED else dict(enable_fp_fusion=True)  # newer Triton leaves it out unless asked
    kernel[grid](
        *arguments, D=head_width, BLOCK_D=max(16, triton.next_power_of_2(head_width)), BLOCK_M=tile.queries,
        BLOCK_N=tile.keys, num_warps=tile.warps, num_stages=tile.stages, **fusion,
    )  # fmt: skip


def readable(x):
    """x [B, H, T, D], copied unless its rows can be read in pieces of 16 bytes."""
    aligned = x.stride(3) == 1 and all(x.stride(d) % 8 == 0 for d in range(3) if x.shape[d] > 1)
    return x if aligned else x.contiguous()


def strides(x):
    """Elements from one row, head and token to the next; 0 where there is but one, as its stride may be anything."""
    return tuple(x.stride(d) if x.shape[d] > 1 else 0 for d in range(3))


def empty(like):
    """Room for a [B, H, T, D], with the heads of a token side by side as the next layer reads them."""
    return like.new_empty(like.shape[0], like.shape[2], like.shape[1], like.shape[3]).transpose(1, 2)


def seen_by(first, stop, num_keys, tile):
    """Intervals turned around: which queries see each tile of keys.

    Args:
      first, stop: int[B or 1, T]. num_keys: S. tile: Tile, of dkv_kernel.
    Returns: int32[B or 1, key tiles, 4], begin, full_begin, full_end, end: all that see any key of the tile are in
      [begin, end); each in [full_begin, full_end), whole tiles of queries, sees all of it.
    """
    index = torch.arange(first.shape[1], device=first.device)
    lowest = torch.arange(0, num_keys, tile.keys, device=first.device)[:, None]
    beyond = (lowest + tile.keys).clamp(max=num_keys)
    first, stop = first[:, None], stop[:, None]  # B 1 T
    sees = (first < beyond) & (stop > lowest) & (first < stop)  # B tiles T
    sees_all = (first <= lowest) & (stop >= beyond)
    begin, full_begin = (torch.where(these, index, len(index)).amin(-1) for these in (sees, sees_all))
    end, full_end = (torch.where(these, index + 1, 0).amax(-1) for these in (sees, sees_all))
    without_gap = sees_all.sum(-1) == full_end - full_begin
    begin = begin // tile.queries * tile.queries
    full_begin = (full_begin + tile.queries - 1) // tile.queries * tile.queries
    full_end = full_end // tile.queries * tile.queries
    some_full = without_gap & (full_begin < full_end)
    full_begin, full_end = torch.where(some_full, full_begin, begin), torch.where(some_full, full_end, begin)
    return torch.stack([begin, full_begin, full_end, end], dim=-1).int()


@torch.library.custom_op("nanovlm::flash_attention", mutates_args=())
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, stop: torch.Tensor,
            scale: float) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [B, H, T, D] and the softmax's log2 of sums float32[B, H, T]."""
    out, lse = forward_shapes(q, k, v, first, stop, scale)
    if not out.numel():
        return out, lse
    q, k, v, first, stop = readable(q), readable(k), readable(v), first.contiguous(), stop.contiguous()
    (rows, heads, num_queries, width), tile = q.shape, tiles_for(q)[0]
    launch(
        forward_kernel, (triton.cdiv(num_queries, tile.queries), rows * heads), tile, width,
        q, k, v, first, stop, out, lse, strides(q), strides(k), strides(v), strides(out),
        num_queries if len(first) > 1 else 0, heads, heads // k.shape[1], num_queries, k.shape[2], scale,
    )  # fmt: skip
    return out, lse


@forward.register_fake
def forward_shapes(q, k, v, first, stop, scale):
    """What `forward` returns, without its numbers."""
    return empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nanovlm::flash_attention_backward", mutates_args=())
def backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor,
             stop: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
             scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv."""
    dq, dk, dv = backward_shapes(do, q, k, v, first, stop, out, lse, scale)
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    do, q, k, v, out = (readable(x) for x in (do, q, k, v, out))
    first, stop, lse = first.int().contiguous(), stop.int().contiguous(), lse.contiguous()  # 64 bits cost registers
    (rows, heads, num_queries, width), (num_kv_heads, num_keys) = q.shape, k.shape[1:3]
    _, q_tile, kv_tile = tiles_for(q)
    sizes = (heads, heads // num_kv_heads, num_queries, num_keys, scale)
    visible_stride = num_queries if len(first) > 1 else 0
    delta = torch.empty_like(lse)
    launch(
        dq_kernel, (triton.cdiv(num_queries, q_tile.queries), rows * heads), q_tile, width,
        q, k, v, first, stop, out, do, lse, delta, dq, strides(q), strides(k), strides(v), strides(out), strides(do),
        strides(dq), visible_stride, *sizes,
    )  # fmt: skip
    turned = seen_by(first, stop, num_keys, kv_tile)
    if num_kv_heads < heads:  # a sum over the heads within the kernel would need registers that it has not got
        dk, dv = (q.new_empty(rows, num_keys, heads, width, dtype=torch.float32).transpose(1, 2) for _ in range(2))
    launch(
        dkv_kernel, (turned.shape[1], rows * heads), kv_tile, width,
        q, k, v, first, stop, do, lse, delta, turned, dk, dv, strides(q), strides(k), strides(v), strides(do),
        strides(dk), strides(dv), visible_stride, turned.stride(0) if len(turned) > 1 else 0, *sizes,
    )  # fmt: skip
    if num_kv_heads < heads:
        dk, dv = (empty(k).copy_(x.unflatten(1, (num_kv_heads, -1)).sum(2)) for x in (dk, dv))
    return dq, dk, dv


@backward.register_fake
def backward_shapes(do, q, k, v, first, stop, out, lse, scale):
    """What `backward` returns, without its numbers."""
    return empty(q), empty(k), empty(v)


def keep(ctx, inputs, output):
    """What the backward pass needs; the scores are computed again."""
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def differentiate(ctx, do, d_lse):
    """Gradients for `forward`'s arguments."""
    if do is None:
        return (None,) * 6
    return *backward(do, *ctx.saved_tensors, ctx.scale), None, None, None


forward.register_autograd(differentiate, setup_context=keep)


def flash_attention(q, k, v, visible, scale=None):
    """softmax(q k^T * scale) v over each query's interval of keys.

    Args:
      q: float[B, H, T, D], float16, bfloat16 or float32; D a multiple of 8, at most 128. k, v: float[B, K, S, D], H a
        multiple of K. Any strides: what cannot be read in pieces of 16 bytes is copied first.
      visible: attention.Visible, int[B or 1, T] over the S keys; any intervals, fastest where they do not descend.
        They are trusted, as reading them would wait for the GPU; NANOVLM_CHECK_INTERVALS=1 checks them in every call.
      scale: None = 1 / sqrt(D).
    Returns: float[B, H, T, D]; zeros, with zero gradients, where a query sees nothing. Under autocast its type.
    Raises: ValueError that names the argument with a wrong shape, type or device.
    """
    kind = q.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    check(q, k, v, visible)
    if CHECK_INTERVALS:
        visible.check(k.shape[2])
    return forward(q, k, v, visible.first, visible.stop, q.shape[-1] ** -0.5 if scale is None else float(scale))[0]


def check(q, k, v, visible):
    """Raise ValueError for arguments that the kernels would misread; looks at no numbers."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [rows, heads, tokens, channels]")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q {q.dtype}; all must be one of {', '.join(map(str, DTYPES))}")
    for name, x in (("k", k), ("v", v), ("visible.first", visible.first), ("visible.stop", visible.stop)):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q on {q.device}; move it there")
    rows, heads, num_queries, width = q.shape
    if width % 8 or not 8 <= width <= MAX_HEAD_WIDTH:
        raise ValueError(
            f"q has heads of {width} channels; the kernels take multiples of 8 up to {MAX_HEAD_WIDTH}: pad them with "
            "zeros (and pass scale), or use the backend 'sdpa'"
        )
    if k.shape != v.shape or k.shape[0] != rows or k.shape[3] != width:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must both be [{rows}, heads, keys, {width}] as q is"
        )
    if not k.shape[1] or heads % k.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {k.shape[1]} key heads: no multiple")
    for name, x in (("visible.first", visible.first), ("visible.stop", visible.stop)):
        if x.shape not in ((rows, num_queries), (1, num_queries)) or x.shape != visible.first.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [{rows} or 1, {num_queries}] as q's tokens")
        if x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {x.dtype}; expected int64 or int32")
    if max(q.shape[2] * q.stride(2), k.shape[2] * max(k.stride(2), v.stride(2))) >= 2**31:
        raise ValueError(f"{num_queries} queries and {k.shape[2]} keys reach beyond 2 ** 31 elements; split them")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"q is on {q.device}: the Triton kernels need a GPU, or TRITON_INTERPRET=1 in the environment (slow); "
            "use the backend 'sdpa'"
        )


# Attention that never writes its scores to memory: forward and backward as Triton kernels.
#
# The scores of T queries and S keys are T * S numbers, and memory is slow: writing them, reading them for the softmax
# and again for the sum over values costs far more time than computing them. So a program takes one tile of queries,
# walks over tiles of keys, and keeps for each query a running maximum, a running sum and a running output, which it
# rescales when the maximum grows (the online softmax). Only the output and one number per query leave the chip; the
# backward pass computes the scores again from them. `attention.reference` is the same function written out.
#
# A mask is an interval of keys per query (attention.Visible). Tiles of keys that no query of the tile sees are never
# visited, tiles that all of them see are taken without a mask, and only those between pay for one. dK and dV walk the
# other way, over the queries that see a tile of keys. Nothing is added atomically: equal inputs give equal bits.
#
# FlashAttention-2, arXiv:2307.08691, Algorithms 1 and 2. Differs from the paper: intervals instead of "causal"; dQ has a
# kernel of its own, two more products in exchange for determinism; scores in base 2, as GPUs raise 2 to a power.
#
# B batch, T queries, S keys, H heads, K key/value heads, D head width


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(base, rows, num_rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, GUARD: tl.constexpr):
    """Rows of a [rows, D] matrix as [rows, BLOCK_D], zeros behind its edges; GUARD: rows may end within."""
    channels = tl.arange(0, BLOCK_D)
    # without the hint rows of 88 channels would be read 2 bytes at a time; flash_attention.readable keeps the promise
    places = base + tl.multiple_of(rows * stride, 8)[:, None] + channels[None, :]
    if GUARD:
        tile = tl.load(places, mask=(rows[:, None] < num_rows) & (channels[None, :] < D), other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(places, mask=channels[None, :] < D, other=0.0)
    else:
        tile = tl.load(places)
    return tile


@triton.jit
def store_tile(base, rows, num_rows, stride, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of load_tile, in the memory's type."""
    channels = tl.arange(0, BLOCK_D)
    places = base + tl.multiple_of(rows * stride, 8)[:, None] + channels[None, :]
    tl.store(places, tile.to(base.dtype.element_ty), mask=(rows[:, None] < num_rows) & (channels[None, :] < D))


@triton.jit
def head_of(base, strides, batch, head):
    """Where the [rows, D] matrix of one head begins."""
    return base + tl.multiple_of(batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1], 8)


@triton.jit
def intervals(first, stop, rows, num_queries, num_keys):
    """The intervals of a tile of queries, cut to the keys there are; who sees nothing gets [num_keys, 0)."""
    rows = tl.minimum(rows, num_queries - 1)  # rows behind the end are never stored: let them be like the last
    lo = tl.maximum(tl.load(first + rows), 0).to(tl.int32)
    hi = tl.minimum(tl.load(stop + rows), num_keys).to(tl.int32)
    return tl.where(lo < hi, lo, num_keys), tl.where(lo < hi, hi, 0)


@triton.jit
def edges(lo, hi, BLOCK_N: tl.constexpr):
    """Keys to visit: some queries see [begin, full_begin), all see [full_begin, full_end), some [full_end, end)."""
    begin = tl.min(lo, 0) // BLOCK_N * BLOCK_N
    end = tl.max(hi, 0)
    full_begin = tl.cdiv(tl.max(lo, 0), BLOCK_N) * BLOCK_N
    full_end = tl.min(hi, 0) // BLOCK_N * BLOCK_N
    some_full = full_begin < full_end
    return begin, tl.where(some_full, full_begin, begin), tl.where(some_full, full_end, begin), end


@triton.jit
def see(acc, total, top, q, k, v, k_stride, v_stride, lo, hi, begin, end, num_keys, scale, D: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The online softmax over keys [begin, end): new acc float[M, D], total float[M], top float[M]."""
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, keys, num_keys, k_stride, D, BLOCK_D, MASKED)
        v_tile = load_tile(v, keys, num_keys, v_stride, D, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)  # what was summed so far was measured from the old maximum
        total = total * shrink + tl.sum(shares, 1)
        acc = tl.dot(shares.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit
def forward_kernel(q, k, v, first, stop, out, lse, q_strides, k_strides, v_strides, out_strides, visible_stride,
                   num_heads, group, num_queries, num_keys, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """out and the logarithm (base 2) of the softmax's sum, for one tile of queries of one head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows of a causal mask start first
    batch, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    lo, hi = intervals(first + batch * visible_stride, stop + batch * visible_stride, rows, num_queries, num_keys)
    edge = edges(lo, hi, BLOCK_N)
    q_tile = load_tile(head_of(q, q_strides, batch, head), rows, num_queries, q_strides[2], D, BLOCK_D, True)
    k = head_of(k, k_strides, batch, head // group)
    v = head_of(v, v_strides, batch, head // group)
    top = tl.full([BLOCK_M], -1e30, tl.float32)  # not -inf: of a row that sees nothing -inf - -inf would be NaN
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale *= LOG2_E
    for part in tl.static_range(3):
        acc, total, top = see(acc, total, top, q_tile, k, v, k_strides[2], v_strides[2], lo, hi, edge[part],
                              edge[part + 1], num_keys, scale, D, BLOCK_D, BLOCK_N, part != 1)  # fmt: skip
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    out = head_of(out, out_strides, batch, head)
    store_tile(out, rows, num_queries, out_strides[2], acc / total[:, None], D, BLOCK_D)
    # +inf makes 2 ** (score - lse) zero in the backward pass
    lse += tl.program_id(1) * num_queries + rows
    tl.store(lse, tl.where(blind, float("inf"), top + tl.log2(total)), mask=rows < num_queries)


@triton.jit
def blame_queries(dq, q, do, lse, delta, k, v, k_stride, v_stride, lo, hi, begin, end, num_keys, scale,
                  D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """dq float[M, D] of a tile of queries, grown by the keys [begin, end)."""
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, keys, num_keys, k_stride, D, BLOCK_D, MASKED)
        v_tile = load_tile(v, keys, num_keys, v_stride, D, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), scores, float("-inf"))
        shares = tl.exp2(scores - lse[:, None])
        d_shares = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
        d_scores = shares * (d_shares - delta[:, None])  # the derivative of a softmax
        dq = tl.dot(d_scores.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def dq_kernel(q, k, v, first, stop, out, do, lse, delta, dq, q_strides, k_strides, v_strides, out_strides, do_strides,
              dq_strides, visible_stride, num_heads, group, num_queries, num_keys, scale, D: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dq of one tile of queries, and delta = sum(out * do), which dkv_kernel needs too."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    lo, hi = intervals(first + batch * visible_stride, stop + batch * visible_stride, rows, num_queries, num_keys)
    edge = edges(lo, hi, BLOCK_N)
    do_tile = load_tile(head_of(do, do_strides, batch, head), rows, num_queries, do_strides[2], D, BLOCK_D, True)
    out_tile = load_tile(head_of(out, out_strides, batch, head), rows, num_queries, out_strides[2], D, BLOCK_D, True)
    row_delta = tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + tl.program_id(1) * num_queries + rows, row_delta, mask=rows < num_queries)
    row_lse = tl.load(lse + tl.program_id(1) * num_queries + rows, mask=rows < num_queries, other=float("inf"))
    q_tile = load_tile(head_of(q, q_strides, batch, head), rows, num_queries, q_strides[2], D, BLOCK_D, True)
    k = head_of(k, k_strides, batch, head // group)
    v = head_of(v, v_strides, batch, head // group)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    base_2 = scale * LOG2_E
    for part in tl.static_range(3):
        acc = blame_queries(acc, q_tile, do_tile, row_lse, row_delta, k, v, k_strides[2], v_strides[2], lo, hi,
                            edge[part], edge[part + 1], num_keys, base_2, D, BLOCK_D, BLOCK_N, part != 1)  # fmt: skip
    store_tile(head_of(dq, dq_strides, batch, head), rows, num_queries, dq_strides[2], acc * scale, D, BLOCK_D)


@triton.jit
def blame_keys(dk, dv, k, v, keys, q, do, lse, delta, first, stop, q_stride, do_stride, begin, end, num_queries,
               scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """dk, dv float[N, D] of a tile of keys, grown by the queries [begin, end) of one head; scores stand transposed."""
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q_tile = load_tile(q, rows, num_queries, q_stride, D, BLOCK_D, MASKED)
        do_tile = load_tile(do, rows, num_queries, do_stride, D, BLOCK_D, MASKED)
        if MASKED:
            row_lse = tl.load(lse + rows, mask=rows < num_queries, other=float("inf"))
            row_delta = tl.load(delta + rows, mask=rows < num_queries, other=0.0)
        else:
            row_lse, row_delta = tl.load(lse + rows), tl.load(delta + rows)
        scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee") * scale  # N M
        if MASKED:
            lo = tl.load(first + rows, mask=rows < num_queries, other=0)
            hi = tl.load(stop + rows, mask=rows < num_queries, other=0)
            scores = tl.where((keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :]), scores, float("-inf"))
        shares = tl.exp2(scores - row_lse[None, :])
        dv = tl.dot(shares.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
        d_shares = tl.dot(v, tl.trans(do_tile), input_precision="ieee")
        d_scores = shares * (d_shares - row_delta[None, :])
        dk = tl.dot(d_scores.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkv_kernel(q, k, v, first, stop, do, lse, delta, seen_by, dk, dv, q_strides, k_strides, v_strides, do_strides,
               dk_strides, dv_strides, visible_stride, seen_by_stride, num_heads, group, num_queries, num_keys, scale,
               D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dk and dv of one tile of keys from the queries of one head; heads that share keys are added up outside."""
    batch, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first += batch * visible_stride
    stop += batch * visible_stride
    seen_by += batch * seen_by_stride + tl.program_id(0) * 4
    edge = (tl.load(seen_by), tl.load(seen_by + 1), tl.load(seen_by + 2), tl.load(seen_by + 3))
    k_tile = load_tile(head_of(k, k_strides, batch, head // group), keys, num_keys, k_strides[2], D, BLOCK_D, True)
    v_tile = load_tile(head_of(v, v_strides, batch, head // group), keys, num_keys, v_strides[2], D, BLOCK_D, True)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    base_2 = scale * LOG2_E
    q, do = head_of(q, q_strides, batch, head), head_of(do, do_strides, batch, head)
    lse += tl.program_id(1) * num_queries
    delta += tl.program_id(1) * num_queries
    for part in tl.static_range(3):
        dk_acc, dv_acc = blame_keys(dk_acc, dv_acc, k_tile, v_tile, keys, q, do, lse, delta, first, stop, q_strides[2],
                                    do_strides[2], edge[part], edge[part + 1], num_queries, base_2, D, BLOCK_D,
                                    BLOCK_M, part != 1)  # fmt: skip
    store_tile(head_of(dk, dk_strides, batch, head), keys, num_keys, dk_strides[2], dk_acc * scale, D, BLOCK_D)
    store_tile(head_of(dv, dv_strides, batch, head), keys, num_keys, dv_strides[2], dv_acc, D, BLOCK_D)
