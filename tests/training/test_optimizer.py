"""Which parameter learns how fast, and when."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from nanovlm.training import optimizer
from nanovlm.training.stages import Stage

STAGE = Stage("align", "language", {"vision": 1e-3}, {"scenes": 1.0}, steps=100, batch_size=8, schedule="constant")


def stage(**values):
    return dataclasses.replace(STAGE, **values)


@pytest.mark.parametrize(("values", "expected"), [
    ({}, {0: 1, 99: 1}),
    ({"warmup_steps": 4, "start_lr_factor": 0.2}, {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1}),
    ({"schedule": "linear", "end_lr_factor": 0.2}, {0: 1, 50: 0.6, 99: 0.2 + 0.8 / 100}),
    ({"schedule": "linear", "warmup_steps": 20, "start_lr_factor": 0.0}, {0: 0, 10: 0.5, 20: 1, 60: 0.5, 99: 1 / 80}),
    ({"schedule": "cosine", "end_lr_factor": 0.1}, {0: 1, 25: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 50: 0.55}),
    ({"schedule": "trapezoid", "decay_share": 0.4, "end_lr_factor": 0.1},
     {0: 1, 60: 1, 61: 0.1 + 0.9 * 39 / 40, 80: 0.55, 99: 0.1 + 0.9 / 40}),
    ({"schedule": "trapezoid", "decay_share": 1.0, "warmup_steps": 50, "start_lr_factor": 0.0}, {49: 0.98, 50: 1, 75: 0.5}),
])
def test_the_learning_rate_over_time(values, expected):
    assert {step: optimizer.lr_factor(step, stage(**values)) for step in expected} == pytest.approx(expected)


def test_depths_count_from_the_top_as_in_beit():
    names = ["positions", "patch.weight", "blocks.0.q.weight", "blocks.1.q.weight", "blocks.1.norm.bias",
             "blocks.10.q.weight", "norm.weight"]
    assert optimizer.depths_from_top(names) == dict(zip(names, [4, 4, 3, 2, 2, 1, 0]))
    assert optimizer.depths_from_top(["a", "b.weight"]) == {"a": 0, "b.weight": 0}
    assert optimizer.depths_from_top(["decoder.layers.0.q", "decoder.norm", "decoder.head"])["decoder.head"] == 0


@pytest.mark.parametrize(("name", "shape", "expected"), [
    ("vision.blocks.0.q.weight", (4, 4), True), ("layers.11.q.weight", (4, 3), True),
    ("vision.blocks.0.latents", (4, 4), False), ("vision.patch.weight", (4, 4), False),
    ("blocks.0.conv.weight", (4, 4, 1, 1), False), ("superblocks.0.q.weight", (4, 4), False),
])
def test_matrices_are_two_dimensional_weights_inside_blocks(name, shape, expected):
    assert optimizer.is_matrix(name, nn.Parameter(torch.ones(shape))) is expected


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(2, 4))
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(2))
        self.norm = nn.LayerNorm(4)


def parts():
    return {"vision": {f"vision.{name}": p for name, p in Tower().named_parameters()},
            "bridge": {"bridge.weight": nn.Parameter(torch.randn(4, 4))}, "adapters": {}}


def test_groups_are_part_by_depth_by_kind():
    found = {group["name"]: group for group in optimizer.groups(parts(), stage(layer_decay={"vision": 0.5}, weight_decay=0.1))}
    assert {name: (group["peak_lr"], group["weight_decay"]) for name, group in found.items()} == {
        "vision/3/other": (1.25e-4, 0.0), "vision/2/matrix": (2.5e-4, 0.1), "vision/2/other": (2.5e-4, 0.0),
        "vision/1/matrix": (5e-4, 0.1), "vision/1/other": (5e-4, 0.0), "vision/0/other": (1e-3, 0.0)}
    assert found["vision/1/other"]["param_names"] == [f"vision.blocks.1.{n}" for n in ("q.bias", "norm.weight", "norm.bias")]
    assert [p.shape for p in found["vision/1/matrix"]["params"]] == [(4, 4)]
    made = stage(weight_decay=0.5, learning_rates={"vision": 0.1})
    held = parts()
    before = {name: p.detach().clone() for name, p in held["vision"].items()}
    (adamw,) = optimizer.build(held, made)
    for parameter in held["vision"].values():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    for name, parameter in held["vision"].items():
        expected = before[name] * (0.95 if name.endswith("q.weight") else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)


def test_muon_takes_the_matrices_at_its_own_rate():
    made = stage(optimizer="muon", precision="bfloat16", muon_factor=4.0, momentum=0.8, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-5)
    muon, adamw = optimizer.build(parts(), made)
    assert type(muon) is optimizer.Muon and muon.dtype is torch.bfloat16 and type(adamw) is torch.optim.AdamW
    assert [(g["name"], g["lr"], g["momentum"], g["weight_decay"]) for g in muon.param_groups] == [
        ("vision/2/matrix", 4e-3, 0.8, 0.1), ("vision/1/matrix", 4e-3, 0.8, 0.1)]
    assert {(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in adamw.param_groups} == {(1e-3, (0.8, 0.9), 1e-5, 0.0)}
    assert all(g["fused"] for g in adamw.param_groups), "one kernel for all parameters, several times faster on a CPU"
    assert sum(len(g["params"]) for one in (muon, adamw) for g in one.param_groups) == len(parts()["vision"])
    assert [type(one) for one in optimizer.build(parts(), STAGE)] == [torch.optim.AdamW]
    only_bridge = stage(optimizer="muon", learning_rates={"bridge": 1e-3})
    assert [type(one) for one in optimizer.build(parts(), only_bridge)] == [torch.optim.AdamW]


def test_muons_that_share_the_matrices_do_what_one_does():
    made, weights = stage(optimizer="muon", weight_decay=0.1), [parts(), parts()]
    one, many = (optimizer.build(found, made, number) for found, number in zip(weights, (1, 8)))
    assert (len(one), len(many)) == (2, 3), "no thread without a matrix"
    for found, optimizers in zip(weights, (one, many)):
        torch.manual_seed(0)
        for parameter in found["vision"].values():
            parameter.data, parameter.grad = torch.randn(parameter.shape), torch.randn(parameter.shape)
        for each in optimizers:
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(weights[0]["vision"].values(), weights[1]["vision"].values()))


@pytest.mark.parametrize("shape", [(16, 4), (4, 16), (8, 8)])
def test_muon_is_torchs_own_in_bfloat16_and_near_it_in_float32(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(5, *shape)

    def course(make):
        weight = nn.Parameter(start.clone())
        muon = make(weight)
        for gradient in gradients:
            weight.grad = gradient.clone()
            muon.step()
        return weight.detach() - start

    def ours(dtype):
        return course(lambda weight: optimizer.Muon([{"params": [weight], "lr": 0.1, "weight_decay": 0.2}], 0.9, dtype))

    torchs = course(lambda weight: torch.optim.Muon([weight], 0.1, 0.2, 0.9, True, adjust_lr_fn="original"))
    assert (ours(torch.bfloat16) - torchs).norm() < 5e-3 * torchs.norm()
    exact = ours(torch.float64)
    assert (ours(torch.float32) - exact).norm() < 1e-5 * exact.norm()
    assert (torchs - exact).norm() < 0.05 * exact.norm()


def test_newton_schulz_keeps_the_singular_vectors():
    """Five times a s + b s^3 + c s^5 of every singular value, and a float64 one of a wide and of a tall matrix alike."""
    torch.manual_seed(0)
    for matrix in (torch.randn(6, 9, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(optimizer.orthogonalised(matrix, torch.float64), u * s @ v)


def test_table():
    lines = optimizer.table(parts(), stage(layer_decay={"vision": 0.5}, learning_rates={"vision": 1e-3, "adapters": 1e-3}))
    assert [line.split() for line in lines] == [
        ["part", "parameters", "trained", "peak", "learning", "rate"],
        ["vision", "72", "yes", "0.000125", "to", "0.001"], ["bridge", "16", "frozen", "-"], ["adapters", "0", "frozen", "-"],
        ["all", "88", "72", "trained", "(82%)"]]
    with_muon = optimizer.table(parts(), stage(optimizer="muon", muon_factor=4.0))
    assert with_muon[1].split() == ["vision", "72", "yes", "0.001", "to", "0.004"]
