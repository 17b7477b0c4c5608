# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · What does each training stage move?
#
# **Time**: 20 minutes to read, a minute to run on one core.
#
# **Reads**: `nanovlm/training/stages.py`, `nanovlm/training/diagnostics.py`, `nanovlm/training/optimizer.py`,
# `nanovlm/vit.py`, `nanovlm/recipes/mplug_owl2.py`
#
# None of the papers trains its model in one go. A stage frees some parts, freezes all others, and often shows larger
# pictures than the one before. This lesson lines up the papers' stages, runs a chain of five in miniature, and measures
# how far every part travels in each; then it leaves a stage out, and stretches a position table.

# %%
import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from support import chain_08, checks, lesson, solutions
from support.lesson import show_source

from nanovlm.recipes import RECIPES, mplug_owl2
from nanovlm.training.diagnostics import Movement
from nanovlm.training.optimizer import groups
from nanovlm.training.stages import PARTS
from nanovlm.vit import resize_positions

SEED = 0

# %% [markdown]
# ## 1. Stages are data
#
# A stage gives a peak learning rate to every part that it trains; a part that it does not name is frozen. So the papers'
# stages fit into one picture. Nothing is loaded for it: these are the recipes' own tuples.

# %%
NAMES = ("llava", "llava_phi", "lynx", "mplug_owl2", "blip2", "open_flamingo")
lines = [(name, stage) for name in NAMES for stage in RECIPES[name].stages("full", False)]
columns = [part for part in PARTS if any(part in stage.learning_rates for _, stage in lines)]
rates = np.array([[stage.learning_rates.get(part, np.nan) for part in columns] for _, stage in lines])

figure, axis = plt.subplots(figsize=(9.4, 5.4), layout="constrained")
shown = axis.imshow(np.log10(rates), cmap="YlOrBr", vmin=-5.3, vmax=-2.5, aspect="auto")
for (row, column), rate in np.ndenumerate(rates):
    if not np.isnan(rate):
        axis.text(column, row, f"{rate:.0e}".replace("e-0", "e-"), ha="center", va="center", fontsize=9)
axis.set_xticks(range(len(columns)), [part.replace("_", "\n") for part in columns], fontsize=9)
axis.set_yticks(range(len(lines)), [f"{name} · {stage.name} · {stage.image_size} px" for name, stage in lines], fontsize=9)
axis.set_title("peak learning rate of every part in every stage (empty = frozen)")
plt.show()

# %% [markdown]
# Read it line by line. Every paper begins with the bridge, and with whatever else is new: Lynx's adapters,
# mPLUG-Owl2's image copies (`vision_branch`). The language model, ready-made and expensive, comes last or never. The
# tower is trained by some and left alone by others, and where it trains, mPLUG-Owl2 is careful: its first layers learn
# at a fraction of the rate of its last, 0.9 for each block that lies between.

# %%
with torch.device("meta"):  # shapes without numbers: eight billion parameters in no memory
    owl = mplug_owl2.RECIPE.build("full", 0)
align = mplug_owl2.STAGES[0]
by_depth = {int(group["name"].split("/")[1]): group["peak_lr"] for group in groups(owl.parts(), align) if group["name"].startswith("vision/")}

figure, axis = plt.subplots(figsize=(8.4, 2.6), layout="constrained")
axis.bar(list(by_depth), list(by_depth.values()), color=lesson.VISION_COLOR)
axis.set(xlabel="depth from the top: 0 = last norm, 1 to 24 = blocks, 25 = patches and positions", ylabel="peak learning rate")
axis.set_title("mPLUG-Owl2, first stage: the tower's rates by depth")
plt.show()
print(f"deepest / top = {min(by_depth.values()) / max(by_depth.values()):.3f} = 0.9 ** {max(by_depth)} = {0.9 ** max(by_depth):.3f}")

# %% [markdown]
# ## 2. How far does a part travel?
#
# Norms of updates say little by themselves: a large matrix has a large norm. So we divide: the distance from where the
# weights stood when the stage began, over their length then.
#
# $$\text{moved} = \frac{\lVert w - w_0 \rVert}{\lVert w_0 \rVert}$$
#
# `train.py` logs this number for every part and prints it at the end of each stage. It keeps a few thousand numbers of
# each tensor to compare with, as a copy of all weights would take as much memory again.

# %%
show_source(Movement.measure)

# %% [markdown]
# Now a chain. Ours has five stages, because it must also make what the papers find ready-made: a tower that has
# matched pictures with captions (CLIP), and a language model that has read (Vicuna). Then come Lynx's three: align the
# bridge on small pictures, raise the resolution, instruct.

# %%
for stage in chain_08.STAGES:
    print(f"{stage.name:<11} {stage.steps:>3} steps, {stage.image_size} px, trains {', '.join(stage.learning_rates)}")

# %% [markdown]
# Beside the movement we keep a copy of the model behind `words`, to come back to, and behind `align`, to stretch later.

# %%
travelled, kept = {}, {}


def watch(stage, moved):
    """Note how far the parts have come, and keep a copy of the model."""
    travelled[stage.name] = moved
    kept[stage.name] = copy.deepcopy(model)


model, towers, tokenizer, sources = chain_08.begin(SEED)
chain_08.run(chain_08.STAGES, model, towers, tokenizer, sources, watch)

# %%
parts = list(travelled["tower"])
moved = 100 * np.array([[travelled[stage][part] for part in parts] for stage in travelled])
figure, axis = plt.subplots(figsize=(7.6, 3.6), layout="constrained")
axis.imshow(np.log10(np.where(moved > 0, moved, np.nan)), cmap="YlGnBu", vmin=0.5, vmax=3.5, aspect="auto")
for (row, column), number in np.ndenumerate(moved):
    words = f"{number:.0f}%" if number else "frozen: 0"
    axis.text(column, row, words, ha="center", va="center", color="white" if number > 150 else "black", fontsize=10)
axis.set_xticks(range(len(parts)), parts)
axis.set_yticks(range(len(travelled)), list(travelled))
axis.set_title(f"weights moved in each stage, share of their length (seed {SEED})")
plt.show()

# %% [markdown]
# Three things to see.
#
# - **Frozen is exactly zero.** Not small: no bit has changed, and `train.py` proves it with a fingerprint of every
#   frozen tensor before and after each stage.
# - **From nothing is far, from something is near.** In `words` the embedding ends more than six times its own length
#   away from where it began: small random numbers are a place to leave. In `instruct`, with more steps at the same rate,
#   the same embedding moves a sixth of that.
# - **What has been aligned moves again.** The bridge goes on travelling in every later stage: once larger pictures
#   come, once the tower moves beneath it, once the language model does.
#
# **Puzzle.** `align` moves one small part by a third of its length, `instruct` moves everything, by a third and more.
# Which of the two takes more of the loss away? Is a part that moves a lot a part that learns a lot? Guess, then run:

# %%
exam = chain_08.records(sources["exam"], 0, 60)
for name in ("words", "align", "resolution", "instruct"):
    print(f"after {name:<11}: {chain_08.loss_on(kept[name], tokenizer, exam):.2f} nats per answer token")

# %% [markdown]
# The stage that moves least takes away the most: a language model that can answer only lacked something to look
# through. Movement counts kilometres, not arrivals. It tells where training *acts*, and where by mistake it does not.

# %% [markdown]
# ## 3. Leave a stage out
#
# What is a stage good for? Take it out and give its steps to the last one, so that both runs are equally long. First a
# single pair, live: the chain without `align`.

# %%
show_source(chain_08.chain)

# %%
shorter = copy.deepcopy(kept["words"])  # tower and words are the same in both
chain_08.run(chain_08.chain("align")[2:], shorter, None, tokenizer, sources)
found = {name: chain_08.examine(one, tokenizer, sources["exam"]) for name, one in (("whole", model), ("shorter", shorter))}


def in_percent(result):
    """Right answers by kind of question, in %."""
    return [100 * result[kind] for kind in chain_08.KINDS]


figure, axis = plt.subplots(figsize=(8.4, 3.2), layout="constrained")
lesson.grouped_bars(axis, list(chain_08.KINDS), {
    "all five stages": (lesson.TEXT_COLOR, in_percent(found["whole"])), "without align": (lesson.GREY, in_percent(found["shorter"])),
})  # fmt: skip
axis.set(ylabel=f"right (% of {chain_08.EXAM} new pictures)", title=f"one seed ({SEED}), equally many steps")
plt.show()

# %% [markdown]
# Four bars of each colour, of about 125 questions each, so differences below nine points or so are the exam's own noise.
# Colours suffer without `align`, the rest does not, in this seed; how another seed turns out, only another run can tell
# (`SEED = 1` at the top). And note what "without align" still has: tower and bridge learn in `resolution`, a little
# later and on larger pictures. A stage is rarely the only one that could do its work. Its argument is often price: the
# bridge learns at 224 pixels, a quarter of the patches, and with no gradient for anything else.

# %% [markdown]
# ## 4. Stretch the position table
#
# Between `align` and `resolution` the pictures grow from 32 to 48 pixels, from 4 x 4 patches to 6 x 6. A ViT has one
# learned position per patch, so 16 rows must become 36. The table is a little picture itself, as many channels as the
# tower is wide, and is enlarged like one.

# %%
show_source(resize_positions)

# %% [markdown]
# Does it keep what the rows mean? We ask how similar the position of one patch is to all others, before and after:

# %%
table = kept["align"].vision.positions.detach()
stretched = resize_positions(table, 36)
figure, axes = plt.subplots(1, 4, figsize=(9.4, 2.7), layout="constrained")
for axis, (rows, side, place, title) in zip(axes, (
    (table, 4, (0, 0), "4 x 4: top left"), (stretched, 6, (0, 0), "6 x 6: top left"),
    (table, 4, (2, 2), "4 x 4: row 2, column 2"), (stretched, 6, (3, 3), "6 x 6: row 3, column 3"),
)):  # fmt: skip
    likeness = torch.nn.functional.cosine_similarity(rows, rows[place[0] * side + place[1]][None], dim=1).reshape(side, side)
    image = axis.imshow(likeness, cmap="viridis", vmin=0, vmax=1)
    axis.plot(place[1], place[0], "w+", markersize=10)
    axis.set(title=title, xticks=[], yticks=[])
figure.colorbar(image, ax=axes, label="cosine")
plt.show()

# %% [markdown]
# And does the tower cope? The model at the end of the chain stands at 48 pixels. We show it pictures of 64, 8 x 8
# patches, which it has never seen, without a single step of training, and with three tables: stretched as above,
# stretched without blending neighbours, and one of random rows of the same length.

# %%
def at_64(table):
    """Right answers, in %, of the trained model at 64 pixels with this position table."""
    larger = copy.deepcopy(model)
    larger.vision.resize(64)
    larger.vision.positions.data.copy_(table)
    return in_percent(chain_08.examine(larger, tokenizer, sources["exam"], 120))


old = model.vision.positions.detach()
grid = old.T.reshape(1, -1, 6, 6)
nearest = torch.nn.functional.interpolate(grid, size=(8, 8), mode="nearest")[0].flatten(1).T
torch.manual_seed(SEED)
noise = torch.nn.functional.normalize(torch.randn(64, old.shape[1]), dim=1) * old.norm(dim=1).mean()
at_48 = chain_08.examine(model, tokenizer, sources["exam"], 120)
figure, axis = plt.subplots(figsize=(9.4, 3.2), layout="constrained")
lesson.grouped_bars(axis, list(chain_08.KINDS), {
    "48 px": (lesson.TEXT_COLOR, in_percent(at_48)),
    "64 px, bicubic": (lesson.VISION_COLOR, at_64(resize_positions(old, 64))),
    "64 px, nearest": ("#d9b08c", at_64(nearest)),
    "64 px, random rows": (lesson.GREY, at_64(noise)),
})  # fmt: skip
axis.set(ylabel="right (% of 120 pictures)", title=f"a size never trained on (seed {SEED})")
axis.legend(ncols=4, loc="upper center", frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# Colour, which needs no place, survives a stretched table and not one of random rows. Place falls with all three: there
# are 64 image tokens in the row now instead of 36, and the decoder, which has no table to stretch, knew places by their
# order in the row. (With some 60 questions of a kind, that random rows look better for places is nothing to build on.)
# So stretching is where a resolution stage begins, not what it can be replaced by: Lynx gives it 10,000 steps.
#
# ### Exercise: stretch a table that has a class token
#
# CLIP's and EVA's towers have one more row in front, the class token's, which stands nowhere in the picture. Write
# `stretch(table, side)`: table float[1 + n * n, W] becomes float[1 + side * side, W]; the first row is copied, the
# grid behind it, row by row, is enlarged by bicubic interpolation (`align_corners=False`).

# %%
def stretch(table, side):
    ...  # your code


checks.attempt(checks.check_stretch, stretch)

# %% [markdown]
# ## Solution of the exercise

# %%
show_source(solutions.stretch)
checks.check_stretch(solutions.stretch)

# %% [markdown]
# ## What this lesson did not show
#
# - Movement of the papers' own weights: that takes their checkpoints before and after a stage. `train.py` prints this
#   table for any recipe, so it costs nothing beside the training itself.
# - Whether the order of stages matters at full size. A chain of a minute, in a world of single shapes, is a model of the
#   method and not of its results.
# - Learning rates as a choice: every stage here has one rate for all its parts. The papers' differ by a factor of a
#   hundred between stages, and Section 1 shows which.
