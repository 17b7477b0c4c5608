"""The first kernel: in the interpreter, and with bad arguments."""

import pytest
import torch

import interpreter

module = pytest.importorskip("notebooks.support.fused_norm")


@pytest.mark.slow
@pytest.mark.parametrize("slow", [False, True])
def test_kernels_in_the_interpreter(slow):
    interpreter.run("fused_norm.py", slow=slow)


BAD = {
    r"gain has shape \(3,\); expected \[4\]": ((2, 4), (3,), {}),
    "x has 16385 channels": ((1, 16385), (16385,), {}),
    "gain is torch.float32 and x torch.float16": ((2, 4), (4,), dict(dtype=torch.float16)),
    "gain is on cpu, but x on meta": ((2, 4), (4,), dict(device="meta")),
    "x is on cpu: this kernel needs a GPU": ((2, 4), (4,), {}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    shape, gain_shape, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        module.rms_norm(torch.zeros(shape, **options), torch.zeros(gain_shape))
