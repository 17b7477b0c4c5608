import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sample
from nanovlm.data.templates import NANO
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.generation.chat import Assistant, Chat
from nanovlm.generation.sampler import Decoding
from nanovlm.recipes import opening
from nanovlm.vlm import VLM
from tiny import random_vlm

DECODINGS = {"default": Decoding(max_new_tokens=5), "describe": Decoding(max_new_tokens=3), "beams": Decoding(num_beams=2)}
SIZE = 48


@pytest.fixture(scope="module")
def loaded():
    tokenizer = train_tokenizer(["user: how many shapes are there?\nbot: two"] * 3, 300)
    model = random_vlm(tokenizer.vocab_size, context_length=100, image_size=SIZE)
    return Assistant(model, tokenizer, NANO, SIZE, decodings=DECODINGS, remark="only drawings")


@pytest.fixture
def run(loaded, monkeypatch, capsys, tmp_path):
    """Run the command line on the loaded model: (code, what it printed, what it complained)."""
    calls = []

    def run(*arguments, says="", model=loaded):
        monkeypatch.setattr(opening, "load", lambda folder, **options: calls.append((folder, options)) or model)
        monkeypatch.setattr(sys, "stdin", io.StringIO(says))
        code = sample.main([str(tmp_path), *arguments])
        return SimpleNamespace(code=code, calls=calls, **dict(zip(("out", "err"), capsys.readouterr())))

    return run


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (50, 40), "green").save(path)
    return str(path)


def test_an_answer_without_picture(run, loaded):
    done = run("how many?", "--greedy")
    assert done.code == 0 and done.err == ""
    ids = [loaded.tokenizer.bos, *loaded.tokenizer.encode("user: how many?\nbot:")]
    decoding = Decoding(max_new_tokens=5, eos_ids=(loaded.tokenizer.eos,))
    want = loaded.chat(decoding)
    assert done.out == want.ask("how many?") + "\n" and want.prompt.row.ids == ids
    assert done.calls[0][1] == {"dtype": torch.float32, "device": sample.parse(["a"]).device, "recipe": None}


def test_a_photograph_gets_the_remark_and_a_drawing_does_not(run, loaded, photo, tmp_path):
    done = run("what is it?", "--image", photo)
    assert done.code == 0 and done.out.endswith("\n(only drawings)\n")
    done = run("what is it?", "--draw", "small red circle")
    assert done.code == 0 and "only drawings" not in done.out
    own = tmp_path / "own.png"
    Image.new("RGB", (SIZE, SIZE)).save(own)
    assert "only drawings" not in run("what?", "--image", str(own)).out
    assert run("what is it?", "--image", photo, model=dataclasses.replace(loaded, remark="")).out.count("\n") == 1
    assert "only drawings" in run("what?", "--image", str(own), "--image", photo).out
    path, drawn = tmp_path / "drawn.png", []
    for seed in "334":
        assert run("what?", "--draw", "small red circle", "--seed", seed).out.startswith(f"(drawn: {path})\n")
        with Image.open(path) as image:
            drawn.append((image.size, image.tobytes()))
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0][0] == (SIZE, SIZE)


def test_attention_is_saved(run, photo, tmp_path):
    path = tmp_path / "looks.png"
    done = run("what?", "--image", photo, "--attention", str(path), "--max-new-tokens", "2", "--draw", "small red ring")
    assert done.code == 0 and done.out.endswith(f"(attention: {path})\n")
    with Image.open(path) as image:
        assert image.width > 300 and image.height > 400, "two pictures one above the other"


@pytest.fixture
def clip(tmp_path):
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    return str(tmp_path / "clip.gif")


def test_pictures_and_clips_stand_in_order(run, clip, photo, monkeypatch):
    asked = []
    monkeypatch.setattr(Chat, "stream", lambda self, question, pictures: asked.append(pictures) or iter("ok"))
    done = run("what?", "--video", clip, "--frames", "2", "--image", photo, "--draw", "small red ring", "--image", photo)
    *pictures, frames, drawn = asked[0]
    assert [one.size for one in (*pictures, drawn)] == [(50, 40), (50, 40), (SIZE, SIZE)]
    assert [frame.size for frame in frames] == [(30, 20)] * 2 and isinstance(frames, list)
    assert done.code == 0 and "\nok\n" in done.out and "only drawings" in done.out
    asked.clear()
    run("--frames", "3", says=f"/video {clip}\none\ntwo\n")
    assert [[len(frames) for frames in pictures] for pictures in asked] == [[3], []]


def test_timing_speaks_of_every_part(run, photo):
    done = run("what?", "--image", photo, "--image", photo, "--greedy", "--timing")
    lines = done.err.splitlines()
    assert done.code == 0 and [line.split()[0] for line in lines] == ["images", "prompt", "decoding"]
    assert "(2 encoded)" in lines[0] and "tokens)" in lines[1] and "tokens/s)" in lines[2]
    assert run("what?", "--image", photo, "--greedy").out == run("what?", "--image", photo, "--greedy", "--fast").out


def test_a_bare_tower_cannot_talk_and_a_bare_language_model_cannot_see(run, loaded, photo):
    done = run("what?", "--fast", model=dataclasses.replace(loaded, model=loaded.model.vision))
    assert done.code == 2 and "a ViT alone writes no text" in done.err
    blind = dataclasses.replace(loaded, model=VLM(None, None, loaded.model.decoder), image_size=0)
    assert run("what?", model=blind).out == run("what?").out
    for flags in (("--image", photo), ("--draw", "small red circle")):
        done = run("what?", *flags, model=blind)
        assert done.code == 2 and "reads no pictures" in done.err


def test_text_is_printed_while_it_is_made(run, monkeypatch, capsys):
    printed = []

    def slowly(self, question, pictures):
        for piece in ("one", "two"):
            printed.append(capsys.readouterr().out)
            yield piece

    monkeypatch.setattr(Chat, "stream", slowly)
    assert run("what?").out == "two\n" and printed == ["", "one"]


@pytest.mark.parametrize("flags, want", [
    ([], DECODINGS["default"]),
    (["--preset", "beams"], DECODINGS["beams"]),
    (["--preset", "beams", "--greedy"], Decoding()),
    (["--greedy", "--max-new-tokens", "7"], Decoding(max_new_tokens=7)),
    (["--num-beams", "4"], Decoding(max_new_tokens=5, num_beams=4)),
    (["--temperature", "0.5"], Decoding(max_new_tokens=5, temperature=0.5, do_sample=True)),
    (["--temperature", "0"], Decoding(max_new_tokens=5)),
    (["--top-k", "3"], Decoding(max_new_tokens=5, top_k=3, do_sample=True)),
    (["--top-p", "0.8", "--num-beams", "2"], Decoding(max_new_tokens=5, top_p=0.8, num_beams=2, do_sample=True)),
])
def test_flags_change_the_preset(loaded, flags, want):
    assert sample.choose_decoding(loaded, sample.parse(["folder", *flags])) == want


def test_seed_decides_what_is_drawn(run, monkeypatch):
    answers = {seed: run("what?", "--temperature", "3.0", "--seed", seed).out for seed in "0123"}
    assert len(set(answers.values())) > 1
    assert run("what?", "--temperature", "3.0", "--seed", "0").out == answers["0"]
    monkeypatch.setattr(opening, "slow_line", lambda dtype, device: f"slow in {dtype}" if dtype != "float32" else None)
    done = run("what?", "--dtype", "bfloat16", "--device", "cpu")
    assert done.err == "(slow in bfloat16)\n" and done.calls[-1][1] == {"dtype": torch.bfloat16, "device": "cpu", "recipe": None}
    assert run("what?", "--device", "cpu").err == ""


def test_the_question_may_stand_anywhere():
    for words in (["folder", "--image", "a", "q"], ["folder", "q", "--image", "a"], ["--image", "a", "folder", "q"]):
        args = sample.parse(words)
        assert (args.folder, args.question, args.image) == ("folder", "q", ["a"])
    assert sample.parse(["folder", "--image", "a"]).question is None
    program = Path(sample.__file__)
    done = subprocess.run([sys.executable, program, "--help"], capture_output=True, text=True, cwd=program.parent)
    assert done.returncode == 0 and "/image PATH" in done.stdout and "--describe-first" in done.stdout


@pytest.mark.parametrize("flags, message", [
    (["--imag", "x.png", "q"], "unknown flag '--imag'. Did you mean '--image'?"),
    (["q", "--imag", "x.png"], "unknown flag '--imag'. Did you mean '--image'?"),
    (["q", "--top_k=3"], "unknown flag '--top_k'. Did you mean '--top-k'?"),
    (["what", "is", "this?"], "unexpected 'is'; put the whole question in quotes"),
    (["q", "--greedy", "--top-p", "0.9"], "--greedy and --top-p contradict"),
    (["q", "--greedy", "--top-k", "0"], "--greedy and --top-k contradict"),
    (["q", "--greedy", "--num-beams", "2"], "--greedy and --num-beams contradict"),
    (["q", "--greedy", "--temperature", "1"], "--greedy and --temperature contradict"),
    (["q", "--attention", "a.png"], "--attention needs a question and a picture"),
    (["--attention", "a.png", "--draw", "red ring"], "--attention needs a question and a picture"),
    (["q", "--describe-first"], "--describe-first needs a picture"),
    (["q", "--video", "a.gif", "--attention", "a.png"], "--video and --attention contradict"),
    (["q", "--frames", "0"], "--frames 0: a clip needs at least 1"),
    (["q", "--dtype", "float8"], "invalid choice: 'float8'"),
])
def test_bad_flags(run, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["q", "--preset", "beam"], "unknown preset 'beam'. Did you mean 'beams'?"),
    (["q", "--image", "nothing.png"], "nothing.png: no such image"),
    (["q", "--video", "nothing.mp4"], "nothing.mp4"),
    (["q", "--draw", "red circel"], "unknown word 'circel'. Did you mean 'circle'?"),
    (["q", "--max-new-tokens", "100"], "the context has 100"),
    (["q", "--top-p", "2"], "top_p is 2.0"),
    ([""], "the question is empty"),
    (["q", "--device", "nonsense"], "--device nonsense cannot be used here"),
])
def test_bad_input_is_one_line_and_code_2(run, flags, message):
    done = run(*flags)
    assert done.code == 2 and done.err.startswith("sample.py: ") and done.err.count("\n") == 1
    assert message in done.err and "Traceback" not in done.err


def test_chat_keeps_its_history(run, photo, monkeypatch):
    asked = []

    def ask(self, question, pictures):
        asked.append((question, len(pictures), len(self.turns)))
        self.turns = self.turns + [question]
        return iter([f"<{question}>"])

    monkeypatch.setattr(Chat, "stream", ask)
    says = f"\none\n/image {photo}\n/image {photo}\n  two \nthree\n/image {photo}\n/reset\nfour\n/exit\nfive\n"
    done = run("--draw", "small red ring", says=says)
    assert done.code == 0
    assert asked == [("one", 1, 0), ("two", 2, 1), ("three", 0, 2), ("four", 0, 0)]
    assert done.out.count("<") == 4 and "<four>" in done.out
    assert done.out.count("only drawings") == 1


def test_a_mistake_in_a_chat_is_said_and_the_chat_goes_on(run, photo, tmp_path):
    Path(tmp_path / "broken.png").write_bytes(b"no picture")
    says = f"/imag x\n/image {tmp_path / 'broken.png'}\n/image {tmp_path / 'none.png'}\n/image {photo}\n{'long ' * 200}\nshort?\n"
    done = run(says=says)
    assert done.code == 0 and done.err == ""
    assert "unknown command '/imag'. Did you mean '/image'?" in done.out
    assert "broken.png" in done.out and "none.png: no such image" in done.out and "the context has 100" in done.out
    assert done.out.endswith("\n") and done.out.count("only drawings") == 1, "the picture waited for the next question"


def test_every_new_picture_is_described_first(run, photo):
    done = run("--describe-first", says=f"one\n/image {photo}\ntwo\nthree\n")
    assert done.code == 0 and done.out.count("(description: ") == 1
    done = run("what?", "--image", photo, "--describe-first")
    assert done.code == 0 and done.out.startswith("(description: ")
    done = run(says="a question about nothing at all\n" * 6)
    assert done.code == 0 and "(the context was full: 1 earlier exchanges forgotten)" in done.out


def test_ctrl_c_leaves_politely(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    done = run()
    assert done.code == 0 and done.err == "" and done.out.endswith("\n")
    monkeypatch.setattr(Chat, "stream", interrupted)
    assert run("what?").code == 130
    lines = iter(["what?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    done = run()
    assert done.code == 0 and "stopped" in done.out
