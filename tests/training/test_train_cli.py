"""The command line of train.py: what it accepts, and one clean line for what it does not."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from nanovlm.recipes import RECIPES
from nanovlm.training import start

RECIPE = str(Path(__file__).parents[1] / "tiny_recipe.py")
FAST = ["--threads", "1", "--set", "tower.steps=1", "--set", "align.steps=1", "--set", "align.warmup_steps=0"]


def run(*arguments, recipe=RECIPE):
    return train.main([*([recipe] if recipe else []), *map(str, arguments)])


def refuse(capsys, *arguments, recipe=RECIPE):
    """The one line that a mistake is answered with."""
    with pytest.raises(SystemExit) as exit:
        run(*arguments, recipe=recipe)
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("train.py: ") and printed.endswith("\n") and "Traceback" not in printed
    return printed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run("--out", out, *FAST) == 0
    return out


@pytest.mark.parametrize(("arguments", "words"), [
    (["--resum"], "unknown argument '--resum'. Did you mean '--resume'"),
    (["--thread", "1"], "Did you mean '--threads'"),
    (["--parallel", "fdsp"], "--parallel 'fdsp' is unknown. Did you mean 'fsdp'"), (["--threads", "0"], "0 lies outside of 1"),
    (["--threads", "two"], "--threads"), (["--size", "ful"], "no size 'ful'. Did you mean 'full'"),
    (["--stages", "towr"], "no stage 'towr'. Did you mean 'tower'"), (["--without", "alig"], "Did you mean 'align'"),
    (["--without", "align,tower"], "no stage is left"),
    (["--set", "align.learning_rates.brigde=1"], "Did you mean 'bridge'"),
    (["--set", "align.learning_rates.lora=1"], "'lora', which this model does not have"),
    (["--set", "align.mixture.word=1"], "reads 'word', which neither the recipe nor --datasets provides. Did you mean 'words'"),
    (["--set", "align.image_size=17"], "no multiple of patch_size 4; try 16"),
    (["--set", "align.max_tokens=65"], "stage 'align': max_tokens is 65, but the context is 64"),
    (["--set", "tower.max_tokens=25"], "stage 'tower': max_tokens is 25, but the context is 24"),
    (["--set", "tower.group=2"], "group and packing"), (["--workers", "-1"], "-1 lies outside of 0"),
    (["--set", "tower.packing=true"], "group and packing"),
    (["--max-damaged", "2"], "2 lies outside of 0 to 1"),
    (["--device", "gpu"], "--device gpu cannot be used here"),
    (["--data", "nowhere.json"], "nowhere.json: no such file"),
    (["--images", "."], "--images is the image folder of --data"),
    (["--datasets", "nowhere.json"], "nowhere.json"), (["--init", "nowhere"], "nowhere"),
])
def test_mistakes_are_answered_in_one_line(capsys, tmp_path, arguments, words):
    assert words in refuse(capsys, *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a mistake must not leave a folder behind"


def test_recipes_are_found_by_name_or_file(capsys, tmp_path):
    assert "no recipe 'tny'" in refuse(capsys, recipe="tny")
    assert "nowhere.py" in refuse(capsys, recipe=str(tmp_path / "nowhere.py"))
    (tmp_path / "empty.py").write_text("RECIPE = 3")
    assert "empty.py defines no RECIPE" in refuse(capsys, recipe=str(tmp_path / "empty.py"))


def test_an_output_folder_is_never_overwritten(capsys, trained, tmp_path):
    assert "already holds config.json; continue that run with --resume" in refuse(capsys, "--out", trained, *FAST)
    assert "stages.align.steps 1, now 2" in refuse(capsys, "--out", trained, *FAST, "--set", "align.steps=2", "--resume")
    assert "seed 0, now 1" in refuse(capsys, "--out", trained, *FAST, "--seed", "1", "--resume")
    assert "size 'full', now 'tiny'" in refuse(capsys, "--out", trained, *FAST, "--size", "tiny", "--resume")
    assert "threads 1, now 2" in refuse(capsys, "--out", trained, *FAST, "--threads", "2", "--resume")
    assert "stage_names [" in refuse(capsys, "--out", trained, *FAST[:4], "--stages", "tower", "--resume")
    (tmp_path / "holiday.jpg").write_text("")
    assert "holds holiday.jpg but no config.json" in refuse(capsys, "--out", tmp_path, "--resume")


def test_resume_without_a_checkpoint_begins_at_the_start(capsys, tmp_path, trained):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(trained / "config.json", out)
    (out / "log.jsonl").write_text('{"stage": "tower", "step": 1, "loss": 1')
    assert run("--out", out, *FAST, "--resume") == 0
    assert "no checkpoint in" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert ["loss" in json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()].count(True) == 2


def test_stages_can_be_left_out_and_start_from_a_model(tmp_path, trained):
    out = tmp_path / "run"
    assert run("--out", out, "--init", trained, "--without", "tower", *FAST[:2], *FAST[4:]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["stage_names"] == ["align"] and config["init"] == str(trained)
    before, after = load_file(trained / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"bridge", "decoder"}
    assert torch.equal(before["decoder.embedding.weight"], after["decoder.embedding.weight"])
    assert (out / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    tower = load_file(trained / "text_tower.safetensors")
    assert all(torch.equal(tower[name], value) for name, value in load_file(out / "text_tower.safetensors").items())


def test_a_model_that_does_not_fit_is_named(capsys, tmp_path, trained):
    init = tmp_path / "init"
    shutil.copytree(trained, init)
    weights = load_file(init / "model.safetensors")
    weights["bridge.old"] = weights.pop("bridge.linear.bias")
    save_file(weights, init / "model.safetensors")
    printed = refuse(capsys, "--out", tmp_path / "run", "--init", init, *FAST)
    assert "bridge.linear.bias is missing" in printed and "bridge.old is not part of this model" in printed
    (init / "text_tower.safetensors").unlink()
    shutil.copy(trained / "model.safetensors", init)
    assert run("--out", tmp_path / "other", "--init", init, "--stages", "tower", *FAST[:4]) == 0, "a text tower may be absent"


def test_own_data_replaces_the_mixture_of_the_last_stage(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\ncolour?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "own.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": talk}]))
    out = tmp_path / "run"
    assert run("--out", out, "--data", tmp_path / "own.json", "--images", tmp_path, *FAST) == 0
    stages = json.loads((out / "config.json").read_text())["stages"]
    assert stages["align"]["mixture"] == {"data": 1.0} and stages["tower"]["mixture"] == {"pictures": 1}
    alone = tmp_path / "alone"
    assert run("--out", alone, "--data", tmp_path / "own.json", "--stages", "align", *FAST[:2], *FAST[4:]) == 0
    assert json.loads((alone / "config.json").read_text())["stage_names"] == ["align"]


def test_own_data_is_judged_by_records_of_its_own(tmp_path, capsys):
    talk = [{"from": "human", "value": "colour?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "own.json").write_text(json.dumps([{"id": str(n), "conversations": talk} for n in range(60)]))
    own, out = ["--data", tmp_path / "own.json", "--stages", "align", "--threads", "1"], tmp_path / "run"
    assert run("--out", out, *own, "--epochs", "0.4") == 0
    stage = json.loads((out / "config.json").read_text())["stages"]["align"]
    assert stage["steps"] == math.ceil(0.4 * 60 / stage["batch_size"])
    lines = list(map(json.loads, (out / "log.jsonl").read_text().splitlines()))
    told = [line for line in lines if "held_out" in line]
    assert [line["step"] for line in (told[0], told[-1])] == [0, stage["steps"]]
    assert told[-1]["held_out"]["data"] < told[0]["held_out"]["data"] and told[0]["right"] == [0, told[0]["right"][1]]
    assert all(line["measures"] == {} for line in lines if "measures" in line), "the recipe's own tests run if asked"
    assert "held out of data: loss" in capsys.readouterr().out
    assert run("--out", tmp_path / "asked", *own, "--tests", "--set", "align.steps=3") == 0
    assert '"measures": {"' in (tmp_path / "asked" / "log.jsonl").read_text()
    assert "--epochs" in refuse(capsys, "--epochs", "1", "--out", tmp_path / "none")
    assert "--epochs" in refuse(capsys, *own, "--epochs", "1", "--set", "align.steps=3", "--out", tmp_path / "none")


def test_print_shows_stages_and_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run("--print", "--set", "align.steps=77")
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "stage tower\n  objective = 'contrastive'" in printed and "  steps = 77\n" in printed
    assert "text_tower               7,241  yes     0.002" in printed
    assert os.listdir(tmp_path) == []
    assert "no multiple of patch_size" in refuse(capsys, "--print", "--set", "align.image_size=17")


def test_defaults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", {0: range(1)}.get)
    torch.set_num_threads(3)
    assert run("--stages", "tower", "--set", "tower.steps=1") == 0
    config = json.loads((tmp_path / "out" / "tiny" / "config.json").read_text())
    assert config["threads"] == 1 == torch.get_num_threads() and config["size"] == "full" and config["seed"] == 0
    assert "no checkpoint" not in capsys.readouterr().out


def test_ctrl_c_before_the_first_step(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "find", lambda name: os.kill(os.getpid(), signal.SIGINT))
    assert run("--out", tmp_path / "run") == 130
    command = f"python train.py {RECIPE} --out {tmp_path / 'run'} --resume"
    assert capsys.readouterr().out == f"stopped: SIGINT received. To go on:\n  {command}\n"


def test_a_failed_training_ends_with_one_line_and_the_command(capsys, tmp_path):
    out = tmp_path / "run"
    assert run("--out", out, *FAST, "--set", "tower.learning_rates.vision=1e30", "--set", "tower.steps=3") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("train.py: stage tower, step 2 of 3: the loss is nan; records: ")
    assert printed.endswith("--resume\n") and str(out) in printed


@pytest.fixture
def machine_type(monkeypatch):
    """Makes this machine fast in a type and slow in the other."""
    def choose(fast):
        monkeypatch.setattr(start, "training_precision", lambda facts: fast)
        monkeypatch.setattr(start, "slow_line", lambda dtype, device: f"slow in {dtype}" if dtype != fast else None)
    return choose


def test_a_run_keeps_the_type_that_it_began_with(tmp_path, capsys, machine_type):
    out = tmp_path / "run"
    auto = ["--out", out, *FAST, "--precision", "auto"]
    machine_type("bfloat16")
    assert run(*auto, "--max-minutes", "0") == 0
    precisions = lambda: [stage["precision"] for stage in json.loads((out / "config.json").read_text())["stages"].values()]
    assert precisions() == ["bfloat16"] * 2 and "slow" not in capsys.readouterr().out
    machine_type("float32")
    assert run(*auto, "--resume") == 0
    assert precisions() == ["bfloat16"] * 2 and capsys.readouterr().out.count("slow in bfloat16") == 1
    assert "precision 'bfloat16', now 'float32'" in refuse(capsys, *auto[:-1], "float32", "--resume")


def test_every_recipe_trains_in_the_type_that_the_machine_is_fast_in():
    for recipe in RECIPES.values():
        assert {stage.precision for stage in recipe.stages("full", False)} == {"auto"}
