# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12 · Why does the loss not fall?
#
# **Time**: 25 minutes to read, half a minute to run on one core.
#
# **Reads**: `nanovlm/data/batching.py`, `nanovlm/data/show.py`, `nanovlm/data/templates.py`, `nanovlm/recipes/nano_tests.py`,
# `nanovlm/training/checkpoint.py`, `nanovlm/training/diagnostics.py`, `nanovlm/vlm.py`
#
# Six runs, each broken in one place. You first see what its owner saw: a curve, a few numbers, some answers. Then a
# command or a plot finds the cause, and then it is put right. The seventh is yours.

# %%
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file, save_file
from support import checks, lesson, recipe_12, runs_12, solutions
from support.lesson import grouped_bars, show_pictures, show_source

from nanovlm.data.batching import build_batch
from nanovlm.data.show import printable
from nanovlm.data.templates import LLAVA, NANO, prompt, write
from nanovlm.recipes.nano_tests import ask, shares
from nanovlm.training.checkpoint import copy_into
from nanovlm.training.diagnostics import Movement
from nanovlm.vlm import IMAGE_TOKEN

folder = runs_12.enter_folder()  # a new one, with the recipe colors.py and some data

# %% [markdown]
# ## 0. A run that works
#
# One shape a picture, and the question for its colour. The data are a file in LLaVA's form, as yours might be:

# %%
print(json.dumps(json.loads(Path("data/good.json").read_text())[0], indent=1))
EXAM = recipe_12.exam()
show_pictures(
    [record.visuals[0].frames[0] for record in EXAM[:6]], [record.conversations[0][1].text for record in EXAM[:6]], columns=6, size=1.2
)

# %% [markdown]
# Before you train, write down two numbers, so that you can read the curve:
#
# - **Knowing nothing.** All tokens of the vocabulary are equally likely: ln(vocabulary) nats. The first loss must be about that. If
#   it is far above, something is wrong before any training.
# - **Knowing the language, not the picture.** An answer here is two tokens, a colour and the end. Who knows that, but does not look,
#   pays ln 8 for one of eight colours and nothing for the end: ln 8 / 2 nats per token.

# %%
healthy = runs_12.start("healthy", "--data data/good.json")
assistant = healthy.assistant()
LEVELS = {
    f"knows nothing: ln {assistant.tokenizer.vocab_size}": math.log(assistant.tokenizer.vocab_size),
    "guesses: ln(8) / 2": math.log(8) / 2,
}
runs_12.curves({"healthy": healthy}, LEVELS)
print(healthy.said.splitlines()[-6])

# %% [markdown]
# The curve goes through both levels. The first part is language, and a model learns it without looking. Only what happens *below*
# the second level has to do with pictures. So "the loss falls" says little; below which level does it fall?
#
# ## 1. The loss falls, the answers are nonsense
#
# **Symptom.** The loss goes well below the guessing level, as it should. But the answers:

# %%
def show_answers(assistant, records=EXAM, number=4):
    """Print what a model says to a few questions, and its share of right answers among all of them."""
    answers = ask(assistant, records, max_new_tokens=24)
    for one in answers[:number]:
        print(f"{one.question}  -> {one.prediction or '(nothing)'}   (right: {one.truth})")
    print(f"right: {shares(answers)['all']:.0%} of {len(answers)}")


reply = runs_12.start("reply", "--data data/question_in_reply.json")
runs_12.curves({"healthy": healthy, "broken": reply}, LEVELS)
show_answers(reply.assistant())

# %% [markdown]
# **Find it.** Look at what is trained, token by token. `python -m nanovlm.data show` prints the first rows of a stage as the trainer
# makes them: what has a loss stands in [square brackets] (on a terminal it is green).

# %%
runs_12.show("python -m nanovlm.data show --recipe colors.py --data data/question_in_reply.json -n 2")

# %% [markdown]
# Somebody converted the data so that the whole dialogue became *one reply*. So the question has a loss as well, and most of the trained
# tokens are the question's. They are easy to know, so the mean over all of them is small. Multiply it by the number of trained tokens of a
# row, and compare with what guessing one of two shapes and one of eight colours costs:

# %%
print(f"{8 * reply.log('loss')[-1]:.2f} nats per row; ln 2 + ln 8 = {math.log(2 * 8):.2f}")

# %% [markdown]
# The small number was guessing all the time. And the model has learned to *ask*.
#
# **Put right**: the question belongs in the human turn. In a healthy row the brackets hold the answer and the end of text, nothing else:

# %%
runs_12.show("python -m nanovlm.data show --recipe colors.py --data data/good.json -n 2")

# %% [markdown]
# A loss is a mean over the *trained* tokens. Two losses can only be compared if the same tokens are trained.
#
# ## 2. The loss hardly falls, or stops far too early
#
# **Symptom.** Two runs with the same data:

# %%
def at_rate(rate):
    """Flags that give all parts one learning rate."""
    return " ".join(["--data data/good.json", *(f"--set answers.learning_rates.{part}={rate}" for part in recipe_12.EVERYTHING)])


low, high = runs_12.start("low", at_rate(4e-5)), runs_12.start("high", at_rate(0.4))
runs_12.curves({"healthy": healthy, "broken, one": low, "broken, other": high}, LEVELS)

# %% [markdown]
# **Find it.** `train.py` ends every stage with a table: the gradient of each part (the middle one of those that were logged), and how far
# the part has moved, as a share of its own length. The same numbers stand in `log.jsonl`, under "parts".

# %%
show_source(Movement.measure)

# %%
for name, run in (("healthy", healthy), ("broken, one", low), ("broken, other", high)):
    last, norms = run.log("parts")[-1], run.log("gradient_norm")
    moved = ", ".join(f"{part} {found['moved']:.1%}" for part, found in last.items())
    print(f"{name:<13} moved: {moved}\n{'':<13} gradient norm: {norms[0]:.2f} at first, {norms[-1]:.2f} at last; "
          f"of the vision at last {last['vision']['gradient']:.5f}")

# %% [markdown]
# - **One** has hardly moved: the learning rate is 100 times too low. The gradient is as large as at first, as nothing has been learned.
# - **The other** went many times its own length: the rate is 100 times too high. The words recover, the vision does not: its gradient is
#   almost zero. That is the usual sign of numbers that have grown so large that a small change of a weight makes no difference any more.
#   So the run stops at the guessing level.
#
# **Put right**: start from the recipe's rate, and when in doubt try three, a factor of 10 apart, for a few dozen steps each. What a healthy
# part moves depends on where it began: a part from nothing moves by a large share of its length, or several times it, a trained one by a few per cent.
#
# ## 3. The loss stays far above guessing
#
# **Symptom.** It falls at first, so something learns. Then it stays close to knowing nothing.

# %%
bridge = runs_12.start("bridge", "--data data/good.json --set answers.tune=bridge")
runs_12.curves({"healthy": healthy, "broken": bridge}, LEVELS)

# %% [markdown]
# **Find it.** Every stage begins with a table of what trains, and ends with one of what has moved:

# %%
bridge.parts()
print(next(line for line in bridge.said.splitlines() if "frozen tensors" in line))

# %% [markdown]
# Only the bridge trains. Papers do just that in their first stage, and it works for them, since their language model can already
# speak. Here it is random (somebody forgot `--init`), and no picture token, however good, makes a random language model say a word. The
# sentence at the end is no estimate: the trainer compares a fingerprint (SHA-256) of every frozen tensor before and after the stage.
#
# **Put right**: train the words too, as in the healthy run, or start from a language model that speaks (`--init FOLDER`). A part that does
# not exist cannot be frozen or trained by accident; its name is refused:

# %%
runs_12.show("python train.py colors.py --data data/good.json --set answers.learning_rates.langage_model=1e-3")

# %% [markdown]
# ## 4. The loss is perfect, the answers are wrong
#
# **Symptom.** The healthy model, with its loss of nearly zero. Three people ask it, each with their own program:

# %%
people = {
    "as trained": assistant,
    "first": replace(assistant, template=LLAVA),
    "second": replace(assistant, template=replace(NANO, user_prefix="User: ", assistant_prefix="Bot:")),
    "third": replace(assistant, template=replace(NANO, assistant_prefix="bot: ", answer_prefix="")),
}
for name, own in people.items():
    print(f"--- {name}")
    show_answers(own, number=2)

# %% [markdown]
# **Find it.** Training and asking must write the same tokens. Up to where the answer begins, the two rows have to be equal, id by id:

# %%
def pieces(ids):
    """Ids as text with a bar between any two."""
    return "|".join("<image>" if one == IMAGE_TOKEN else printable([one], assistant.tokenizer) for one in ids)


turns = EXAM[0].conversations[0]
batch = build_batch(EXAM[:1], NANO, assistant.tokenizer, assistant.model.num_image_tokens, 24, "crop", 64)
row = batch.ids[0].tolist()
print(f"{'trained on':<14}{pieces(row)}")
for name, own in people.items():
    asked = write(prompt(turns[:1], own.template), assistant.tokenizer, [1]).ids
    print(f"{name:<14}{pieces(asked)}   equal so far: {asked == row[:len(asked)]}")

# %% [markdown]
# - The **first** writes another model's template. Nothing is right, so somebody will notice.
# - The **second** writes two capital letters. That costs some answers, not all, and there is no message: just a benchmark number that is lower
#   than it should be. This is the fault that takes days.
# - The **third** was lucky: all answers are still right. The text is the *same* as in training, but the space before the answer stands at the
#   end of the prompt, where it is a token of its own; in training it was the first letter of the token " pink".
#
# **Put right**: one template writes both, `templates.segments` for training and `templates.prompt` for asking, and a model's folder
# records which recipe it belongs to. If you ask a model in your own program, print the ids once, and compare.
#
# ## 5. It was trained, and begins from nothing
#
# **Symptom.** A model's weights are loaded, no error is seen. But its loss is that of a random model, or worse:

# %%
@torch.no_grad()
def exam_loss(model):
    """Loss on the exam, in nats per trained token."""
    batch = build_batch(EXAM, NANO, assistant.tokenizer, model.num_image_tokens, 24, "crop", 64)
    loss, num_trained = model.loss(batch)
    return (loss / num_trained).item()


def fresh():
    """An untrained model of the same sizes."""
    torch.manual_seed(1)
    return recipe_12.build("tiny", assistant.tokenizer.vocab_size)


weights = load_file("out/healthy/model.safetensors")
wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}  # as a wrapped model names them
shuffled = weights | {"decoder.embedding.weight": weights["decoder.embedding.weight"].flip(0)}  # as of another tokenizer
loaded = {"first file": fresh(), "second file": fresh()}
loaded["first file"].load_state_dict(wrapped, strict=False)
loaded["second file"].load_state_dict(shuffled)
print(f"the model that wrote them: {exam_loss(assistant.model):.2f}, an untrained one: {exam_loss(fresh()):.2f}")
for name, model in loaded.items():
    print(f"{name}: {exam_loss(model):.2f}")

# %% [markdown]
# **Find it.** `strict=False` leaves out every name that does not fit, without a word. This project does not have that option: `--init` and every
# checkpoint go through `copy_into`, which names everything that is missing, left over or of another shape.

# %%
show_source(copy_into)
shutil.copytree("out/healthy", "out/wrapped")
save_file(wrapped, "out/wrapped/model.safetensors")
said, code = runs_12.command("python train.py colors.py --data data/good.json --init out/wrapped --out out/more")
problems = said.split("; ")
print(f"exit code {code}, {len(problems)} problems:\n  " + "\n  ".join([*problems[:2], "…", problems[-1]]))

# %% [markdown]
# The first file's names begin with `module.`, because a wrapper was saved with its model. So nothing was loaded at all.
#
# The second file has the right names and the right shapes, and no check of names can find it: the rows of the embedding belong to another
# tokenizer. Only a number can: **a model that goes on begins with the loss at which it stopped.** If the first line of `log.jsonl` says otherwise, stop there. The tokenizer's
# file travels with the weights: `--init` takes both from one folder.
#
# **Put right**: take the prefix away, and the loss is the old one.

# %%
repaired = fresh()
copy_into(repaired.state_dict(), {name.removeprefix("module."): tensor for name, tensor in wrapped.items()}, "the first file")
print(f"the first file, prefix taken away: {exam_loss(repaired):.2f}")
more = runs_12.start("more", "--data data/good.json --init out/healthy --set answers.steps=1")
print(f"train.py --init out/healthy, its first step: {more.log('loss')[0]:.2f}")

# %% [markdown]
# ## 6. The loss stops at the guessing level
#
# **Symptom.** Everything looks calm. The curve falls like the healthy one, then it stays at the guessing level. The rate is the recipe's, all parts
# train, and the answers are colours:

# %%
misnamed = runs_12.start("misnamed", "--data data/misnamed.json")
runs_12.curves({"healthy": healthy, "broken": misnamed}, LEVELS)
show_answers(misnamed.assistant())

# %% [markdown]
# **Find it.** A level that can be had without looking asks for one test: take the pictures away. If the answers stay as good as before, the model
# does not look. `ask(..., blank=True)` shows grey instead of every picture; `train.py nano` reports the same share at its end.

# %%
bars = {}
for name, color, blank in (("its own picture", lesson.VISION_COLOR, False), ("grey", lesson.GREY, True)):
    bars[name] = (color, [100 * shares(ask(run.assistant(), EXAM, blank))["all"] for run in (healthy, misnamed)])
figure, axis = plt.subplots(figsize=(5.4, 3), layout="constrained")
grouped_bars(axis, ["healthy", "broken"], bars)
axis.axhline(100 / 8, color="black", linestyle=":", linewidth=1)
axis.set(ylabel="right (%)", title=f"{len(EXAM)} pictures, seed 0; dotted: one in eight")
plt.show()
misnamed.parts()

# %% [markdown]
# It does not look. The table says why in one line: vision and bridge train, and yet their gradient is exactly zero. No picture has ever passed
# through them. (In run 2, with the rate too high, it was small, not zero: there the pictures came and were lost on the way.) Then one look at the data:

# %%
runs_12.show("python -m nanovlm.data show --recipe colors.py --data data/misnamed.json -n 2")
print(json.dumps(json.loads(Path("data/misnamed.json").read_text())[0]))

# %% [markdown]
# `pictures []`, and no `<image x1>` in the row: the file calls its pictures "img", a field that nobody reads. An item without "image" is allowed,
# since instruction data hold plain text too. A word `<image>` in the question would have given it away: a placeholder without a picture is an error.
#
# **Put right**: "image". And compare with grey pictures before you believe any number of a vision-language model.
#
# ## The six in one table
#
# | what you see | look first at | it was |
# |---|---|---|
# | loss far below guessing, answers nonsense | `python -m nanovlm.data show`: what stands in brackets? | loss on the question |
# | loss hardly falls | "moved" in the table at the end: under 1% | rate too low |
# | loss jumps, then stops at guessing | "moved": thousands of per cent | rate too high |
# | loss stays near ln(vocabulary) | the table at the beginning: frozen? | language model random and frozen |
# | loss perfect, answers wrong | ids of the prompt against ids of the row | another template |
# | first loss of a trained model is high | names and shapes; the tokenizer | weights that do not fit |
# | loss stops at guessing, calmly | grey pictures; gradient of vision and bridge | data without pictures |
#
# ## Exercise: the seventh run
#
# New data: half of the items ask for the colour as before, the others say "describe the image." The loss is the best that you have seen today,
# and all colours are right. But look at the descriptions:

# %%
seventh = runs_12.start("seventh", runs_12.SEVENTH)
runs_12.curves({"healthy": healthy, "the seventh": seventh})
show_answers(seventh.assistant())
show_answers(seventh.assistant(), recipe_12.exam(describe=True))

# %% [markdown]
# Find the cause. What you have: everything that `train.py` printed (`print(seventh.said)`), the log (`seventh.log("parts")`), the data
# (`data/with_descriptions.json`), the commands above, and the stage as the run's `config.json` keeps it:

# %%
stage = seventh.stage()


def repair(stage):
    ...  # your code: return a copy of the stage, dataclasses.replace(stage, ...), with the one value changed that is wrong


checks.attempt(checks.check_repair, repair)

# %% [markdown]
# ## Solution of the exercise

# %%
show_source(solutions.repair)
checks.check_repair(solutions.repair)
print(next(line for line in seventh.said.splitlines() if " cut to " in line))
long_enough = solutions.repair(stage).max_tokens
repaired = runs_12.start("repaired", f"{runs_12.SEVENTH} --set answers.max_tokens={long_enough}")
show_answers(repaired.assistant(), recipe_12.exam(describe=True), number=2)

# %% [markdown]
# The row of a description is longer than `max_tokens`, and its end was cut off: the last words, and the token that ends an answer. What is cut
# has no loss, so the curve looks better for it. The model never learned what comes then, and never learned to stop. `train.py` counts such rows
# and says so at the end of the stage; `data show` says it for the rows that it shows.

# %% [markdown]
# ## What this lesson did not show
#
# - Losses that are not finite. `train.py` stops at once and names step, records and part; `--set STAGE.non_finite=skip` leaves the update out.
# - Two faults at once. Put one thing right at a time, and begin with the data.
# - Slow learning that is no fault: too few steps, too small a model, too hard a question. Guess a level for it before you search.
# - A loss that falls on the training data alone: compare with held-out records (`curves.png` draws both where a recipe holds some out).
# - Other seeds. One seed of a run that takes seconds is enough to tell *broken* from *working*, not better from worse.
