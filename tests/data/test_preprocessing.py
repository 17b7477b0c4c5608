"""A model's own preprocessing reaches training and conversation: batches, both losses, chat."""

import dataclasses

import numpy
import torch
from PIL import Image

import tiny_recipe
from nanovlm.training import update
from nanovlm.generation.chat import Assistant, Chat
from nanovlm.training.checkpoint import replace_tensors
from nanovlm.data import images
from nanovlm.data.batching import Report
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.templates import NANO, PLAIN
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.published.load import open_trained
from nanovlm.generation.sampler import Decoding
from test_trainer import make
from tiny import random_vlm

PICTURE = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=numpy.uint8))
RECORD = Record("r", (Visual("v", (PICTURE,)),), ((Turn("user", (0, "what?")), Turn("assistant", ("red",))),))


def wanted(size, fit, preprocessing):
    return images.to_pixels(PICTURE, size, fit, preprocessing)[None]


def test_training_sees_the_recipes_pixels_and_the_stages_template(tmp_path):
    recipe = dataclasses.replace(tiny_recipe.RECIPE, preprocessing=images.SIGLIP, stage_templates={"align": PLAIN})
    run = make(tmp_path / "run", recipe, smoke=True)
    tower, align = run.stages
    (batch,), = update.language_batch(run, align, [RECORD], Report(), 1).inputs
    ((pixels, _),), *_ = update.pairs_batch(run, tower, [RECORD], Report(), 1).inputs
    assert torch.equal(batch.pixels, wanted(align.image_size, align.image_fit, images.SIGLIP))
    assert torch.equal(pixels, wanted(tower.image_size, tower.image_fit, images.SIGLIP))
    written = [id for id in batch.ids[0].tolist() if id >= 0]
    assert written == [run.tokenizer.bos, *run.tokenizer.encode("red\n")]
    plain = make(tmp_path / "plain", smoke=True)
    (batch,), = update.language_batch(plain, align, [RECORD], Report(), 1).inputs
    assert torch.equal(batch.pixels, wanted(align.image_size, align.image_fit, images.CLIP))


def test_a_folder_is_asked_in_the_form_of_its_last_stage(tmp_path):
    recipe = dataclasses.replace(tiny_recipe.RECIPE, stage_templates={"align": PLAIN})
    run = make(tmp_path / "run", recipe, smoke=True)
    replace_tensors(run.out / "model.safetensors", run.model.state_dict())
    config = run.identity | {"image_size": run.model.vision.image_size}
    assert open_trained(run.out, config, recipe, torch.float32, "cpu").template == PLAIN
    config |= {"stages": {"tower": config["stages"]["tower"]}}
    assert open_trained(run.out, config, recipe, torch.float32, "cpu").template == NANO


def test_a_chat_sees_the_models_pixels():
    tokenizer = train_tokenizer(["what?"], 270)
    model = random_vlm(tokenizer.vocab_size, context_length=60)
    for preprocessing in (images.CLIP, images.SIGLIP):
        chat = Chat(Assistant(model, tokenizer, NANO, 8, "pad", preprocessing), Decoding(max_new_tokens=2))
        chat.ask("what?", [PICTURE])
        assert torch.equal(chat.prompt.visual_inputs[0], wanted(8, "pad", preprocessing))
