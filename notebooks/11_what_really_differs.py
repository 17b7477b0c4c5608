# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 · What really differs between the papers?
#
# **Time**: 20 minutes to read, half a minute to run on one core.
#
# **Reads**: `nanovlm/recipes/table.py`, `nanovlm/recipes/nano.py`, `nanovlm/recipes/nano_resampler.py`,
# `nanovlm/recipes/llava_phi.py`, `nanovlm/resampler.py`, `nanovlm/projector.py`,
# `nanovlm/abstractor.py`, `nanovlm/vlm.py`, `nanovlm/data/records.py`, `nanovlm/data/batching.py`
#
# Every paper has a figure of its own, with boxes of its own colours. Built from the same files, their models are three
# modules each, `VLM(vision, bridge, decoder)`, and the differences fit on one page. This lesson lets the code write that
# page, at full size and without a single weight, and ends with a model of your own.

# %%
import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from support import checks, lesson, solutions
from support.lesson import show_source

from nanovlm.abstractor import Abstractor
from nanovlm.data.batching import build_batch
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.projector import MLPProjector
from nanovlm.recipes import RECIPES, llava_phi, nano, nano_resampler, table
from nanovlm.resampler import Resampler
from nanovlm.vlm import VLM

SEED = 0
torch.manual_seed(SEED);

# %% [markdown]
# ## 1. The page
#
# `python -m nanovlm.recipes` prints these tables. Each model is built on the `meta` device, where a weight has a shape
# and no memory; operations are counted while the shapes of one picture pass through.

# %%
show_source(table.encode_flops)

# %%
PAPERS = ("nano", "lynx", "mplug_owl2", "llava_phi", "llava", "blip2", "open_flamingo")
counted = {name: table.row(RECIPES[name], RECIPES[name].sizes[0]) for name in PAPERS}
(_, headings, models), (_, parts, shares), (_, stage_headings, stages) = table.tables(counted.values())


def as_markdown(headings, cells):
    """A table for the notebook."""
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in [headings, ["---"] * len(headings), *cells]))


as_markdown(headings, models)

# %% [markdown]
# Read the columns of tokens first. All towers are much alike; what the papers disagree about is how many tokens
# of a picture reach the language model: LLaVA and LLaVA-Phi hand on every patch, mPLUG-Owl2 65, Lynx and BLIP-2 32.
# OpenFlamingo's 64 never enter the row at all. Here is what that decides:

# %%
figure, axis = plt.subplots(figsize=(8.4, 3.6), layout="constrained")
published = PAPERS[1:]
places = np.arange(len(published))
for offset, (name, color, flops) in enumerate((
    ("tower and bridge", lesson.VISION_COLOR, [counted[paper].encode_flops for paper in published]),
    ("language model, image tokens only", lesson.TEXT_COLOR, [counted[paper].language_flops for paper in published]),
)):  # fmt: skip
    bars = axis.bar(places + 0.38 * offset, np.array(flops) / 1e12, 0.36, color=color, label=name)
    axis.bar_label(bars, [table.short(number) for number in flops], fontsize=8)
axis.set_xticks(places + 0.19, [f"{paper}\n{counted[paper].image_tokens} tokens" for paper in published], fontsize=9)
axis.set(yscale="log", ylim=(3e-3, 40), ylabel="operations per picture (10¹²)", title="what one picture costs, full size")
axis.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# Where every patch is handed on, the language model pays up to twenty times what the tower does. A resampler turns this around,
# and Lynx can afford 420 pixels and a billion parameters in its tower.
#
# ## 2. Who trains, and when
#
# The second difference is what a stage may change. Orange is a part that trains, with its peak learning rate:

# %%
PARTS = ("vision", "bridge", "adapters", "vision_branch", "cross_attention", "embedding", "language_model", "lm_head")
lines = [(paper, stage) for paper in published for stage in RECIPES[paper].stages(RECIPES[paper].sizes[0], False)]
figure, axis = plt.subplots(figsize=(8.6, 0.32 * len(lines) + 1.1), layout="constrained")
for line, (paper, stage) in enumerate(lines):
    for column, part in enumerate(PARTS):
        here = part in counted[paper].parameters or part in stage.learning_rates
        rate = stage.learning_rates.get(part)
        color = lesson.VISION_COLOR if rate else "#d5dbe3"
        if here:
            axis.plot(column, line, "o", color=color, markersize=9)
        if rate:
            axis.text(column + 0.16, line, f"{rate:.0e}".replace("e-0", "e-"), va="center", fontsize=8)
axis.set_yticks(range(len(lines)), [f"{paper}: {stage.name}" for paper, stage in lines], fontsize=9)
axis.set_xticks(range(len(PARTS)), [part.replace("_", "\n") for part in PARTS], fontsize=9)
axis.set(xlim=(-0.4, len(PARTS) - 0.2), ylim=(len(lines) - 0.5, -0.5), title="orange trains, grey is frozen, nothing: no such part")
axis.xaxis.tick_top()
axis.tick_params(length=0)
plt.show()

# %% [markdown]
# Three schools: keep the language model and put something beside it (Lynx, BLIP-2, OpenFlamingo); train everything in the end
# (mPLUG-Owl2, LLaVA-Phi; LLaVA all but the tower); and, between them, mPLUG-Owl2's image branch, which trains while
# the words' own weights stand still. That the tower trains in *both* of its stages sets mPLUG-Owl2 apart too.
#
# ## 3. What a part costs when it is exchanged
#
# Because a bridge is a plain module, one can be put in another's place. LLaVA-Phi's tower and Phi-2, with the bridges of
# the other papers, full size:

# %%
with torch.device("meta"):
    phi = llava_phi.build(llava_phi.CONFIGS["full"])
    vision_width, width = phi.vision.config.width, phi.decoder.config.width
    bridges = {
        "MLP, its own": MLPProjector(vision_width, width),
        "Lynx's resampler, 32 latents": Resampler(vision_width, width, 32, 3, num_heads=8, head_width=64, ffn_width=4 * width),
        "mPLUG-Owl2's abstractor, 64 queries": Abstractor(vision_width, width, 64, 6, num_heads=16, ffn_width=2816),
    }
cells = []
for name, bridge in bridges.items():
    with torch.device("meta"):
        model = VLM(llava_phi.build(llava_phi.CONFIGS["full"]).vision, bridge, llava_phi.build(llava_phi.CONFIGS["full"]).decoder)
    tokens = model.num_image_tokens(336)
    size = sum(parameter.numel() for parameter in bridge.parameters())
    cells.append([name, f"{tokens}", table.short(size), table.short(table.language_flops(model, tokens))])
as_markdown(["bridge", "image tokens", "parameters of the bridge", "operations of Phi-2 per picture"], cells)

# %% [markdown]
# Fewer tokens are cheaper by an order of magnitude. Whether they are *enough* is a question of accuracy: lesson 04.
#
# ## 4. A recipe of your own
#
# A recipe is data: a function that builds the model, stages, sources, a template. The shortest one in the package
# exchanges a part of nano's and keeps the rest:

# %%
show_source(nano_resampler.build)

# %% [markdown]
# ### Exercise: the bridge that nobody published
#
# Write a bridge that averages the patches of every *row* of the picture into one image token, and maps it linearly to
# the language model's width. A bridge has `output_width`; `num_image_tokens(num_patches, num_frames=1)`, which the tokenizer
# asks *before* any picture is seen; and `forward(patches, num_frames=1, out=None)`, float[M, frames · N, vision_width] to
# float[M, image tokens, output_width]. Call the linear layer `linear`. Patches stand row by row, in a square grid, frame after frame.
# The check puts your bridge into a model and looks at one row at a time.

# %%
show_source(VLM.num_image_tokens)

# %%
class MyBridge(torch.nn.Module):
    ...  # your code


checks.attempt(checks.check_bridge, MyBridge)

# %% [markdown]
# With the solution, nano has 8 image tokens instead of 16, and everything else of the package works with it: here a
# batch is written, and the loss goes backward through all parts.

# %%
def nano_of_rows(size, vocab_size):
    """nano with a token per row of patches."""
    return nano.build(size, vocab_size, lambda width: solutions.RowBridge(width, width))


MINE = dataclasses.replace(nano.RECIPE, name="rows", build=nano_of_rows)
tokenizer = MINE.tokenizer()
model = MINE.build("tiny", tokenizer.vocab_size)
scenes = nano.sources()["scenes"](SEED)
batch = build_batch([scenes.record(n) for n in range(4)], MINE.template, tokenizer, model.num_image_tokens, 64, "crop", 128)
loss, trained = model.loss(batch)
(loss / trained).backward()
print(f"{model.num_image_tokens(64)} image tokens; loss {loss.item() / trained:.2f} nats, "
      f"an untrained guess among {tokenizer.vocab_size} tokens: {np.log(tokenizer.vocab_size):.2f}")
for part, parameters in model.parts().items():
    if parameters:
        norm = torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm()
        print(f"{part:<15} {sum(p.numel() for p in parameters.values()):>7,} parameters, gradient norm {norm:.3f}")

# %% [markdown]
# To train it, write the class and `RECIPE = dataclasses.replace(...)` into a file and run `python train.py my_recipe.py`.
#
# ## Solution of the exercise

# %%
show_source(solutions.RowBridge)
checks.check_bridge(solutions.RowBridge)

# %% [markdown]
# ## What this lesson did not show
#
# - Which choice is better. The papers train on different data with different budgets; no table of theirs isolates the architecture.
# - The data, which differ more than the models do: mixtures stand in the recipes, `python train.py lynx --print`.
# - The cost of text, of decoding and of training: only one picture passed through here, once.
