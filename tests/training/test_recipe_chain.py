"""The whole chain for every published model at its tiny size: train all stages, open the folder, ask about a picture."""

import json

import pytest
from PIL import Image
from safetensors.torch import save_file

import sample
import train
from nanovlm import recipes
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.published.load import added_tokens

NAMES = [name for name, recipe in recipes.RECIPES.items() if recipe.published]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with two pictures, a LLaVA-style file about them (one question has no picture), and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    items = [{"id": "text", "conversations": [{"from": "human", "value": "Say red."}, {"from": "gpt", "value": "red"}]}]
    for color in ("red", "green"):
        Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
        talk = [{"from": "human", "value": "<image>\nWhich color?"}, {"from": "gpt", "value": color}]
        items.append({"id": color, "image": f"{color}.png", "conversations": talk})
    (folder / "data.json").write_text(json.dumps(items))
    train_tokenizer(["Which color? red green Say red. USER: ASSISTANT:"] * 9, 300).save(folder / "tokenizer.json")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_train_open_ask(name, data, tmp_path, capsys):
    recipe = recipes.RECIPES[name]
    stages = recipe.stages("tiny", True)
    init = tmp_path / "init"
    init.mkdir()
    (init / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    model = recipe.build("tiny", 300 + len(added_tokens(recipe)))
    model.vision.resize(stages[0].image_size)
    save_file(model.state_dict(), init / "model.safetensors")
    (init / "config.json").write_text(json.dumps({"image_size": stages[0].image_size}))
    source = {"reader": "llava", "path": str(data / "data.json"), "prompts": ["{question}"]}  # as they stand, Lynx's too
    datasets = tmp_path / "datasets.json"
    datasets.write_text(json.dumps({one: source for stage in stages for one in stage.mixture}))
    arguments = [name, "--size", "tiny", "--smoke", "--threads", "1", "--device", "cpu", "--datasets", str(datasets)]
    assert train.main([*arguments, "--init", str(init), "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    loaded = recipes.load(tmp_path / "out")
    assert loaded.image_size == stages[-1].image_size and loaded.template == recipe.template
    assert loaded.preprocessing == recipe.preprocessing
    question = [str(tmp_path / "out"), "Which color?", "--image", str(data / "red.png"), "--max-new-tokens", "3"]
    assert sample.main(question) == 0, capsys.readouterr().err
