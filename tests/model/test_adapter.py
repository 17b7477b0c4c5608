"""Lynx's bottleneck adapter starts near zero, but not at zero; its formula: tests/official."""

import torch

from nanovlm.adapter import Adapter


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
