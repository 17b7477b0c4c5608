# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · How does an image become tokens?
#
# **Time**: 20 minutes to read, half a minute to run on one core.
#
# **Reads**: `nanovlm/vit.py`, `nanovlm/contrastive.py`, `nanovlm/training/optimizer.py`,
# `nanovlm/training/stages.py`, `nanovlm/data/images.py`, `nanovlm/data/scenes.py`,
# `nanovlm/data/scene_questions.py`, `nanovlm/data/records.py`, `nanovlm/data/batching.py`,
# `nanovlm/data/tokenizer.py`
#
# A language model reads a list of vectors, one per token. A picture is a grid of pixels. This lesson follows a
# picture from one to the other: cut it, embed the pieces, tell each piece where it came from. At the end you will
# have broken the second half of that sentence on purpose, and seen what a model can still do without it.

# %%
import itertools

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from support import checks, lesson, solutions
from support.lesson import grouped_bars, show_pictures, show_source

from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.data.batching import contrastive_batch
from nanovlm.data.images import MEAN, STD, to_pixels
from nanovlm.data.records import Record, Turn
from nanovlm.data.scene_questions import REGIONS, Scenes
from nanovlm.data.scenes import COLORS
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.training import optimizer
from nanovlm.training.stages import Stage
from nanovlm.vit import ConvStem, ViT, ViTConfig, sincos_positions

SEED = 0
torch.manual_seed(SEED);

# %% [markdown]
# ## 1. A picture is a grid of numbers
#
# Two pictures: a *scene*, as the generator of this project draws them (64 × 64 pixels), and a landscape that we
# make from a few sine waves, as large as the pictures of a real ViT (224 × 224 pixels).

# %%
def landscape(size, rng):
    """Sky, sun and three ranges of hills: uint8[size, size, 3]."""
    y, x = np.mgrid[0:size, 0:size] / size
    picture = np.stack([0.95 - 0.5 * y, 0.75 - 0.1 * y, 0.65 + 0.3 * y], axis=-1)
    picture[(x - 0.7) ** 2 + (y - 0.3) ** 2 < 0.01] = (1.0, 0.9, 0.5)
    for depth in range(3):
        waves = sum(rng.normal() * np.sin(2 * np.pi * (k * x + rng.random())) / k for k in range(1, 9))
        hills = y > 0.5 + 0.15 * depth + 0.05 * waves
        picture[hills] = np.array([0.35, 0.45, 0.5]) * (1 - 0.3 * depth)
    return np.uint8(255 * np.clip(picture, 0, 1))


scenes = Scenes("new", seed=SEED, max_objects=3, string_share=0.0)
scene = scenes.record(11).visuals[0].frames[0]  # a PIL image
hills = landscape(224, np.random.default_rng(SEED))
pixels = to_pixels(scene, image_size=64)
print(f"the scene as the ViT reads it: {tuple(pixels.shape)} (colours, rows, columns)")
print(f"its numbers, normalised: from {pixels.min():.2f} to {pixels.max():.2f}")

# %% [markdown]
# ## 2. Cut it into patches
#
# A ViT cuts the picture into squares of `patch_size` pixels, a *patch* each, and reads them like text: along the
# first row, then along the second. One patch is one token, so the number of tokens is `(image_size / patch_size)
# ** 2`. It grows with the square of the resolution, and the language model behind will pay for every one of them.
# Bridges that summarise (lesson 04) exist for that reason.

# %%
def draw_grid(axis, picture, patch_size, title):
    """A picture with its patches' borders; axes in pixels."""
    size = len(np.asarray(picture))
    axis.imshow(picture, extent=(0, size, size, 0))
    axis.set_xticks(range(0, size + 1, patch_size), minor=True)
    axis.set_yticks(range(0, size + 1, patch_size), minor=True)
    axis.grid(which="minor", color="black", linewidth=0.6, alpha=0.6)
    ticks = (0, size // 2, size)
    axis.set(title=title, xlabel="column (pixels)", ylabel="row (pixels)", xticks=ticks, yticks=ticks)


figure, axes = plt.subplots(1, 2, figsize=(8, 4))
draw_grid(axes[0], scene, 8, f"scene: 64 px, patches of 8 px\n8 × 8 = 64 tokens (seed {SEED})")
draw_grid(axes[1], hills, 16, f"landscape: 224 px, patches of 16 px\n14 × 14 = 196 tokens (seed {SEED})")
figure.tight_layout()
plt.show()

# %% [markdown]
# This is what the transformer gets: the patches one behind the other, no longer a plane. Below are the 64 patches
# of the scene in reading order, 16 to a line. Can you still tell what is on it?

# %%
pieces = np.asarray(scene).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 8, 8, 3)
show_pictures(pieces, [str(number) for number in range(64)], columns=16, size=0.55)

# %% [markdown]
# ## 3. One convolution embeds them all
#
# Each patch of 8 × 8 pixels and 3 colours is 192 numbers. A token is a vector of the model's width, so all
# patches go through one matrix, the same for each. A convolution whose stride equals its kernel does just that,
# in one call: it visits every patch once, and no pixel twice. Look for `patch_embedding` and for the line that
# turns the plane into a list:

# %%
show_source(ViT.forward)

# %% [markdown]
# ### Exercise: write `patchify`
#
# Take float[F, 3, H, W] pixels and return float[F, N, 3 · patch_size²]: every patch as one row of numbers, such
# that multiplying by the convolution's flattened weight gives exactly what the convolution gives. No loop is
# needed; think of `unflatten`, `permute` and `flatten`. The check uses a picture that is wider than high, because
# there a mix-up of rows and columns shows. A solution stands at the end of the lesson.

# %%
def patchify(pixels, patch_size):
    ...  # your code


checks.attempt(checks.check_patchify, patchify)

# %% [markdown]
# ## 4. A stem instead of one big step
#
# The small ViTs of this project go from pixels to tokens in steps of two: each convolution halves the picture and
# doubles the channels. The number of tokens is the same, but every token has seen beyond the borders of its
# patch, and several non-linearities have looked at it.

# %%
show_source(ConvStem)

# %% [markdown]
# How far does one token see? We ask the gradient: which pixels would change the token in the middle?

# %%
def pixels_that_matter(embedding, size=64):
    """How strongly each pixel moves the token at row 4, column 4: float[size, size], largest = 1."""
    picture = torch.rand(1, 3, size, size, requires_grad=True)
    embedding(picture)[0, :, 4, 4].abs().sum().backward()
    influence = picture.grad[0].abs().sum(0)
    return influence / influence.max()


torch.manual_seed(SEED)
influences = {
    "patch convolution": pixels_that_matter(torch.nn.Conv2d(3, 64, kernel_size=8, stride=8)),
    "convolutional stem": pixels_that_matter(ConvStem(patch_size=8, width=64)),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
for axis, (name, influence) in zip(axes, influences.items()):
    own = influence[32:40, 32:40].sum() / influence.sum()
    dark = 1 - influence[..., None].expand(-1, -1, 3).sqrt().numpy()
    draw_grid(axis, dark, 8, f"{name}: {own:.0%} of the influence\ncomes from the token's own patch (seed {SEED})")
figure.tight_layout()
plt.show()

# %% [markdown]
# The dark square is what the convolutions reach. The faint grey around it is the normalisation: it takes the mean
# of the whole picture, so every pixel counts a little.
#
# For the rest of this lesson we use the plain patch convolution: its tokens know nothing of their neighbours,
# which makes the puzzle at the end exact.

# %% [markdown]
# ## 5. Where was each patch?
#
# Attention compares tokens with one another and does not know their order. After the plane has become a list,
# nothing in a patch says whether it was sky or floor. So a vector is added to each token, one per place: the
# *position table*. In this project it starts as sines and cosines of row and column, and then trains with
# everything else:

# %%
show_source(sincos_positions)

# %% [markdown]
# The usual way to look at such a table: take one position and ask how similar (cosine) all others are to it. We
# train three towers for a few seconds each and look at their tables before and after. One starts from the sines
# and cosines; one from random numbers of the same size; one from random numbers thirty times smaller, as many
# ViTs do. **Predict**: which of them will know where things are?
#
# The task: a *tower* learns as CLIP did, by matching pictures and captions (`nanovlm/contrastive.py`). Our
# pictures hold one object, and a caption says its colour and its place, such as "red, top left": one half needs
# no positions, the other half nothing else.

# %%
PLACES = [place for line in REGIONS for place in line]
CAPTIONS = [f"{color}, {place}" for color in COLORS for place in PLACES]
tokenizer = train_tokenizer(CAPTIONS, vocab_size=400)


def described(split, seed):
    """Endless records of one picture and one caption, made from the source's own questions and answers."""
    questions = {"color": 1, "place": 1}
    source = Scenes(split, seed=seed, max_objects=1, string_share=0.0, weights=questions, questions_per_picture=2)
    for n in itertools.count():
        record = source.record(n)
        answers = dict(zip(record.kinds, (turns[-1].text for turns in record.conversations)))
        if len(answers) == 2:  # too close to a border between two places, no place is asked for
            caption = Turn("assistant", (f"{answers['color']}, {answers['place']}",))
            yield Record(record.id, record.visuals, ((caption,),))


def batch(records, number):
    """The next records as pixels, caption ids and their lengths."""
    return contrastive_batch(list(itertools.islice(records, number)), tokenizer, 64, "crop", max_tokens=16)


def make_tower(seed):
    """A small ViT with the plain patch convolution, and a text tower beside it."""
    torch.manual_seed(seed)
    vision = ViT(ViTConfig(64, 8, width=64, num_layers=1, num_heads=4, mlp_width=128, class_token=False))
    text = TextTower(tokenizer.vocab_size, 64, num_layers=1, num_heads=4, mlp_width=128, context_length=16)
    return ContrastiveModel(vision, 64, text, 64, joint_width=64)


def train(tower, steps, seed):
    """Plain contrastive training; the whole of it."""
    stage = Stage(
        "tower", "contrastive", {"vision": 4e-3, "text_tower": 4e-3}, {"scenes": 1.0}, steps, batch_size=64,
        optimizer="muon", warmup_steps=10,
    )
    optimizers = optimizer.build(tower.parts(), stage)
    records = described("train", seed)
    for step in range(steps):
        optimizer.set_lr(optimizers, optimizer.lr_factor(step, stage))
        tower.loss(*batch(records, stage.batch_size)).backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)


STEPS = 130
towers = {name: make_tower(SEED) for name in ("sines and cosines", "random, as large", "random, small")}
with torch.no_grad():
    towers["random, as large"].vision.positions.normal_(std=0.6)
    towers["random, small"].vision.positions.normal_(std=0.02)
tables = {}
for start, tower in towers.items():
    before = tower.vision.positions.detach().clone()
    train(tower, STEPS, SEED)
    tables[start] = (before, tower.vision.positions.detach().clone())

# %%
def similarity(table, row, column):
    """Cosine of one position with all: float[8, 8]; the table's mean, which says nothing about places, is taken out."""
    unit = F.normalize(table - table.mean(0), dim=-1)
    return (unit @ unit[8 * row + column]).view(8, 8)


places = [(1, 1), (4, 4), (6, 2)]
figure, axes = plt.subplots(
    len(tables), 7, figsize=(8.8, 4.6), sharex=True, sharey=True, layout="constrained", width_ratios=[1, 1, 1, 0.2, 1, 1, 1]
)
for line, (name, both) in zip(axes, tables.items()):
    line[3].axis("off")
    line[0].set_ylabel(name.replace(" and ", "\nand ").replace(", ", ",\n"), fontsize=10)
    for half, table in enumerate(both):
        for axis, (row, column) in zip(line[4 * half :], places):
            shown = axis.imshow(similarity(table, row, column), cmap="RdBu_r", vmin=-1, vmax=1)
            axis.plot(column, row, "k+", markersize=7)
            axis.set(xticks=(0, 7), yticks=(0, 7))
axes[0, 1].set_title("at the start")
axes[0, 5].set_title(f"after {STEPS} steps")
figure.supxlabel("column (patches)", fontsize=11)
figure.supylabel("row (patches)", fontsize=11)
figure.colorbar(shown, ax=axes, label="cosine with position +", shrink=0.8)
figure.suptitle(f"similarity of positions (seed {SEED})", fontsize=12)
plt.show()

# %% [markdown]
# Red means alike. Sines and cosines know their neighbours before any training; the random tables begin as noise.
# In published ViTs, learned tables end up with rows and columns too (arXiv:2010.11929, Fig. 7), after millions of
# pictures; ours had a few thousand. But what does the table do for the task? That is a number, and we can measure
# it: name the nearest of all 72 captions for 200 new pictures.

# %%
exam = batch(described("new", seed=1), 200)
truth = [tokenizer.decode(ids[:length].tolist()).split(", ") for ids, length in zip(exam[1], exam[2])]


@torch.no_grad()
def right(tower, pixels):
    """Share of pictures whose nearest caption names the right colour, and the right place: two floats."""
    rows = [[tokenizer.bos, *tokenizer.encode(caption), tokenizer.eos] for caption in CAPTIONS]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [tokenizer.pad] * (int(lengths.max()) - len(row)) for row in rows])
    nearest = (tower.embed_images(pixels) @ tower.embed_texts(ids, lengths).T).argmax(1)
    named = [CAPTIONS[index].split(", ") for index in nearest.tolist()]
    return tuple(sum(a[half] == b[half] for a, b in zip(named, truth)) / len(truth) for half in (0, 1))


print(f"{'table starts as':<20}{'colour right':>14}{'place right':>14}")
for start, tower in towers.items():
    color, place = right(tower, exam[0])
    print(f"{start:<20}{color:>14.0%}{place:>14.0%}")
print(f"{'guessing':<20}{1 / len(COLORS):>14.0%}{1 / len(PLACES):>14.0%}")

# %% [markdown]
# Did you expect that? The large random table has no neighbours to show, and yet its tower finds the places: what
# the task needs is that positions *differ* enough to be told apart, not that they look like a plane. The small
# one is drowned by the patches it is added to, and in so few steps it does not grow loud enough. One seed and a
# few seconds: this says how the towers start, not which start wins in a long training.

# %% [markdown]
# ## 6. Puzzle: shuffle the patches
#
# Take the tower that started from sines and cosines, cut new pictures into patches, and put them back in random
# order. **Before you read on, predict**: which of the two, colour or place, will it still get right? And what
# would happen to the *features* if the tower had no positions at all?

# %%
def shuffle_patches(pixels, patch_size, seed):
    """Every picture's patches in a random order of its own.

    Returns: (pixels like those given, int[F, N]: which patch stands at each place now).
    """
    generator = torch.Generator().manual_seed(seed)
    patches = F.unfold(pixels, patch_size, stride=patch_size)  # F 3pp N
    order = torch.stack([torch.randperm(patches.shape[2], generator=generator) for _ in pixels])
    shuffled = patches.gather(2, order[:, None].expand_as(patches))
    return F.fold(shuffled, pixels.shape[2:], patch_size, stride=patch_size), order


tower = towers["sines and cosines"]
shuffled, order = shuffle_patches(exam[0], 8, SEED)


def picture_of(pixels):
    """Normalised pixels as a picture again: float[64, 64, 3] between 0 and 1."""
    return (pixels.permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)).clamp(0, 1)


chosen = range(4)
show_pictures(
    [picture_of(exam[0][n]) for n in chosen] + [picture_of(shuffled[n]) for n in chosen],
    [", ".join(truth[n]) for n in chosen] + ["shuffled"] * 4, columns=4,
)

# %% [markdown]
# First the features. We zero the position table of a copy and compare: are the features of the shuffled picture
# the shuffled features of the picture?

# %%
blind = make_tower(SEED)
blind.load_state_dict(tower.state_dict())
with torch.no_grad():
    blind.vision.positions.zero_()
    for name, vision in (("without positions", blind.vision), ("with positions", tower.vision)):
        plain, mixed = vision(exam[0]), vision(shuffled)
        moved = plain.gather(1, order[..., None].expand_as(plain))
        print(
            f"{name:<18}: largest difference token by token {(moved - mixed).abs().max():.6f}, "
            f"of their mean {(plain.mean(1) - mixed.mean(1)).abs().max():.6f}"
        )

# %% [markdown]
# Without positions the tower does not see that anything happened: each patch keeps its feature, only the order
# differs (up to rounding), and their mean, which CLIP-style training compares with the caption, is the same. Such
# a ViT reads a *bag of patches*. With positions the features change. Now the answers:

# %%
shares = {
    "as they are": right(tower, exam[0]),
    "patches shuffled": right(tower, shuffled),
    "positions zeroed": right(blind, exam[0]),
}
figure, axis = plt.subplots(figsize=(6.4, 3.4))
grouped_bars(axis, list(shares), {
    "colour": (lesson.VISION_COLOR, [100 * color for color, _ in shares.values()]),
    "place": (lesson.TEXT_COLOR, [100 * place for _, place in shares.values()]),
})  # fmt: skip
axis.axhline(100 / len(PLACES), color=lesson.GREY, linestyle="--")
axis.text(2.55, 100 / len(PLACES), "place by\nguessing", va="center", fontsize=9)
axis.set(ylabel="right (% of 200 pictures)", title=f"what survives (one tower, seed {SEED})", xlim=(-0.5, 2.5))
plt.show()

# %% [markdown]
# In this run, shuffling leaves colour as it was and takes place down to guessing. Without the table place is gone
# as well: positions are what carries "where". Two words of caution. Zeroing a table that the tower was trained
# with shows how much it relied on it (colour may suffer too), not what a tower trained without any would have
# learned. And patches of 8 pixels hold a good piece of an object each, so shuffling keeps what colour needs;
# shapes would not be so lucky.
#
# **One more puzzle, without code.** LLaVA-1.5 feeds 336-pixel pictures to a ViT with patches of 14 pixels. How
# many image tokens reach its language model, if the bridge keeps them all? And how many at 672 pixels? (576 and
# 2,304: twice the side, four times the tokens.)

# %% [markdown]
# ## Solution of the exercise

# %%
show_source(solutions.patchify)
checks.check_patchify(solutions.patchify)

# %% [markdown]
# ## What this lesson did not show
#
# - How a tower learns on real photographs: CLIP saw 400 million pairs, ours a few thousand drawings.
# - What the features hold beyond colour and place. Shapes, for instance, take longer.
# - Class tokens, two-dimensional rotary positions, and pictures that are not square.
# - What becomes of the position table when the resolution changes between training stages (lesson 08).
# - How the tokens get into a language model: that is lesson 03, and lesson 04 asks how many of them it needs.
