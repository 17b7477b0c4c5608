"""The norm's kernels, as numpy, against decoder.RMSNorm; started by test_fused_norm."""

import pytest
import torch

from support import fused_norm as module
from nanovlm.decoder import RMSNorm
from support.fused_norm import rms_norm
from parity import close

assert module.INTERPRETED


def make(*shape, dtype=torch.float32):
    norm = RMSNorm(shape[-1], eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return norm, (torch.randn(shape) * 3).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 64), (1, 1), (300, 5), (0, 8), (33,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_torch_with_gradients(shape, dtype):
    norm, x = make(*shape, dtype=dtype)
    expected, found = norm(x), rms_norm(x, norm.weight, 1e-5)
    assert found.dtype == dtype
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=2e-2, rtol=4e-3)
    close(found, expected, **tolerance)
    dy = torch.randn_like(x)
    for f, e in zip(*(torch.autograd.grad(y, (x, norm.weight), dy) for y in (found, expected))):
        close(f, e, **(tolerance if dtype == torch.float32 else dict(atol=0.1, rtol=0.02)))


@pytest.mark.slow
def test_torch_finds_the_operator_in_order():
    norm, x = make(5, 12)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(module.forward, (x, norm.weight, 1e-5), test_utils=tests)
