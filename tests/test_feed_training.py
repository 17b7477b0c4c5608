"""Whole runs over the feed: workers, groups, packing and damage change what they should and nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nanovlm.interrupts import Stopped
from nanovlm.update import TrainingError
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


@pytest.mark.parametrize("last", [3, 7, 9])
def test_interrupted_runs_with_workers_are_the_same(tmp_path, grouped, last):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(make(out, set=SETTINGS, workers=2), StopAfter(out, last))
    train(make(out, set=SETTINGS, workers=1))
    assert_equal(out, grouped)


def test_packing_changes_the_rows_and_not_the_losses(tmp_path, grouped):
    apart = train(make(tmp_path / "run", set=SETTINGS[:1])).out
    for (step, loss), (_, expected) in zip(losses(apart), losses(grouped)):
        assert loss == pytest.approx(expected, rel=1e-4), step
    assert not all(torch.equal(tensor, weights(grouped)[name]) for name, tensor in weights(apart).items()), "another order of sums"


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


def test_too_much_damage_stops_the_run_until_it_is_allowed(tmp_path):
    class Worse(Spoiled):
        def record(self, n):
            if n == 45:
                raise ValueError("square-45: gone")
            return super().record(n)

    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="stage align, step 3 of 6: 4 of 18 records are damaged, more than max_damaged 0.03"):
        train(spoiled(out, Worse))
    recipe = hooked(sources=RECIPE.sources | {"pictures": Worse})
    train(make(out, recipe, max_damaged=0.04))
    assert len((out / "damaged.jsonl").read_text().splitlines()) == 4
