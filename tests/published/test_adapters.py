"""LoRA adapters: PEFT's and LLaVA's added to their bases, and our own written as PEFT has it; alone, and with the bridge."""

import json
import math
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nanovlm
from nanovlm import recipes
from nanovlm.published import vision as towers
from nanovlm.published.weights import to_published, write_checkpoint
from nanovlm.recipes.__main__ import main
from nanovlm.recipes.llava import CONFIGS, LAYOUT
from tests.published_folders import folder_with, language, make_folder, tune, write_talks  # noqa: F401
from tests.random_models import randomise

NAME = "model.layers.{}.self_attn.{}_proj"


def save_adapter(folder, base, prefix=NAME, extra=(), **config):
    """An adapter of queries and values in every layer of a language model, rank 3: {name in the base: B A}."""
    folder.mkdir()
    updates, tensors = {}, dict(extra)
    for layer in range(4):
        for part in "qv":
            name, (d, k) = prefix.format(layer, part), (32, 32)
            a, b = torch.randn(3, k), torch.randn(d, 3)
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            updates[layer, part] = b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    return updates


def is_base_with(model, base, updates, scale):
    """A decoder is another one with updates of some weights."""
    for name, tensor in base.state_dict().items():
        update = next((one for (layer, part), one in updates.items() if name == f"layers.{layer}.attention.{part}.weight"), None)
        expected = tensor if update is None else tensor + (scale(name) if callable(scale) else scale) * update
        torch.testing.assert_close(model.state_dict()[name], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("config", "scale"), [
    ({}, 2.0), ({"use_rslora": True}, 6 / math.sqrt(3)),
    ({"alpha_pattern": {"layers.1.self_attn.q_proj": 30}}, lambda name: 10.0 if "layers.1.attention.q" in name else 2.0),
])  # fmt: skip
def test_an_adapter_opens_with_its_base(language, tmp_path, config, scale):
    updates = save_adapter(tmp_path / "adapter", language[0], **config)
    is_base_with(recipes.load(tmp_path / "adapter").model.decoder, language[1], updates, scale)


def test_convert_adds_an_adapter_to_the_base_that_is_named(language, tmp_path):
    updates = save_adapter(tmp_path / "adapter", "elsewhere")
    assert main(["convert", str(language[0]), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    is_base_with(recipes.load(tmp_path / "out").model.decoder, language[1], updates, 2.0)


@pytest.mark.parametrize(("config", "words"), [
    ({"base_model_name_or_path": "elsewhere"}, "elsewhere"), ({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"),
])  # fmt: skip
def test_what_is_not_read_is_named(language, tmp_path, config, words):
    save_adapter(tmp_path / "adapter", language[0], **config)
    with pytest.raises(ValueError, match=words) as caught:
        recipes.load(tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(caught.value)


def test_half_an_update_and_a_module_of_another_model_are_named(language, tmp_path):
    save_adapter(tmp_path / "adapter", language[0])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    half = dict(tensors)
    del half["base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"]
    other = {name.replace("q_proj", "w_proj"): tensor for name, tensor in tensors.items()}
    for content, words in ((half, "layers.2.self_attn.q_proj"), (other, "w_proj")):
        save_file(content, tmp_path / "adapter" / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=words):
            recipes.load(tmp_path / "adapter")


def test_llavas_adapter_with_its_projector(language, tmp_path):
    """As LLaVA's scripts write it: the base is the language model, and the tower is CLIP's own."""
    config = CONFIGS["tiny"] | {"text_config": json.loads((language[0] / "config.json").read_text()), "model_type": "llava"}
    model = randomise(recipes.llava.build(config))
    write_checkpoint(make_folder(tmp_path / "clip"), towers.CLIP, model.vision.state_dict())
    updates = save_adapter(tmp_path / "adapter", language[0])
    bridge = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("bridge.")}
    names = {"bridge.linear.": "mm_projector.0.", "bridge.linear_2.": "mm_projector.2."}
    torch.save({f"base_model.model.model.{names[name.rpartition('.')[0] + '.']}{name.rpartition('.')[2]}": tensor
                for name, tensor in bridge.items()}, tmp_path / "adapter" / "non_lora_trainables.bin")
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(tmp_path / "clip")}))
    opened = recipes.load(tmp_path / "adapter").model
    assert main(["convert", "--vision", str(tmp_path / "clip"), "--language", str(language[0]), str(tmp_path / "adapter"),
                 str(tmp_path / "out")]) == 0
    for found in (opened, recipes.load(tmp_path / "out").model):
        is_base_with(found.decoder, language[1], updates, 2.0)
        assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in bridge.items())
        assert all(torch.equal(found.vision.state_dict()[name], tensor) for name, tensor in model.vision.state_dict().items())


@pytest.fixture
def source(tmp_path):
    """A published LLaVA's folder, its model, and data to tune it on."""
    model = randomise(recipes.llava.build(CONFIGS["tiny"]))
    folder = folder_with(tmp_path / "source", CONFIGS["tiny"] | {"model_type": "llava"}, LAYOUT(CONFIGS["tiny"]), model.state_dict())
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return folder, model, write_talks(tmp_path, "red.png")


@pytest.mark.parametrize(("flags", "parts"), [(["--lora", "2"], set()), (["--lora", "2:8", "--tune", "bridge,lora"], {"bridge"})])
def test_lora_moves_alone_or_with_the_bridge_and_is_saved_by_itself(flags, parts, source, tmp_path, capsys):
    folder, model, data = source
    assert tune("llava", data, tmp_path / "out", "--init", folder, *flags) == 0, capsys.readouterr().err
    found, before = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    updates = {name: tensor for name, tensor in found.items() if ".lora_" in name}
    assert len(updates) == 2 * 7 * 2 and all(tensor.abs().max() > 1e-5 for tensor in updates.values())
    moved = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, found[name])}
    assert moved == parts
    merged = recipes.load(tmp_path / "out").model.state_dict()
    assert main(["convert", "--to", "adapter", str(tmp_path / "out"), str(tmp_path / "adapter")]) == 0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == ((2, 8) if parts else (2, 2)) and config["peft_type"] == "LORA"
    assert config["modules_to_save"] == (["multi_modal_projector"] if parts else None)
    again = nanovlm.load(tmp_path / "adapter").model.state_dict()  # its base is where it was trained from
    for name, tensor in merged.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    base = to_published(LAYOUT(CONFIGS["tiny"]), before)
    name = "language_model.model.layers.1.mlp.up_proj"
    a, b = (tensors[f"base_model.model.model.language_model.layers.1.mlp.up_proj.lora_{side}.weight"] for side in "AB")
    update = config["lora_alpha"] / config["r"] * b @ a
    torch.testing.assert_close(to_published(LAYOUT(CONFIGS["tiny"]), merged)[f"{name}.weight"], base[f"{name}.weight"] + update)


def test_an_adapter_is_a_start_and_only_published_models_have_one(source, tmp_path, capsys):
    folder, _, data = source
    assert tune("llava", data, tmp_path / "out", "--init", folder, "--lora", "2") == 0, capsys.readouterr().err
    assert main(["convert", "--to", "adapter", str(tmp_path / "out"), str(tmp_path / "adapter")]) == 0
    more = ["--init", tmp_path / "adapter", "--tune", "bridge"]
    assert tune("llava", data, tmp_path / "more", *more) == 0, capsys.readouterr().err
    merged, found = recipes.load(tmp_path / "out").model.state_dict(), load_file(tmp_path / "more" / "model.safetensors")
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in merged.items() if not name.startswith("bridge."))
    assert not torch.equal(found["bridge.linear.weight"], merged["bridge.linear.weight"])
    assert main(["convert", "--to", "adapter", str(tmp_path / "more"), str(tmp_path / "none")]) == 1
    assert "--lora" in capsys.readouterr().err


def test_the_adapter_has_transformers_names_and_peft_puts_it_on_its_base(source, tmp_path, capsys):
    """The scores of PEFT's model, low-rank updates and trained bridge on the base, are those of the merged one.

    What PEFT looks for are names of modules in the model that transformers makes of the base.
    """
    transformers = pytest.importorskip("transformers")
    flags = ["--init", source[0], "--lora", "2:8", "--tune", "bridge,lora"]
    assert tune("llava", source[2], tmp_path / "out", *flags) == 0, capsys.readouterr().err
    for to in ("adapter", "published"):
        assert main(["convert", "--to", to, str(tmp_path / "out"), str(tmp_path / to)]) == 0
    base, merged = (transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
                    for folder in (source[0], tmp_path / "published"))
    told, modules = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()), dict(merged.named_modules())
    for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        module, _, side = name.removeprefix("base_model.model.").partition(".lora_")
        if side:
            linear = modules[module]
            assert re.fullmatch(told["target_modules"], module)
            assert tensor.shape == ((2, linear.in_features) if side[0] == "A" else (linear.out_features, 2))
        else:
            assert any(f".{one}." in f".{module}" for one in told["modules_to_save"])
            torch.testing.assert_close(merged.get_parameter(module), tensor)
    peft, config = pytest.importorskip("peft"), merged.config
    base.config.image_token_id = config.image_token_id = 3  # the tiny one's lies outside its vocabulary
    pictures = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    ids = torch.tensor([[1, *[config.image_token_id] * pictures, 7, 9, 4]])
    shown = {"input_ids": ids, "pixel_values": torch.randn(1, 3, *(config.vision_config.image_size,) * 2)}
    with torch.no_grad():
        before, expected = base(**shown).logits, merged(**shown).logits
        with_adapter = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        found = with_adapter(**shown).logits
    updated = {name for name, _ in with_adapter.named_modules() if name.endswith(".lora_A")}
    assert len(updated) == 2 * 7 and all(".language_model." in name for name in updated)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)
