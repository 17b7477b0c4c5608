"""Published folders open, convert and go back; separate towers become a model to train; bad input is refused by name."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovlm import layouts, recipes, vision_layouts
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.decoder import Decoder
from nanovlm.layouts import LLAMA, llama_config
from nanovlm.recipes.__main__ import main
from nanovlm.vit import ViT, ViTConfig, resize_positions
from nanovlm.weight_files import write_checkpoint
from nanovlm.weights import to_published
from tests.random_models import randomise

WORDS = ["what is in the picture? a red circle and a blue star, left of a green square.", "user: describe\nbot: yes"] * 9
LLAMA_SIZES = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
                   max_position_embeddings=256, rms_norm_eps=1e-6)
EVA_SIZES = dict(patch_size=14, width=32, num_heads=2, mlp_width=139, qkv_bias="qv")  # mlp: int(32 * 4.3637)


def folder_with(path, config, table, state, **write):
    """A published folder."""
    path.mkdir()
    write_checkpoint(path, table, state, **write)
    (path / "config.json").write_text(json.dumps(config))
    train_tokenizer(WORDS, 320).save(path / "tokenizer.json")
    return path


@pytest.fixture
def language(tmp_path):
    """A folder like Vicuna's, in three shards, and its decoder."""
    decoder = randomise(Decoder(llama_config(LLAMA_SIZES)))
    config = LLAMA_SIZES | {"model_type": "llama", "rope_theta": 10000.0}
    return folder_with(tmp_path / "vicuna", config, LLAMA, decoder.state_dict(), max_shard_bytes=70_000), decoder


@pytest.fixture
def eva(tmp_path):
    """A .pth like EVA's own: one block more than is used, at another resolution, fused, half precision, wrapped."""
    tower = randomise(ViT(ViTConfig(image_size=28, num_layers=3, **EVA_SIZES)))
    state, content = tower.state_dict(), {}
    for name, tensor in state.items():
        if ".attention.q." in name:
            i, kind = name.split(".")[1], name.rsplit(".", 1)[1]
            if kind == "weight":
                parts = [state[f"blocks.{i}.attention.{letter}.weight"] for letter in "qkv"]
                content[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
            else:
                content[f"blocks.{i}.attn.q_bias"] = tensor
                content[f"blocks.{i}.attn.v_bias"] = state[f"blocks.{i}.attention.v.bias"]
        elif ".attention.k." not in name and ".attention.v." not in name:
            for ours, theirs in (("class_token", "cls_token"), ("positions", "pos_embed"), ("post_norm", "norm"),
                                 ("patch_embedding", "patch_embed.proj"), ("attention.o", "attn.proj"), ("norm_", "norm"),
                                 ("fc_", "mlp.fc")):
                name = name.replace(ours, theirs)
            content[name] = tensor
    content["cls_token"] = content["cls_token"].view(1, 1, -1)
    content["pos_embed"] = content["pos_embed"][None]
    content = {name: tensor.half() for name, tensor in content.items()}
    torch.save({"model": content, "epoch": 3}, tmp_path / "eva.pth")
    return tmp_path / "eva.pth", tower


def test_a_start_from_separate_towers(tmp_path, language, eva, capsys):
    out = tmp_path / "start"
    flags = ["--family", "lynx", "--size", "tiny", "--vision", str(eva[0]), "--language", str(language[0]), "--seed", "4"]
    assert main(["convert", *flags, str(out)]) == 0
    told = capsys.readouterr().out
    assert "a block behind the features that are used" in told and "vision.positions: [1, 5, 32] became [1, 17, 32]" in told
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


def test_the_modality_adaptive_copies_start_equal(tmp_path, language):
    tower = randomise(ViT(ViTConfig(56, 14, 32, 2, 2, 64, pre_norm=True, patch_bias=False)))
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "patch_size": 14, "image_size": 56, "model_type": "clip_vision_model"}
    clip = folder_with(tmp_path / "clip", config, vision_layouts.CLIP, tower.state_dict())
    sizes = recipes.mplug_owl2.CONFIGS["tiny"]
    sizes = sizes | {"llm": LLAMA_SIZES}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    out = tmp_path / "start"
    assert main(["convert", "--family", "mplug_owl2", "--config", str(tmp_path / "sizes.json"), "--vision", str(clip),
                 "--language", str(language[0]), str(out)]) == 0
    state, decoder = load_file(out / "model.safetensors"), language[1].state_dict()
    for name in ("layers.3.attention.k", "layers.0.attention.v", "layers.1.norm_1", "layers.2.norm_2"):
        text, vision = (state[f"decoder.{name}.{branch}.weight"] for branch in ("text", "vision"))
        assert torch.equal(text, vision) and torch.equal(text, decoder[f"{name}.weight"])
    assert torch.equal(state["decoder.layers.3.attention.q.weight"], decoder["layers.3.attention.q.weight"])
    assert all(torch.equal(state[f"vision.{name}"], tensor) for name, tensor in tower.state_dict().items())
    rest = json.loads((out / "config.json").read_text())["initialised"]
    assert all(name.startswith("bridge.") for name in rest)


def lynx_file(tmp_path, keep=lambda name: True):
    """A released file of a tiny Lynx, wrapped as the official loader expects, and the model."""
    published = recipes.FAMILIES["lynx"]
    config = published.configs["tiny"]
    model = randomise(published.build(config))
    tensors = to_published(published.layout(config), model.state_dict())
    path = tmp_path / "finetune_lynx.pt"
    torch.save({"model": {f"model.{name}": tensor for name, tensor in tensors.items() if keep(name)}}, path)
    return path, model


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


def test_bare_language_model_in_other_types(language):
    loaded = recipes.load(language[0], dtype=torch.bfloat16)
    assert isinstance(loaded.model, Decoder) and loaded.image_size == 0
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, language[1].state_dict()[name].bfloat16())


def test_another_resolution_only_when_asked(tmp_path):
    published, config = recipes.FAMILIES["llava_phi"], recipes.FAMILIES["llava_phi"].configs["tiny"]
    model = randomise(published.build(config))
    folder = folder_with(tmp_path / "phi", config | {"model_type": "llava_phi"}, published.layout(config), model.state_dict())
    assert recipes.load(folder).notes[0].startswith("512 embedding rows")
    loaded = recipes.load(folder, image_size=28)
    assert loaded.image_size == 28 and "17 rows resized to 5" in " ".join(loaded.notes)
    assert torch.equal(loaded.model.vision.positions, resize_positions(model.vision.positions.data, 4))
    wrong = config | {"vision": config["vision"] | {"image_size": 28}, "model_type": "llava_phi"}
    (folder / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="image_size"):
        recipes.load(folder)


def spoil_shard(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-40])
    return shard.name


def lose_shard(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    return shard.name


def corrupt_header(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_bytes(b"\xff" * 64)
    return shard.name


def pointer(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    return "git lfs pull"


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    return "model.safetensors.index.json"


def other_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "opt"}))
    return "another family"


def unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "llame"}')
    return "llama"


def stretched_rope(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "yarn"}}))
    return "yarn"


def fewer_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    return "model.layers.3.self_attn.q_proj.weight"


def small_vocabulary(folder):
    train_tokenizer(WORDS * 3, 600).save(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 511}))
    return "vocabulary"


@pytest.mark.parametrize("spoil", [spoil_shard, lose_shard, corrupt_header, pointer, broken_index, other_family,
                                   unknown_type, stretched_rope, fewer_layers, small_vocabulary])
def test_bad_folders_are_refused_by_name(language, spoil):
    words = spoil(language[0])
    with pytest.raises((ValueError, OSError)) as caught:
        recipes.load(language[0])
    assert words in str(caught.value)


def test_python_objects_are_never_unpickled(tmp_path, capsys):
    torch.save({"model": {"bridge.latents": torch.ones(1)}, "run": subprocess.Popen}, tmp_path / "evil.pt")
    assert main(["convert", "--family", "lynx", str(tmp_path / "evil.pt"), str(tmp_path / "out")]) == 1
    assert "Python objects" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_load_takes_no_bin_files(language):
    for shard in language[0].glob("model*"):
        shard.unlink()
    torch.save(language[1].state_dict(), language[0] / "pytorch_model.bin")
    with pytest.raises(ValueError, match="convert"):
        recipes.load(language[0])


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


def test_the_command_line_ends_in_one_line_and_a_code(tmp_path):
    call = [sys.executable, "-m", "nanovlm.recipes"]
    done = subprocess.run([*call, "coverage", str(tmp_path / "absent.json")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "absent.json" in done.stderr
    assert subprocess.run([*call, "coverage"], capture_output=True).returncode == 2


@pytest.mark.parametrize("flags", [[], ["--vision", "x"], ["--family", "nonsense", "x"], ["--family", "llama", "absent"]])
def test_convert_names_what_it_needs(tmp_path, capsys, flags):
    assert main(["convert", *flags, str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("recipes convert: ") and not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path, language, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    assert main(["convert", str(language[0]), str(tmp_path / "out")]) == 1
    assert "already exists" in capsys.readouterr().err and [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_tied_and_untied_heads(tmp_path):
    sizes = LLAMA_SIZES | {"tie_word_embeddings": True, "model_type": "llama", "num_key_value_heads": 1}
    decoder = randomise(Decoder(llama_config(sizes)))
    folder = folder_with(tmp_path / "tied", sizes, LLAMA, decoder.state_dict())
    tensors = load_file(folder / "model.safetensors")
    for change, fits in ((lambda t: {"lm_head.weight": t.pop("model.embed_tokens.weight")}, True),
                         (lambda t: {"lm_head.weight": t["model.embed_tokens.weight"].clone()}, True),
                         (lambda t: {"lm_head.weight": t["model.embed_tokens.weight"] + 1}, False)):  # fmt: skip
        changed = dict(tensors)
        changed |= change(changed)
        save_file(changed, folder / "model.safetensors")
        if fits:
            assert torch.equal(recipes.load(folder).model.embedding.weight, decoder.embedding.weight)
        else:
            with pytest.raises(ValueError, match="second copy"):
                recipes.load(folder)


TOWERS = {"lynx": "eva_original", "mplug_owl2": "CLIP", "llava_phi": "CLIP", "llava": "CLIP", "blip2": "EVA",
          "open_flamingo": "CLIP", "small": "SIGLIP"}  # fmt: skip
LANGUAGES = {"llava_phi": "PHI", "blip2": "OPT", "open_flamingo": "OPT"}


@pytest.mark.parametrize("family", TOWERS)
def test_every_family_starts_from_its_towers(tmp_path, family):
    published = recipes.FAMILIES[family]
    config = published.configs["tiny"]
    model = randomise(published.build(config))
    table = vars(vision_layouts)[TOWERS[family]]
    table = table(model.vision.config.num_layers) if callable(table) else table
    state = model.vision.state_dict()
    write_checkpoint(make_folder(tmp_path / "tower"), table, state)
    words = {}
    for name, tensor in model.decoder.state_dict().items():
        if ".vision." not in name and ".adapter." not in name and ".cross_attention." not in name:
            words[name.replace(".text.", ".")] = tensor
    write_checkpoint(make_folder(tmp_path / "language"), vars(layouts)[LANGUAGES.get(family, "LLAMA")], words, 50_000)
    out = tmp_path / "start"
    assert main(["convert", "--family", family, "--size", "tiny", "--vision", str(tmp_path / "tower"),
                 "--language", str(tmp_path / "language"), str(out)]) == 0
    found = load_file(out / "model.safetensors")
    fresh = {name for name in found if not torch.equal(found[name], model.state_dict()[name])}
    assert set(json.loads((out / "config.json").read_text())["initialised"]) >= {
        name for name in fresh if not (".vision." in name and name.startswith("decoder."))
    }
    assert all(name.startswith(("bridge.", "decoder.layers.")) for name in fresh)
    assert not any(".attention.q." in name and "adapter" not in name for name in fresh if name.startswith("decoder."))


def make_folder(path):
    path.mkdir()
    return path
