"""The three forms against one token at a time, forward and backward; where tokens stand; which form runs."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import interpreter
from nanovlm import modality_adaptive
from nanovlm.modality_adaptive import ModalityAdaptive, TEXT, TILE, VISION, route, sort
from parity import close
from random_models import randomise

MODALITIES = {
    "mixed": [[1, 1, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    "all text": [[0, 0, 0], [0, 0, 0]],
    "all vision": [[1, 1, 1], [1, 1, 1]],
    "one token": [[1]],
    "tiles with one token more": [[0, 1] * 129],
}
LAYERS = {
    "norm": lambda: nn.RMSNorm(6, eps=1e-6),
    "projection": lambda: nn.Linear(6, 4, bias=False),
    "with bias": lambda: nn.Linear(6, 9),
}


def make(name):
    return randomise(ModalityAdaptive(LAYERS[name](), LAYERS[name]()), spread=1.0)


def project(x, text, vision, order, text_end):
    """What routed_projection's kernel computes (interpreted/routed_projection.py), in torch, a tile of rows at a time."""
    x, out = F.pad(x, (0, 0, 0, 1)), x.new_zeros(len(x) + 1, len(text))
    for number, rows in enumerate(order):
        out = out.index_copy(0, rows, x[rows] @ (text if number * TILE < text_end else vision).T)
    return out[:-1]


@pytest.mark.parametrize("form", ["as_written", "routed", "in_place"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("modality", MODALITIES)
def test_each_token_meets_its_own_branch(form, name, modality, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanovlm.routed_projection", SimpleNamespace(project=project))
    layer, modality = make(name), torch.tensor(MODALITIES[modality])
    routing = route(modality, in_place=form == "in_place")
    x = torch.randn(*modality.shape, 6, requires_grad=True)
    tokens = zip(x.flatten(0, 1), modality.flatten())
    expected = torch.stack([(layer.vision if kind == VISION else layer.text)(token) for token, kind in tokens])
    found, expected = getattr(layer, form)(x, routing), expected.unflatten(0, modality.shape)
    close(found, expected)
    assert form == "as_written" or torch.equal(layer(x, routing), found)
    weight, wanted = torch.randn_like(found), (x, *layer.parameters())
    close(*(torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True, materialize_grads=True)
            for out in (found, expected)), atol=1e-4)  # fmt: skip


def test_route_finds_the_tokens_and_each_is_computed_once():
    assert (TEXT, VISION) == (0, 1)
    modality = torch.tensor([[0, 1, 1], [0, 0, 1]])
    routing = route(modality)
    assert routing.modality is modality
    assert routing.text.tolist() == [0, 3, 4] and routing.vision.tolist() == [1, 2, 5]
    alone, pictures = route(torch.zeros(2, 3).long()), route(torch.ones(1, 2).long())
    assert alone.text.tolist() == list(range(6)) and alone.vision is None
    assert pictures.text is None and pictures.vision.tolist() == [0, 1]
    routing = route(None)
    assert routing.modality is routing.text is routing.vision is routing.order is None
    layer = ModalityAdaptive(nn.Linear(6, 4), nn.Linear(5, 4))  # the vision branch would raise
    x = torch.randn(2, 3, 6)
    assert torch.equal(layer(x, routing), layer.text(x))
    layer, seen = make("projection"), {}
    for name in ("text", "vision"):
        getattr(layer, name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: len(args[0])}))
    layer(torch.randn(3, 5, 6), route(torch.tensor(MODALITIES["mixed"])))
    assert seen == {"text": 11, "vision": 4}


@pytest.mark.parametrize("modality", MODALITIES)
def test_sorted_tiles_hold_one_modality_each_and_every_token_once(modality):
    modality = torch.tensor(MODALITIES[modality]).repeat(1, 50)
    order, text_end = sort(modality)
    number = modality.numel()
    assert order.shape == (-(-number // TILE) + 1, TILE) and int(text_end) % TILE == 0
    for part, kind in ((order.flatten()[:text_end], TEXT), (order.flatten()[text_end:], VISION)):
        expected = (modality.flatten() == kind).nonzero().flatten()
        assert torch.equal(part[part < number], expected)  # in the order of the row
        assert (part[len(expected) :] == number).all()


def test_routing_in_place_never_waits_for_a_device():
    """Meta tensors have no numbers: whoever asked for one would fail."""
    modality = torch.zeros(3, 100, dtype=torch.long, device="meta")
    routing = route(modality, in_place=True)
    assert routing.text is routing.vision is None and routing.order.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        route(modality, in_place=False)


@pytest.mark.parametrize("device, triton, in_place", [("cuda", True, True), ("cuda", None, False), ("cpu", True, False)])
def test_a_gpu_with_triton_routes_in_place(device, triton, in_place, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton)
    monkeypatch.setattr(modality_adaptive, "sort", lambda modality: ("order", "text_end"))
    modality = SimpleNamespace(device=torch.device(device), flatten=lambda: torch.zeros(3))
    assert (route(modality).order is not None) == in_place


@pytest.mark.slow
@pytest.mark.parametrize("slow", [False, True])
def test_product_of_sorted_tiles_in_the_interpreter(slow):
    interpreter.run("routed_projection.py", slow=slow)


def test_without_gpu_and_interpreter_the_kernel_says_so():
    module = pytest.importorskip("nanovlm.routed_projection")
    x, weight = torch.randn(5, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match="x is on cpu: this kernel needs a GPU, or \\(slow\\) TRITON_INTERPRET=1"):
        module.project(x, weight, weight, *sort(torch.zeros(1, 5)))
