"""The benchmark's own machinery, on a model small enough for a test."""

import json

import pytest
import torch

from nanovlm.bench import decode, gpu
from nanovlm.bench.__main__ import BAD_INPUT, main

pytest.importorskip("transformers")
TINY = dict(vocab_size=97, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(decode.SIZES, "tiny", TINY)
    monkeypatch.setitem(decode.CASES["cpu"], "tiny", decode.Case("tiny", 5, 8, 0.0, rows_end=True))
    monkeypatch.setattr(decode, "SPREAD", 0.5)  # so narrow a model needs more not to repeat itself
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_both_write_the_same_and_rows_end_at_different_steps():
    theirs, model = decode.build("tiny", "cpu", torch.float32)
    case = decode.CASES["cpu"]["tiny"]
    prompts = decode.make_prompts(case, 97)
    assert len({len(prompt) for prompt in prompts}) == 5
    plain = decode.Decoding(max_new_tokens=8)
    answers = decode.generate(model, prompts, plain)
    ends = decode.Decoding(max_new_tokens=8, eos_ids=decode.end_tokens(answers))
    got = decode.generate(model, prompts, ends)
    assert got == decode.their_generate(theirs, prompts, ends) and len({len(row) for row in got}) > 1
    assert answers == decode.their_generate(theirs, prompts, plain)


def test_report(capsys):
    assert main(["decode", "--case", "tiny", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "transformers" in out and "tokens equal" in out and "(required 0.0: reached)" in out
    assert "GB/s, " in out and "GB/s of a plain sum" in out


@pytest.mark.parametrize("rate, word", [(1e-3, "reached"), (1e9, "MISSED")])
def test_a_rate_may_be_required_instead(rate, word):
    case = decode.Case("tiny", 1, 4, None, rate=rate)
    assert f"(required {rate:.0f} tokens/s on an H200: {word})" in "\n".join(decode.compare(case, 1, "cpu", torch.float32))


def test_other_tokens_are_no_result(monkeypatch):
    monkeypatch.setattr(decode, "their_generate", lambda model, prompts, decoding: [[1]] * len(prompts))
    with pytest.raises(RuntimeError, match="tokens are those of transformers: no speed to compare"):
        decode.compare(decode.CASES["cpu"]["tiny"], 1, "cpu", torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without CUDA")
def test_no_gpu_here(capsys, tmp_path):
    for command, *flags in (["decode"], ["train", "--out", str(tmp_path / "results")]):
        assert main([command, "--device", "cuda", *flags]) == BAD_INPUT
        assert "--device cuda cannot be used here" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_bad_input(capsys):
    for command, case, known in (("decode", "8B", "135M, 4M"), ("train", "7B-slice", "4M, 135M on cpu")):
        assert main([command, "--case", case]) == BAD_INPUT
        assert f"--case {case} is none of {known}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["decode", "--rounds", "0"])
    assert "0: at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["decode", "--devic", "cpu"])


def test_all_that_a_gpu_can_tell_is_rehearsed_without_one(tmp_path, monkeypatch):
    """A part that fails leaves its error, and the next one runs; the file is there after each."""
    def broken(args, minutes):
        assert "equality" in json.loads((tmp_path / "gpu.json").read_text())["parts"]
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "nano", broken)
    parts = [word for name in ("equality", "nano", "attention", "lynx", "decoding") for word in ("--part", name)]
    assert main(["gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path), *parts]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert "no such kernel" in found["nano"]["error"] and found["decoding"]["result"]["tokens_per_second"] > 0
    assert {line["contender"] for line in found["attention"]["result"]} == {"nanovlm", "sdpa"}
    assert found["lynx"]["result"][0]["gb_estimated"] > 0
    assert main(["gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path), "--minutes", "0"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {part["error"] for part in found.values()} == {"no time was left"}
