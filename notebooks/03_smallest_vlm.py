# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · What is the smallest VLM?
#
# **Time**: 25 minutes to read, half a minute to run on one core.
#
# **Reads**: `nanovlm/vlm.py`, `nanovlm/vit.py`, `nanovlm/resampler.py`, `nanovlm/decoder.py`,
# `nanovlm/contrastive.py`, `nanovlm/training/optimizer.py`, `nanovlm/training/stages.py`,
# `nanovlm/generation/sampler.py`, `nanovlm/data/scene_questions.py`, `nanovlm/data/scenes.py`,
# `nanovlm/data/records.py`, `nanovlm/data/tokenizer.py`, `nanovlm/data/templates.py`, `nanovlm/data/batching.py`,
# `nanovlm/recipes/nano_tests.py`
#
# A vision-language model (VLM) looks at a picture and answers in words. It needs three parts: something that
# sees, something that speaks, and a bridge between them. Here we put the three together as small as they go,
# watch the answers change while it trains, and then take the picture away to see whether it ever looked.

# %%
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from support import checks, lesson, solutions
from support.lesson import grouped_bars, show_pictures, show_source

from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.data.batching import build_batch, contrastive_batch, pixels_of
from nanovlm.data.records import Record, Visual
from nanovlm.data.scene_questions import Scenes
from nanovlm.data.scenes import COLORS, SHAPES
from nanovlm.data.templates import NANO, prompt, write
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.recipes.nano_tests import majority_baseline
from nanovlm.resampler import Resampler
from nanovlm.training import optimizer
from nanovlm.training.stages import Stage
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import IGNORE, IMAGE_TOKEN, VLM

SEED = 0
torch.manual_seed(SEED);

# %% [markdown]
# ## 1. The task
#
# One object per picture, and two questions: what colour, what shape? There are 8 colours and 6 shapes. Four
# pairs, such as the red star, never occur in training (that is a matter for the big run; here we only ask about
# pairs like those it trained on, in pictures that it has not seen).

# %%
IMAGE_SIZE = 40
ONE_OBJECT = dict(max_objects=1, string_share=0.0, canvas=IMAGE_SIZE)
TASK = dict(**ONE_OBJECT, weights={"color": 1, "shape": 1.5}, questions_per_picture=1)
train_source = Scenes("train", seed=SEED, **TASK)
exam_source = Scenes("new", seed=1, **TASK)
exam_records = [exam_source.record(n) for n in range(200)]


def asked(record):
    """The question and the right answer of a record."""
    question, answer = record.conversations[0]
    return question.text, answer.text


show_pictures(
    [record.visuals[0].frames[0] for record in exam_records[:6]],
    ["\n".join((*textwrap.wrap(asked(record)[0], 22), f"→ {asked(record)[1]}")) for record in exam_records[:6]], columns=6,
)  # fmt: skip

# %% [markdown]
# ## 2. From a conversation to a row of tokens
#
# The tokenizer cuts text into ids. A *template* says how a conversation is written down; ours puts the image
# tokens first, then the question, then the answer. For the picture it writes as many ids of -1 as the bridge will
# produce: places kept free, to be filled in later. Only the answer is *trained*: the loss ignores the rest.

# %%
texts = [text for n in range(300) for text in asked(train_source.record(n))]
tokenizer = train_tokenizer(["user: \nbot:", *(f" {text}" for text in texts)], vocab_size=400)
NUM_IMAGE_TOKENS = 4


def make_batch(records):
    """Records as a Batch, one row per question."""
    count = lambda image_size, num_frames: NUM_IMAGE_TOKENS  # whatever the picture: a resampler's output is fixed
    return build_batch(records, NANO, tokenizer, count, IMAGE_SIZE, "crop", max_tokens=32)


batch = make_batch(exam_records[:3])
words = [["picture" if i == IMAGE_TOKEN else "<s>" if i == tokenizer.bos else "</s>" if i == tokenizer.eos else
          "" if segment < 0 else tokenizer.decode([i]).replace("\n", "↵") for i, segment in zip(*both)]
         for both in zip(batch.ids.tolist(), batch.segments.tolist())]  # fmt: skip
kinds = np.where(batch.segments < 0, 0, np.where(batch.ids == IMAGE_TOKEN, 2, np.where(batch.labels != IGNORE, 3, 1)))
palette = {0: "white", 1: "#dcdcdc", 2: lesson.VISION_COLOR, 3: "#8fb7e8"}
figure, axis = plt.subplots(figsize=(9.4, 2.2))
for row, line in enumerate(words):
    for column, word in enumerate(line):
        axis.add_patch(plt.Rectangle((column, row + 0.1), 0.94, 0.8, color=palette[kinds[row, column]]))
        axis.text(column + 0.47, row + 0.5, word.strip(), ha="center", va="center", fontsize=8, rotation=25)
axis.set(xlim=(0, len(words[0])), ylim=(3, 0), xlabel="position (tokens)", ylabel="row")
axis.set_yticks((0.5, 1.5, 2.5), (0, 1, 2))
axis.set_title("one batch: image tokens orange, trained tokens blue, ignored ones grey")
plt.show()

# %% [markdown]
# ## 3. Three parts
#
# - **Vision**: the ViT of lesson 01, with a convolutional stem. 40 pixels and patches of 8 give 25 features.
# - **Bridge**: a resampler, which sums up the 25 features in 4 image tokens of the decoder's width (lesson 04
#   compares bridges).
# - **Decoder**: a causal language model of two layers, LLaMA's kind. It reads embeddings, and does not care
#   whether one came from a word or from a picture.

# %%
def make_model(seed):
    """A VLM of about 200,000 parameters."""
    torch.manual_seed(seed)
    vision = ViT(ViTConfig(IMAGE_SIZE, 8, 64, num_layers=1, num_heads=4, mlp_width=128, conv_stem=True, class_token=False))
    bridge = Resampler(64, 64, NUM_IMAGE_TOKENS, num_layers=1, num_heads=4, head_width=16, ffn_width=128)
    layers = (LayerOptions(), LayerOptions())
    return VLM(vision, bridge, Decoder(DecoderConfig(tokenizer.vocab_size, 64, 4, 4, 128, 32, layers, tied_head=True)))


model = make_model(SEED)
for part, parameters in model.parts().items():
    if parameters:
        print(f"{part:<16}{sum(parameter.numel() for parameter in parameters.values()):>9,} parameters")

# %% [markdown]
# And this is where they meet. `embed` looks up the words, and drops the image tokens into the places that the
# template kept free. That one line, `masked_scatter`, is what makes a language model a vision-language model:

# %%
show_source(VLM.embed)

# %% [markdown]
# ### Exercise: put the image tokens in place yourself
#
# You get the words' embeddings float[B, T, W], a mask bool[B, T] that is True where an image token belongs, and
# the image tokens float[n, W], one behind the other. Return new embeddings with the k-th image token in the k-th
# free place, counted along the first row, then along the second. Rows may hold different numbers of them, or
# none. Do not change what you were given.

# %%
def place(embeddings, is_image, image_tokens):
    ...  # your code


checks.attempt(checks.check_place, place)

# %% [markdown]
# ## 4. First the eyes
#
# No paper trains all of it from nothing: the ViT has seen captions before, hundreds of millions of them. We give
# ours a few seconds of the same kind, as in lesson 01: match pictures with captions such as "purple triangle".
# Later, set `TOWER_STEPS = 0`, run the lesson again, and watch the shape questions.

# %%
def train(parts, stage, loss_of, after_step=lambda step: None):
    """The whole of training: loss, gradient, step.

    Args:
      parts: {part: {name: parameter}} that train. stage: learning rates, steps, schedule.
      loss_of: function of the step's number, from 0. after_step: called with the number of steps done, from 0.
    """
    optimizers = optimizer.build(parts, stage)
    trained = [parameter for part in parts.values() for parameter in part.values()]
    after_step(0)
    for step in range(stage.steps):
        optimizer.set_lr(optimizers, optimizer.lr_factor(step, stage))
        loss_of(step).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)
        after_step(step + 1)


def next_records(source, step, number=64):
    """The records of one step."""
    return [source.record(n) for n in range(step * number, (step + 1) * number)]


TOWER_STEPS = 120
captions = Scenes("train", "captions", seed=2, **ONE_OBJECT, weights={"short_caption": 1})
text_tower = TextTower(tokenizer.vocab_size, 64, num_layers=1, num_heads=4, mlp_width=128, context_length=16)
tower = ContrastiveModel(model.vision, 64, text_tower, 64, joint_width=64)
if TOWER_STEPS:
    rates = {"vision": 4e-3, "text_tower": 4e-3}
    stage = Stage("tower", "contrastive", rates, {captions.name: 1.0}, TOWER_STEPS, 64, optimizer="muon", warmup_steps=10)
    train(tower.parts(), stage, lambda step: tower.loss(
        *contrastive_batch(next_records(captions, step), tokenizer, IMAGE_SIZE, "crop", max_tokens=16)
    ))  # fmt: skip

# %% [markdown]
# ## 5. Then the whole, and keep asking
#
# The loss is the language model's own: cross-entropy of the answer's tokens, each predicted from all before it.

# %%
show_source(VLM.loss)

# %% [markdown]
# While it trains, an *exam*: after some steps the model answers questions about pictures it has not seen, in its
# own words, by the sampler that also serves `sample.py`.

# %%
def answer(model, records, pixels=None):
    """What the model says to each record's question: list of str.

    pixels: float[N, 3, S, S] to show instead of the records' own pictures.
    """
    pixels = pixels_of([record.visuals[0] for record in records], IMAGE_SIZE, "crop") if pixels is None else pixels
    questions = [record.conversations[0][:1] for record in records]
    prompts = [write(prompt(question, NANO), tokenizer, [NUM_IMAGE_TOKENS]).ids for question in questions]
    decoding = Decoding(max_new_tokens=4, eos_ids=(tokenizer.eos,))
    replies = generate(model, prompts, decoding, [[picture[None]] for picture in pixels])
    return [tokenizer.decode(ids).strip() for ids in replies]


def shares_right(answers, records):
    """{kind of question: share answered right, word for word}."""
    marks = {}
    for said, record in zip(answers, records):
        marks.setdefault(record.kinds[0], []).append(said == asked(record)[1])
    return {kind: float(np.mean(marks[kind])) for kind in sorted(marks)}


def train_on_questions(model, source, steps, after_step=lambda step: None):
    """Learn to answer a source's questions, all parts of the model at once."""
    parts = {part: parameters for part, parameters in model.parts().items() if parameters}
    stage = Stage(
        "answers", "language", dict.fromkeys(parts, 4e-3), {source.name: 1.0}, steps, batch_size=64,
        optimizer="muon", warmup_steps=10,
    )  # fmt: skip

    def loss_of(step):
        loss, num_tokens = model.loss(make_batch(next_records(source, step)))
        return loss / num_tokens

    train(parts, stage, loss_of, after_step)


STEPS, MOMENTS = 200, (0, 5, 10, 20, 30, 40, 60, 80, 100, 120, 140, 160, 180, 200)
history, last_words = {}, None


def in_print(word):
    """A word, or what to call it if it is none."""
    return "(nothing)" if not word else word if word.isascii() and word.isprintable() else "(noise)"


def look(step):
    """At some moments: examine all 200 pictures, and print the answers to the first six when they change."""
    global last_words
    if step not in MOMENTS:
        return
    answers = answer(model, exam_records)
    history[step] = shares_right(answers, exam_records)
    if answers[:6] != last_words:
        last_words = answers[:6]
        print(f"step {step:<4}: " + " · ".join(map(in_print, last_words)))


print("asked for: " + " · ".join(record.kinds[0] for record in exam_records[:6]))
print("truth    : " + " · ".join(asked(record)[1] for record in exam_records[:6]))
train_on_questions(model, train_source, STEPS, look)

# %%
guessing = {"color": 1 / len(COLORS), "shape": 1 / len(SHAPES)}
figure, axis = plt.subplots(figsize=(7, 3.6))
for kind, color in (("color", lesson.VISION_COLOR), ("shape", lesson.TEXT_COLOR)):
    right = [100 * shares[kind] for shares in history.values()]
    axis.plot(list(history), right, "o-", color=color, label=f"{kind} questions")
    axis.axhline(100 * guessing[kind], color=color, linestyle=":", label=f"{kind}, guessing")
axis.set(xlabel="training (steps of 64 questions)", ylabel="right (% of the exam)", ylim=(0, 105))
axis.set_title(f"200 held-out pictures, seed {SEED}")
axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
plt.show()

# %% [markdown]
# Read the printed answers from top to bottom: first nothing sensible, then *the right kind of word*, a colour for
# a colour question and a shape for a shape question, which needs no picture at all; then right colours, and
# shapes last: a handful of pixels tells a star from a cross.

# %%
final = answer(model, exam_records)
show_pictures(
    [record.visuals[0].frames[0] for record in exam_records[6:14]],
    [f"{record.kinds[0]}? {said}\n{'right' if said == asked(record)[1] else 'truth: ' + asked(record)[1]}"
     for said, record in zip(final[6:14], exam_records[6:14])], columns=8, size=1.25,
)  # fmt: skip

# %% [markdown]
# ## 6. Does it need the image?
#
# A model may score well without looking, by knowing which answers are frequent. Four ways to take the picture
# away:
#
# - **blank**: every picture is one even grey, for the model we just trained. It has never seen such a picture, so
#   this alone would prove little.
# - **exchanged**: every question gets the picture of another record. Does the answer follow the picture?
# - **trained blind**: a new model, trained on blank pictures only. It may learn all that words alone can tell.
# - **constant**: always the most frequent answer. No training at all.

# %%
class BlankPictures:
    """A source whose pictures show nothing; questions and answers stay."""

    def __init__(self, source):
        self.source, self.name = source, f"{source.name}_blank"

    def record(self, n):
        record = self.source.record(n)
        blank = record.visuals[0].frames[0].copy()
        blank.paste((225, 225, 225), (0, 0, *blank.size))
        return Record(record.id, (Visual("blank", (blank,)),), record.conversations, record.kinds)


blank_exam = [BlankPictures(exam_source).record(n) for n in range(200)]
blind = make_model(SEED)
train_on_questions(blind, BlankPictures(train_source), steps=60)

own = pixels_of([record.visuals[0] for record in exam_records], IMAGE_SIZE, "crop")
results = {
    "its own\npicture": shares_right(final, exam_records),
    "blank": shares_right(answer(model, blank_exam), exam_records),
    "exchanged": shares_right(answer(model, exam_records, own.roll(1, dims=0)), exam_records),
    "trained\nblind": shares_right(answer(blind, blank_exam), exam_records),
    "constant": majority_baseline(exam_records),
}
figure, axis = plt.subplots(figsize=(7.4, 3.6))
grouped_bars(axis, list(results), {
    f"{kind} questions": (color, [100 * shares[kind] for shares in results.values()])
    for kind, color in (("color", lesson.VISION_COLOR), ("shape", lesson.TEXT_COLOR))
})  # fmt: skip
axis.set(ylabel="right (% of the exam)", title=f"with and without the picture, seed {SEED}")
plt.show()

# %% [markdown]
# With the exchanged picture the score is judged by the *old* truth. Is the model confused, or does it describe
# what it is shown? Ask again, and judge by the picture that was shown, where its question fits:

# %%
said = answer(model, exam_records, own.roll(1, dims=0))
shown = [exam_records[-1], *exam_records[:-1]]
for kind in ("color", "shape"):
    fitting = [n for n in range(len(said)) if exam_records[n].kinds == shown[n].kinds == (kind,)]
    right = np.mean([said[n] == asked(shown[n])[1] for n in fitting])
    print(f"{kind}: {right:.0%} of {len(fitting)} answers are right for the picture shown")

# %% [markdown]
# With its own picture the model stands far above everything else; without, it falls to about guessing, 1 colour
# of 8 and 1 shape of 6. (*Constant* is a little better than guessing because it picks its answer with hindsight.)
# And the exchanged pictures show that the model is not confused by them: it says what it sees. All this is one
# seed, and a 200-question exam moves by several points from one set of pictures to another.

# %% [markdown]
# ## Solution of the exercise

# %%
show_source(solutions.place)
checks.check_place(solutions.place)

# %% [markdown]
# ## What this lesson did not show
#
# - What the head start of the eyes is worth: one run with it is no comparison (lesson 04 makes one).
# - A language model that could speak before it saw. Ours learned words and pictures at once; the papers start
#   from a trained one (lesson 08).
# - More than one object, and questions where one answer depends on another part of the picture.
# - Several pictures in one conversation, or one picture in many rows: `shown` in `Batch` takes care of both.
# - How the answers were generated: cache, sampling and beams are lesson 10's.
# - Any number that you should quote: one seed, 200 questions, half a minute.
