# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · How do adapters steer a frozen language model?
#
# **Time**: 25 minutes to read, one minute to run on one core.
#
# **Reads**: `nanovlm/adapter.py`, `nanovlm/lora.py`, `nanovlm/decoder.py`, `nanovlm/vlm.py`,
# `nanovlm/training/optimizer.py`, `nanovlm/training/stages.py`, `nanovlm/recipes/lynx.py`,
# `nanovlm/recipes/lynx_mini_tests.py`, `nanovlm/recipes/nano_tests.py`, `nanovlm/data/records.py`,
# `nanovlm/data/scene_questions.py`
#
# Lynx (arXiv:2307.02469) does not touch its language model: 6.7 billion numbers stay frozen, and small networks
# between the layers learn to read pictures. This lesson counts what trains and what does not, looks at what such
# an *adapter* does to a model before it has learned anything, and then teaches a frozen decoder a new habit, beside
# LoRA with as many numbers to learn.

# %%
import copy
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from ablations import ablation_07
from IPython.display import Markdown
from support import checks, lesson, solutions
from support.lesson import show_source

from nanovlm import lora, recipes
from nanovlm.adapter import Adapter
from nanovlm.data.records import Record, Turn
from nanovlm.data.scene_questions import Scenes
from nanovlm.decoder import Decoder, LayerOptions
from nanovlm.lora import LoRALinear
from nanovlm.recipes import lynx, lynx_mini_tests, nano_tests
from nanovlm.training import optimizer
from nanovlm.training.stages import Stage
from nanovlm.vlm import IGNORE

SEED = 0
torch.manual_seed(SEED);

# %% [markdown]
# ## 1. Who trains, and who does not
#
# Lynx at its real size. torch's `meta` device gives every weight a shape and no memory, which is all we need to
# count. The last three columns are the paper's stages (Table 8), as the recipe states them: a part that has no
# learning rate is frozen.

# %%
with torch.device("meta"):
    full = lynx.build(lynx.CONFIGS["full"])
sizes = {part: sum(p.numel() for p in parameters.values()) for part, parameters in full.parts().items() if parameters}
head = "".join(f" | {stage.name}" for stage in lynx.STAGES)
table = [f"| part | parameters{head} |", "|---|---:" + "|---" * len(lynx.STAGES) + "|"]
for part, size in sizes.items():
    marks = "".join(f" | {'**trains**' if part in stage.learning_rates else 'frozen'}" for stage in lynx.STAGES)
    table.append(f"| {part} | {size:,}{marks} |")
shares = (sum(sizes[part] for part in stage.learning_rates) / sum(sizes.values()) for stage in lynx.STAGES)
table.append(f"| **all** | {sum(sizes.values()):,}" + "".join(f" | {share:.1%}" for share in shares) + " |")
Markdown("\n".join(table))

# %% [markdown]
# And where are they? The paper says "after every M blocks", M = 2. In the code as released that means after layers
# 0, 2, 4, … 30, so the first adapter stands behind the very first layer and none behind the last. In this project
# the list is written down layer by layer; here it is, read back from the model:

# %%
carrying = [index for index, options in enumerate(full.decoder.config.layers) if options.adapter_width]
figure, axis = plt.subplots(figsize=(9.4, 1.5))
for index in range(len(full.decoder.layers)):
    axis.add_patch(plt.Rectangle((index, 0), 0.72, 1, color=lesson.TEXT_COLOR))
    axis.text(index + 0.36, 0.5, str(index), ha="center", va="center", color="white", fontsize=8)
    if index in carrying:
        axis.add_patch(plt.Rectangle((index + 0.74, 0.1), 0.24, 0.8, color=lesson.VISION_COLOR))
axis.set(xlim=(-0.2, 32.2), ylim=(-0.1, 1.1))
axis.set_title("Lynx: 32 frozen layers (blue) and the adapters behind some of them (orange)")
axis.axis("off")
plt.show()
one = sum(parameter.numel() for parameter in full.decoder.layers[0].adapter.parameters())
print(f"adapters behind layers {', '.join(map(str, carrying))}: {len(carrying)} of {one:,} parameters each")

# %% [markdown]
# ## 2. What an adapter is
#
# It gets the whole output of a layer, narrows it to half its width, bends it once, widens it, and *adds* the result:

# %%
show_source(Adapter)

# %% [markdown]
# If what it adds were zero at the start, the model would begin as the language model it was. Lynx's released code
# starts both matrices at N(0, 0.02²) instead, and a scale of 1. How much is that? The input is normalised, so its
# size does not matter, but the *width* does: a wider adapter sums over more numbers. We measure what fresh adapters
# add to random hidden states.

# %%
def size_of_update(width, std=0.02, seed=SEED):
    """Root mean square of what a fresh adapter adds, half as wide inside as outside."""
    torch.manual_seed(seed)
    adapter = Adapter(width, width // 2)
    with torch.no_grad():
        for linear in (adapter.down, adapter.up):
            linear.weight.normal_(std=std)
        hidden = torch.randn(1, 16, width)
        return (adapter(hidden) - hidden).square().mean().sqrt().item()


for width in (64, 256, 1024, 4096):
    print(f"width {width:>5}: adds {size_of_update(width):.3f} per channel at N(0, 0.02²)")

# %% [markdown]
# At Lynx's width the same 0.02 adds dozens of times more than at our width of 64. Whether that much disturbs
# Vicuna depends on how large Vicuna's hidden states are, which we cannot measure here. What we can do is disturb a
# small model that has learned something.

# %% [markdown]
# ## 3. The shift at step 0
#
# The model: the decoder of lesson 07, which learned to answer questions about scenes told in words. It has two
# layers, and we put an adapter behind both (Lynx's rule would give it just one).

# %%
LEARNED = ablation_07.Settings(language_steps=110, exam=150)
model, tokenizer, sources = ablation_07.learn_words(SEED, LEARNED)
model.requires_grad_(False)
old_exam = ablation_07.rows(ablation_07.records(sources["words_exam"], 0, LEARNED.exam), model, tokenizer)
for number in range(2):
    question, answer = sources["words_exam"].record(number).conversations[0]
    print(f"{question.text} -> {answer.text}")
print(f"the old task, new scenes: {ablation_07.examine(model, old_exam)[1]:.0%} right")


# %%
def with_adapters(model, adapter_width, std=0.02):
    """A copy of the model with a fresh adapter behind every layer; all old weights frozen."""
    steered = copy.deepcopy(model)
    layers = (LayerOptions(adapter_width=adapter_width),) * len(model.decoder.layers)
    steered.decoder = Decoder(replace(model.decoder.config, layers=layers))
    missing, unexpected = steered.decoder.load_state_dict(model.decoder.state_dict(), strict=False)
    assert not unexpected and all(".adapter." in name for name in missing)
    steered.requires_grad_(False)
    for parameter in steered.parts()["adapters"].values():
        parameter.requires_grad_(True)
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=std)
    return steered


@torch.no_grad()
def shift(one, other, batch):
    """Where answers are predicted: (root mean square shift of the logits, Kullback-Leibler divergence in nats)."""
    predicts = batch.labels[:, 1:] != IGNORE
    before, after = (each(batch)[:, :-1][predicts] for each in (one, other))
    divergence = F.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean")
    return (after - before).square().mean().sqrt().item(), max(divergence.item(), 0.0)  # rounding goes below zero


STDS, DRAWS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32), 5
shifts = np.empty((len(STDS), DRAWS, 3))  # logit shift, divergence, share right
for place, std in enumerate(STDS):
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        disturbed = with_adapters(model, 32, std)
        shifts[place, draw] = *shift(model, disturbed, old_exam), ablation_07.examine(disturbed, old_exam)[1]
alike = min(np.geomspace(0.02, 0.6, 60), key=lambda std: abs(size_of_update(64, std) - size_of_update(4096)))

figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.6))
for axis, values, name in (
    (axes[0], shifts[..., 0], "shift of the logits\n(root mean square)"),
    (axes[1], 100 * shifts[..., 2], "old task right (%)"),
):
    axis.fill_between(STDS, values.min(1), values.max(1), color=lesson.VISION_COLOR, alpha=0.35, linewidth=0)
    axis.plot(STDS, np.median(values, axis=1), "o-", color=lesson.VISION_COLOR)
    axis.axvline(0.02, color=lesson.GREY, linestyle=":")
    axis.axvline(alike, color=lesson.GREY, linestyle="--")
    axis.set(xscale="log", xlabel="adapters start at N(0, std²): std", ylabel=name)
axes[0].set_yscale("log")
axes[1].set_ylim(0, 105)
axes[1].text(0.021, 4, "Lynx's\n0.02", fontsize=9)
axes[1].text(alike * 0.93, 40, "adds as much\nas Lynx's does\nat width 4096", fontsize=9, ha="right")
figure.suptitle(f"untrained adapters: median and range of {DRAWS} draws, 150 questions")
figure.tight_layout()
plt.show()
for std, values in zip(STDS, shifts):
    print(f"std {std:<6}: logits shift by {values[:, 0].min():.3f} to {values[:, 0].max():.3f}, KL {values[:, 1].min():.4f} to "
          f"{values[:, 1].max():.4f} nats, {values[:, 2].min():.0%} to {values[:, 2].max():.0%} right")  # fmt: skip

# %% [markdown]
# Not zero anywhere, since neither matrix of an adapter starts at zero. At our width 0.02 is a whisper; adapters that
# *add* as much per channel as Lynx's do at its width (dashed) cost our small model part of what it knew, before the
# first step. That comparison carries over the size of the update and nothing else: Vicuna's hidden states are not
# ours.

# %% [markdown]
# ### Exercise: make it zero
#
# Write `silence(adapter)`: change an `Adapter` in place so that it adds exactly nothing, whatever its weights and
# biases were, *and can still learn*. The check compares bit by bit, then trains for a few steps and looks whether
# both matrices have moved. Mind that second half: it is easy to silence an adapter forever.

# %%
def silence(adapter):
    ...  # your code


checks.attempt(checks.check_silence, silence)

# %% [markdown]
# With the solution (at the end of the lesson), the shift is gone, exactly:

# %%
torch.manual_seed(SEED)
silenced = with_adapters(model, 32)
for layer in silenced.decoder.layers:
    solutions.silence(layer.adapter)
print("shift of the logits, divergence:", shift(model, silenced, old_exam))

# %% [markdown]
# ## 4. A new habit for a frozen model
#
# The new task: the same scenes, but left and right change places, as in a mirror. The old model is right only where
# the answer has no side (top, center, bottom). We ask for places alone:

# %%
def places(source, number, swap):
    """Records of a source of texts that ask for a place; words of the answer are swapped: {word: other}."""
    found, n = [], 0
    while len(found) < number:
        record, n = source.record(n), n + 1
        if record.kinds == ("described_place",):
            question, answer = record.conversations[0]
            turned = Turn("assistant", (" ".join(swap.get(word, word) for word in answer.text.split()),))
            found.append(Record(record.id, (), ((question, turned),), record.kinds))
    return found


STEPS, BATCH, SEEDS, LOOK = 40, 32, (0, 1, 2), 5
MIRROR = {"left": "right", "right": "left"}
practice = {seed: places(ablation_07.sources(100 + seed)["words"], STEPS * BATCH, MIRROR) for seed in SEEDS}
new_exam, place_exam = (
    ablation_07.rows(places(sources["words_exam"], 150, swap), model, tokenizer) for swap in (MIRROR, {})
)
others = [record for record in ablation_07.records(sources["words_exam"], 0, 400) if record.kinds != ("described_place",)]
other_exam = ablation_07.rows(others[:150], model, tokenizer)
question, answer = practice[0][0].conversations[0]
print(f"{question.text} -> {answer.text}")
OLD = {"places as they are": place_exam, "all other questions": other_exam}
print(f"the old model: {ablation_07.examine(model, new_exam)[1]:.0%} right in the mirror, " + ", ".join(
    f"{name} {ablation_07.examine(model, batch)[1]:.0%}" for name, batch in OLD.items()
))  # fmt: skip

# %% [markdown]
# Five ways to learn it, four of them with the whole decoder frozen:
#
# - **adapters**, 32 channels inside, half the width as in Lynx, from Lynx's start;
# - **adapters, loud**: as above, but beginning with updates as large as Lynx's at its own width;
# - **adapters, silent**: beginning behind `silence`;
# - **LoRA** (arXiv:2106.09685): each linear layer gets a thin product `B A` beside it, which is zero at first.
#   Rank 4 on all projections has as many parameters as the adapters, to a per cent;
# - **whole decoder**: all layers train, at a fifth of the others' learning rate.

# %%
show_source(LoRALinear.forward)

# %%
def with_lora(model, rank):
    """A copy of the model with a low-rank update at every projection of its decoder; all old weights frozen."""
    updated = copy.deepcopy(model)
    lora.add(updated, rank, alpha=rank)
    return updated


def with_silent_adapters(model, adapter_width):
    """As with_adapters, but adding nothing at first."""
    steered = with_adapters(model, adapter_width)
    for layer in steered.decoder.layers:
        solutions.silence(layer.adapter)
    return steered


def learn(learner, part, records, rate):
    """Train one part on records; returns the shares right on the new task, at first and after every LOOK steps."""
    parts = learner.parts()
    stage = Stage("mirror", "language", {part: rate}, {"mirrored": 1.0}, STEPS, BATCH, warmup_steps=4)
    for parameter in parts[part].values():
        parameter.requires_grad_(True)
    optimizers = optimizer.build(parts, stage)
    curve = [ablation_07.examine(learner, new_exam)[1]]
    for step in range(STEPS):
        optimizer.set_lr(optimizers, optimizer.lr_factor(step, stage))
        loss, count = learner.loss(ablation_07.rows(records[step * BATCH : (step + 1) * BATCH], learner, tokenizer))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(list(parts[part].values()), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)
        if (step + 1) % LOOK == 0:
            curve.append(ablation_07.examine(learner, new_exam)[1])
    return curve


WAYS = {  # name: (model -> learner, the part that trains, peak learning rate, colour)
    "adapters": (lambda: with_adapters(model, 32), "adapters", 1e-2, lesson.VISION_COLOR),
    "adapters, loud": (lambda: with_adapters(model, 32, alike), "adapters", 1e-2, "#b5443a"),
    "adapters, silent": (lambda: with_silent_adapters(model, 32), "adapters", 1e-2, "#7a4a9e"),
    "LoRA": (lambda: with_lora(model, 4), "lora", 1e-2, "#3f8f5f"),
    "whole decoder": (lambda: copy.deepcopy(model), "language_model", 2e-3, lesson.GREY),
}
curves, learners = {name: [] for name in WAYS}, {}
for name, (make, part, rate, _) in WAYS.items():
    for seed in SEEDS:
        torch.manual_seed(seed)
        learner = make()
        curves[name].append(learn(learner, part, practice[seed], rate))
        learners[name, seed] = learner
    print(f"{name:<19}: {sum(p.numel() for p in learner.parts()[part].values()):>7,} parameters train")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained", width_ratios=(1.2, 1))
for (name, (_, _, _, color)), runs in zip(WAYS.items(), curves.values()):
    runs = 100 * np.array(runs)
    moments = range(0, STEPS + 1, LOOK)
    axes[0].fill_between(moments, runs.min(0), runs.max(0), color=color, alpha=0.2, linewidth=0)
    axes[0].plot(moments, np.median(runs, axis=0), "o-", color=color, label=name, markersize=4)
axes[0].set(xlabel=f"training (steps of {BATCH} questions)", ylabel="right (%)", ylim=(0, 105))
axes[0].set_title("the new task: places in the mirror")
axes[0].legend(fontsize=9, loc="lower right", frameon=False)
before, kept = {}, {}
for (kind, batch), offset, filled in zip(OLD.items(), (0.15, -0.15), ("none", "full")):
    before[kind] = 100 * ablation_07.examine(model, batch)[1]
    kept[kind] = {name: [100 * ablation_07.examine(learners[name, seed], batch)[1] for seed in SEEDS] for name in WAYS}
    for line, (name, values) in enumerate(kept[kind].items()):
        height, color = line + offset, WAYS[name][3]
        axes[1].plot((min(values), max(values)), (height, height), color=color, linewidth=5, alpha=0.4)
        axes[1].plot(values, [height] * len(values), "o", color=color, fillstyle=filled)
axes[1].set(xlabel="right (%)", xlim=(-3, 103), ylim=(4.6, -0.6))
axes[1].set_title("old tasks: places (hollow),\nother questions (filled)")
axes[1].set_yticks(range(len(WAYS)), WAYS)
figure.suptitle(f"seeds {SEEDS[0]} to {SEEDS[-1]}, one frozen decoder: medians and ranges")
plt.show()
print("before: " + ", ".join(f"{kind} {share:.0f}%" for kind, share in before.items()))
for name, runs in curves.items():
    spans = {"mirrored": [100 * run[-1] for run in runs], **{kind: kept[kind][name] for kind in kept}}
    words = (f"{kind} {min(values):.0f} to {max(values):.0f}%" for kind, values in spans.items())
    print(f"{name:<17}: " + ", ".join(words))

# %% [markdown]
# ## 5. Frozen means bit-identical
#
# Not almost: every weight of the old decoder is the same to the last bit, and so is the old model's function once
# the additions are taken off.

# %%
def unchanged(learner):
    """Number of the old model's tensors that are bit-identical in a learner, of how many: (int, int)."""
    now, then = learner.state_dict(), model.state_dict()
    return sum(torch.equal(now[name], then[name]) for name in then), len(then)


def taken_off(learner):
    """The plain model again, from a learner's own weights."""
    plain = copy.deepcopy(model)
    plain.load_state_dict({name: learner.state_dict()[name] for name in model.state_dict()})
    return plain


for name in WAYS:
    learner = learners[name, SEED]
    with torch.no_grad():
        steered, off = (torch.equal(each(old_exam), model(old_exam)) for each in (learner, taken_off(learner)))
    same, number = unchanged(learner)
    print(f"{name:<19}: {same:>2} of {number} old tensors bit-identical; logits as before? with what it learned: "
          f"{steered}, without: {off}")  # fmt: skip

# %% [markdown]
# Two things are easily confused here. *Frozen weights* are kept, and with adapters or LoRA the old model is always
# one step away. *Behaviour* is not: an adapter acts on every token of every row. The steered model mirrors places
# whether it should or not, for nothing in the question tells the two tasks apart; what becomes of questions it did
# not practise is the filled dots, and nothing but luck and a short training protects them. The separate keys and
# values of lesson 07 are different in just this point: words never meet them.
#
# On the comparison: the ranges above are what three seeds of one easy task say, with AdamW and one learning rate for
# each way. On the new task all four frozen ways end at the same height, so it cannot rank them, adapters against LoRA
# as little as one start against another; how fast they got there depends on the learning rate, which we did not
# tune. The filled dots hang on the one decoder that all began from: with a version of the package that rounds
# differently, and so another decoder, nearly all of them stayed at 91%. Do not rank anything by them.
#
# **Puzzle.** LoRA's update can be merged into the weights, so that the trained model is as fast as before. Can an
# adapter be merged? Think before you run:

# %%
merged = copy.deepcopy(learners["LoRA", SEED])
lora.merge(merged)
print("LoRA, merged: largest change of a logit {:.1e}; modules left over: {}".format(
    (merged(old_exam) - learners["LoRA", SEED](old_exam)).abs().max().item(),
    sum(isinstance(module, LoRALinear) for module in merged.modules()),
))  # fmt: skip

# %% [markdown]
# An adapter cannot: between its two matrices stands a SiLU, so no single matrix does the same. It stays a part of
# the model, with its cost at every token: for Lynx, two matrices of 4096 × 2048 behind every second layer.

# %% [markdown]
# ## 6. A real language model
#
# So far the frozen model was ours and knew one thing. The recipe `lynx_mini` freezes SmolLM2-135M-Instruct, which
# answers questions about anything, and puts an adapter behind each of its 30 layers; nano's tower gives it pictures
# through a bridge that says a few words of every square. The measurements below were taken once from a trained one
# (`python notebooks/support/steer_05.py out/lynx_mini`). First, what untrained adapters do to it:

# %%
real = json.loads((lesson.ROOT / "notebooks" / "results" / "lynx_mini_adapters.json").read_text())
print(real["made of"])
for std, divergence in real["fresh"].items():
    print(f"fresh adapters from N(0, {std}²): KL {divergence:.3f} nats where an answer begins")

# %% [markdown]
# Then what each adapter writes after training, as a share of what it is given, and what becomes of the model when all
# of them are turned up from nothing to what they have learned:

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
for (place, shares), color in zip(real["writes"].items(), (lesson.VISION_COLOR, lesson.TEXT_COLOR)):
    axes[0].plot(real["layers"], [100 * share for share in shares], "o-", color=color, label=place, markersize=4)
axes[0].set(xlabel="behind layer", ylabel="written, of what it is given (%)", ylim=(0, 18))
axes[0].legend(frameon=False)
scales = [one["scale"] for one in real["turned up"]]
for key, name, color in (("knowledge", "general knowledge", lesson.TEXT_COLOR), ("easy_vqa_test", "easy-VQA", lesson.VISION_COLOR),
                         ("scenes_new", "new scenes", "#b5443a")):  # fmt: skip
    axes[1].plot(scales, [100 * one[key] for one in real["turned up"]], "o-", color=color, label=name)
axes[1].set(xlabel="scale of all adapters", ylabel="right (%)", ylim=(0, 105))
axes[1].legend(frameon=False)
plt.show()
for one in real["turned up"]:
    print(", ".join(f"{key} {value:.2f}" for key, value in one.items()))

# %% [markdown]
# At 0 the model is the one it was: it knows what it knew, and says nothing that a test would count. What it sees grows
# up to full strength. What it forgets, a few facts of a hundred, is forgotten at half of that: turning adapters down
# after training buys nothing here. They write most behind the first layer, where image tokens come in.
#
# The same can be tried here and now with the nano that comes along. Its language model trained beside its adapters:

# %%
seeing = recipes.load("nano")
scenes = [Scenes("new", seed=SEED, string_share=0.0).record(n) for n in range(12)]
for scale in (0.0, 1.0, 10.0):
    with lynx_mini_tests.scaled(seeing.model, scale):
        print(f"nano, adapters times {scale}: {nano_tests.shares(nano_tests.ask(seeing, scenes))['all']:.0%} right")

# %% [markdown]
# Where the layers themselves may learn, adapters are left with nothing to do: nano answers as well without them.

# %% [markdown]
# ## Solution of the exercise

# %%
show_source(solutions.silence)
checks.check_silence(solutions.silence)

# %% [markdown]
# ## What this lesson did not show
#
# - Adapters that learn to read *pictures*, step by step: section 6 shows what one run left, of one seed.
# - Whether Lynx's start hurts Lynx. That needs Vicuna's hidden states; the paper does not speak of it.
# - Which is better at 7 billion parameters, adapters or LoRA: one toy task, two layers, one learning rate.
# - Where adapters belong: behind every layer, every second, inside the layer as Houlsby et al. place them.
# - What keeps old behaviour while adapters learn: mixing old data in, as Lynx does with text instructions.
