"""The batch printed: what is trained, read and seen, in colour on a terminal only."""

import io
import json

import pytest
from PIL import Image

from nanovlm.data.__main__ import main
from nanovlm.data.batching import build_batch
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.show import BLUE, GREEN, GREY, PLAIN, legend, paint, use_color
from nanovlm.data.templates import NANO, Template


def batch_of(tokenizer, template, *conversations):
    visuals = tuple(Visual(f"v{n}", (Image.new("RGB", (4, 4)),)) for n in range(2))
    record = Record("r", visuals, conversations)
    return build_batch([record], template, tokenizer, lambda size, frames: 5, 4, "crop", 200)


def talk(*parts, answer="a Cat"):
    return Turn("user", parts), Turn("assistant", (answer,))


def test_marks_sizes_and_colours_for_a_terminal_that_wants_them(tokenizer):
    talks = talk(0, "what?", 1), talk("hi", answer="漢 </s>"), talk("\x1b[31m\t")  # which must not reach the terminal
    assert paint(batch_of(tokenizer, NANO, *talks), tokenizer, color=False)[1::2] == [
        "<image x10><s>user: what?↵bot:[ a Cat</s>]", "<s>user: hi↵bot:[ 漢 </s></s>]",
        r"<s>user: \x1b[31m\t↵bot:[ a Cat</s>]"]
    batch = batch_of(tokenizer, NANO, talk(1, "what is this?", 0), talk("hi"), talk(0, "what?"))
    heads, reply = paint(batch, tokenizer, color=False)[::2], len(tokenizer.encode(" a Cat")) + 1
    lengths = [size + 1 + len(tokenizer.encode(f"user: {question}\nbot:")) + reply
               for size, question in ((10, "what is this?"), (0, "hi"), (5, "what?"))]
    assert heads == [f"row {b}: {length} tokens, {reply} trained, {lengths[0] - length} padding, pictures {pictures}"
                     for b, (length, pictures) in enumerate(zip(lengths, ([0, 1], [], [1])))]
    lines = paint(batch_of(tokenizer, Template(), talk("is ", 0, " it?")), tokenizer, color=True)
    assert lines[1] == (
        f"{GREY}<s>user: is {PLAIN}{BLUE}<image x5>{PLAIN}{GREY} it?↵bot:{PLAIN}{GREEN} a Cat</s>{PLAIN}"
    )
    assert (GREEN, GREY, BLUE, PLAIN) == ("\x1b[32m", "\x1b[90m", "\x1b[34m", "\x1b[0m")
    assert legend(False) == "[trained (has a loss)]   read only   <image xN> N image tokens"
    assert legend(True).startswith(f"{GREEN}trained (has a loss){PLAIN}   {GREY}read only{PLAIN}   {BLUE}<image xN>")
    terminal, file = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    assert use_color(terminal, {}) and use_color(terminal, {"NO_COLOR": ""})
    assert not use_color(terminal, {"NO_COLOR": "1"}) and not use_color(file, {})


RECIPE = """
import dataclasses
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.recipes import nano
TEXTS = ["user: what is this?\\nbot: a cat"] * 20
RECIPE = dataclasses.replace(nano.RECIPE, tokenizer=lambda: train_tokenizer(TEXTS, 290))
"""


@pytest.fixture
def command(tmp_path):
    """The flags that show two records of a user's own file by the recipe nano with a quick tokenizer."""
    Image.new("RGB", (9, 5)).save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a Cat"}]
    words = [{"from": "gpt", "value": "X" * 140}]
    items = [{"id": "first", "image": "a.png", "conversations": talk}, {"id": "second", "conversations": words}]
    (tmp_path / "own.json").write_text(json.dumps(items))
    (tmp_path / "recipe.py").write_text(RECIPE)
    return ["show", "--recipe", str(tmp_path / "recipe.py"), "--data", str(tmp_path / "own.json")]


def test_a_users_own_file_and_the_recipes_own_data_by_seed(command, capsys):
    main([*command, "-n", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "recipe nano, stage instruct: 2 records in 2 rows; 1 cut to 128 tokens"
    assert sorted(lines[1].removeprefix("records: ").split(", ")) == ["first (data)", "second (data)"]
    assert lines[2] == legend(False)
    assert "<image x64><s>user: what is this?↵bot:[ a Cat</s>]" in lines[3:]
    assert f"<s>[{'X' * 127}]" in lines[3:]
    assert len(lines) == 7
    recipe = command[:3]
    shown = []
    for seed in ([], ["--seed", "0"], ["--seed", "1"]):
        main([*recipe, "-n", "1", *seed])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]
    assert "stage instruct: 1 records" in shown[0] and "cut to" not in shown[0] and "(scenes)" in shown[0]


@pytest.mark.parametrize("flags, message", [
    (["shw"], "unknown command 'shw'. Did you mean 'show'"), (["show", "-n", "0"], "-n 0: at least one record"),
    (["show", "--recipe", "nan"], "there is no recipe 'nan'. Did you mean 'nano'"),
    (["show", "--stage", "instrct"], "there is no stage 'instrct'. Did you mean 'instruct'"),
    (["show", "--stage", "tower"], "stage 'tower' compares pictures with captions"),
    (["show", "--data", "nowhere.json"], "nowhere.json: no such file"),
])
def test_unusable_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
