"""`train.py --print`: a plan of every recipe, without a weight, a file or a folder."""

import argparse
import re

import pytest

from nanovlm.recipes import RECIPES
from nanovlm.recipes.recipe import Expected, papers_datasets
from nanovlm.training.cost import UTILISATION, hours, hours_lines, plan

UNNAMED = {"AirCrowdFood", "HAR", "Pascal Sentences", "Pexels 110k", "TimeClassification", "VLN Caption", "VLN VQA"}


def wishes(**values):
    return argparse.Namespace(**{"size": None, "smoke": False, "stages": None, "without": [], "set": [], "precision": None, "data": None, "seed": 0,
                                 "lora": None, "tune": None, "recompute": False} | values)  # fmt: skip


def test_every_data_set_of_a_paper_has_a_page_and_every_stage_says_what_it_expects():
    """Seven of Lynx's data sets are named nowhere but in its table."""
    names = {name for recipe in RECIPES.values() if recipe.published for size in recipe.sizes
             for stage in recipe.stages(size, False) for name in stage.mixture if name not in recipe.sources}  # fmt: skip
    home = RECIPES["lynx"].home
    assert {name for name in names if "no source" in home(name)} == UNNAMED
    assert not set(papers_datasets()) - names, "a page for a data set that no recipe reads"
    assert home("VQAv2") == " 443.8K  visualqa.org" and "?" in home("COYO") and "102.8M" in home("BlipCapFilt")
    for recipe in (recipe for recipe in RECIPES.values() if recipe.published):
        assert {stage.name for stage in recipe.stages("full", False)} == recipe.expected.keys(), recipe.name
        assert len(recipe.weights) >= 2 and all(expected.source for expected in recipe.expected.values() if expected.hours)


def test_hours_by_hand():
    """3.6e18 operations at 40% of two A100: 3.6e18 / (0.4 * 2 * 312e12) = 14,423 s = 4.0 hours."""
    assert UTILISATION == 0.4
    lines = hours_lines(Expected(9, num_gpus=2, hours=8.0, source="Table 1"), 3.6e18)
    assert lines[0] == "time    4.0 hours on 2 A100 at 40% of their peak"
    assert lines[1] == "        8.0 hours on 2 A100 by the paper (Table 1), 20% of their peak"
    assert [hours(number) for number in (0.5, 1, 47.9, 48)] == ["30.0 minutes", "1.0 hours", "47.9 hours", "2.0 days (48 hours)"]


@pytest.mark.parametrize("name", ["nano", "blip2", "open_flamingo", "llava", "smolvlm"])
def test_a_plan_of_the_tiny_size(name):
    recipe = RECIPES[name]
    lines = plan(recipe, wishes(size="tiny"))
    assert [line for line in lines if line.startswith("stage ")] == [f"stage {stage.name}" for stage in recipe.stages("tiny", False)]
    for start in ("data ", "work ", "time ", "memory "):
        assert sum(line.startswith(start) for line in lines) == len(recipe.stages("tiny", False))
    heads = [line for line in lines if line.startswith("memory ")]
    assert all(len(re.split(r" {2,}", line)) == 8 for line in heads), "column heads stand apart"
    assert any(line.startswith("files   none: ") for line in lines) == (recipe.published is None)


@pytest.mark.parametrize("name, beside", [("nano", 0), ("llava", 3)])  # LLaVA's two towers and the line above them
def test_what_data_names_needs_no_other_home(tmp_path, name, beside):
    """A file of one's own is no data set of the paper that would have to be listed."""
    (tmp_path / "my.json").write_text('[{"id": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]')
    lines = plan(RECIPES[name], wishes(size="tiny", stages=["instruct"], data=str(tmp_path / "my.json"), images=None, epochs=None, tests=False))
    files = lines[next(place for place, line in enumerate(lines) if line.startswith("files ")) :]
    assert len(files) == beside + 1 and str(tmp_path / "my.json") in files[-1]


def test_what_is_tuned_decides_the_cost():
    """LLaVA's second stage: bridge alone, low rank, all."""
    found = []
    for choice, lora in (("bridge", None), ("lora", {"rank": 2, "alpha": 2.0}), ("all", None)):
        lines = plan(RECIPES["llava"], wishes(size="tiny", stages=["instruct"], set=[f"instruct.tune={choice}"], lora=lora))
        work, trained = (next(line.split() for line in lines if line.startswith(start)) for start in ("work ", "all "))
        found.append((float(work[1].replace(",", "")), int(trained[2].replace(",", ""))))
    assert found == sorted(found) and found[0][1] < found[1][1] < found[2][1] and found[0][0] < found[2][0]


def test_tiles_and_the_process_on_a_cpu_are_counted():
    """Of the tiny SmolVLM a square is 4 tokens; a picture of 4 x 4 tiles is 17 squares. 0.4 GB and 16 bytes a parameter are the least."""
    found = []
    for tiles in ("0", "2", "4"):
        lines = plan(RECIPES["smolvlm"], wishes(size="tiny", stages=["instruct"], set=[f"instruct.tiles={tiles}"]))
        data, cpu = (next(line for line in lines if words in line) for words in ("image tokens", "in one process on a CPU"))
        found.append(int(data.split("examples of ")[1].split()[0]))
        assert 0.4 <= float(cpu.split()[0]) < 1
    assert found == [4, 5 * 4, 17 * 4]
