"""Lynx's bottleneck adapter: its formula, and a start that is near zero but not zero."""

import torch

from nanovlm.adapter import Adapter
from parity import close
from random_models import randomise


def test_formula():
    adapter = randomise(Adapter(6, 4), spread=0.5)
    hidden = torch.randn(2, 5, 6) * 3 + 1
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * adapter.norm.weight + adapter.norm.bias
    narrow = normed @ adapter.down.weight.T + adapter.down.bias
    narrow = narrow / (1 + (-narrow).exp())  # SiLU
    expected = hidden + adapter.scale * (narrow @ adapter.up.weight.T + adapter.up.bias)
    close(adapter(hidden), expected)
    assert (adapter(hidden) - hidden).abs().min() > 1e-4  # the update is not lost


def test_start():
    adapter = Adapter(96, 64)
    for linear, shape in ((adapter.down, (64, 96)), (adapter.up, (96, 64))):
        assert linear.weight.shape == shape
        assert 0.018 < linear.weight.std() < 0.022 and abs(linear.weight.mean()) < 0.002
        assert (linear.bias == 0).all()
    assert adapter.scale.shape == (1,) and adapter.scale == 1.0
    assert (adapter.norm.weight == 1).all() and (adapter.norm.bias == 0).all()
    hidden = torch.randn(3, 7, 96)
    update = (adapter(hidden) - hidden).std()
    assert 0.001 < update < 0.1  # disturbs the frozen model a little from the first step
