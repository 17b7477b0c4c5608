"""Attention that never writes its scores to memory: forward and backward as Triton kernels.

The scores of T queries and S keys are T * S numbers, and memory is slow: writing them, reading them for the softmax
and again for the sum over values costs far more time than computing them. So a program takes one tile of queries,
walks over tiles of keys, and keeps for each query a running maximum, a running sum and a running output, which it
rescales when the maximum grows (the online softmax). Only the output and one number per query leave the chip; the
backward pass computes the scores again from them. `attention.reference` is the same function written out.

A mask is an interval of keys per query (attention.Visible). Tiles of keys that no query of the tile sees are never
visited, tiles that all of them see are taken without a mask, and only those between pay for one. dK and dV walk the
other way, over the queries that see a tile of keys. Nothing is added atomically: equal inputs give equal bits.

FlashAttention-2, arXiv:2307.08691, Algorithms 1 and 2. Differs from the paper: intervals instead of "causal"; dQ has a
kernel of its own, two more products in exchange for determinism; scores in base 2, as GPUs raise 2 to a power.

B batch, T queries, S keys, H heads, K key/value heads, D head width
"""

import triton
import triton.language as tl

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
