"""`convert`: separate towers become a model to train, published files our folders, and our folders published ones."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from nanovlm import lora, recipes
from nanovlm.published import vision as vision_layouts
from nanovlm.published.language import LLAMA
from nanovlm.recipes.__main__ import main
from nanovlm.vit import resize_positions
from nanovlm.published.weights import OURS, to_published, write_checkpoint
from tests.published_folders import PARTS, eva, folder_with, language, lynx_file, make_folder, separate  # noqa: F401
from tests.random_models import randomise


def test_a_start_from_separate_towers(tmp_path, language, eva, capsys):
    out = tmp_path / "start"
    flags = ["--family", "lynx", "--size", "tiny", "--vision", str(eva[0]), "--language", str(language[0]), "--seed", "4"]
    assert main(["convert", *flags, str(out)]) == 0
    told = capsys.readouterr().out
    assert "a block behind the features that are used" in told and "vision.positions: [1, 5, 32] to [1, 17, 32]" in told
    assert "initialised from seed 4: bridge" in told and "initialised from seed 4: adapters" in told
    state = load_file(out / "model.safetensors")
    decoder, tower = language[1].state_dict(), eva[1].state_dict()
    assert all(torch.equal(state[f"decoder.{name}"], tensor) for name, tensor in decoder.items())
    for name in ("blocks.1.attention.k.weight", "blocks.0.attention.v.bias", "class_token", "patch_embedding.weight"):
        assert torch.equal(state[f"vision.{name}"], tower[name].half().float())
    assert torch.equal(state["vision.positions"], resize_positions(tower["positions"].half(), 16).float())
    torch.manual_seed(4)
    fresh = recipes.RECIPES["lynx"].build("tiny", 512).state_dict()
    rest = json.loads((out / "config.json").read_text())["initialised"]
    assert rest and all(name.startswith("bridge.") or ".adapter." in name for name in rest)
    assert all(torch.equal(state[name], fresh[name]) for name in rest)
    loaded = recipes.load(out)
    assert loaded.image_size == 56 and loaded.tokenizer.vocab_size == 320 and "only fill up" in loaded.notes[0]
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_released_pt_file_becomes_a_folder_and_returns(tmp_path, language):
    path, model = lynx_file(tmp_path)
    assert main(["convert", "--family", "lynx", "--size", "tiny", str(path), str(tmp_path / "ours")]) == 0
    state = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert main(["convert", "--to", "published", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    theirs, released = load_file(tmp_path / "theirs" / "model.safetensors"), torch.load(path)["model"]
    assert {f"model.{name}" for name in theirs} == released.keys()
    assert all(torch.equal(tensor, released[f"model.{name}"]) for name, tensor in theirs.items())


def test_a_file_without_tower_and_language_model_says_so(tmp_path, language, eva, capsys):
    trained = ("bridge.", "absolute_frame_pos_embed")
    path, model = lynx_file(tmp_path, lambda name: name.startswith(trained) or "output_adapter" in name)
    out = tmp_path / "ours"
    flags = ["convert", "--family", "lynx", "--size", "tiny", str(path)]
    assert main([*flags, str(out)]) == 1
    told = capsys.readouterr().err
    assert "vision: " in told and "language_model: " in told and "--vision" in told and "bridge: " not in told
    assert not out.exists()
    assert main([*flags, "--vision", str(eva[0]), "--language", str(language[0]), str(out)]) == 0
    state = load_file(out / "model.safetensors")
    assert torch.equal(state["bridge.latents"], model.bridge.latents)
    assert torch.equal(state["decoder.lm_head.weight"], language[1].lm_head.weight)


def test_python_objects_are_never_unpickled(tmp_path, capsys):
    torch.save({"model": {"bridge.latents": torch.ones(1)}, "run": subprocess.Popen}, tmp_path / "evil.pt")
    for content, words in ((None, "Python objects"), (b"", "evil.pt"), (b"PK\x03\x04 cut short", "evil.pt"), (b"\x80\x02.", "evil.pt")):
        if content is not None:
            (tmp_path / "evil.pt").write_bytes(content)
        assert main(["convert", "--family", "lynx", str(tmp_path / "evil.pt"), str(tmp_path / "out")]) == 1
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bin_folder_becomes_safetensors_under_published_names(tmp_path, language):
    folder, decoder = language
    for shard in folder.glob("model*"):
        shard.unlink()
    tensors = {name: tensor.half() for name, tensor in to_published(LLAMA, decoder.state_dict()).items()}
    names = sorted(tensors)
    shards = {f"pytorch_model-0000{i}-of-00002.bin": names[i::2] for i in (0, 1)}
    for shard, held in shards.items():
        torch.save({name: tensors[name] for name in held}, folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert main(["convert", "--to", "published", str(folder), str(tmp_path / "out")]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in names)
    assert recipes.load(tmp_path / "out").tokenizer.vocab_size == 320


@pytest.mark.parametrize("flags", [[], ["--vision", "x"], ["--family", "nonsense", "x"], ["--family", "llama", "absent"]])
def test_convert_names_what_it_needs(tmp_path, capsys, flags):
    assert main(["convert", *flags, str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("recipes convert: ") and not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path, language, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    assert main(["convert", str(language[0]), str(tmp_path / "out")]) == 1
    assert "already exists" in capsys.readouterr().err and [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize("family", PARTS)
def test_every_family_starts_from_its_towers(tmp_path, family):
    model, out = separate(tmp_path, family).state_dict(), tmp_path / "start"
    assert main(["convert", "--family", family, "--size", "tiny", "--vision", str(tmp_path / "tower"),
                 "--language", str(tmp_path / "words"), str(out)]) == 0
    found = load_file(out / "model.safetensors")
    fresh = {name for name in found if not torch.equal(found[name], model[name])}
    assert set(json.loads((out / "config.json").read_text())["initialised"]) >= {
        name for name in fresh if not (".vision." in name and name.startswith("decoder."))
    }
    assert all(name.startswith(("bridge.", "decoder.layers.")) for name in fresh)
    assert not any(".attention.q." in name and "adapter" not in name for name in fresh if name.startswith("decoder."))
    assert all(torch.equal(found[name], found[name.replace(".vision.", ".text.")])  # modality-adaptive copies start equal
               for name in found if name.startswith("decoder.") and ".vision." in name)


def test_the_original_llava_has_no_tower(tmp_path):
    """A folder like liuhaotian's: language model and projector under the original's names."""
    published = recipes.FAMILIES["llava"]
    config = published.configs["tiny"]
    model, tensors = randomise(published.build(config)), {}
    for name, tensor in to_published(published.layout(config), model.state_dict()).items():
        name = name.removeprefix("language_model.").replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        tensors[name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")] = tensor
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_tower.")}
    folder = folder_with(tmp_path / "llava", config | {"model_type": "llava"}, OURS, tensors)
    with pytest.raises(ValueError, match="hold no vision.*--vision"):
        recipes.load(folder)
    write_checkpoint(make_folder(tmp_path / "clip"), vision_layouts.CLIP, model.vision.state_dict())
    assert main(["convert", str(folder), "--vision", str(tmp_path / "clip"), str(tmp_path / "out")]) == 0
    state = recipes.load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def trained(tmp_path, recipe, model, **settings):
    """What train.py leaves of a run."""
    settings |= {"recipe": recipe, "size": "tiny", "image_size": 28, "stages": {"instruct": {"image_fit": "pad"}}}
    return folder_with(tmp_path / "trained", settings, OURS, model.state_dict())


def test_lora_is_merged_before_it_goes_out(tmp_path):
    model = recipes.RECIPES["llava"].build("tiny", 320)
    lora.add(model, rank=2, alpha=4)
    randomise(model)
    folder = trained(tmp_path, "llava", model, lora={"rank": 2, "alpha": 4})
    assert main(["convert", "--to", "published", str(folder), str(tmp_path / "out")]) == 0
    lora.merge(model)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["language_model.model.layers.1.mlp.up_proj.weight"], model.decoder.layers[1].ffn.up.weight)
    assert not any("lora" in name for name in written)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and config["vision_config"]["image_size"] == 28
    back = recipes.load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_a_recipe_of_our_own_has_no_published_layout(tmp_path, capsys):
    with torch.device("meta"):
        model = recipes.RECIPES["nano"].build("tiny", 320)
    folder = trained(tmp_path, "nano", model.to_empty(device="cpu"))
    assert main(["convert", "--to", "published", str(folder), str(tmp_path / "out")]) == 1
    assert "nobody's published model" in capsys.readouterr().err


def test_the_token_of_a_picture_gets_the_tokenizers_id(tmp_path):
    published = recipes.FAMILIES["open_flamingo"]
    model = published.build(published.configs["tiny"])
    state = to_published(published.layout(published.configs["tiny"]), model.state_dict())
    folder = folder_with(tmp_path / "flamingo", {}, OURS, state)
    flags = ["--family", "open_flamingo", "--size", "tiny", str(folder)]
    assert main(["convert", *flags, str(tmp_path / "out")]) == 0
    loaded = recipes.load(tmp_path / "out")
    assert loaded.model.media_token == loaded.tokenizer.special_id("<image>")
    assert loaded.tokenizer.special_id("<|endofchunk|>") == loaded.model.media_token - 1  # as OpenFlamingo adds them
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["config"]["media_token_id"] = 7
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="media_token_id"):
        recipes.load(tmp_path / "out")
