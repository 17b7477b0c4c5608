"""A checkpoint is whole or absent, whatever interrupts its writing; what does not fit is named."""

import copy
import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nanovlm.training import checkpoint, optimizer
from nanovlm.training.checkpoint import CheckpointError
from nanovlm.training.stages import Stage


def tensors(value):
    return {"model": {"w": torch.full((2, 3), float(value)), "scale": torch.tensor(float(value))},
            "random": {"cpu": torch.get_rng_state()}}


def save(*arguments):
    return checkpoint.begin(*arguments)()


def held(out):
    return sorted(path.name for path in (out / "state").iterdir())


def test_round_trip_and_the_newest_alone_stays(tmp_path):
    kept = tensors(0.1) | {"nothing": {}}
    kept["model"]["turned"] = torch.randn(4, 3).T
    folder = save(tmp_path, 7, kept, {"step": 7, "loss": 0.1})
    assert folder == tmp_path / "state" / "step-00000007" and checkpoint.complete(tmp_path) == [folder]
    found, state = checkpoint.read(folder), checkpoint.read_state(folder)
    assert state == {"step": 7, "loss": 0.1} and found.keys() == kept.keys()
    for name, content in kept.items():
        assert found[name].keys() == content.keys()
        assert all(torch.equal(found[name][key], value) for key, value in content.items())
    for step in (8, 9, 10, 100):
        save(tmp_path, step, tensors(step), {})
    assert held(tmp_path) == ["step-00000100"]
    assert checkpoint.read(checkpoint.complete(tmp_path)[-1])["model"]["w"][0, 0] == 100
    save(tmp_path, 200, tensors(1), {})
    save(tmp_path, 200, tensors(2), {})  # the same step is not written twice
    assert checkpoint.read(checkpoint.complete(tmp_path)[0])["model"]["w"][0, 0] == 1

def test_what_changes_while_it_is_written_stands_there_as_it_was(tmp_path):
    kept = tensors(1)
    rest = checkpoint.begin(tmp_path, 3, kept, {}, background=True)
    kept["model"]["w"].zero_()
    assert torch.equal(checkpoint.read(rest())["model"]["w"], torch.ones(2, 3))


def fail(at, error):
    """A stand-in for os.fsync that raises at its `at`-th call."""
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == at:
            raise error
    return fsync


def test_everything_is_forced_to_the_disk_before_the_rename(tmp_path, monkeypatch):
    seen = []
    path = "/proc/self/fd/{}"
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(os.path.basename(os.readlink(path.format(number)))))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (seen.append("rename"), rename(old, new)))
    save(tmp_path, 1, tensors(1), {})
    assert seen == ["model.safetensors", "random.safetensors", "state.json", "step-00000001.tmp", "rename", "state"]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, at):
    save(tmp_path, 1, tensors(1), {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(at, OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(CheckpointError, match="step 2 could not be .*No space left.*step-00000001 is intact.*--resume"):
            save(tmp_path, 2, tensors(2), {})
    assert held(tmp_path) == ["step-00000001"]
    assert checkpoint.read_state(checkpoint.complete(tmp_path)[0]) == {"step": 1}
    save(tmp_path, 2, tensors(2), {"step": 2})
    assert held(tmp_path) == ["step-00000002"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    (tmp_path / "state").write_text("")
    with pytest.raises(CheckpointError, match="could not be written.*no earlier one is intact"):
        save(tmp_path, 1, tensors(1), {})
    path = tmp_path / "a.txt"
    checkpoint.replace(path, lambda target: target.write_text("one"))
    def stop(target):
        target.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(CheckpointError, match="a.txt could not be written.*No space left"):
        checkpoint.replace(path, stop)
    assert path.read_text() == "one" and sorted(os.listdir(tmp_path)) == ["a.txt", "state"]
    checkpoint.replace_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}


class Killed(BaseException):
    """What nothing catches, as SIGKILL."""


@pytest.mark.parametrize("at", range(1, 6))
def test_a_kill_anywhere_leaves_a_whole_checkpoint(tmp_path, monkeypatch, at):
    save(tmp_path, 1, tensors(1), {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(at, Killed()))
        with pytest.raises(Killed):
            save(tmp_path, 2, tensors(2), {"step": 2})
    newest = checkpoint.complete(tmp_path)[-1]
    found, state = checkpoint.read(newest), checkpoint.read_state(newest)
    assert state["step"] == found["model"]["w"][0, 0] == (2 if at == 5 else 1)
    save(tmp_path, 3, tensors(3), {"step": 3})
    assert held(tmp_path) == ["step-00000003"]


def test_a_kill_while_the_old_one_is_removed(tmp_path, monkeypatch):
    save(tmp_path, 1, tensors(1), {})
    def rmtree(path, **options):
        (path / "state.json").unlink()
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            save(tmp_path, 2, tensors(2), {})
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000002"]
    save(tmp_path, 3, tensors(3), {})
    assert held(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "state.json").unlink(), lambda folder: (folder / "state.json").write_text("{"),
    lambda folder: os.truncate(folder / "model.safetensors", 20)])
def test_damage_is_named(tmp_path, damage):
    folder = save(tmp_path, 1, tensors(1), {})
    damage(folder)
    with pytest.raises(CheckpointError, match="step-00000001 is damaged"):
        checkpoint.read(folder), checkpoint.read_state(folder)


def test_copy_into_names_everything_that_does_not_fit(tmp_path):
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(CheckpointError) as error:
        checkpoint.copy_into(model.state_dict(), {"weight": torch.ones(2, 3), "scale": torch.ones(1)}, "a.safetensors")
    for words in ("a.safetensors", "bias is missing", "scale is not part of this model",
                  "weight has shape (2, 3), this model's has (2, 2)"):
        assert words in str(error.value)
    assert torch.equal(model.weight, before)
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, path)
    model = nn.Linear(2, 1)
    checkpoint.load_file_into(model.state_dict(), path)
    assert model.weight.sum() == 2
    os.truncate(path, 30)
    with pytest.raises(CheckpointError, match="a.safetensors is damaged"):
        checkpoint.load_file_into(model.state_dict(), path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_file_into(model.state_dict(), tmp_path / "b.safetensors")


STAGE = Stage("s", "language", {"bridge": 1e-2}, {"x": 1}, steps=10, batch_size=1, optimizer="muon")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3)])
        self.unused = nn.Parameter(torch.ones(2))

    def parts(self):
        return {"bridge": dict(self.named_parameters())}


def train(model, optimizers, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model.zero_grad()
        model.layers[0](torch.randn(2, 3, generator=generator)).square().sum().backward()
        for one in optimizers:
            one.step()


def test_optimizers_go_on_as_if_nothing_had_happened_and_name_what_does_not_fit():
    model = Two()
    optimizers = optimizer.build(model.parts(), STAGE)
    assert len(optimizers) == 2
    train(model, optimizers, 3, seed=1)
    state = {name: tensor.clone() for name, tensor in checkpoint.optimizer_tensors(optimizers).items()}
    assert set(state) == {"momentum_buffer/layers.0.weight",
                          "step/layers.0.bias", "exp_avg/layers.0.bias", "exp_avg_sq/layers.0.bias"}
    second = copy.deepcopy(model)
    fresh = optimizer.build(second.parts(), STAGE)
    checkpoint.load_optimizer(fresh, state)
    train(model, optimizers, 3, seed=2)
    train(second, fresh, 3, seed=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
    state["exp_avg/other"] = state.pop("exp_avg/layers.0.bias")
    with pytest.raises(CheckpointError, match=r"missing \['exp_avg/layers.0.bias'\], left over \['exp_avg/other'\]"):
        checkpoint.load_optimizer(fresh, state)
