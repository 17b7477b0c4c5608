"""Low-rank updates: nothing changes at the start, only they train, merged they are gone; and a run with --lora."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import train
from nanovlm import lora, recipes
from nanovlm.decoder import LayerOptions
from nanovlm.lora import LoRALinear
from parity import close
from random_models import image_batch, randomise, small_decoder, small_vlm
from test_train_cli import RECIPE, refuse, run

I = -1
LAYERS = (LayerOptions(3, modality_adaptive=True), LayerOptions())
DECODER = {f"decoder.layers.0.{name}" for name in (
    "attention.q", "attention.k.text", "attention.k.vision", "attention.v.text", "attention.v.vision", "attention.o",
    "ffn.gate", "ffn.up", "ffn.down",
)} | {f"decoder.layers.1.{name}" for name in (
    "attention.q", "attention.k", "attention.v", "attention.o", "ffn.gate", "ffn.up", "ffn.down",
)}  # fmt: skip
EVERYWHERE = ""


def batch():
    return image_batch([[I, I, I, 4, 5], [6, 7, I, I, I]], [1, 1], [0, 1], [0, 1])


def test_equation_3():
    linear = randomise(torch.nn.Linear(5, 7))
    adapted, x = randomise(LoRALinear(linear, rank=2, alpha=6)), torch.randn(3, 5)
    weight = linear.weight + 6 / 2 * adapted.lora_b @ adapted.lora_a
    close(adapted(x), x @ weight.T + linear.bias)
    assert adapted.lora_a.shape == (2, 5) and adapted.lora_b.shape == (7, 2)
    linear = torch.nn.Linear(4, 6, bias=False).to(torch.bfloat16)
    adapted = randomise(LoRALinear(linear, 2, 2))
    assert adapted.lora_a.dtype == adapted.lora_b.dtype == torch.bfloat16
    expected = (linear.weight.float() + adapted.lora_b.float() @ adapted.lora_a.float()).bfloat16()  # rounded once
    merged = adapted.merged()
    assert torch.equal(merged.weight, expected) and merged.bias is None
    with torch.device("meta"):
        decoder = small_decoder()
    lora.add(decoder, 2, 2, "attention")
    assert decoder.layers[0].attention.q.lora_a.device.type == "meta"


def test_nothing_changes_at_the_start():
    model = small_vlm(layers=LAYERS)
    given, names = batch(), dict(model.named_parameters())
    before = model(given)
    assert set(lora.add(model, 2, 4.0)) == DECODER
    assert torch.equal(model(given), before)
    after, adapted = dict(model.named_parameters()), [model.get_submodule(name) for name in DECODER]
    assert all(after[name] is parameter for name, parameter in names.items())  # the same weights under the same names
    assert set(after) - set(names) == {f"{name}.lora_{letter}" for name in DECODER for letter in "ab"}
    assert not any(one.weight.requires_grad or one.lora_b.any() for one in adapted)
    starts = torch.cat([one.lora_a.flatten() * one.in_features**0.5 for one in adapted])
    assert 0.99 < starts.abs().max() <= 1 and starts.mean().abs() < 0.1  # as torch's own linear layers


@pytest.mark.parametrize("where", [EVERYWHERE, lora.DECODER_LAYERS, "lm_head$", r"attention\.k"])
def test_merged_is_the_same_function_without_a_trace(where):
    model = small_vlm(layers=LAYERS).double()
    given, names = batch(), set(model.state_dict())
    given.pixels = given.pixels.double()
    plain, chosen = model(given), lora.add(model, 3, 2.0, where)
    for name in chosen:
        randomise(model.get_submodule(name))
    expected = model.eval()(given)
    assert (expected - plain).abs().max() > 1e-3
    assert lora.merge(model) == chosen and lora.merge(model) == []
    close(model(given), expected, atol=1e-6, rtol=1e-6)
    assert set(model.state_dict()) == names
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    merged = model.get_submodule(chosen[0])
    assert type(merged) is torch.nn.Linear and not merged.training and merged.weight.requires_grad


def test_names_choose():
    model = small_vlm(layers=LAYERS)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert lora.add(model, 2, 2, r"attention\.[kv]") == [name for name in linears if re.search(r"attention\.[kv]", name)]
    cross = small_decoder((LayerOptions(cross_attention=True),), cross_attention_width=5)
    names = [f"decoder.{name}" for name, _ in cross.named_modules()]  # its own attention, not the cross-attention
    assert not any("cross" in name for name in names if re.search(lora.DECODER_LAYERS, name))


@pytest.mark.parametrize("options", [
    dict(rank=0), dict(rank=1.5), dict(alpha=0), dict(where="norm_1"), dict(where="attention.q$"),
])  # fmt: skip
def test_mistakes(options):
    model = small_vlm(layers=LAYERS)
    lora.add(model, 2, 2, r"attention\.q$")
    with pytest.raises(ValueError, match=str(next(iter(options.values()))).replace("$", r"\$")):
        lora.add(model, **dict(rank=2, alpha=2) | options)
    assert not isinstance(model.decoder.layers[0].attention.o, LoRALinear)  # nothing is half done


def test_only_the_updates_learn():
    model = small_vlm(layers=LAYERS).requires_grad_(False)
    lora.add(model, 2, 2, EVERYWHERE)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.AdamW(model.parts()["lora"].values(), lr=1e-2)
    for _ in range(2):
        loss, _ = model.loss(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parts()["lora"].values())


FROZEN = [f"align.learning_rates.{part}=none" for part in ("bridge", "adapters", "vision_branch")]
FLAGS = ["--threads", "1", "--stages", "align", "--lora", "2:6", "--set", "align.learning_rates.lora=1e-2",
         *[word for setting in FROZEN for word in ("--set", setting)]]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A model, and the run that goes on from it with low-rank updates alone: (folder of the first, of the second)."""
    folder = tmp_path_factory.mktemp("tuned")
    assert run("--out", folder / "base", "--threads", "1", "--set", "tower.steps=1") == 0
    assert run("--out", folder / "tuned", "--init", folder / "base", *FLAGS) == 0
    return folder / "base", folder / "tuned"


@pytest.mark.slow
def test_a_run_leaves_the_base_and_merged_updates_are_the_next_ones_start(tuned, tmp_path):
    base, found = (load_file(out / "model.safetensors") for out in tuned)
    updates = {name for name in found if ".lora_" in name}
    assert found.keys() - updates == base.keys() and len(updates) == 2 * 16
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
    assert all(found[name].abs().sum() > 0 for name in updates)  # B has left zero
    assert json.loads((tuned[1] / "config.json").read_text())["lora"] == {"rank": 2, "alpha": 6.0}
    base, loaded = (recipes.load(folder, recipe=RECIPE).model for folder in tuned)
    plain = base.state_dict()
    assert loaded.state_dict().keys() == plain.keys()
    name = "decoder.layers.1.attention.q"
    update = 6 / 2 * found[f"{name}.lora_b"] @ found[f"{name}.lora_a"]
    assert update.abs().max() > 1e-3
    close(loaded.state_dict()[f"{name}.weight"], plain[f"{name}.weight"] + update)
    assert torch.equal(loaded.decoder.embedding.weight, base.decoder.embedding.weight)
    again = ["--threads", "1", "--stages", "align", "--set", "align.steps=1", "--set", "align.warmup_steps=0"]
    assert run("--out", tmp_path / "plain", "--init", tuned[1], *again) == 0
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == loaded.state_dict().keys()
    for name in plain:
        if name.startswith("decoder.layers") and ".adapter." not in name and ".vision." not in name:
            assert torch.equal(plain[name], loaded.state_dict()[name]), name


@pytest.mark.slow
def test_resumed_bit_for_bit(tuned, tmp_path):
    out = tmp_path / "run"
    assert run("--out", out, "--init", tuned[0], *FLAGS, "--max-minutes", "0") == 0  # stops after every step
    for _ in range(5):
        assert not (out / "model.safetensors").exists()
        assert run("--out", out, "--init", tuned[0], *FLAGS, "--max-minutes", "0", "--resume") == 0
    assert run("--out", out, "--init", tuned[0], *FLAGS, "--resume") == 0
    assert (out / "model.safetensors").read_bytes() == (tuned[1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--lora", "0"], "0 lies outside of 1"), (["--lora", "two"], "--lora"), (["--lora", "2:x"], "--lora"),
    (["--lora", "2:0", "--set", "align.learning_rates.lora=1"], "alpha 0.0"),
    (["--lora", "2", "--tune", "bridge"], "no stage trains the part 'lora'; try --set"),
    (["--lora", "2", "--tune", "brigde,lora"], "Did you mean 'bridge'"),
    (["--set", "align.learning_rates.lora=1"], "'lora', which this model does not have; give it one with --lora RANK"),
    (["--set", "align.learning_rates.cross_attention=1"], "'cross_attention', which this model does not have"),
])  # fmt: skip
def test_mistakes_on_the_command_line(capsys, tmp_path, arguments, words):
    assert words in refuse(capsys, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_print_shows_the_part(capsys):
    with pytest.raises(SystemExit):
        run("--print", "--lora", "2", "--set", "align.learning_rates.lora=1e-3")
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lora ")][-1]
    assert line.split()[2:] == ["yes", "0.001"]
    assert train.low_rank("8") == {"rank": 8, "alpha": 8.0}
