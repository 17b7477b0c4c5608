"""From a mixture's names to sources: prompts that a recipe brings, and what is missing."""

import dataclasses
import json
from argparse import Namespace

import pytest
from PIL import Image

from nanovlm.recipes import RECIPES
from nanovlm.recipes.lynx import AS_THEY_ARE, DATASETS, POOLS
from nanovlm.training.start import find_sources, lost_lines
from test_trainer import RECIPE, hooked, make, train

LYNX = RECIPES["lynx"]
WISHES = {"data": None, "images": None, "datasets": None, "seed": 0, "allow_missing": False}


def talk(words):
    return [{"from": "human", "value": f"<image>\n{words}" if words else "<image>"}, {"from": "gpt", "value": "answer"}]


@pytest.fixture
def datasets(tmp_path):
    """A datasets file for some of Lynx's third stage; the pictures of one are missing."""
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    listed = {}
    for name, words in (("GQA", "what is it"), ("MSVD-QA", "who?"), ("Places365", ""), ("LLaVA Dialog", "Tell me."), ("VGQA", "")):
        image = {"image": "gone.png"} if name == "VGQA" else {"image": "a.png"}
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": 1, "conversations": talk(words)} | image]))
        listed[name] = {"reader": "llava", "path": f"{name}.json"}
    (tmp_path / "sets.json").write_text(json.dumps(listed))
    return tmp_path / "sets.json"


def stage(*names):
    """Lynx's last stage with a few of its data sets."""
    last = LYNX.stages("full", False)[-1]
    return dataclasses.replace(last, mixture={name: last.mixture[name] for name in names})


def find(stages, **wishes):
    return find_sources(LYNX, stages, Namespace(**WISHES | wishes))


def test_table_13_reaches_the_records_of_a_listed_data_set(datasets):
    sources, stages, lost = find((stage("GQA", "MSVD-QA", "Places365", "LLaVA Dialog"),), datasets=datasets, allow_missing=True)
    assert lost == {} and len(stages[0].mixture) == 4
    said = {name: {sources[name].record(n).conversations[0][0].text for n in range(80)} for name in stages[0].mixture}
    assert "\nwhat is it? Give a short answer." in said["GQA"] and len(said["GQA"]) == 4
    assert all("what is it?" in words for words in said["GQA"])
    assert any("the video" in words for words in said["MSVD-QA"])
    assert "Where is this? Answer with a place name." in said["Places365"] and len(said["Places365"]) == 4
    assert said["LLaVA Dialog"] == {"\nTell me."}


def test_every_data_set_of_table_12_has_at_least_three_ways_to_ask():
    for data in DATASETS:
        prompts = LYNX.prompts.get(data["name"])
        if data["prompt"] in AS_THEY_ARE:
            assert prompts is None, data["name"]
            continue
        assert len(set(prompts)) == len(prompts) >= 3
        first = data["prompt"]
        if "[QUESTION]" in first and "[OPTIONS]" not in first:
            assert prompts[0] == first.replace("[QUESTION]", "{question?}")
            assert all(prompt.count("{question?}") == 1 for prompt in prompts)
        elif "[" in first:
            assert all(prompt.count("{question}") == 1 for prompt in prompts)
        else:
            assert prompts[0] == first and not any("{" in prompt for prompt in prompts)
        assert not any("[" in prompt for prompt in prompts)
    assert {pool[0] for pool in POOLS} == {data["prompt"] for data in DATASETS} - set(AS_THEY_ARE), "no pool without a use"


def test_what_is_missing_is_listed_at_once_and_the_rest_trains_in_its_own_proportions(datasets):
    stages = stage("GQA", "VGQA", "Flan V2", "Baize"), dataclasses.replace(stage("SthV2"), name="more")
    with pytest.raises(FileNotFoundError) as caught:
        find(stages, datasets=datasets)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("4 data sets are missing")
    total = 3.999 + 10.88 + 15 + 5  # Table 12
    assert lines[1].split()[:4] == ["VGQA", "instruct", f"{10.88 / total:.1%}", str(datasets.parent / "VGQA.json:")]
    assert lines[2].strip() == str(datasets.parent / "gone.png")
    assert lines[3].split() == ["Flan", "V2", "instruct", f"{15 / total:.1%}", "?", "github.com/google-research/FLAN"]
    assert lines[5].split()[:4] == ["SthV2", "more", "100.0%", "168.9K"]
    given = stage("GQA", "MSVD-QA", "VGQA", "Flan V2")
    sources, (left,), lost = find((given,), datasets=datasets, allow_missing=True)
    assert left == dataclasses.replace(given, mixture={"GQA": 3.999, "MSVD-QA": 0.611}) and left.mixture.keys() <= sources.keys()
    total = 3.999 + 0.611 + 10.88 + 15
    assert lost == {"instruct": {"VGQA": 10.88 / total, "Flan V2": 15 / total}}
    assert lost_lines(lost) == [
        "stage instruct: 2 data sets are missing, 84.9% of its examples; the shares of the others grow by 6.61"]
    with pytest.raises(ValueError, match="stage 'instruct': nothing of its mixture is there"):
        find((stage("VGQA", "Baize"),), datasets=datasets, allow_missing=True)


def test_a_run_records_what_it_trained_without(tmp_path, capsys):
    recipe = hooked(sources={"pictures": RECIPE.sources["pictures"]})
    run = train(make(tmp_path / "run", recipe, allow_missing=True))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["missing"] == {"align": {"words": 1 / 3}} and config["stages"]["align"]["mixture"] == {"pictures": 2}
    assert "stage align: 1 data sets are missing, 33.3% of its examples; the shares of the others grow by 1.50" in capsys.readouterr().out
    assert "missing" not in make(tmp_path / "whole").identity and run.stages[0].mixture == {"pictures": 1}
