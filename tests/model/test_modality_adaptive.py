"""The equations as written against the routed form, forward and backward."""

import dataclasses

import pytest
import torch
from torch import nn

import interpreter
from nanovlm.modality_adaptive import ModalityAdaptive, TEXT, TILE, VISION, route, sort, split
from random_models import randomise

MODALITIES = {
    "mixed": [[1, 1, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    "all text": [[0, 0, 0], [0, 0, 0]],
    "all vision": [[1, 1, 1], [1, 1, 1]],
    "one token": [[1]],
}
LAYERS = {
    "norm": lambda: nn.RMSNorm(6, eps=1e-6),
    "projection": lambda: nn.Linear(6, 4, bias=False),
    "with bias": lambda: nn.Linear(6, 9),
}


def make(name):
    return randomise(ModalityAdaptive(LAYERS[name](), LAYERS[name]()), spread=1.0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("modality", MODALITIES)
def test_routed_equals_as_written_with_gradients(name, modality):
    layer, modality = make(name), torch.tensor(MODALITIES[modality])
    routing = route(modality)
    x = torch.randn(*modality.shape, 6, requires_grad=True)
    written, routed = layer.as_written(x, routing), layer.routed(x, routing)
    assert written.shape == routed.shape
    torch.testing.assert_close(routed, written)
    torch.testing.assert_close(layer(x, routing), written)
    weight = torch.randn_like(written)
    wanted = (x, *layer.parameters())
    grads = [torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True) for out in (written, routed)]
    for expected, found, parameter in zip(*grads, wanted):
        found = torch.zeros_like(parameter) if found is None else found  # an unused branch may stay out of the graph
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["as_written", "routed"])
def test_each_token_meets_its_own_branch(form):
    layer = make("projection")
    modality = torch.tensor(MODALITIES["mixed"])
    x = torch.randn(3, 5, 6)
    out = getattr(layer, form)(x, route(modality))
    for b in range(3):
        for t in range(5):
            own = layer.vision if modality[b, t] == 1 else layer.text
            torch.testing.assert_close(out[b, t], own(x[b, t]))


@pytest.mark.parametrize("name", LAYERS)
def test_equal_branches_are_the_plain_layer(name):
    layer = make(name)
    layer.vision.load_state_dict(layer.text.state_dict())
    x = torch.randn(3, 5, 6)
    routing = route(torch.tensor(MODALITIES["mixed"]))
    torch.testing.assert_close(layer.routed(x, routing), layer.text(x))
    torch.testing.assert_close(layer.as_written(x, routing), layer.text(x))


def test_route_finds_the_tokens():
    assert (TEXT, VISION) == (0, 1)
    modality = torch.tensor([[0, 1, 1], [0, 0, 1]])
    routing = route(modality)
    assert routing.modality is modality
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.text = None
    assert routing.text.tolist() == [0, 3, 4] and routing.vision.tolist() == [1, 2, 5]
    alone = route(torch.zeros(2, 3, dtype=torch.long))
    assert alone.text.tolist() == list(range(6)) and alone.vision is None
    pictures = route(torch.ones(1, 2, dtype=torch.long))
    assert pictures.text is None and pictures.vision.tolist() == [0, 1]


def test_one_modality_alone_never_runs_the_other_branch():
    layer = ModalityAdaptive(nn.Linear(6, 4), nn.Linear(5, 4))  # the other branch would raise
    for width, modality in ((6, torch.zeros(2, 3, dtype=torch.long)), (5, torch.ones(2, 3, dtype=torch.long))):
        assert layer(torch.randn(2, 3, width), route(modality)).shape == (2, 3, 4)


def test_routed_computes_each_token_once():
    layer, seen = make("projection"), {}
    for name in ("text", "vision"):
        getattr(layer, name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: len(args[0])}))
    layer(torch.randn(3, 5, 6), route(torch.tensor(MODALITIES["mixed"])))
    assert seen == {"text": 11, "vision": 4}


def test_split_binds_only_modality_adaptive_layers():
    plain, layer = nn.Linear(6, 4), make("projection")
    routing, x = route(torch.tensor([[0, 1]])), torch.randn(1, 2, 6)
    assert split(plain, routing) is plain
    assert torch.equal(split(layer, routing)(x), layer(x, routing))


@pytest.mark.parametrize("modality", MODALITIES)
def test_sorted_tiles_hold_one_modality_each_and_every_token_once(modality):
    modality = torch.tensor(MODALITIES[modality]).repeat(1, 50)
    order, text_end = sort(modality)
    number = modality.numel()
    assert order.shape[1] == TILE and order.numel() >= number and int(text_end) % TILE == 0
    order = order.flatten()
    text, vision = order[:text_end], order[text_end:]
    for part, kind in ((text, TEXT), (vision, VISION)):
        expected = (modality.flatten() == kind).nonzero().flatten()
        assert torch.equal(part[part < number], expected)  # in the order of the row
        assert (part[len(expected) :] == number).all()


def test_all_text_is_known_without_looking():
    routing = route(None)
    assert routing.modality is routing.text is routing.vision is routing.order is None
    layer = ModalityAdaptive(nn.Linear(6, 4), nn.Linear(5, 4))  # the vision branch would raise
    x = torch.randn(2, 3, 6)
    assert torch.equal(layer(x, routing), layer.text(x))


def test_routing_in_place_never_waits_for_a_device():
    """Meta tensors have no numbers: whoever asked for one would fail."""
    modality = torch.zeros(3, 100, dtype=torch.long, device="meta")
    routing = route(modality, in_place=True)
    assert routing.text is None and routing.order.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        route(modality, in_place=False)


@pytest.mark.slow
def test_product_of_sorted_tiles_in_the_interpreter():
    interpreter.run("routed_projection.py")


@pytest.mark.slow
def test_product_of_sorted_tiles_in_the_interpreter_slowly():
    interpreter.run("routed_projection.py", slow=True)


def test_routed_projection_names_bad_arguments():
    module = pytest.importorskip("nanovlm.routed_projection")
    x, weight = torch.randn(5, 8), torch.randn(4, 8)
    order, text_end = sort(torch.zeros(1, 5))
    for arguments, message in (
        ((x, weight, weight, order, text_end), "x is on cpu: this kernel needs a GPU, or \\(slow\\) TRITON_INTERPRET=1"),
        ((x, weight, weight[:3], order, text_end), r"vision does not fit x: .*\(3, 8\)"),
        ((x, weight[:, :7], weight, order, text_end), r"text does not fit x: .*\(4, 7\)"),
        ((x.half(), weight, weight, order, text_end), "text does not fit x: torch.float32 .*torch.float16"),
        ((x, weight, weight.to("meta"), order, text_end), "vision does not fit x: .* on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            module.project(*arguments)
