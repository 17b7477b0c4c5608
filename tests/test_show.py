"""The batch printed: what is trained, read and seen, in colour on a terminal only."""

import io

import pytest
import torch
from PIL import Image

from nanovlm.data.__main__ import main
from nanovlm.data.batching import build_batch
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.show import BLUE, GREEN, GREY, PLAIN, legend, paint, use_color
from nanovlm.data.templates import NANO, Template
from nanovlm.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user: what is this?\nbot: a cat"] * 20, 290)


def batch_of(tokenizer, template, *conversations):
    visuals = tuple(Visual(f"v{n}", (Image.new("RGB", (4, 4)),)) for n in range(2))
    return build_batch([Record("r", visuals, conversations)], template, tokenizer, lambda size, frames: 5, 4, "crop", 200)


def talk(*parts, answer="a Cat"):
    return Turn("user", parts), Turn("assistant", (answer,))


def test_marks_without_colour(tokenizer):
    lines = paint(batch_of(tokenizer, NANO, talk(0, "what?", 1), talk("hi", answer="漢 </s>")), tokenizer, color=False)
    assert lines[1] == "<image x10><s>user: what?↵bot:[ a Cat</s>]"
    assert lines[3] == "<s>user: hi↵bot:[ 漢 </s></s>]"
    assert len(lines) == 4


def test_sizes_of_the_rows(tokenizer):
    batch = batch_of(tokenizer, NANO, talk(1, "what is this?", 0), talk("hi"), talk(0, "what?"))
    lines = paint(batch, tokenizer, color=False)
    reply = len(tokenizer.encode(" a Cat")) + 1
    lengths = [10, 0, 5]
    for b, question in enumerate(("what is this?", "hi", "what?")):
        lengths[b] += 1 + len(tokenizer.encode(f"user: {question}\nbot:")) + reply
    for b, pictures in enumerate(([0, 1], [], [1])):
        padding = lengths[0] - lengths[b]
        assert lines[2 * b] == f"row {b}: {lengths[b]} tokens, {reply} trained, {padding} padding, pictures {pictures}"


def test_colours(tokenizer):
    lines = paint(batch_of(tokenizer, Template(), talk("is ", 0, " it?")), tokenizer, color=True)
    assert lines[1] == (
        f"{GREY}<s>user: is {PLAIN}{BLUE}<image x5>{PLAIN}{GREY} it?↵bot:{PLAIN}{GREEN} a Cat</s>{PLAIN}"
    )
    assert (GREEN, GREY, BLUE, PLAIN) == ("\x1b[32m", "\x1b[90m", "\x1b[34m", "\x1b[0m")


def test_control_characters_do_not_reach_the_terminal(tokenizer):
    lines = paint(batch_of(tokenizer, NANO, talk("\x1b[31m\t")), tokenizer, color=False)
    assert lines[1] == r"<s>user: \x1b[31m\t↵bot:[ a Cat</s>]"


def test_padding_ids_are_named_where_they_are_real(tokenizer):
    batch = batch_of(tokenizer, NANO, talk("hi"))
    batch.ids[0, :2] = torch.tensor([tokenizer.pad, tokenizer.pad])
    assert paint(batch, tokenizer, color=False)[1].startswith("<pad><pad>")


def test_legend():
    assert legend(False) == "[trained (has a loss)]   read only   <image xN> N image tokens"
    assert legend(True).startswith(f"{GREEN}trained (has a loss){PLAIN}   {GREY}read only{PLAIN}   {BLUE}<image xN>")


def test_colour_only_on_a_terminal_that_wants_it():
    terminal, file = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    assert use_color(terminal, {}) and use_color(terminal, {"NO_COLOR": ""})
    assert not use_color(terminal, {"NO_COLOR": "1"})
    assert not use_color(file, {})
