"""Two recipes compared: from one start, with the same seeds, by paired differences."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import tiny_recipe
import train
from nanovlm.recipes import against

TINY = tiny_recipe.__file__
OTHER_BRIDGE = """
import dataclasses
from nanovlm.projector import LinearProjector
from tiny_recipe import RECIPE, WIDTH, build

def rebuilt(size, vocab_size):
    model = build(size, vocab_size)
    model.bridge = LinearProjector(WIDTH, WIDTH)
    return model

RECIPE = dataclasses.replace(RECIPE, name="linear", build=rebuilt)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    out = tmp_path_factory.mktemp("start") / "tiny"
    assert train.main([TINY, "--out", str(out), "--threads", "1"]) == 0
    return out


def rows(printed):
    """{measure: [its numbers]} of a printed table."""
    lines = [line for line in printed.splitlines() if re.match(r"\w[\w ]*? {2,}[\d.]+%", line)]
    return {line.split("  ")[0]: [float(one) for one in re.findall(r"[+-]?\d+\.\d", line)] for line in lines}


def test_a_recipe_against_itself_differs_in_nothing(start, tmp_path, capsys):
    out = tmp_path / "same"
    flags = [TINY, "--against", TINY, "--init", str(start), "--out", str(out), "--set", "align.steps=3", "--threads", "1"]
    assert train.main(flags) == 0
    *_, gain, low, high, could_see = rows(capsys.readouterr().out)["color"]
    assert (gain, low, high, could_see) == (0, 0, 0, 0)
    configs = [json.loads((out / run / "config.json").read_text()) for run in ("a_0", "b_0", "a_2", "b_2")]
    assert [one["seed"] for one in configs] == [0, 0, 2, 2] and {tuple(one["stage_names"]) for one in configs} == {("align",)}
    assert configs[0]["stages"]["align"]["steps"] == 3
    before = [(out / run / "log.jsonl").read_text().count('"loss"') for run in ("a_1", "b_1")]
    assert before == [3, 3] and train.main(flags) == 0  # a finished run is not trained again, and its settings stand
    assert [(out / run / "log.jsonl").read_text().count('"loss"') for run in ("a_1", "b_1")] == before
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--set", "align.steps=4"])
    assert stop.value.code == 2


def test_a_flag_reaches_every_run_and_a_setting_that_none_would_read_is_refused(start, tmp_path):
    flags = [TINY, "--against", TINY, "--init", str(start), "--out", str(tmp_path), "--precision", "bfloat16", "--smoke"]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--set", "tower.steps=3"])
    assert stop.value.code == 2 and train.main([*flags, "--set", "align.batch_size=5", "--threads", "1"]) == 0
    for run in ("a_0", "b_2"):
        stage = json.loads((tmp_path / run / "config.json").read_text())["stages"]["align"]
        assert (stage["precision"], stage["batch_size"], stage["steps"]) == ("bfloat16", 5, 6)


def test_a_part_or_tensor_that_differs_begins_anew_in_both(start, tmp_path, capsys):
    (tmp_path / "linear.py").write_text(OTHER_BRIDGE)
    recipes = [against.find(TINY), against.find(str(tmp_path / "linear.py"))]
    folders, anew = against.write_starts(recipes, ["full", "full"], 1, start, tmp_path)
    known, ours, theirs = (load_file(folder / "model.safetensors") for folder in (start, *folders))
    assert anew and all(name.startswith("bridge.") for name in anew)
    for name in ours.keys() & theirs.keys() - set(anew):
        assert ours[name].equal(known[name]) and theirs[name].equal(known[name]), name
    assert not any(ours[name].equal(known[name]) for name in ours.keys() & set(anew) if name.endswith("weight"))
    def wider(size, vocab_size):
        model = tiny_recipe.build(size, vocab_size)
        model.vision.blocks[0].fc_1, model.vision.blocks[0].fc_2 = torch.nn.Linear(16, 30), torch.nn.Linear(30, 16)
        return model

    recipes = [tiny_recipe.RECIPE, dataclasses.replace(tiny_recipe.RECIPE, build=wider)]
    folders, anew = against.write_starts(recipes, ["full", "full"], 1, start, tmp_path / "wider")
    assert anew == [f"vision.blocks.0.{name}" for name in ("fc_1.bias", "fc_1.weight", "fc_2.weight")]
    ours, theirs = (load_file(folder / "model.safetensors")["vision.blocks.0.fc_1.weight"] for folder in folders)
    assert ours.shape == (24, 16) and theirs.shape == (30, 16)


def test_intervals_and_the_smallest_effect():
    """By hand: gains 10, 20 and 5 points, deviation 7.64, standard error 4.41."""
    found = [({"x": 0.5}, {"x": 0.4}), ({"x": 0.7}, {"x": 0.5}), ({"x": 0.6}, {"x": 0.55})]
    numbers = rows("\n".join(against.table(found, ("ours", "theirs"))))["x"]
    assert numbers == [60.0, 48.3, 11.7, -7.3, 30.6, 23.7]
    results = {"easy": 0.5, "seconds": 3.0, "kinds": {"easy": {"color": 0.25}}, "interval": {"easy": [0.1, 0.2]}}
    assert against.shares(results) == {"easy": 0.5, "easy color": 0.25}
