"""Whole runs over the feed: workers, groups, packing and damage change what they should and nothing else."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nanovlm.data.__main__ import main
from nanovlm.training.progress import Stopped
from test_trainer import RECIPE, Squares, StopAfter, hooked, losses, make, train

SETTINGS = ["align.group=2", "align.packing=true"]


def weights(out):
    return load_file(out / "model.safetensors")


def assert_equal(one, other):
    assert losses(one) == losses(other)
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A run with grouped batches packed into rows, without workers and uninterrupted."""
    return train(make(tmp_path_factory.mktemp("grouped") / "run", set=SETTINGS)).out


@pytest.mark.parametrize("last", [pytest.param(3, marks=pytest.mark.slow), 7, pytest.param(9, marks=pytest.mark.slow)])
def test_interrupted_runs_with_workers_are_the_same(tmp_path, grouped, last):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(make(out, set=SETTINGS, workers=2), StopAfter(out, last))
    train(make(out, set=SETTINGS, workers=1))
    assert_equal(out, grouped)


class Spoiled(Squares):
    """A source with two bad records, the second and third of the second stage."""

    def record(self, n):
        if n in (37, 38):
            raise ValueError(f"square-{n}: cut short")
        return super().record(n)


class Mended(Squares):
    """The same, with what should stand in the place of the bad records."""

    def record(self, n):
        return super().record(39 if n in (37, 38) else n)


def spoiled(out, source=Spoiled, **wishes):
    return make(out, hooked(sources=RECIPE.sources | {"pictures": source}), max_damaged=0.03, **wishes)


def test_damage_is_replaced_by_the_next_and_reported(tmp_path, capsys):
    mended = train(spoiled(tmp_path / "mended", Mended)).out
    assert not (mended / "damaged.jsonl").exists()
    out = tmp_path / "run"
    for last in (7, 8):
        with pytest.raises(Stopped):
            train(spoiled(out, workers=last - 7), StopAfter(out, last))
    with open(out / "damaged.jsonl", "a") as file:
        file.write('{"stage": "align", "step": 99, "source": "pict')  # a kill cut it short
    train(spoiled(out, workers=1))
    assert_equal(out, mended)
    listed = [json.loads(line) for line in (out / "damaged.jsonl").read_text().splitlines()]
    words = {n: {"source": "pictures", "record": n - 36, "id": None, "error": f"square-{n}: cut short", "replaced_by": n - 35}
             for n in (37, 38)}  # a stage counts from where the one before it stopped
    assert listed == [{"stage": "align", "step": 7} | words[n] for n in (37, 38, 38)]
    assert "stage align: 3 damaged records were replaced by the next, see" in capsys.readouterr().out


@pytest.fixture
def datasets(tmp_path):
    """A datasets file of JSON lines with picture files, one of them cut short, and of the same converted to shards."""
    for n in range(12):
        Image.effect_mandelbrot((40 + n, 30), (-2, -1.5, 1, 1.5), 9).save(tmp_path / f"{n}.jpg")
    whole = (tmp_path / "7.jpg").read_bytes()
    talk = [{"from": "human", "value": "<image>\ncolour?"}, {"from": "gpt", "value": "red blue"}]
    items = [{"id": n, "image": f"{n}.jpg", "conversations": talk} for n in range(12)]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, items)))
    main(["convert", "llava", str(tmp_path / "some.jsonl"), str(tmp_path / "shards"), "--shards", "5"])
    (tmp_path / "7.jpg").write_bytes(whole[: len(whole) // 2])
    listed = {"json": {"reader": "llava", "path": "some.jsonl", "prompts": ["{question} Briefly.", "Say: {question}"]},
              "tar": {"reader": "shards", "path": "shards"}}
    (tmp_path / "sets.json").write_text(json.dumps(listed))
    return tmp_path / "sets.json"


@pytest.mark.slow
def test_files_and_shards_train_through_a_datasets_file(datasets, tmp_path):
    mixture = [f"align.mixture.{name}" for name in ("pictures=none", "words=none", "json=2", "tar=1")]
    runs = [train(make(tmp_path / f"run {workers}", datasets=str(datasets), stages=["align"], workers=workers, max_damaged=0.5,
                       set=[*mixture, "align.augmentation=crop", "align.micro_batch_size=none"])).out for workers in (0, 2)]
    assert_equal(*runs)
    damaged = [(run / "damaged.jsonl").read_text() for run in runs]
    assert damaged[0] == damaged[1]
    listed = [json.loads(line) for line in damaged[0].splitlines()]
    assert len(listed) == 2, "24 records are two epochs of 12"
    assert {(one["source"], one["id"]) for one in listed} == {("json", "7")}
    assert all("7.jpg: the image is damaged or cut short" in one["error"] for one in listed)
    assert all("data_seconds" in json.loads(line) for line in (runs[1] / "log.jsonl").read_text().splitlines() if "loss" in line)
