"""Folders of models: those of earlier versions still answer, the architecture is their own, and none of their files is run."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
import train
from nanovlm import recipes
from nanovlm.generation.chat import Chat
from nanovlm.decoder import DecoderConfig
from nanovlm.architecture import architecture, rebuild
from nanovlm.recipes import nano, nano_resampler, __main__ as recipes_command
from nanovlm.training.checkpoint import consolidate
from nanovlm.vlit.matching import load_encoder

TESTS = Path(__file__).parents[1]
FOLDERS = TESTS / "golden" / "folders"
TINY = TESTS / "tiny_recipe.py"
FAST = ["--threads", "1", "--device", "cpu", "--set", "tower.steps=1", "--set", "align.steps=1", "--set", "align.warmup_steps=0"]
RED, GREEN = (200, 30, 30), (30, 160, 40)
ANSWERS = [  # of commit 9da5652, which also trained the folders: nano and nano_resampler some steps, small until it knew red
    ("nano", "what color is the star?", RED, "teal"), ("nano", "how many objects are there?", RED, "yes"),
    ("nano", "describe the image.", RED, "a small teal triangle at the top left, a small teal"),
    ("nano_resampler", "how many objects are there?", GREEN, "yes"),
    ("nano_resampler", "describe the image.", RED, "a small teal triangle at the bottom, a small teal triangle"),
    ("small", "Which color?", RED, "red"), ("small", "Which color?", GREEN, "green"),
]  # fmt: skip


def ask(folder, question, color, **options):
    """A greedy answer about a picture of one colour: str."""
    loaded = recipes.load(folder, **options)
    decoding = dataclasses.replace(loaded.decodings["default"], do_sample=False, num_beams=1, max_new_tokens=12)
    chat = Chat(loaded, decoding)
    return "".join(chat.ask(question, [Image.new("RGB", (64, 64), color)]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that was trained from a copy of the tiny recipe, and the copy."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = shutil.copy(TINY, folder / "my_recipe.py")
    assert train.main([str(recipe), "--out", str(folder / "out"), *FAST]) == 0
    return folder / "out", recipe


@pytest.mark.parametrize(("name", "question", "color", "answer"), ANSWERS)
def test_folders_of_an_earlier_version_answer_as_they_did(name, question, color, answer):
    assert ask(FOLDERS / name, question, color) == answer


def test_nano_comes_along_unless_a_folder_is_called_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(recipes.COME_ALONG, "nano", FOLDERS / "nano")
    asked = ["nano", "--greedy", "--draw", "red circle", "how many objects are there?"]
    assert sample.main(asked) == 0 and "(drawn: drawn.png)" in capsys.readouterr().out
    assert train.make_parser().parse(["--init", "nano"]).init == [str(FOLDERS / "nano")]
    (tmp_path / "nano").mkdir()
    assert sample.main(asked) == 2 and "nano" in capsys.readouterr().err
    assert train.make_parser().parse(["--init", "nano"]).init == ["nano"]


def test_the_weights_that_come_along_are_those_of_the_published_numbers():
    """On a part of each test; two standard deviations are what so few questions may differ by."""
    folder = recipes.COME_ALONG["nano"]
    seed, loaded = json.loads((folder / "config.json").read_text())["seed"], recipes.load(folder)
    runs = json.loads((TESTS.parent / "notebooks" / "results" / "nano.json").read_text())["runs"]
    (published,) = (run["results"] for run in runs if run["seed"] == seed)
    for name, records in nano.nano_tests.held_out_tests(30, 40).items():
        answers = nano.nano_tests.ask(loaded, records)
        assert abs(nano.nano_tests.shares(answers)["all"] - published[name]) < len(answers) ** -0.5, name


def test_the_text_tower_of_an_earlier_version_is_found():
    """Its config.json lacks the architecture, so the recipe builds it."""
    assert "architecture" not in json.loads((FOLDERS / "nano" / "config.json").read_text())
    assert load_encoder(FOLDERS / "nano").name == "MD (own encoder)"


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_architecture_describes_every_recipe(name):
    recipe = recipes.RECIPES[name]
    for size in recipe.sizes:
        with torch.device("meta"):
            model = recipe.build(size, 400)
            towers = recipe.contrastive(size, model) if recipe.contrastive else None
            found = architecture(model, towers)
            again, again_towers = rebuild(json.loads(json.dumps(found)))
        for one, other in ((model, again), (towers, again_towers)):
            assert (one is None) == (other is None)
            if one is not None:
                assert [(key, value.shape) for key, value in one.state_dict().items()] == [
                    (key, value.shape) for key, value in other.state_dict().items()]
        assert again.vision.config == model.vision.config and again.decoder.config == model.decoder.config
        assert again.bridge.arguments == model.bridge.arguments and architecture(again, again_towers) == found


def test_a_folder_opens_whatever_becomes_of_its_recipe(tmp_path, monkeypatch, capsys):
    """Its own sizes also go on training, and every way to open it finds them."""
    out, flags = tmp_path / "out", ["nano", "--size", "tiny", "--smoke", "--threads", "1", "--stages", "align"]
    flags += ["--set", "align.steps=3", "--set", "align.batch_size=2", "--out", str(out)]
    monkeypatch.setattr(nano.nano_tests, "evaluate", lambda run, stage: {})
    changed = dataclasses.replace(nano.RECIPE, evaluate=lambda run, stage: {}, exam=lambda run: [], finish=lambda run: {},
                                  report=lambda run, results: [],
                                  stages=lambda *told: tuple(dataclasses.replace(one, summary="") for one in nano.stages(*told)))
    monkeypatch.setattr(nano, "RECIPE", changed)
    assert train.main([*flags, "--max-minutes", "0"]) == 0
    assert consolidate(out)
    question = ("how many objects are there?", RED)
    before = ask(out, *question)
    monkeypatch.setattr(nano, "SIZES", {"full": (128, 2), "tiny": (64, 2)})
    monkeypatch.setattr(nano, "projector", None)
    monkeypatch.setattr(nano, "DecoderConfig", lambda *sizes, **options: DecoderConfig(*sizes, **options | {"rope_base": 5.0}))
    monkeypatch.setattr(nano, "RECIPE", dataclasses.replace(
        changed, build=lambda size, vocab_size: nano.build(size, vocab_size, nano_resampler.resampler)))
    assert ask(out, *question) == before
    assert recipes.load(out).model.decoder.config.rope_base == 100.0
    assert train.main([*flags, "--resume"]) == 0
    loaded = recipes.load(out).model
    assert loaded.decoder.config.width == 32 and len(loaded.decoder.layers) == 1
    assert load_encoder(out).model.text.arguments["width"] == 32


def test_an_architecture_that_cannot_be_built_is_said(tmp_path):
    shutil.copytree(FOLDERS / "nano", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"architecture": {"bridge": {"class": "os.system"}}}))
    with pytest.raises(ValueError, match="architecture"):
        recipes.load(tmp_path / "out")


def test_a_folder_of_ones_own_recipe_opens_with_its_file(trained, tmp_path, capsys):
    out, recipe = trained
    with pytest.raises(ValueError, match="--recipe my_recipe.py"):
        recipes.load(out)
    assert recipes.load(out, recipe=recipe).model.decoder.config.width == 16
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"] == str(recipe) and len(config["recipe_sha256"]) == 64 and "architecture" in config
    assert load_encoder(out, recipe).name == "MD (own encoder)"
    assert capsys.readouterr().err == ""
    (tmp_path / "beside.py").write_text("WIDTH = 99\n")
    changed = tmp_path / "changed.py"
    changed.write_text(Path(recipe).read_text() + "\nimport beside\n\nWIDTH = beside.WIDTH\n")
    before = list(sys.path)
    loaded = recipes.load(out, recipe=changed)
    assert loaded.model.decoder.config.width == 16, "the folder's architecture, not the file's"
    assert sys.path == before
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "changed.py has changed" in printed
    with pytest.raises(FileNotFoundError):
        recipes.load(out, recipe=tmp_path / "nowhere.py")


def test_going_on_with_a_changed_recipe_is_said(trained, tmp_path, capsys):
    out, recipe = tmp_path / "out", tmp_path / "my_recipe.py"
    shutil.copy(TINY, recipe)
    assert train.main([str(recipe), "--out", str(out), *FAST, "--max-minutes", "0"]) == 0
    before = json.loads((out / "config.json").read_text())
    recipe.write_text(recipe.read_text() + "\n# another\n")
    assert train.main([str(recipe), "--out", str(out), *FAST, "--resume"]) == 0
    assert capsys.readouterr().out.count("has changed since") == 1
    assert json.loads((out / "config.json").read_text())["recipe_sha256"] == before["recipe_sha256"]


HOSTILE = "import pathlib\npathlib.Path(__file__).with_name('RAN').write_text('')\n"


@pytest.fixture(params=["{}/r.py", "r.py", "./r.py", "nano.py"])
def hostile(request, trained, tmp_path, monkeypatch):
    """A folder whose config.json names a file within it as its recipe, from where it could be found."""
    out = tmp_path / "m"
    shutil.copytree(trained[0], out)
    config = json.loads((out / "config.json").read_text())
    name = request.param.format(out)
    (out / "config.json").write_text(json.dumps(config | {"recipe": name}))
    for file in ("r.py", "nano.py", "__init__.py", "sitecustomize.py", "tiny_recipe.py"):
        (out / file).write_text(HOSTILE)
    monkeypatch.chdir(out)
    yield out
    assert not (out / "RAN").exists()


def test_no_file_in_a_folder_is_run(hostile, tmp_path, capsys):
    with pytest.raises(ValueError, match="recipe"):
        recipes.load(hostile)
    with pytest.raises(ValueError, match="recipe"):
        load_encoder(hostile)
    assert sample.main([str(hostile), "hi", "--device", "cpu"]) == 2 and "--recipe" in capsys.readouterr().err
    assert sample.main([str(hostile), "hi", "--device", "cpu", "--recipe", str(TINY)]) == 2  # it brings no presets
    assert "unknown preset" in capsys.readouterr().err
    assert recipes_command.main(["convert", "--to", "published", str(hostile), str(tmp_path / "published")]) == 1
    assert recipes_command.main(["inspect", str(hostile)]) == 0 and "train.py" in capsys.readouterr().out
    assert recipes.load(hostile, recipe=TINY).model.decoder.config.width == 16
    capsys.readouterr()
    arguments = [str(TINY), *FAST, "--out"]
    assert train.main([*arguments, str(tmp_path / "out"), "--init", str(hostile)]) == 0
    for more in ([], ["--init", str(hostile)]):
        with pytest.raises(SystemExit):
            train.main([*arguments, str(hostile), *more, "--resume"])
        with pytest.raises(SystemExit):
            train.main(["--out", str(hostile), *more, "--resume"])


def test_consolidate_keeps_the_architecture(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    before = json.loads((tmp_path / "out" / "config.json").read_text())
    consolidate(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(trained[0] / "model.safetensors").keys()
