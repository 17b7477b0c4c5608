"""Lesson 12's recipe, a file for `python train.py notebooks/support/recipe_12.py --data FILE.json`, and its data.

One shape a picture, one question, eight answers: a model of 190,000 parameters learns it in a few dozen steps.
"""

import json

import numpy as np
from PIL import Image, ImageDraw

from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.scenes import COLORS, pick
from nanovlm.data.templates import NANO
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.generation.sampler import Decoding
from nanovlm.projector import PixelShuffleProjector
from nanovlm.recipes.nano_tests import ask, assistant, shares
from nanovlm.recipes.recipe import Recipe
from nanovlm.training.stages import Stage
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

IMAGE_SIZE, WIDTH, CONTEXT = 24, 64, 64  # pixels; channels; tokens
SHAPES = ("circle", "square")
QUESTION, DESCRIBE = "what color is the {}?", "describe the image."
DESCRIPTION = "it is {}, on a light ground, and there is nothing else"
EVERYTHING = ("vision", "bridge", "embedding", "language_model")
SEVENTH = ("answers.max_tokens=20", "answers.steps=60")  # what the exercise's run changes; read it last


def picture(n, seed):
    """(image, shape, colour) number n of a seed: one shape of one colour on a light, noisy ground."""
    rng = np.random.default_rng((seed, n))
    shape, color, side = pick(rng, SHAPES), pick(rng, tuple(COLORS)), int(rng.integers(11, 16))
    left, top = rng.integers(0, IMAGE_SIZE - side, 2).tolist()
    image = Image.fromarray(rng.integers(200, 240, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8))
    draw = getattr(ImageDraw.Draw(image), "ellipse" if shape == "circle" else "rectangle")
    draw((left, top, left + side, top + side), fill=COLORS[color])
    return image, shape, color


def exam(number=64, describe=False):
    """Pictures that no file holds, each with a question: list of Record."""
    records = []
    for n in range(number):
        image, shape, color = picture(n, seed=1)
        told = (DESCRIBE, DESCRIPTION.format(color)) if describe else (QUESTION.format(shape), color)
        turns = Turn("user", (0, told[0])), Turn("assistant", (told[1],))
        records.append(Record(f"exam/{n}", (Visual(f"exam/{n}", (image,)),), (turns,)))
    return records


# Forms of the data: (n, shape, colour) -> (name of the field that names the picture, question, answer)


def good(n, shape, color):
    """As it should be."""
    return "image", QUESTION.format(shape), color


def question_in_reply(n, shape, color):
    """The whole dialogue is one reply, as a careless conversion leaves it."""
    return "image", "<image>", f"{QUESTION.format(shape)} {color}"


def misnamed(n, shape, color):
    """The picture is named in a field that nobody reads."""
    return "img", QUESTION.format(shape), color


def with_descriptions(n, shape, color):
    """Every other item asks for a description instead."""
    return ("image", DESCRIBE, DESCRIPTION.format(color)) if n % 2 else good(n, shape, color)


def write_data(folder, number=400):
    """Write pictures and four LLaVA-style JSON files about them into a folder, Path."""
    pictures = [picture(n, seed=0) for n in range(number)]
    for n, (image, _, _) in enumerate(pictures):
        image.save(folder / f"{n}.png")
    for form in (good, question_in_reply, misnamed, with_descriptions):
        items = []
        for n, (_, shape, color) in enumerate(pictures):
            field, question, answer = form(n, shape, color)
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            items.append({"id": n, field: f"{n}.png", "conversations": turns})
        (folder / f"{form.__name__}.json").write_text(json.dumps(items))


def build(size, vocab_size):
    """A ViT of one layer, one image token a picture, a decoder of two layers."""
    vision = ViT(ViTConfig(IMAGE_SIZE, 8, WIDTH, num_layers=1, num_heads=4, mlp_width=2 * WIDTH, class_token=False))
    layers = (LayerOptions(),) * 2
    decoder = Decoder(DecoderConfig(vocab_size, WIDTH, 4, 4, 2 * WIDTH, CONTEXT, layers, tied_head=True))
    return VLM(vision, PixelShuffleProjector(WIDTH, WIDTH, merge=3), decoder)


def stages(size, smoke):
    """One stage, in which everything learns to answer."""
    rates = dict.fromkeys(EVERYTHING, 4e-3) | {"embedding": 1e-2}
    return (Stage("answers", "language", rates, {"data": 1.0}, steps=40, batch_size=32, max_tokens=CONTEXT, optimizer="muon",
                  image_size=IMAGE_SIZE, warmup_steps=5, summary="answers: colors right {color}"),)  # fmt: skip


def tokenizer():
    """A tokenizer of the words that occur, each of which is one token."""
    words = [*map(QUESTION.format, SHAPES), DESCRIBE, *map(DESCRIPTION.format, COLORS), *COLORS]
    return train_tokenizer(["user: \nbot:", *(f" {text}" for text in words)] * 20, 400)


def evaluate(run, stage):
    """The share of the exam's colours that is right."""
    return {"color": shares(ask(assistant(run), exam()))["all"]}


RECIPE = Recipe(
    name="lesson 12", sizes=("tiny",), build=build, stages=stages, template=NANO, tokenizer=tokenizer, evaluate=evaluate,
    decodings={"default": Decoding(max_new_tokens=24)}, exam_every=10,
)  # fmt: skip
