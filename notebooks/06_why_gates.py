# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Why gates?
#
# **Time**: 20 minutes to read, one minute to run on one core.
#
# **Reads**: `nanovlm/cross_attention.py`, `nanovlm/decoder.py`, `nanovlm/vlm.py`, `nanovlm/training/optimizer.py`,
# `nanovlm/training/stages.py`, `nanovlm/data/batching.py`, `nanovlm/data/templates.py`
#
# Flamingo (arXiv:2204.14198) teaches a frozen language model to see by putting new blocks *between* its layers. A new
# block is random, and a random block in front of every layer is the end of any language model. Its answer is two numbers
# per block, `tanh(0) = 0`. This lesson looks at what they do at step 0, lets them open, and then takes them away.

# %%
import copy
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from ablations import ablation_07
from support import checks, lesson, solutions
from support.lesson import show_source

from nanovlm.cross_attention import GatedCrossAttention
from nanovlm.data.batching import build_batch
from nanovlm.data.templates import NANO
from nanovlm.decoder import Decoder, DecoderLayer, LayerOptions
from nanovlm.training import optimizer
from nanovlm.training.stages import Stage
from nanovlm.vlm import VLM

SEED = 0
torch.manual_seed(SEED);

# %% [markdown]
# ## 1. Two gates in every block
#
# The words ask the picture (cross-attention, let in by tanh(a)), then think (a feed-forward, let in by tanh(b)):

# %%
show_source(GatedCrossAttention.forward)

# %% [markdown]
# Note what happens without a picture: nothing is looked at, but the feed-forward still works. A text that has no
# picture passes the second gate too, and that is where its words could be hurt.
#
# The language model is the one of lesson 07: a decoder of two layers that answers questions about scenes told in words.

# %%
LEARNED = ablation_07.Settings(language_steps=110, exam=100)
words_only, tokenizer, sources = ablation_07.learn_words(SEED, LEARNED)
FLAMINGO = replace(NANO, media_token="<pad>")  # one token of the row says "here is a picture"; padding has no other use in it


def to_batch(records, model):
    """Records as a batch: with gates the picture stands beside the row."""
    template = NANO if model.media_token is None else FLAMINGO
    return build_batch(records, template, tokenizer, model.num_image_tokens, ablation_07.IMAGE_SIZE, "crop", 64)


def with_gates(model, gate):
    """A copy of the model with a random gated block in front of every layer, all gates at `gate`; only the new parts train."""
    old = model.decoder
    layers = (LayerOptions(cross_attention=True),) * len(old.layers)
    decoder = Decoder(replace(old.config, layers=layers, cross_attention_width=old.config.width))
    missing, unexpected = decoder.load_state_dict(old.state_dict(), strict=False)
    assert not unexpected and all(".cross_attention." in name for name in missing)
    seeing = VLM(copy.deepcopy(model.vision), copy.deepcopy(model.bridge), decoder, media_token=tokenizer.pad)
    seeing.requires_grad_(False)
    for name, parameter in seeing.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, gate)
    for part in ("vision", "bridge", "cross_attention"):
        for parameter in seeing.parts()[part].values():
            parameter.requires_grad_(True)
    return seeing


words_exam = ablation_07.records(sources["words_exam"], 0, LEARNED.exam)
picture_exam = ablation_07.records(sources["pictures_exam"], 0, LEARNED.exam)
text_loss, text_right = ablation_07.examine(words_only, to_batch(words_exam, words_only))
print(f"words alone: {text_right:.0%} right, {text_loss:.3f} nats per token")

# %% [markdown]
# ## 2. Step 0
#
# How much of the language model is left when random blocks are let in through half-open gates? Three draws each:

# %%
OPEN, DRAWS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0), 3
shares = np.empty((len(OPEN), DRAWS))
for place, gate in enumerate(OPEN):
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        shares[place, draw] = 100 * ablation_07.examine(disturbed := with_gates(words_only, gate), to_batch(words_exam, disturbed))[1]
torch.manual_seed(SEED)
closed = with_gates(words_only, 0.0)
with torch.no_grad():
    same = torch.equal(closed(to_batch(words_exam, closed)), words_only(to_batch(words_exam, words_only)))

figure, axis = plt.subplots(figsize=(6.4, 3), layout="constrained")
axis.fill_between(np.tanh(OPEN), shares.min(1), shares.max(1), color=lesson.VISION_COLOR, alpha=0.35, linewidth=0)
axis.plot(np.tanh(OPEN), np.median(shares, axis=1), "o-", color=lesson.VISION_COLOR)
axis.set(xlabel="tanh(gate), of all gates", ylabel="text questions right (%)", ylim=(0, 105),
         title=f"untrained blocks: median and range of {DRAWS} draws, {LEARNED.exam} questions")  # fmt: skip
plt.show()
print(f"gates closed: all logits as before, bit by bit? {same}")

# %% [markdown]
# ### Exercise: does a closed gate stay closed?
#
# `tanh(0) = 0` hides the whole block. Then how does anything behind it ever learn? Work out the gradient: for
# `y = x + tanh(gate) * update` and the gradient `dy` of a loss with respect to y, return the pair
# (gradient of the gate, gradient of the update). `x`, `update`, `dy` are float[T, W], `gate` is a number in a float[1].

# %%
def gate_gradients(gate, update, dy):
    ...  # your code


checks.attempt(checks.check_gate_gradients, gate_gradients)

# %% [markdown]
# At 0 the second is zero and the first is not: the very first step moves the *gate alone*, and only then does the block get a
# gradient. So a closed gate opens exactly when what stands behind it, random as it is, already points somewhere useful.
#
# ## 3. Opening
#
# Now they learn to see. Tower, bridge and blocks train on questions about pictures, the language model is frozen, and not
# one text is shown. Along the way we look at the gates and ask the old questions, without pictures. Beside it the
# ablation: the same blocks, from the same numbers, with all gates fixed wide open, tanh(gate) = 1.

# %%
show_source(DecoderLayer.forward)

# %%
STEPS, BATCH, LOOK, SEEDS = 80, 32, 40, (0, 1, 2)
RATES = {"vision": 3e-3, "bridge": 3e-3, "cross_attention": 3e-3}


def gates(model):
    """tanh of every gate: float[layers, 2], attention and feed-forward."""
    blocks = [layer.cross_attention for layer in model.decoder.layers]
    return np.array([[block.attention_gate.tanh().item(), block.ffn_gate.tanh().item()] for block in blocks])


def learn_to_see(model, seed):
    """Train; returns per look (text loss, text right, pictures right) and the gates."""
    parts = {part: model.parts()[part] for part in RATES}
    stage = Stage("gates", "language", RATES, {"pictures": 1.0}, STEPS, BATCH, optimizer="muon", warmup_steps=8)
    trained = [p for parameters in parts.values() for p in parameters.values() if p.requires_grad]
    optimizers = optimizer.build(parts, stage)
    pictures = ablation_07.sources(seed)["pictures"]
    words, seen = to_batch(words_exam, model), to_batch(picture_exam, model)
    curve, opened = [], []
    for step in range(STEPS + 1):
        if step % LOOK == 0:
            curve.append((*ablation_07.examine(model, words), ablation_07.examine(model, seen)[1]))
            opened.append(gates(model))
        if step == STEPS:
            return np.array(curve), np.array(opened)
        optimizer.set_lr(optimizers, optimizer.lr_factor(step, stage))
        loss, count = model.loss(to_batch(ablation_07.records(pictures, step * BATCH, BATCH), model))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)


WIDE = 20.0  # tanh of it is 1 to the last bit
ways, opened = {"gates from 0": [], "gates fixed at 1": []}, []
for seed in SEEDS:
    for name, gate in zip(ways, (0.0, WIDE)):
        torch.manual_seed(seed)
        seeing = with_gates(words_only, gate)
        if gate:
            for parameter_name, parameter in seeing.named_parameters():
                if parameter_name.endswith("_gate"):
                    parameter.requires_grad_(False)
        curve, course = learn_to_see(seeing, seed)
        ways[name].append(curve)
        if not gate:
            opened.append(course)

# %%
moments = range(0, STEPS + 1, LOOK)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), layout="constrained")
for axis, column, scale, title in ((axes[0], 2, 100, "pictures right (%)"), (axes[1], 1, 100, "texts right (%)")):
    for (name, runs), color in zip(ways.items(), (lesson.TEXT_COLOR, lesson.VISION_COLOR)):
        values = scale * np.array(runs)[..., column]
        axis.fill_between(moments, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
        axis.plot(moments, np.median(values, axis=0), "o-", color=color, label=name, markersize=4)
    axis.set(xlabel=f"training (steps of {BATCH} questions)", ylim=(-3, 105), title=title)
axes[1].axhline(100 * text_right, color=lesson.GREY, linestyle=":")
axes[0].legend(frameon=False, fontsize=9)
for layer in range(2):
    for kind, (name, line) in enumerate((("attention", "-"), ("feed-forward", "--"))):
        course = np.abs(np.array(opened)[:, :, layer, kind])
        color = (lesson.TEXT_COLOR, "#3f8f5f")[layer]
        axes[2].plot(moments, np.median(course, axis=0), line, color=color, label=f"layer {layer}, {name}")
axes[2].set(xlabel=f"training (steps of {BATCH} questions)", ylim=(0, 0.11), title="|tanh(gate)|, median")
axes[2].legend(frameon=False, fontsize=8)
figure.suptitle(f"seeds {SEEDS[0]} to {SEEDS[-1]}, one frozen language model: medians and ranges")
plt.show()
for name, runs in ways.items():
    last = np.array(runs)[:, -1]
    print(f"{name:<17}: pictures {last[:, 2].min():.0%} to {last[:, 2].max():.0%}, texts {last[:, 1].min():.0%} to "
          f"{last[:, 1].max():.0%} ({text_right:.0%} before), text loss {last[:, 0].min():.2f} to {last[:, 0].max():.2f}")
print("gates at the end, per seed:", "; ".join(np.array2string(course[-1].ravel(), precision=2) for course in opened))

# %% [markdown]
# Both arms learn to see with the language model's own weights untouched to the last bit. Wide open, they learn faster, and
# the language model is lost all the same: it now gets hidden states that it has never met, with or without a picture,
# and nothing in the training asks it about texts. Behind gates that began at zero the texts stay within a few questions
# of where they were, since the gates have opened by a few per cent only. That is the bargain: a gate trades speed
# for a start from which nothing has to be relearned.
#
# How fast a gate opens is a matter of its learning rate. AdamW moves a single number by about the learning rate per step, so
# 80 steps of 0.003 cannot take it further than a quarter. Flamingo trained for hundreds of thousands.
#
# **Puzzle.** The feed-forward's gate works on texts without pictures too. Would it not be safer to skip the whole block
# where no picture has been shown? Think of the row *before* its first picture, then look again at what `media=None` does.
#
# ## Solution of the exercise

# %%
show_source(solutions.gate_gradients)
checks.check_gate_gradients(solutions.gate_gradients)

# %% [markdown]
# ## What this lesson did not show
#
# - Which way is better after long training. Eighty steps are where wide gates look good on pictures.
# - The rest of Flamingo: interleaved pictures (lesson 02 has its mask), shots in the prompt, its mixture of data.
# - Other cures for the same trouble: zero-initialised output layers (lesson 05's exercise is one), LayerScale, ReZero.
# - A language model large enough to be worth keeping. Ours knows one kind of question.
