# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · Why is fused attention fast?
#
# **Time**: 35 minutes to read, a minute to run on one core.
#
# **Reads**: `nanovlm/attention.py`, `nanovlm/flash_attention.py`, `nanovlm/bench/kernels.py`
#
# Attention is two matrix products with a softmax between. A GPU's tensor cores do such products faster than its
# memory can hand them numbers, so whoever writes the scores to memory and reads them again waits for the memory. This
# lesson takes the same sum apart until nothing needs to be written: first in torch, then as a kernel of forty lines,
# which runs here without a GPU, in Triton's interpreter.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are made: they then run as numpy

import matplotlib.pyplot as plt
import numpy as np
import torch
from support import checks, lesson, solutions
from support.fused_norm import forward_kernel, rms_norm
from support.lesson import show_source

from nanovlm.attention import causal, causal_rows, reference, sliding_window
from nanovlm.bench.kernels import BYTES, FLOPS, Case
from nanovlm.flash_attention import edges, flash_attention, score, seen_by
from nanovlm.flash_attention import forward_kernel as attention_kernel

SEED = 0
torch.manual_seed(SEED);

# %% [markdown]
# ## 1. What moves
#
# Here is attention as written. Each line reads its input from memory and writes its output there:

# %%
show_source(reference)

# %% [markdown]
# Count bytes for one head of D = 128 channels in two-byte numbers. Queries, keys, values and output are 4 · T · D
# numbers. The scores are T², and they move at least four times: written by the product, read and written by the
# softmax, read by the sum over values. We divide by what an H200 moves and multiplies per second (assumed, not
# measured: 4.3 TB/s and 790 TFLOP/s) and get the least time that either way can take.

# %%
lengths = np.array([256, 512, 1024, 2048, 4096, 8192])
width, heads = 128, 32
flops = 4 * lengths.astype(float) ** 2 * width * heads
small = 4 * lengths * width * heads * 2
large = small + 4 * lengths.astype(float) ** 2 * heads * 2
figure, axis = plt.subplots(figsize=(7, 3.4))
axis.loglog(lengths, 1e6 * large / BYTES, "o-", color=lesson.VISION_COLOR, label="memory, scores written")
axis.loglog(lengths, 1e6 * small / BYTES, "o-", color=lesson.TEXT_COLOR, label="memory, scores never leave the chip")
axis.loglog(lengths, 1e6 * flops / FLOPS, "--", color=lesson.GREY, label="arithmetic, either way")
axis.set(xlabel="tokens of a row", ylabel="least time (microseconds)", title="one row, 32 heads of 128 channels, full mask")
axis.set_xticks(lengths, lengths)
axis.minorticks_off()
axis.legend(frameon=False, fontsize=9)
plt.show()
print(f"at 2,048 tokens: {large[3] / 1e6:.0f} MB against {small[3] / 1e6:.0f} MB; the scores alone cost "
      f"{large[3] / BYTES / (flops[3] / FLOPS):.1f} times the arithmetic")

# %% [markdown]
# So the plan: never write the scores. But the softmax of a row needs the row's largest score and its sum, and those
# are known only when all keys have been seen. Must one not go through the keys twice?
#
# ## 2. A softmax that can wait
#
# No. Keep three things per query: the largest score so far, `top`; the sum of exp(score − top), `total`; and the sum of
# exp(score − top) · value, `acc`. When a larger score turns up, what was summed so far was measured from the wrong
# point, and one factor puts it right: exp(old top − new top). At the end the output is acc / total.
#
# ### Exercise: two parts become one
#
# `one` and `other` are (top float[T], total float[T], acc float[T, D]), each from its own set of keys. Return the same
# three as if all keys had been seen at once.

# %%
def join_parts(one, other):
    ...  # your code


checks.attempt(checks.check_merge, join_parts)

# %% [markdown]
# With it attention walks over the keys in pieces and holds no more than one piece of scores at a time:

# %%
def in_pieces(q, k, v, size):
    """q float[T, D], k, v float[S, D] -> float[T, D]; `size` keys at a time."""
    state = None
    for keys, values in zip(k.split(size), v.split(size)):
        scores = q @ keys.T * q.shape[-1] ** -0.5
        top = scores.amax(1)
        shares = (scores - top[:, None]).exp()
        part = (top, shares.sum(1), shares @ values)
        state = part if state is None else solutions.merge(state, part)
    return state[2] / state[1][:, None]


q, k, v = torch.randn(3, 100, 16)
whole = ((q @ k.T) / 4).softmax(-1) @ v
for size in (100, 32, 7, 1):
    print(f"pieces of {size:>3} keys: largest difference {(in_pieces(q, k, v, size) - whole).abs().max():.0e}, "
          f"{q.shape[0] * size:>6,} scores held at once")

# %% [markdown]
# ## 3. A first kernel
#
# A Triton kernel is a function that many *programs* run at once, each on its own piece; `program_id` says which. A
# program loads a block of numbers from memory, computes on the whole block, and stores. RMSNorm, a program per row:

# %%
show_source(forward_kernel.fn)

# %%
x, gain = torch.randn(5, 24), torch.randn(24)
difference = (rms_norm(x, gain) - torch.nn.functional.rms_norm(x, (24,), gain, 1e-6)).abs().max()
print(f"five programs, one row each: largest difference from torch {difference:.0e}")

# %% [markdown]
# The row has 24 channels, a block 32: blocks are powers of two. `mask` keeps the last eight from being read or written.
#
# ## 4. Masks are intervals, and most tiles are easy
#
# Every mask of this package says: query t sees the keys [first, stop). Cut queries and keys into tiles, and a tile is of
# one of three kinds: nobody sees any of it (**skip** it, it is not even loaded), everybody sees all of it (**no mask**
# needed), or something between (**mask**). Only the last kind pays for comparing.
#
# ### Exercise: the kind of every tile
#
# `first` and `stop` are int[T]. Return int[query tiles, key tiles]: 0 = skip, 1 = mask, 2 = no mask. Mind the rows
# that see nothing (stop ≤ first), and the last tile, which may be cut short.

# %%
def sort_tiles(first, stop, num_keys, size):
    ...  # your code


checks.attempt(checks.check_tile_kinds, sort_tiles)

# %%
TOKENS, SIZE = 512, 32
documents = torch.arange(TOKENS) * 5 // TOKENS
padded = torch.where(torch.arange(TOKENS) < 400, torch.arange(TOKENS) // 200, -1)
PICTURES = {
    "causal": causal_rows(1, TOKENS),
    "packed, 5 documents": causal(documents[None]),
    "2 documents and padding": causal(padded[None]),
    "sliding window of 100": sliding_window(torch.zeros(1, TOKENS).long(), 100),
}
colors = np.array([[1, 1, 1], [0.878, 0.482, 0.224], [0.247, 0.435, 0.690]])
figure, axes = plt.subplots(1, 4, figsize=(10.4, 3.1), sharey=True)
for axis, (name, visible) in zip(axes, PICTURES.items()):
    kinds = solutions.tile_kinds(visible.first[0], visible.stop[0], TOKENS, SIZE)
    axis.imshow(colors[kinds], extent=(0, TOKENS, TOKENS, 0))
    counts = [int((kinds == kind).sum()) for kind in (0, 1, 2)]
    axis.set(title=name, xlabel="{} skipped, {} masked,\n{} without mask".format(*counts))
axes[0].set_ylabel("queries (tokens)")
figure.suptitle("tiles of 32 queries and 32 keys: orange = masked, blue = all seen; keys along the x axis")
figure.tight_layout()
plt.show()

# %% [markdown]
# The kernel does not list the kinds. The queries of a tile see intervals, so it needs four borders: between the
# lowest `first` and the highest `first` some see, from there to the lowest `stop` all see, and up to the highest
# `stop` some.

# %%
show_source(edges.fn)

# %% [markdown]
# ## 5. The kernel
#
# One program takes one tile of queries and sweeps over the keys. This is `in_pieces` again, with `tl.dot` for the
# products and 2 to the power instead of e to the power, as GPUs have an instruction for that one (the scores are
# multiplied by log₂ e beforehand):

# %%
show_source(score.fn)
show_source(attention_kernel.fn)

# %% [markdown]
# `part` is a constant when the kernel is compiled: the sweep exists three times, and the middle one has no comparisons.
# Does it give what attention gives? Packed documents, padding that sees nothing, four query heads that share two key
# heads:

# %%
segments = torch.cat([torch.arange(3).repeat_interleave(30), torch.full((10,), -1)])[None]
visible = causal(segments)
q, k, v = (torch.randn(1, heads, 100, 64, requires_grad=True) for heads in (4, 2, 2))
outs = {"as written": reference(q, k, v, visible), "kernel": flash_attention(q, k, v, visible)}
print(f"output: largest difference {(outs['as written'] - outs['kernel']).abs().max().item():.0e}; "
      f"rows of padding are zero: {bool((outs['kernel'][:, :, 90:] == 0).all())}")

# %% [markdown]
# Skipped tiles are not read at all. Put NaN into the first document's values: a share of zero times NaN would be NaN, so
# a masked tile would spread it, but only that document notices:

# %%
longer = causal(torch.arange(3).repeat_interleave(32)[None])
q3, k3, v3 = (torch.randn(1, 1, 96, 16) for _ in range(3))
v3[:, :, :32] = float("nan")
hurt = flash_attention(q3, k3, v3, longer).isnan().any(-1)[0, 0]
print("queries that met a NaN:", "none" if not hurt.any() else f"{int(hurt.nonzero().min())} to {int(hurt.nonzero().max())}")

# %% [markdown]
# ## 6. The way back
#
# The backward pass needs the softmax's output again, and it was never kept. It is computed again, tile by tile: from
# q and k, and from one number per query that the forward pass did keep, log₂ of the sum. More arithmetic, less memory:
# the same trade as before. What remains is the derivative of a softmax.
#
# ### Exercise: the gradient of the scores
#
# `shares` are a softmax's output float[T, S], `d_shares` the gradient of the loss for them. Return the gradient for the
# scores that went in.

# %%
def back_through_softmax(shares, d_shares):
    ...  # your code


checks.attempt(checks.check_blame, back_through_softmax)

# %% [markdown]
# The sum in it runs over a whole row of scores, which no tile has. But it equals the product of the output with its
# gradient, sum(out · d_out), D numbers instead of S: the kernel computes it once per query and calls it `delta`.
#
# For dQ a program keeps its queries and sweeps over keys, as before. dK and dV are sums over queries, so a program keeps
# its keys and sweeps over the queries that see them. The intervals are turned around for that:

# %%
show_source(seen_by)

# %%
weights = torch.randn(1, 4, 100, 64)
gradients = {name: torch.autograd.grad(out, (q, k, v), weights) for name, out in outs.items()}
for name, one, other in zip("qkv", *gradients.values()):
    print(f"d{name}: largest difference {(one - other).abs().max():.0e}")
again = torch.autograd.grad(flash_attention(q, k, v, visible), (q, k, v), weights)
print("the same bits when run again:", all(torch.equal(a, b) for a, b in zip(gradients["kernel"], again)))

# %% [markdown]
# The last line is no matter of course. A single kernel for dQ, dK and dV would have many programs adding to the same
# dQ, in the order in which they happen to finish, and sums of rounded numbers depend on their order. Two kernels compute
# the scores twice, seven products instead of five, and every run gives the same bits.
#
# ## 7. What can be gained
#
# The least time of some cases, whatever the kernel, and what limits it:

# %%
print(f"{'case':<34}{'forward':>10}{'backward':>10}   scores skipped")
for case in (Case("full", 577, 64, 32), Case("causal", 2048, 128, 4, 32), Case("packed", 8192, 128, 1, 32)):
    pairs = case.flops() / (4 * case.rows * case.heads * case.head_width)
    print(f"{f'{case.mask}, {case.rows} x {case.tokens} tokens, {case.head_width} channels':<34}"
          f"{1e3 * case.floor(False):>7.3f} ms{1e3 * case.floor(True):>7.3f} ms   {1 - pairs / case.tokens**2:>6.0%}")

# %% [markdown]
# How near the kernels come is for a GPU to say. `python -m nanovlm.bench kernels` measures there and writes a dated
# table; the cell below draws the newest one, if there is any. What needs no GPU is done on every change:
# `python -m nanovlm.bench compile` compiles each tile size for the A100 and the H100 and looks for what makes a kernel
# slow, registers that do not suffice, products that bypass the tensor cores, rows read in pieces of two bytes.

# %%
import csv

tables = sorted((lesson.ROOT / "notebooks" / "results").glob("kernels_*.csv"))
if not tables:
    print("no table of a GPU here yet")
else:
    rows = [row for row in csv.DictReader(open(tables[-1])) if "forward" in row["what"] and row["what"].startswith("attention")]
    figure, axis = plt.subplots(figsize=(8, 8))
    names = sorted({row["what"] for row in rows})
    for contender in sorted({row["contender"] for row in rows}):
        mine = [row for row in rows if row["contender"] == contender]
        axis.plot([float(row["tflops"]) for row in mine], [names.index(row["what"]) for row in mine], "o", label=contender)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(xlabel="TFLOP/s", title=f"{tables[-1].stem}, {rows[0]['device']}, torch {rows[0]['torch']}")
    axis.legend(frameon=False)
    figure.tight_layout()
    plt.show()

# %% [markdown]
# ## Solutions of the exercises

# %%
show_source(solutions.merge)
checks.check_merge(solutions.merge)

# %%
show_source(solutions.tile_kinds)
checks.check_tile_kinds(solutions.tile_kinds)

# %%
show_source(solutions.blame_scores)
checks.check_blame(solutions.blame_scores)

# %% [markdown]
# ## What this lesson did not show
#
# - Any measured speed: the interpreter runs each program as numpy, one after the other. Times of a GPU stand in the
#   dated table, if one was drawn above.
# - How a compiler hides the loading of the next tile behind the products of this one, which decides the last factor of
#   two; what newer kernels do with specialised warps (FlashAttention-3, arXiv:2407.08608) lies beyond this one.
# - Rounding: the interpreter multiplies bfloat16 wrongly, so the tests here use float32 and float16, and the benchmark
#   compares bfloat16 with float64 on a GPU before it measures anything.
# - Dropout and biases on the scores, which these kernels do not have.
