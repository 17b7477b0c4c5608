"""What makes a stage's loss one module: blank pictures that change nothing, captions of all processes merged."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanovlm.training import processes, update
from nanovlm.training.processes import join
from nanovlm.recipes import RECIPES
from nanovlm.vlm import Batch
from nanovlm.training.stages import Stage, freeze
from test_trainer import make
from tiny_recipe import RECIPE


@pytest.fixture
def run(tmp_path):
    return make(tmp_path / "run")


def gradients(model, batch):
    """As one of two processes: (loss, gradients by name)."""
    model.zero_grad()
    run = SimpleNamespace(device=torch.device("cpu"), processes=SimpleNamespace(size=2), share_prefix=True)
    loss = processes.LanguageLoss(model, run, RECIPE.stages("full", False)[1])([batch])
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def test_a_process_without_rows_has_a_loss_of_zero(run):
    empty = update.blank(run, RECIPE.stages("full", False)[0])
    loss, found = gradients(run.model, *empty.inputs[0])
    assert loss == 0 and (empty.records, empty.trained, empty.tokens) == ([], 0, 0)
    assert all(value is not None and not value.any() for value in found.values())


@pytest.mark.parametrize("name", RECIPES)
def test_a_blank_picture_reaches_every_parameter_of_the_papers_models(name):
    torch.manual_seed(0)
    model = RECIPES[name].build("tiny", 300)
    freeze(model, None, Stage("s", "language", {part: 1e-3 for part, held in model.parts().items() if held}, {"x": 1}, 1, 1))
    ids = torch.randint(1, 250, (2, 5))
    words = Batch(ids, ids.clone(), torch.zeros_like(ids), torch.arange(5).expand(2, 5), None, *[torch.zeros(0).long()] * 3)
    loss, alone = gradients(model, words)
    same, blank = gradients(model, update.with_blank_picture(words, model, model.vision.image_size))
    assert same == pytest.approx(loss, rel=1e-5)
    wanted = {parameter for parameter, one in model.named_parameters() if one.requires_grad}
    assert {parameter for parameter, value in blank.items() if value is not None} == wanted
    for parameter in wanted:
        expected = torch.zeros_like(blank[parameter]) if alone[parameter] is None else alone[parameter]
        rounding = 1e-6 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(blank[parameter], expected, rtol=1e-4, atol=rounding, msg=parameter)


class Casts(TorchDispatchMode):
    """Counts what is cast, by shape."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.counted[tuple(args[0].shape)] += 1
        return function(*args, **kwargs or {})

    def __enter__(self):
        self.counted = Counter()
        return super().__enter__()


@torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
def test_a_frozen_weight_is_cast_once_and_again_when_it_has_changed():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(6, 4), torch.randn(3, 6)
    linear.requires_grad_(False).forward = processes.CastOnce(linear)
    plain = lambda: F.linear(x, linear.weight, linear.bias)
    with Casts() as casts:
        found = linear(x), linear(x)
    assert casts.counted[4, 6] == 1 and all(torch.equal(one, plain()) for one in found)
    linear.weight.mul_(2)  # as a checkpoint that is read
    assert torch.equal(linear(x), plain())
    linear.weight.requires_grad_()
    linear(x).sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_a_stage_in_bfloat16_casts_the_frozen_once(run):
    stage = dataclasses.replace(RECIPE.stages("full", False)[1], precision="bfloat16")
    processes.lay_out(run, stage)
    frozen = [one for one in run.model.modules() if type(one) is torch.nn.Linear and not one.weight.requires_grad]
    ids = torch.randint(1, 50, (2, 6))
    words = Batch(ids, ids.clone(), torch.zeros_like(ids), torch.arange(6).expand(2, 6), None, *[torch.zeros(0).long()] * 3)
    first = run.loss([words])
    with Casts() as casts:
        assert torch.equal(run.loss([words]), first)
    assert frozen and not casts.counted.keys() & {tuple(one.weight.shape) for one in frozen}


def test_captions_of_all_processes_each_once():
    first = ([(1, 5, 2), (1, 6, 2)], [[True, False], [True, True]])
    second = ([(1, 7, 2), (1, 5, 2)], [[True, True]])
    places, right = processes.merge_captions([first, second])
    assert places.tolist() == [0, 1, 2]
    assert right.tolist() == [[True, False, False], [True, True, False], [True, False, True]]


ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(("mode", "device", "environment", "words"), [
    ("dpp", "cpu", {}, "'dpp' is unknown. Did you mean 'ddp'"),
    ("ddp", "cpu", {}, "torchrun --nproc-per-node 2 train.py ... --parallel ddp"),
    ("fsdp", "cpu", {"RANK": "0"}, "start them with torchrun"),
    ("none", "cpu", ENVIRONMENT, "torchrun has started 2 processes, but --parallel is none"),
    ("none", "cpu", {}, "--shards 4 says how --parallel fsdp cuts the model"),
    ("fsdp", "cpu", ENVIRONMENT | {"WORLD_SIZE": "6"}, "--shards 4 does not divide the 6 processes"),
    ("ddp", "cuda", ENVIRONMENT | {"LOCAL_RANK": "64"}, "GPUs")])
def test_what_cannot_be_one_of_many_is_told_so(monkeypatch, mode, device, environment, words):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        join(mode, device, shards=4 if "--shards" in words else None)


def test_a_process_that_nobody_meets_gives_up_within_the_timeout(monkeypatch):
    def nobody(url, timeout):
        waits.append(timeout.total_seconds())
        raise RuntimeError("timed out")

    waits = []
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "rendezvous", nobody)
    with pytest.raises(ValueError, match=r"do not come together \(timed out\).*MASTER_ADDR"):
        join("ddp", "cpu", timeout=8.0)
    assert waits == [4.0], "torch waits twice"
