# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · Who may look at whom?
#
# **Time**: 25 minutes to read, half a minute to run on one core.
#
# **Reads**: `nanovlm/attention.py`, `nanovlm/cross_attention.py`, `nanovlm/decoder.py`
#
# Attention mixes tokens, and a mask says which. A wrong mask gives no error: the loss falls, even faster if a
# word can see the answer, and the model is useless. So this lesson draws every mask of the package, and then does not
# believe the drawings: it *measures* who influences whom.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from support import checks, lesson, solutions
from support.lesson import show_source

from nanovlm.attention import Visible, alibi_slopes, attention, causal, causal_rows, full, prefix, sliding_window
from nanovlm.cross_attention import latest_picture
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions

SEED = 0
torch.manual_seed(SEED);

# %% [markdown]
# ## 1. A mask is an interval
#
# Nowhere in this package is a square of booleans stored. Every mask says: query t sees the keys from `first[t]` up to,
# but not including, `stop[t]`. Two integers per token are enough for all that the papers need, and a fused kernel
# (lesson 09) can see from them which tiles to skip.

# %%
show_source(Visible.mask)
show_source(causal)

# %% [markdown]
# A row of twelve tokens. Where it is packed, two documents share it: five tokens, then five, then two of padding.
# Dark = may look; a row of the picture is a query, a column a key.

# %%
T = 12
one = torch.zeros(1, T, dtype=torch.long)
packed = torch.tensor([[0] * 5 + [1] * 5 + [-1] * 2])
MASKS = {
    "full: a ViT": full(T, T),
    "causal: text": causal_rows(1, T),
    "packed, padded": causal(packed),
    "prefix of 4": prefix(one, torch.tensor([4])),
    "window of 3": sliding_window(one, 3),
    "padding in front": causal(torch.tensor([[-1] * 3 + [0] * 9])),
}


def draw_mask(axis, mask, title, keys="key"):
    """A mask bool[T, S] as dark squares."""
    axis.imshow(mask, cmap="Blues", vmin=0, vmax=1.4, aspect="equal")
    axis.set_xticks(np.arange(-0.5, mask.shape[1]), minor=True)
    axis.set_yticks(np.arange(-0.5, mask.shape[0]), minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0, labelsize=7)
    axis.set(title=title, xlabel=keys, ylabel="query")


figure, axes = plt.subplots(2, 3, figsize=(8.4, 6), layout="constrained")
for axis, (name, visible) in zip(axes.flat, MASKS.items()):
    draw_mask(axis, visible.mask(T)[0], name)
plt.show()

# %% [markdown]
# ## 2. Do not believe it, measure it
#
# If query t may not look at key s, then nothing that happens to value s may change output t: the derivative of one by
# the other is exactly zero. And if it may, softmax gives it a weight above zero. So the pattern of non-zero
# derivatives *is* the mask, and it can be compared with the drawing, for every backend.

# %%
q, k, v = torch.randn(3, 1, 2, T, 8)


def influence(visible, backend):
    """bool[T, S]: where the output at a query changes with the value at a key."""
    derivative = torch.autograd.functional.jacobian(lambda values: attention(q, k, values, visible, backend).sum((0, 1, 3)), v)
    return derivative.abs().sum((1, 2, 4)) > 0  # T 1 H S D -> T S


for name, visible in MASKS.items():
    same = [torch.equal(influence(visible, backend), visible.mask(T)[0]) for backend in ("reference", "sdpa")]
    print(f"{name:<17} measured = drawn? reference {same[0]}, sdpa {same[1]}")

# %% [markdown]
# ## 3. Layers on top of layers
#
# A mask holds for one layer. In the next, a token reads what others have read. A window of three reaches two tokens
# back in one layer; how far does it reach in two, three, four? We measure again, through the product of the masks:

# %%
window = MASKS["window of 3"].mask(T)[0].float()
figure, axes = plt.subplots(1, 4, figsize=(9.4, 2.6), layout="constrained")
for layers, axis in enumerate(axes, start=1):
    reach = torch.linalg.matrix_power(window, layers) > 0
    draw_mask(axis, reach, f"{layers} layer{'s' * (layers > 1)}: {int(reach[-1].sum()) - 1} back")
plt.show()

# %% [markdown]
# That is why models with windows can still use long texts: L layers of a window of w reach L · (w − 1) tokens back.
# The walls between packed documents hold through any number of layers, since no path leads around them. We check this on a
# whole decoder with random weights: two documents in one row against each in a row of its own.

# %%
decoder = Decoder(DecoderConfig(50, 32, 4, 2, 64, 32, (LayerOptions(),) * 3)).eval()
documents = [torch.randint(0, 50, (1, 7)), torch.randint(0, 50, (1, 5))]


@torch.no_grad()
def scores(ids, segments, positions):
    """Logits float[T, V] of one row."""
    text = torch.zeros_like(ids)  # no token is an image token
    return decoder.logits(decoder(decoder.embedding(ids), positions, causal(segments), text))[0]


counts = [torch.arange(ids.shape[1])[None] for ids in documents]
apart = torch.cat([scores(ids, torch.zeros_like(ids), count) for ids, count in zip(documents, counts)])
row = torch.cat(documents, dim=1)
walls = torch.cat([torch.full_like(ids, number) for number, ids in enumerate(documents)], dim=1)
restarted, running = torch.cat(counts, dim=1), torch.arange(row.shape[1])[None]
shifts = {
    "with walls": scores(row, walls, restarted) - apart,
    "with walls, positions run on": scores(row, walls, running) - apart,
    "without walls": scores(row, torch.zeros_like(row), restarted) - apart,
}
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for (name, shift), marker, color in zip(shifts.items(), "os^", (lesson.TEXT_COLOR, "#3f8f5f", lesson.VISION_COLOR)):
    axis.plot(shift.abs().amax(-1) + 1e-8, marker, color=color, label=name)
axis.axvline(6.5, color=lesson.GREY, linestyle=":")
axis.set(yscale="log", ylim=(1e-8, 30), xlabel="token of the packed row (the second document begins at 7)",
         ylabel="largest change of a logit", title=f"packed against alone, random weights, seed {SEED}")  # fmt: skip
axis.legend(frameon=False, fontsize=9)
plt.show()
for name, shift in shifts.items():
    print(f"{name:<29}: first document {shift[:7].abs().max():.0e}, second {shift[7:].abs().max():.0e}")

# %% [markdown]
# Two things to see. Without walls only the *second* document is wrong: the first cannot see what comes after it, so a
# test that looks at the beginning of a row notices nothing. And with rotary positions it hardly matters whether the count starts anew
# behind a wall, since only distances enter (what is left is rounding). It would matter a lot with learned positions.
#
# ## 4. Where does a token stand?
#
# A mask says who may look, not where anybody stands, and a softmax over keys does not know it. Three ways to say it:
#
# - a **learned** vector for every position, added to the embedding (OPT);
# - **rotary** angles: queries and keys are turned by their position, so that their product knows the distance (LLaMA);
# - **ALiBi** (arXiv:2108.12409): nothing is added to tokens. The score of query $t$ and key $s$ loses $m\,(t - s)$, with a
#   slope $m$ that is steep in some heads and flat in others (MPT, the language model under OpenFlamingo).

# %%
show_source(alibi_slopes)
show_source(Visible.bias)

# %% [markdown]
# What happens behind the longest row of the training? We train three tiny decoders that differ in nothing else, on rows of 32
# tokens, and read them on rows of 256. The language: a table says which of 12 words follows which two, and one word in five is
# drawn at random. So nothing needs to be known but the last two words, and a model that has learned it is as good at any
# place of a row: 0.92 nats, the entropy of the noise.

# %%
TRAINED, LONGEST, WORDS, NOISE, STEPS = 32, 256, 12, 0.2, 300
follow = torch.randint(0, WORDS, (WORDS, WORDS), generator=torch.Generator().manual_seed(7))
KINDS = {
    "learned": dict(rotary_width=0, position_offset=0),
    "rotary": dict(),
    "ALiBi": dict(rotary_width=0, alibi=alibi_slopes(4)),
}


def speak(rows, length, generator):
    """Rows of the language, int[rows, length]."""
    words = torch.randint(0, WORDS, (rows, length), generator=generator)
    noise = torch.rand(rows, length, generator=generator) < NOISE
    for t in range(2, length):
        words[:, t] = torch.where(noise[:, t], words[:, t], follow[words[:, t - 1], words[:, t - 2]])
    return words


def losses(decoder, words):
    """Cross-entropy of every word but the first, float[rows, length - 1], in nats."""
    positions = torch.arange(words.shape[1]).expand_as(words)
    hidden = decoder(decoder.embedding(words), positions, causal_rows(*words.shape), None)
    return F.cross_entropy(decoder.logits(hidden)[:, :-1].transpose(1, 2), words[:, 1:], reduction="none")


def trained(kind):
    """A decoder of two layers after STEPS steps on rows of TRAINED words."""
    torch.manual_seed(SEED)
    decoder = Decoder(DecoderConfig(WORDS, 48, 4, 4, 96, LONGEST, (LayerOptions(),) * 2, **KINDS[kind]))
    optimizer, generator = torch.optim.AdamW(decoder.parameters()), torch.Generator().manual_seed(1)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (1 - step / STEPS)
        loss = losses(decoder, speak(32, TRAINED, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return decoder


test, share = speak(200, LONGEST, torch.Generator().manual_seed(2)), 1 - NOISE + NOISE / WORDS
floor = -share * np.log(share) - (1 - share) * np.log(NOISE / WORDS)
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for kind, color in zip(KINDS, (lesson.VISION_COLOR, "#3f8f5f", lesson.TEXT_COLOR)):
    found = losses(trained(kind), test).detach().mean(0)
    axis.plot(np.arange(1, LONGEST - 6), found.unfold(0, 7, 1).mean(-1), color=color, label=kind)
    inside, behind = found[1:TRAINED - 1].mean(), found[-64:].mean()
    print(f"{kind:<8} {inside:.2f} nats within {TRAINED} words, {behind:.2f} over the last 64 of {LONGEST}")
axis.axvline(TRAINED, color=lesson.GREY, linestyle=":")
axis.axhline(floor, color=lesson.GREY, linestyle="--")
axis.set(xlabel="place in the row (tokens; dotted: the longest of the training)", ylabel="loss (nats; dashed: the noise)",
         title=f"beyond the trained length, seed {SEED}")  # fmt: skip
axis.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# Learned positions end at once: no step has ever touched the vectors behind 32. Rotary ones fail little by little, as angles
# come that no query has met. ALiBi only ever says "further away", and that stays true. It pays with distance: what is
# far counts little in every head but the flattest, which this language does not ask for and a long story may.
#
# ## 5. Pictures that stand beside the row
#
# Flamingo (arXiv:2204.14198) keeps pictures out of the row. A *media token* marks the place, and every
# token looks at the latest picture before it, and at no other. An interval again, this time over image tokens:

# %%
show_source(latest_picture)

# %%
is_media = torch.tensor([[0, 1, 0, 0, 1, 0, 0, 0, 1, 0]], dtype=torch.bool)
visible = latest_picture(is_media, torch.zeros_like(is_media, dtype=torch.long), 2)
figure, axis = plt.subplots(figsize=(4.2, 4), layout="constrained")
draw_mask(axis, visible.mask(6)[0], "three pictures of two image tokens;\nmedia tokens stand at 1, 4 and 8", "image token")
plt.show()

# %% [markdown]
# ### Exercise: a famous slip
#
# Count the media tokens up to each token: that is its "text time". The first version that comes to mind compares it with
# the pictures' numbers like this:
#
# ```python
# def sees(is_media):
#     text_time = is_media.cumsum(0)
#     picture = torch.arange(1, int(is_media.sum()) + 1)
#     return text_time[:, None] >= picture
# ```
#
# It runs, it trains, and it is wrong. Write it right: `is_media` is bool[T]; return bool[T, pictures], True where a
# token sees a picture. The judge walks along the row token by token, which is slow and cannot be misread:

# %%
show_source(checks.latest_by_walking)

# %%
def sees(is_media):
    ...  # your code


checks.attempt(checks.check_sees, sees)

# %% [markdown]
# ## Solution of the exercise

# %%
show_source(solutions.sees_latest)
checks.check_sees(solutions.sees_latest)

# %% [markdown]
# ## What this lesson did not show
#
# - What a mask costs in time: lesson 09.
# - Masks that are no intervals (dilated, block-sparse, trees of drafts). This package has none.
# - Whether a bidirectional prefix for the image tokens helps. The papers' decoders are causal over them.
# - What a model with the wrong mask learns. Try: train with `>=` and test with one picture, then with three.
