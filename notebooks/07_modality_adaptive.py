# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 · Should images share keys and values?
#
# **Time**: 25 minutes to read, half a minute to run on one core.
#
# **Reads**: `nanovlm/modality_adaptive.py`, `nanovlm/decoder.py`, `nanovlm/vlm.py`
#
# In a plain decoder an image token and a word go through the same norms and the same key and value projections.
# mPLUG-Owl2 (arXiv:2311.04257, Sec. 3.3) gives each modality its own, and shares the rest. This lesson reads the
# equations next to the code, draws the routing, and asks what is gained: does a language model that learns to see
# forget its words?

# %%
import inspect

import matplotlib.pyplot as plt
import numpy as np
import torch
from ablations import ablation_07
from IPython.display import Markdown
from support import checks, lesson, solutions
from support.lesson import show_source

from nanovlm.decoder import DecoderAttention, DecoderLayer
from nanovlm.modality_adaptive import ModalityAdaptive, route
from nanovlm.vlm import IGNORE, IMAGE_TOKEN

SEED = 0
torch.manual_seed(SEED);

# %% [markdown]
# ## 1. The equations, beside the code that computes them
#
# $H$ are the hidden states of a row of words and image tokens, $M$ says for each which it is. Everything rests on
# one operation: keep the tokens of modality $m$, and put zeros elsewhere (Eq. 3):
#
# $$\phi(H, M, m) = H \odot \mathbb{1}_{\{M = m\}}$$
#
# The paper counts vision as 0 and text as 1. The released code, and we, count **text as 0 and vision as 1**, so
# below the letters V and T stand in for the numbers. The lines on the right are looked up in the modules' source
# as this cell runs.

# %%
BESIDE = [
    (r"$\tilde H = LN_V(\phi(H, M, V)) + LN_T(\phi(H, M, T))$ (4)", DecoderLayer.forward, "self.norm_1"),
    (r"$H^Q = \tilde H\, W^Q$ (5): shared", DecoderAttention.forward, "self.q(x)"),
    (r"$H^K = \phi(\tilde H, M, V) W^{K_V} + \phi(\tilde H, M, T) W^{K_T}$ (6)", DecoderAttention.keys_and_values, "split(self.k"),
    (r"$H^V = \phi(\tilde H, M, V) W^{V_V} + \phi(\tilde H, M, T) W^{V_T}$ (7)", DecoderAttention.keys_and_values, "split(self.v"),
    (r"$C = \mathrm{softmax}(H^Q {H^K}^\top / \sqrt{d})\, H^V$ (8)", DecoderAttention.forward, "seen = attention("),
    (r"the feed-forward behind it: shared, but its norm is split too", DecoderLayer.forward, "self.ffn(split("),
]


def line_of(function, fragment):
    """The one line of a function's source that holds a fragment, without its comment."""
    (line,) = [line for line in inspect.getsource(function).splitlines() if fragment in line]
    return line.split("#")[0].strip()


Markdown("| equation | code |\n|---|---|\n" + "\n".join(
    f"| {equation} | `{line_of(function, fragment)}` |" for equation, function, fragment in BESIDE
))  # fmt: skip

# %% [markdown]
# `split` binds a layer to the batch: a plain layer stays as it is, a `ModalityAdaptive` one is told where each
# modality stands. Such a layer has two forms. `as_written` runs both branches over *all* tokens and lets each
# token keep its own; `routed` picks the tokens out first. (`in_place` is for GPUs: it moves no token at all.)

# %%
show_source(ModalityAdaptive)

# %% [markdown]
# One subtlety. Read literally, Eq. 4 puts zeros *into* the norms. An RMSNorm of zeros is zero, so the sum is
# right. But the LayerNorm that the paper writes has a bias, and a LayerNorm of zeros *is* its bias: each token
# would receive the bias of the other modality as a present. `as_written` therefore selects behind the branches,
# not before. You will meet this in the exercise.

# %% [markdown]
# ## 2. The routing, as a picture
#
# `route` finds the tokens of each modality once per batch; every layer uses the result. Two rows, one picture in
# each:

# %%
show_source(route)

# %%
modality = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]])
routing = route(modality)


def draw_tokens(axis, numbers, columns, height, colors):
    """A line of numbered squares: token `numbers[i]` at column `columns[i]`."""
    for number, column in zip(numbers, columns):
        axis.add_patch(plt.Rectangle((column - 0.44, height - 0.3), 0.88, 0.6, color=colors[number]))
        axis.text(column, height, str(number), ha="center", va="center", fontsize=9, color="white")


flat = modality.flatten().tolist()
colors = [lesson.VISION_COLOR if m else lesson.TEXT_COLOR for m in flat]
start = [n + 1.5 * (n >= 8) for n in range(16)]  # a gap between the rows
text, vision = routing.text.tolist(), routing.vision.tolist()
gathered = {number: place for place, number in enumerate(text)}
gathered |= {number: place + 9.5 for place, number in enumerate(vision)}
figure, axis = plt.subplots(figsize=(9.4, 4.2))
draw_tokens(axis, range(16), start, 4, colors)
draw_tokens(axis, range(16), [gathered[n] for n in range(16)], 2.4, colors)
draw_tokens(axis, range(16), start, 0, colors)
for number in range(16):
    axis.plot([start[number], gathered[number]], [3.7, 2.7], color=colors[number], linewidth=0.9)
    axis.plot([gathered[number], start[number]], [1.1, 0.3], color=colors[number], linewidth=0.9)
for left, name, color in ((-0.5, "text branch", lesson.TEXT_COLOR), (9.0, "vision branch", lesson.VISION_COLOR)):
    axis.add_patch(plt.Rectangle((left, 1.1), 8, 0.9, fill=False, edgecolor=color, linewidth=2))
    axis.text(left + 4, 1.55, f"{name}: own norm, $W_K$, $W_V$", ha="center", va="center", color=color)
for height, words in ((4, "hidden\nstates"), (2.4, "gather"), (0, "put back")):
    axis.text(-1.2, height, words, ha="right", va="center")
axis.text(3.5, 4.45, "row 0", ha="center")
axis.text(13, 4.45, "row 1", ha="center")
axis.set(xlim=(-3, 18), ylim=(-0.5, 4.8))
axis.axis("off")
plt.show()

# %% [markdown]
# ## 3. Both forms are equal, and one is cheaper
#
# Random weights and biases, so that no mistake can hide behind a zero: outputs and gradients, and how many tokens
# pass through a branch.

# %%
def try_form(form, layer, x):
    """Output, gradients of input and weights, and the number of tokens that met a branch."""
    passed = []
    hooks = [branch.register_forward_hook(lambda _, inputs, __: passed.append(inputs[0].shape[:-1].numel()))
             for branch in (layer.text, layer.vision)]  # fmt: skip
    x = x.clone().requires_grad_()
    out = getattr(layer, form)(x, routing)
    gradients = torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])
    for hook in hooks:
        hook.remove()
    return [out, *gradients], sum(passed)


x = torch.randn(2, 8, 64)
for name, layer in (
    ("LayerNorm", ModalityAdaptive(torch.nn.LayerNorm(64), torch.nn.LayerNorm(64))),
    ("W_K", ModalityAdaptive(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False))),
):
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    (written, many), (routed, few) = try_form("as_written", layer, x), try_form("routed", layer, x)
    difference = max((a - b).abs().max().item() for a, b in zip(written, routed))
    print(f"{name:<9}: largest difference {difference:.1e}; {len(flat)} tokens, branches run on {many} as written, {few} routed")

# %% [markdown]
# ### Exercise: route by hand
#
# Given x float[B, T, W], modality int[B, T] (0 = text, 1 = vision) and the two branches, return what the split
# layer returns: every token through its own branch. The check tries it with two linear layers, then with two
# LayerNorms that have biases.

# %%
def route_by_hand(x, modality, text, vision):
    ...  # your code


checks.attempt(checks.check_route, route_by_hand)

# %% [markdown]
# ## 4. Learning to see without forgetting
#
# The image copies of a layer start as copies of the text's (the paper does the same). So on the first day the
# split decoder *is* the plain one; only training takes them apart. Here is that step:

# %%
show_source(ablation_07.separate)

# %% [markdown]
# Now the experiment, small enough to run here. It is a caricature of the papers' first stage: pictures alone, no
# text beside them.
#
# 1. A decoder of two layers learns to answer questions about scenes told *in words*: "a small red circle at the
#    top left. what color is the circle?"
# 2. A fresh ViT and bridge are put before it, and it learns to answer such questions about *pictures*. What
#    trains in the decoder is only what image tokens meet in a split layer, norms, keys and values: once the
#    shared ones (**shared**), once the image copies (**separate**). Both train equally many numbers.
# 3. The words are examined again.

# %%
SHORT = ablation_07.Settings(language_steps=100, picture_steps=80, exam=100)
model, tokenizer, sources = ablation_07.learn_words(SEED, SHORT)
for kind in ("words_exam", "pictures_exam"):
    (question, truth) = sources[kind].record(3).conversations[0]
    print(f"{kind:<14}: {question.text} -> {truth.text}")
live = {}
print(f"\n{'':<37}{'trained':>9}{'words right':>24}{'pictures right':>16}")
for arm in ablation_07.ARMS[:2]:
    live[arm], result = ablation_07.learn_to_see(model, arm, tokenizer, sources, SHORT, SEED)
    words = f"{result.text_right_before:.0%} before, {result.text_right_after:.0%} after"
    print(f"{arm.name:<37}{result.trained:>9,}{words:>24}{result.picture_right:>16.0%}")

# %% [markdown]
# That the separate arm keeps its words is no luck: a row without pictures never meets an image copy, so not one
# bit of its computation has changed. Check it yourself:

# %%
words = ablation_07.rows(ablation_07.records(sources["words_exam"], 0, 20), model, tokenizer)
with torch.no_grad():
    for arm, seeing in live.items():
        print(f"{arm.name:<37}: logits of words bit-identical to before? {torch.equal(model(words), seeing(words))}")

# %% [markdown]
# **Puzzle.** One of the image copies did not change at all in training. Which one, and why? Think, then run:

# %%
separate_arm = ablation_07.ARMS[1]
for name, parameter in live[separate_arm].parts()["vision_branch"].items():
    start = model.state_dict()[name.replace(".vision.", ".")]
    print(f"{name:<42}", "moved" if not torch.equal(parameter, start) else "NOT MOVED")

# %% [markdown]
# The second norm of the last layer. Behind it an image token's state is final, and nobody reads it: answers are
# predicted at words, and no later layer is there to attend. (The published models carry this copy along all the
# same.)

# %% [markdown]
# ## 5. Attention on images and words, layer by layer
#
# Where does the answer come from? We take the position that predicts the answer's first token and add up its
# attention over the image tokens, the first word `<s>`, and all other words. `out`, a dict passed along with the
# batch, receives the weights of every layer; the model keeps nothing.

# %%
def attention_by_layer(model, batch):
    """Shares of the answering position's attention: float[num_layers, 3], on image tokens, on <s>, on other words."""
    out = {}
    with torch.no_grad():
        model(batch, out=out)
    answering = (batch.labels != IGNORE).float().argmax(1) - 1  # the position before the first trained token
    is_image, is_bos = batch.ids == IMAGE_TOKEN, batch.ids == tokenizer.bos
    shares = []
    for weights in out["attention"]:  # B H T S
        seen = weights.mean(1)[torch.arange(len(answering)), answering]  # B S
        shares.append([(seen * group).sum(1).mean().item() for group in (is_image, is_bos, ~is_image & ~is_bos)])
    return np.array(shares)


GROUPS = {"image tokens": lesson.VISION_COLOR, "<s>": lesson.GREY, "other words": lesson.TEXT_COLOR}
pictures = ablation_07.rows(ablation_07.records(sources["pictures_exam"], 0, 100), model, tokenizer)
figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.2), sharey=True)
for axis, (arm, seeing) in zip(axes, live.items()):
    shares = 100 * attention_by_layer(seeing, pictures)
    bottom = np.zeros(len(shares))
    for group, (name, color) in enumerate(GROUPS.items()):
        bars = axis.bar(range(len(shares)), shares[:, group], 0.55, bottom, color=color, label=name)
        axis.bar_label(bars, fmt="%.0f", label_type="center", color="white")
        bottom += shares[:, group]
    axis.set(title=arm.name.split(",")[0], xlabel="layer", xticks=range(len(shares)), xlim=(-0.6, len(shares) - 0.4))
axes[0].set_ylabel("attention of the answering\nposition (%)")
axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
figure.suptitle(f"100 held-out pictures, mean over heads, seed {SEED}")
figure.tight_layout()
plt.show()

# %% [markdown]
# Attention is not explanation: a token may be looked at and contribute little. But a model whose answering
# position gave images nothing in any layer could only get at them by way of other words.

# %% [markdown]
# ## 6. Three seeds, four ways
#
# The pair above is one seed and short. The committed table `ablation_07.csv` repeats it over three seeds, longer,
# and adds two arms in which the *whole* decoder trains on pictures. Dots are seeds, bars their range.

# %%
note, results = ablation_07.read()


def seeds_of(arm, field):
    """One value per seed, in %."""
    return [100 * getattr(result, field) for result in results if result.arm == arm.name]


PANELS = (
    ("words: before (hollow) and after", {"text_right_before": 0.2, "text_right_after": -0.1}),
    ("pictures: after", {"picture_right": 0.0}),
)
figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.4), sharey=True)
for axis, (title, fields) in zip(axes, PANELS):
    for line, arm in enumerate(ablation_07.ARMS):
        for field, offset in fields.items():
            before = field.endswith("before")
            color = lesson.GREY if before else lesson.VISION_COLOR if arm.separate else lesson.TEXT_COLOR
            values = seeds_of(arm, field)
            axis.plot((min(values), max(values)), (line - offset,) * 2, color=color, linewidth=5, alpha=0.4)
            style = dict(fillstyle="none") if before else {}
            axis.plot(values, [line - offset] * len(values), "o", color=color, **style)
    axis.set(title=title, xlabel="right (% of 200 questions)", xlim=(0, 103), ylim=(3.6, -0.6))
axes[0].set_yticks(range(4), [arm.name.replace(", ", ",\n") for arm in ablation_07.ARMS])
figure.tight_layout()
plt.show()

print(note)
for arm in ablation_07.ARMS:
    spans = (f"{min(values):.1f} to {max(values):.1f}%" for values in (
        seeds_of(arm, field) for field in ("text_right_before", "text_right_after", "picture_right")))  # fmt: skip
    print("{:<37} words {}, then {}; pictures {}".format(arm.name, *spans))

# %% [markdown]
# What these ranges allow us to say, and no more:
#
# - **Only norms, keys and values train.** With shared ones the words suffer in every seed; with separate ones
#   they do not change at all, as they cannot. On pictures the ranges of the two overlap: keeping the words cost
#   nothing that three seeds could show, and brought nothing either.
# - **The whole decoder trains, on pictures alone.** The words are lost in every seed, shared or separate.
#   Queries, output projections, feed-forwards and embeddings are still common to both modalities, and they moved.
#   Separate keys and values alone are no insurance against that.
#
# So the answer to the title depends on what else may move. In mPLUG-Owl2 the split layers learn first while the
# language model stays frozen, which is our second line; then everything trains, with text instructions mixed in.

# %% [markdown]
# ## Solution of the exercise

# %%
show_source(solutions.route_by_hand)
checks.check_route(solutions.route_by_hand)

# %% [markdown]
# ## What this lesson did not show
#
# - The paper's own remedy for forgetting in its second stage, where the whole model trains: text instructions
#   mixed in with the pictures. Our arms saw pictures alone, which is the hardest case for the words.
# - Whether separate keys and values help *seeing* in a large model. mPLUG-Owl2's Table 5 reports gains at 7
#   billion parameters; two layers and three seeds neither confirm nor contradict that.
# - The cost in memory: every layer carries a second pair of norms, keys and values.
# - How fast the routing is on a GPU, where picking tokens out has a price of its own.
