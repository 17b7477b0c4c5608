"""The recipes as a user meets them: names, sizes, the nano run from nothing to a model that can be asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovlm import recipes
from nanovlm.recipes import RECIPES, nano
from nanovlm.vlm import IMAGE_TOKEN

ROOT = Path(__file__).parents[2]


def run(script, *arguments):
    """A command line of the project in a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Output folder of a smoke run at the tiny size."""
    out = tmp_path_factory.mktemp("nano") / "smoke"
    done = run("train.py", "nano", "--smoke", "--size", "tiny", "--threads", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_every_row_of_every_source_fits_and_trains():
    tokenizer = nano.tokenizer()
    from nanovlm.data.batching import build_batch

    model = nano.build("tiny", tokenizer.vocab_size)
    for name, make in RECIPES["nano"].sources.items():
        records = [make(0).record(n) for n in range(20)]
        batch = build_batch(records, nano.RECIPE.template, tokenizer, model.num_image_tokens, 64, "crop", max_tokens=256)
        lengths = (batch.segments >= 0).sum(1)  # a text with ten questions may be cut, its last answers and no picture's
        assert int(lengths.max()) <= 128 or name == "texts" and float((lengths > 128).float().mean()) < 0.2, name
        per_picture = int((batch.ids == IMAGE_TOKEN).sum()) / max(len(batch.owner), 1)
        assert per_picture == (model.num_image_tokens(64) if len(batch.owner) else 0), name


def test_a_seed_draws_the_tower_before_the_decoder_before_the_bridge():
    """Another order would give other numbers than the published ones."""
    torch.manual_seed(3)
    model = nano.build("tiny", 300)
    torch.manual_seed(3)
    assert all(map(torch.equal, nano.tower("tiny").parameters(), model.vision.parameters()))
    decoder = type(model.decoder)(model.decoder.config)
    assert all(map(torch.equal, decoder.parameters(), model.decoder.parameters()))
    assert all(map(torch.equal, nano.projector(32).parameters(), model.bridge.parameters()))


def test_tokenizer_is_the_same_every_time_and_reads_symbols_one_by_one():
    first, second = nano.tokenizer(), nano.tokenizer()
    assert first.backend.to_str() == second.backend.to_str()
    assert len(first.encode("A7K")) == 3
    assert len(first.encode("user: what color is the star?\nbot:")) <= 8  # frequent words are one token


def test_smoke_run_leaves_a_model_that_opens_and_answers(smoke):
    out, printed = smoke
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "log.jsonl", "results.json"} <= names
    assert {"curves.png", "samples.png"} <= names
    results = json.loads((out / "results.json").read_text())
    for key in ("easy_vqa_test", "scenes_new", "scenes_unseen_pairs", "scenes_reading", "described", "blank_easy_vqa"):
        assert 0 <= results[key] <= 1
    assert results["parameters"] > 0 and results["seconds"] > 0
    losses = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in losses if "loss" in entry]
    assert len(losses) == sum(stage.steps for stage in nano.stages("tiny", True))
    assert "python sample.py" in printed and "frozen tensors has moved" in printed
    loaded = recipes.load(out, dtype=torch.float64)
    assert loaded.image_size == 64 and not loaded.model.training
    assert next(loaded.model.parameters()).dtype == torch.float64
    assert loaded.model.decoder.config.vocab_size == loaded.tokenizer.vocab_size
    done = run("sample.py", out, "--draw", "red circle left of blue star", "how many objects are there?")
    assert done.returncode == 0, done.stderr
    assert "drawn" in done.stdout and "only ever seen drawings" not in done.stdout


@pytest.mark.parametrize(("spoil", "error", "words"), [
    (lambda out: (out / "model.safetensors").unlink(), FileNotFoundError, "has not finished"),
    (lambda out: (out / "config.json").unlink(), FileNotFoundError, "output folder of train.py"),
    (lambda out: (out / "config.json").write_text("{"), ValueError, "not JSON"),
    (lambda out: (out / "config.json").write_text("{}"), ValueError, "names no recipe"),
    (lambda out: (out / "config.json").write_text((out / "config.json").read_text().replace('"ffn_width": 80', '"ffn_width": 88')),
     ValueError, "does not fit recipe 'nano'"),
])  # fmt: skip
def test_load_refuses_what_is_incomplete(smoke, tmp_path, spoil, error, words):
    for path in smoke[0].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    with pytest.raises(error, match=words):
        recipes.load(tmp_path)


def test_the_two_nano_recipes_differ_by_the_bridge_alone():
    with torch.device("meta"):
        one, other = (RECIPES[name].build("full", nano.VOCABULARY) for name in ("nano", "nano_resampler"))
    shapes = [
        {name: p.shape for name, p in model.named_parameters() if not name.startswith("bridge.")} for model in (one, other)
    ]
    assert shapes[0] == shapes[1]
    assert one.num_image_tokens(64) == other.num_image_tokens(64) == 64
    assert RECIPES["nano"].stages("full", False) == RECIPES["nano_resampler"].stages("full", False)
    with pytest.raises(ValueError, match="no recipe 'nanno'.*'nano'"):
        recipes.find("nanno")
