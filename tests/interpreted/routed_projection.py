"""Keys and values of each modality in one product, as numpy, against the equations; see test_modality_adaptive."""

import pytest
import torch
from torch import nn

from nanovlm import routed_projection as module
from nanovlm.decoder import RMSNorm
from nanovlm.lora import LoRALinear
from nanovlm.modality_adaptive import ModalityAdaptive, Routing, route
from parity import close

assert module.INTERPRETED

MODALITIES = {
    "mixed": (torch.arange(300) % 7 < 3).long().view(3, 100),
    "a picture": torch.cat([torch.zeros(1, 10), torch.ones(1, 130), torch.zeros(1, 20)], 1).long(),
    "all text": torch.zeros(2, 70).long(), "all vision": torch.ones(2, 64).long(), "one token": torch.ones(1, 1).long(),
    "no tokens": torch.ones(0, 3).long(),
}


def make(width, out, bias=False):
    layer = ModalityAdaptive(nn.Linear(width, out, bias), nn.Linear(width, out, bias))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def outcome(form, layer, x, routing, dy):
    x = x.detach().requires_grad_()
    out = form(x, routing)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out, wanted, dy)]


@pytest.mark.parametrize("name", MODALITIES)
@pytest.mark.parametrize("width, out, bias", [(40, 72, True), (136, 24, False)])
def test_equals_the_equation_and_its_gradients(name, width, out, bias):
    modality, layer = MODALITIES[name], make(width, out, bias)
    routing = route(modality, in_place=True)
    x, dy = torch.randn(*modality.shape, width), torch.randn(*modality.shape, out)
    expected = outcome(layer.as_written, layer, x, routing, dy)
    close(outcome(layer, layer, x, routing, dy), expected, atol=2e-4)


def test_each_token_meets_one_weight_only():
    """The other weight is NaN wherever it must not count."""
    modality, layer = MODALITIES["mixed"], make(16, 16)
    nn.init.constant_(layer.vision.weight, float("nan"))
    out = layer(torch.randn(3, 100, 16), route(modality, in_place=True))
    assert torch.equal(out.isnan().any(-1), modality == 1) and torch.equal(out.isnan().all(-1), modality == 1)


def test_half_precision_frozen_weights_and_strides():
    modality, layer = MODALITIES["mixed"], make(32, 16).half()
    layer.text.weight.requires_grad_(False)
    routing = route(modality, in_place=True)
    x = torch.randn(3, 32, 100).half().transpose(1, 2)
    dy = torch.ones(1, 1, 1).half().expand(3, 100, 16)
    expected = outcome(layer.as_written, layer, x, routing, dy)
    found = outcome(layer, layer, x, routing, dy)
    close(found, expected, atol=2e-2, rtol=2e-2)  # their types too


def test_what_is_no_plain_projection_is_computed_as_written():
    modality, x = MODALITIES["mixed"], torch.randn(3, 100, 16)
    routing = route(modality, in_place=True)
    norm = ModalityAdaptive(RMSNorm(16), RMSNorm(16))
    nn.init.normal_(norm.vision.weight)
    layer = make(16, 8)
    layer.vision = LoRALinear(layer.vision, 2, 4.0)
    nn.init.normal_(layer.vision.lora_b)
    for module_ in (norm, layer):
        assert torch.equal(module_(x, routing), module_.as_written(x, routing))


@pytest.mark.slow
def test_torch_finds_the_operators_in_order():
    modality = MODALITIES["mixed"]
    order, text_end = route(modality, in_place=True).order, route(modality, in_place=True).text_end
    x, text, vision = torch.randn(300, 16), torch.randn(8, 16), torch.randn(8, 16)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    inputs = [part.requires_grad_() for part in (x, text, vision)]
    torch.library.opcheck(module.routed_product, (*inputs, order, text_end), test_utils=tests)


@pytest.mark.slow
def test_compiles_in_one_piece_and_works_under_autocast():
    layer, modality = make(16, 8, bias=True), MODALITIES["mixed"]

    def run(x, modality):
        return layer(x, route(modality, in_place=True)).sin()

    x = torch.randn(3, 100, 16)
    close(torch.compile(run, backend="aot_eager", fullgraph=True)(x, modality), run(x, modality))
    with torch.autocast("cpu", torch.float16):
        out = layer(x, route(modality, in_place=True))
    assert out.dtype == torch.float16
    close(out.float(), layer.as_written(x, Routing(modality, None, None)), atol=3e-2, rtol=3e-2)
