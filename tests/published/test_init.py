"""`train.py --init`: from separate towers, and from a whole model as it is published; what cannot be is said beforehand."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nanovlm import machine, recipes
from nanovlm.generation.sampler import Decoding
from nanovlm.published.parts import start
from nanovlm.published.weights import to_published
from tests.published_folders import folder_with, separate, tune, write_talks

FOUR = Decoding(max_new_tokens=4)


@pytest.fixture
def data(tmp_path):
    """A LLaVA-style file about two pictures."""
    for color in ("red", "green"):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{color}.png")
    return write_talks(tmp_path, "red.png", "green.png")


def run(name, data, tmp_path, *more, code=0):
    """train.py for a few steps on the CPU."""
    if code:
        with pytest.raises(SystemExit) as left:
            tune(name, data, tmp_path / "out", *more)
        assert left.value.code == code
    else:
        assert tune(name, data, tmp_path / "out", *more) == 0


@pytest.mark.parametrize("family", ["lynx", "mplug_owl2", "llava_phi", "blip2", "llava"])
def test_from_parts(family, data, tmp_path, capsys):
    """Every part begins as its own file has it; after training what is frozen is still that, and the folder opens."""
    model = separate(tmp_path, family)
    parts = [f"vision={tmp_path / 'tower'}", f"language={tmp_path / 'words'}"]
    bridge = family in ("blip2", "llava_phi")
    parts += [f"bridge={tmp_path / 'all'}"] * bridge
    size = ["--size", "tiny"] if family != "llava" else []  # which takes its sizes from the folders
    run(family, data, tmp_path, *size, "--set", "instruct.steps=1", "--set", "instruct.tune=bridge",
        "--set", f"instruct.image_size={model.vision.image_size}", "--init", *parts)
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    assert found.keys() == expected.keys()
    fresh = [name for name in found if not torch.equal(found[name], expected[name])]
    grafted = {"lynx": (".adapter.",), "mplug_owl2": (".vision.",)}.get(family, ())
    assert fresh and all(name.startswith("bridge.") or any(one in name for one in grafted) for name in fresh)
    if bridge:
        assert all(float((found[name] - expected[name]).abs().max()) < 0.01 for name in fresh)
    if family == "mplug_owl2":  # the images' copies begin as the words' own
        name = "decoder.layers.1.attention.k.{}.weight"
        assert float((found[name.format("vision")] - expected[name.format("text")]).abs().max()) < 0.01
    loaded = recipes.load(tmp_path / "out")
    assert loaded.image_size == model.vision.image_size and loaded.ask("Which?", [data.parent / "red.png"], FOUR) is not None
    assert ("initialised from seed 0: bridge" in capsys.readouterr().out) != bridge


@pytest.mark.parametrize(("init", "words"), [
    (["vision={}/tower", "language={}/nowhere"], "nowhere"), (["visio={}/tower"], "Did you mean 'vision'"),
    (["vision={}/tower"], "tokenizer"), (["{}/words"], "language={}/words"), (["vision={}/words", "language={}/words"], "words"),
])  # fmt: skip
def test_what_does_not_go_together_is_said(init, words, data, tmp_path, capsys):
    separate(tmp_path, "llava")
    run("llava", data, tmp_path, "--init", *[one.format(tmp_path) for one in init], code=2)
    said = capsys.readouterr().err
    assert words.format(tmp_path) in said and not (tmp_path / "out").exists()


def test_what_does_not_fit_into_memory_is_refused_with_numbers(data, tmp_path, monkeypatch, capsys):
    model = separate(tmp_path, "llava")
    parts = [f"vision={tmp_path / 'tower'}", f"language={tmp_path / 'words'}"]
    number = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(machine, "free_memory", lambda device: 16 * number - 1 if str(device) == "cpu" else None)
    run("llava", data, tmp_path, "--init", *parts, "--set", "instruct.tune=all", code=2)  # 4 bytes each, gradient, two averages
    run("llava", data, tmp_path, "--init", *parts, "--set", "instruct.tune=bridge", "--set", "instruct.image_size=28")
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(machine, "free_memory", lambda device: 4 * number - 1 if str(device) == "cpu" else None)
    run("llava", data, tmp_path, "--init", *parts, "--set", "instruct.tune=bridge", code=2)
    assert "GB" in capsys.readouterr().err and not (tmp_path / "out").exists()
    folder = folder_with(tmp_path / "whole", recipes.llava.CONFIGS["tiny"] | {"model_type": "llava"}, recipes.llava.LAYOUT(recipes.llava.CONFIGS["tiny"]),
                         model.state_dict())
    with pytest.raises(ValueError, match="GB"):
        recipes.load(folder)
    half = recipes.load(folder, dtype=torch.bfloat16)  # half the bytes
    assert half.model.decoder.embedding.weight.dtype == torch.bfloat16


def test_blip2s_first_stage_in_lavis_names(data, tmp_path, capsys):
    """A Q-Former with the text half and the heads that serve the first stage, and no projection yet."""
    model = separate(tmp_path, "blip2")
    table, tensors = recipes.blip2.LAYOUT(recipes.blip2.CONFIGS["tiny"]), {}
    for name, tensor in to_published(table, model.state_dict()).items():
        if name.startswith(("qformer.", "query_tokens")):
            name = name.replace("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm").replace("qformer.", "Qformer.bert.")
            tensors[name.replace("attention.attention.", "attention.self.")] = tensor
    tensors |= {"Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.ones(3, 3), "Qformer.cls.predictions.bias": torch.ones(3),
                "Qformer.bert.embeddings.word_embeddings.weight": torch.ones(3, 3), "visual_encoder.cls_token": torch.ones(1, 1, 3),
                "vision_proj.weight": torch.ones(3, 3), "itm_head.bias": torch.ones(2), "temp": torch.ones(1)}
    torch.save({"model": tensors}, tmp_path / "blip2_pretrained.pth")
    parts = [f"vision={tmp_path / 'tower'}", f"language={tmp_path / 'words'}", f"bridge={tmp_path / 'blip2_pretrained.pth'}"]
    found = start(recipes.RECIPES["blip2"], parts, "tiny", 0).load().state_dict()
    fresh = {name for name, tensor in model.state_dict().items() if not torch.equal(found[name], tensor)}
    assert fresh == {"bridge.project.weight", "bridge.project.bias"}
    assert "initialised from seed 0: bridge, 2 tensors" in capsys.readouterr().out


def test_parts_take_nothing_from_the_folder_where_one_stands(tmp_path, monkeypatch, capsys):
    separate(tmp_path, "llava")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.9, 0.9, 0.9], "size": {"height": 9, "width": 9}}')
    monkeypatch.chdir(tmp_path)
    recipe = recipes.RECIPES["llava"]
    found = start(recipe, ["vision=tower", "language=words"], None, 0)
    assert (found.preprocessing, found.template, found.files, found.finished) == (recipe.preprocessing, recipe.template, (), False)
    assert [stage.image_fit for stage in found.stages("full", False)] == [stage.image_fit for stage in recipe.stages("full", False)]
