"""Attention that never writes its scores to memory: torch's operator, Triton's kernels, and what they compute.

T * S scores of T queries and S keys take far longer to write and read than to compute. So a program takes one tile of
queries, walks over tiles of keys, and keeps for each query a running maximum, sum and output, rescaled when the maximum
grows (the online softmax). Only the output and one number per query leave the chip; backward, the scores are computed
again. In torch this is `forward_as_written` and `backward_as_written`.

A mask is an interval of keys per query (attention.Visible). Tiles of keys that no query of the tile sees are never
visited, tiles that all of them see need no mask. dK and dV walk the other way, over queries that see a tile of keys.
ALiBi adds one number per key of a tile, counted from the tile's first query: far from a row's start it stays exact.

FlashAttention-2, arXiv:2307.08691, Algorithms 1 and 2. Differs from the paper: intervals instead of "causal"; dQ has a
kernel of its own, two more products in exchange for equal bits; scores in base 2, as GPUs raise 2 to a power.

B batch, T queries, S keys, H heads, K key/value heads, D head width; in the kernels M queries and N keys of a tile
"""

import os
from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # read by Triton when the kernels are made
CHECK_INTERVALS = os.environ.get("NANOVLM_CHECK_INTERVALS", "0") == "1"  # debugging: every call reads its intervals
LOG2_E = tl.constexpr(1.4426950408889634)

Tile = namedtuple("Tile", "queries keys warps stages")  # of a tile; of a program, 32 threads each; tiles on their way
TILES = {  # (compute capability, channels of a head at most) -> forward, dQ, dK and dV; none spills registers
    (90, 64): (Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (90, 96): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (90, 128): (Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (80, 64): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 2)),
    (80, 128): (Tile(64, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
}
EXACT = (Tile(32, 32, 4, 1),) * 3  # float32 does without tensor cores: right, and slow


def scores_of(q, k, first, stop, scale, slopes):
    """S = Q K^T * scale, with ALiBi + slope (key - place): float[B, H, T, S], -inf where a query does not see a key."""
    keys = torch.arange(k.shape[2], device=k.device)
    places = keys[-1:] + torch.arange(1 - q.shape[2], 1, device=k.device)[:, None]  # the last query at the last key
    bias = 0 if slopes is None else slopes[:, None, None] * (keys - places)
    visible = (keys >= first[..., None]) & (keys < stop[..., None])  # B T S
    return (q @ k.transpose(-2, -1) * scale + bias).masked_fill(~visible[:, None], -torch.inf)


def forward_as_written(q, k, v, first, stop, scale, slopes=None):
    """What `forward` returns (Algorithm 1): out float[B, H, T, D], and lse float[B, H, T], here not in base 2."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # grouped queries share their keys
    scores = scores_of(q, k, first, stop, scale, slopes)
    lse = scores.logsumexp(-1)  # L, the logarithm of the softmax's sum
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query that sees nothing: all its shares become 0
    return (scores - lse[..., None]).exp() @ v, lse  # O = P V


def backward_as_written(do, q, k, v, first, stop, out, lse, scale, slopes=None):
    """What `backward` returns (Algorithm 2): dq, dk, dv, from do float[B, H, T, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    shares = (scores_of(q, k, first, stop, scale, slopes) - lse[..., None]).exp()  # P, again: only lse was kept
    dv = shares.transpose(-2, -1) @ do  # dV = P^T dO
    d_shares = do @ v.transpose(-2, -1)  # dP = dO V^T
    delta = (do * out).sum(-1, keepdim=True)  # D = rowsum(dO * O), the same as rowsum(dP * P)
    d_scores = shares * (d_shares - delta)  # dS = P * (dP - D), the derivative of a softmax
    dq = d_scores @ k * scale  # dQ = dS K
    dk = d_scores.transpose(-2, -1) @ q * scale  # dK = dS^T Q
    return dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))  # heads that share keys add up


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
def score(q, k, v, start, k_stride, v_stride, lo, hi, num_keys, scale, slope, origin, D: tl.constexpr,
          BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """A tile of keys and of values float[N, D] from `start` on, and the scores float[M, N] of a tile of queries."""
    keys = start + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k, keys, num_keys, k_stride, D, BLOCK_D, MASKED)
    v_tile = load_tile(v, keys, num_keys, v_stride, D, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale
    if slope is not None:
        scores += (slope * (keys - origin))[None, :]
    if MASKED:
        scores = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), scores, float("-inf"))
    return k_tile, v_tile, scores


@triton.jit
def forward_kernel(q, k, v, first, stop, slopes, out, lse, q_strides, k_strides, v_strides, out_strides, visible_stride,
                   num_heads, group, num_queries, num_keys, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """out and the logarithm (base 2) of the softmax's sum, for one tile of queries of one head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows of a causal mask start first
    batch, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    lo, hi = intervals(first + batch * visible_stride, stop + batch * visible_stride, rows, num_queries, num_keys)
    edge = edges(lo, hi, BLOCK_N)
    q_tile = load_tile(head_of(q, q_strides, batch, head), rows, num_queries, q_strides[2], D, BLOCK_D, True)
    k, v = head_of(k, k_strides, batch, head // group), head_of(v, v_strides, batch, head // group)
    top = tl.full([BLOCK_M], -1e30, tl.float32)  # not -inf: of a row that sees nothing -inf - -inf would be NaN
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale *= LOG2_E
    slope, origin = slopes, tile * BLOCK_M + num_keys - num_queries
    if slopes is not None:  # else nothing of ALiBi is compiled
        slope = tl.load(slopes + head) * LOG2_E
    for part in tl.static_range(3):
        for start in range(edge[part], edge[part + 1], BLOCK_N):
            _, v_tile, scores = score(q_tile, k, v, start, k_strides[2], v_strides[2], lo, hi, num_keys, scale, slope,
                                      origin, D, BLOCK_D, BLOCK_N, part != 1)  # fmt: skip
            new_top = tl.maximum(top, tl.max(scores, 1))
            shares = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)  # what was summed so far was measured from the old maximum
            total = total * shrink + tl.sum(shares, 1)
            acc = tl.dot(shares.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
            top = new_top
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    out = head_of(out, out_strides, batch, head)
    store_tile(out, rows, num_queries, out_strides[2], acc / total[:, None], D, BLOCK_D)
    row_lse = tl.where(blind, float("inf"), top + tl.log2(total))  # inf makes 2 ** (score - lse) zero, backward
    if slope is not None:
        row_lse -= slope * (rows - tile * BLOCK_M)  # from each query's own place, as the tiles of others are others
    tl.store(lse + tl.program_id(1) * num_queries + rows, row_lse, mask=rows < num_queries)


@triton.jit
def dq_kernel(q, k, v, first, stop, slopes, out, do, lse, delta, dq, q_strides, k_strides, v_strides, out_strides,
              do_strides, dq_strides, visible_stride, num_heads, group, num_queries, num_keys, scale, D: tl.constexpr,
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
    k, v = head_of(k, k_strides, batch, head // group), head_of(v, v_strides, batch, head // group)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    base_2, slope, origin = scale * LOG2_E, slopes, tile * BLOCK_M + num_keys - num_queries
    if slopes is not None:
        slope = tl.load(slopes + head) * LOG2_E
        row_lse += slope * (rows - tile * BLOCK_M)
    for part in tl.static_range(3):
        for start in range(edge[part], edge[part + 1], BLOCK_N):
            k_tile, v_tile, scores = score(q_tile, k, v, start, k_strides[2], v_strides[2], lo, hi, num_keys, base_2,
                                           slope, origin, D, BLOCK_D, BLOCK_N, part != 1)  # fmt: skip
            shares = tl.exp2(scores - row_lse[:, None])
            d_shares = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            d_scores = shares * (d_shares - row_delta[:, None])  # the derivative of a softmax
            acc = tl.dot(d_scores.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    store_tile(head_of(dq, dq_strides, batch, head), rows, num_queries, dq_strides[2], acc * scale, D, BLOCK_D)


@triton.jit
def dkv_kernel(q, k, v, first, stop, slopes, do, lse, delta, seen_by, dk, dv, q_strides, k_strides, v_strides,
               do_strides, dk_strides, dv_strides, visible_stride, seen_by_stride, num_heads, group, num_queries,
               num_keys, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):  # fmt: skip
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
    base_2, slope = scale * LOG2_E, slopes
    if slopes is not None:
        slope = tl.load(slopes + head) * LOG2_E
    q, do = head_of(q, q_strides, batch, head), head_of(do, do_strides, batch, head)
    lse += tl.program_id(1) * num_queries
    delta += tl.program_id(1) * num_queries
    for part in tl.static_range(3):
        for start in range(edge[part], edge[part + 1], BLOCK_M):  # scores stand transposed
            rows = start + tl.arange(0, BLOCK_M)
            q_tile = load_tile(q, rows, num_queries, q_strides[2], D, BLOCK_D, part != 1)
            do_tile = load_tile(do, rows, num_queries, do_strides[2], D, BLOCK_D, part != 1)
            if part != 1:
                row_lse = tl.load(lse + rows, mask=rows < num_queries, other=float("inf"))
                row_delta = tl.load(delta + rows, mask=rows < num_queries, other=0.0)
            else:
                row_lse, row_delta = tl.load(lse + rows), tl.load(delta + rows)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * base_2  # N M
            if slope is not None:
                scores += (slope * (keys - (start + num_keys - num_queries)))[:, None]
                row_lse += slope * (rows - start)
            if part != 1:
                lo = tl.load(first + rows, mask=rows < num_queries, other=0)
                hi = tl.load(stop + rows, mask=rows < num_queries, other=0)
                scores = tl.where((keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :]), scores, float("-inf"))
            shares = tl.exp2(scores - row_lse[None, :])
            dv_acc = tl.dot(shares.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
            d_shares = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
            d_scores = shares * (d_shares - row_delta[None, :])
            dk_acc = tl.dot(d_scores.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    store_tile(head_of(dk, dk_strides, batch, head), keys, num_keys, dk_strides[2], dk_acc * scale, D, BLOCK_D)
    store_tile(head_of(dv, dv_strides, batch, head), keys, num_keys, dv_strides[2], dv_acc, D, BLOCK_D)


def with_alibi(tiles):
    """The three tiles, of a forward pass with at most 64 keys: the bias of more would spill registers."""
    return tiles[0]._replace(keys=min(tiles[0].keys, 64)), *tiles[1:]


def tiles_for(q):
    """The three tiles for queries q: by type, head width and the GPU's kind."""
    if q.dtype == torch.float32 or q.device.type != "cuda":
        return EXACT
    kind = 90 if torch.cuda.get_device_capability(q.device) == (9, 0) else 80  # newer ones understand these too
    return TILES[min(key for key in TILES if key[0] == kind and key[1] >= q.shape[-1])]


def launch(kernel, num_tiles, tile, tensors, strided, sizes):
    """Start a kernel, a program for each tile of each head of each row; strided: the tensors that are [B, H, T, D]."""
    # from one row, head and token to the next; 0 where there is but one, as its stride may be anything
    strides = [tuple(x.stride(d) if x.shape[d] > 1 else 0 for d in range(3)) for x in strided]
    rows, heads, _, width = strided[0].shape
    fusion = {} if INTERPRETED else dict(enable_fp_fusion=True)  # newer Triton leaves it out unless asked
    kernel[num_tiles, rows * heads](
        *tensors, *strides, *sizes, D=width, BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK_M=tile.queries,
        BLOCK_N=tile.keys, num_warps=tile.warps, num_stages=tile.stages, **fusion,
    )  # fmt: skip


def readable(x):
    """x [B, H, T, D], copied unless its rows can be read in pieces of 16 bytes."""
    return x if x.stride(3) == 1 and all(x.stride(d) % 8 == 0 for d in range(3) if x.shape[d] > 1) else x.contiguous()


def empty(like):
    """Room for a [B, H, T, D], with the heads of a token side by side as the next layer reads them."""
    return like.new_empty(like.shape[0], like.shape[2], like.shape[1], like.shape[3]).transpose(1, 2)


def seen_by(first, stop, num_keys, tile):
    """Intervals int[B or 1, T] turned around: `edges` of the queries that see a tile, int32[B or 1, key tiles, 4]."""
    index = torch.arange(first.shape[1], device=first.device)
    lowest = torch.arange(0, num_keys, tile.keys, device=first.device)[:, None]
    beyond = (lowest + tile.keys).clamp(max=num_keys)
    first, stop = first[:, None], stop[:, None]  # B 1 T
    sees = (first < beyond) & (stop > lowest) & (first < stop)  # B tiles T
    sees_all = (first <= lowest) & (stop >= beyond)
    begin, full_begin = (torch.where(these, index, len(index)).amin(-1) for these in (sees, sees_all))
    end, full_end = (torch.where(these, index + 1, 0).amax(-1) for these in (sees, sees_all))
    without_gap = sees_all.sum(-1) == full_end - full_begin
    begin, full_end = (edge // tile.queries * tile.queries for edge in (begin, full_end))
    full_begin = (full_begin + tile.queries - 1) // tile.queries * tile.queries
    some_full = without_gap & (full_begin < full_end)
    full_begin, full_end = (torch.where(some_full, edge, begin) for edge in (full_begin, full_end))
    return torch.stack([begin, full_begin, full_end, end], dim=-1).int()


@torch.library.custom_op("nanovlm::flash_attention", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, scale: float,
            slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, H, T, D] and lse, the softmax's log2 of sums, float32[B, H, T]."""
    out, lse = forward_shapes(q, k, v, first, stop, scale, slopes)
    if out.numel():
        q, k, v, first, stop = readable(q), readable(k), readable(v), first.contiguous(), stop.contiguous()
        (heads, num_queries), tiles = q.shape[1:3], tiles_for(q)
        tile = (tiles if slopes is None else with_alibi(tiles))[0]
        sizes = (num_queries if len(first) > 1 else 0, heads, heads // k.shape[1], num_queries, k.shape[2], scale)
        tensors, num_tiles = (q, k, v, first, stop, slopes, out, lse), triton.cdiv(num_queries, tile.queries)
        launch(forward_kernel, num_tiles, tile, tensors, (q, k, v, out), sizes)
    return out, lse


@forward.register_fake
def forward_shapes(q, k, v, first, stop, scale, slopes=None):
    """What `forward` returns, without its numbers."""
    return empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nanovlm::flash_attention_backward", mutates_args=())
def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, out: Tensor, lse: Tensor,
             scale: float, slopes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv."""
    dq, dk, dv = backward_shapes(do, q, k, v, first, stop, out, lse, scale, slopes)
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    do, q, k, v, out = (readable(x) for x in (do, q, k, v, out))
    first, stop, lse = first.int().contiguous(), stop.int().contiguous(), lse.contiguous()  # 64 bits cost registers
    (rows, heads, num_queries, width), (num_kv_heads, num_keys), delta = q.shape, k.shape[1:3], torch.empty_like(lse)
    _, q_tile, kv_tile = tiles_for(q)
    stride, sizes = num_queries if len(first) > 1 else 0, (heads, heads // num_kv_heads, num_queries, num_keys, scale)
    tensors = (q, k, v, first, stop, slopes, out, do, lse, delta, dq)
    num_tiles = triton.cdiv(num_queries, q_tile.queries)
    launch(dq_kernel, num_tiles, q_tile, tensors, (q, k, v, out, do, dq), (stride, *sizes))
    turned = seen_by(first, stop, num_keys, kv_tile)
    if num_kv_heads < heads:  # a sum over the heads within the kernel would need registers that it has not got
        dk, dv = (q.new_empty(rows, num_keys, heads, width, dtype=torch.float32).transpose(1, 2) for _ in range(2))
    tensors = (q, k, v, first, stop, slopes, do, lse, delta, turned, dk, dv)
    sizes = (stride, turned.stride(0) if len(turned) > 1 else 0, *sizes)
    launch(dkv_kernel, turned.shape[1], kv_tile, tensors, (q, k, v, do, dk, dv), sizes)
    if num_kv_heads < heads:
        dk, dv = (empty(k).copy_(x.unflatten(1, (num_kv_heads, -1)).sum(2)) for x in (dk, dv))
    return dq, dk, dv


@backward.register_fake
def backward_shapes(do, q, k, v, first, stop, out, lse, scale, slopes=None):
    """What `backward` returns, without its numbers."""
    return empty(q), empty(k), empty(v)


def keep(ctx, inputs, output):
    """What the backward pass needs; the scores are computed again."""
    *tensors, ctx.scale, slopes = inputs
    ctx.save_for_backward(*tensors, *output, slopes)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def differentiate(ctx, do, d_lse):
    """Gradients for `forward`'s arguments."""
    if do is None:
        return (None,) * 7
    *tensors, slopes = ctx.saved_tensors
    return *backward(do, *tensors, ctx.scale, slopes), None, None, None, None


forward.register_autograd(differentiate, setup_context=keep)


def flash_attention(q, k, v, visible, scale=None):
    """softmax(q k^T * scale) v over each query's interval of keys; scale None = 1 / sqrt(D).

    Args:
      q: float[B, H, T, D], of 16 or 32 bits; D a multiple of 8, at most 128 (64 and 128 best).
      k, v: float[B, K, S, D], H a multiple of K. What cannot be read in pieces of 16 bytes is copied first.
      visible: attention.Visible, any int[B or 1, T] over the S keys, fastest where they do not descend; with ALiBi
        float32[H] slopes, which get no gradient. Trusted, as reading intervals would wait for the GPU;
        NANOVLM_CHECK_INTERVALS=1 checks them in every call.
    Returns: float[B, H, T, D]; zeros, with zero gradients, where a query sees nothing. Under autocast its type.
    Raises: ValueError for arguments of wrong shapes, types or devices.
    """
    kind = q.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    check(q, k, v, visible)
    if CHECK_INTERVALS:
        visible.check(k.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return forward(q, k, v, visible.first, visible.stop, scale, visible.slopes)[0]


def check(q, k, v, visible):
    """Raise ValueError for arguments that the kernels would misread; looks at no numbers."""
    edges, slopes = (visible.first, visible.stop), visible.slopes

    def demand(right, what):
        if not right:
            names = zip(("q", "k", "v", "first", "stop"), (q, k, v, *edges))
            told = ", ".join(f"{name} {x.dtype} {tuple(x.shape)} on {x.device}" for name, x in names)
            raise ValueError(f"{what}; given are {told}")

    demand(q.ndim == k.ndim == v.ndim == 4, "q, k and v are [rows, heads, tokens, channels]")
    (rows, heads, num_queries, width), (num_kv_heads, num_keys) = q.shape, k.shape[1:3]
    fits = q.is_floating_point() and q.element_size() in (2, 4) and q.dtype == k.dtype == v.dtype
    demand(fits, "q, k and v share one type, of 16 or 32 bits")
    demand(all(x.device == q.device for x in (k, v, *edges)), "all are on one device")
    demand(width % 8 == 0 and 8 <= width <= 128, "heads have 8 to 128 channels, a multiple of 8: pad them, pass scale")
    demand(k.shape == v.shape == (rows, num_kv_heads, num_keys, width), "k and v have the rows and channels of q")
    demand(num_kv_heads and heads % num_kv_heads == 0, "query heads are a multiple of key heads")
    fits = edges[0].shape == edges[1].shape and edges[0].shape in ((rows, num_queries), (1, num_queries))
    fits = fits and all(x.dtype in (torch.int32, torch.int64) for x in edges)
    demand(fits, "first and stop are int32 or int64 [rows or 1, q's tokens]")
    fits = slopes is None or slopes.shape == (heads,) and slopes.dtype == torch.float32 and slopes.device == q.device
    demand(fits, "slopes are float32, one for each head, beside q")
    furthest = max(num_queries * q.stride(2), num_keys * max(k.stride(2), v.stride(2)))
    demand(furthest < 2**31, "a head reaches over less than 2 ** 31 elements: split it")
    demand(q.device.type == "cuda" or INTERPRETED, "the kernels need a GPU, or (slow) TRITON_INTERPRET=1; try 'sdpa'")
