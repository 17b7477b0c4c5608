"""The fused kernels against the equation, in the interpreter; bad arguments; the switch."""

import pytest
import torch

import interpreter
from nanovlm.attention import BACKENDS, Visible, attention, full

flash = pytest.importorskip("nanovlm.flash_attention")


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    interpreter.run("flash_attention.py")


@pytest.mark.slow
def test_kernels_in_the_interpreter_slowly():
    interpreter.run("flash_attention.py", slow=True)


def test_without_gpu_and_interpreter_it_says_so():
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match="need a GPU, or TRITON_INTERPRET=1.*'sdpa'"):
        attention(q, q, q, full(3, 3), "triton")
    assert BACKENDS == ("reference", "sdpa", "triton")


def shaped(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


Q, GOOD = shaped(2, 4, 3, 16), full(3, 5)
K = shaped(2, 2, 5, 16)
BAD = {
    "q has shape": (shaped(4, 3, 16), K, K, GOOD),
    "v has shape": (Q, K, shaped(2, 5, 16), GOOD),
    "q is torch.float64": (Q.double(), K, K, GOOD),
    "k is torch.float16 and q torch.float32": (Q, K.half(), K, GOOD),
    "v is on meta": (Q, K, K.to("meta"), GOOD),
    "visible.stop is on meta": (Q, K, K, Visible(GOOD.first, GOOD.stop.to("meta"))),
    "heads of 12 channels": (Q[..., :12], K[..., :12], K[..., :12], GOOD),
    "heads of 136 channels": (shaped(2, 4, 3, 136), shaped(2, 2, 5, 136), shaped(2, 2, 5, 136), GOOD),
    r"k \(2, 2, 5, 16\) and v \(2, 2, 6, 16\)": (Q, K, shaped(2, 2, 6, 16), GOOD),
    r"k \(1, 2, 5, 16\) and v": (Q, K[:1], K[:1], GOOD),
    r"k \(2, 2, 5, 8\) and v": (Q, K[..., :8], K[..., :8], GOOD),
    "4 query heads cannot share 3": (Q, shaped(2, 3, 5, 16), shaped(2, 3, 5, 16), GOOD),
    r"visible.first has shape \(1, 4\)": (Q, K, K, full(4, 5)),
    r"visible.first has shape \(3, 3\)": (Q, K, K, Visible(GOOD.first.expand(3, 3), GOOD.stop.expand(3, 3))),
    r"visible.stop has shape \(2, 3\)": (Q, K, K, Visible(GOOD.first, GOOD.stop.expand(2, 3))),
    "visible.first is torch.float32": (Q, K, K, Visible(GOOD.first.float(), GOOD.stop)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        flash.flash_attention(*BAD[message])


def test_rows_too_far_apart_are_an_error():
    q = torch.empty(1, 1, 2**17, 64, device="meta").as_strided((1, 1, 2**17, 64), (64, 64, 2**14, 1))
    with pytest.raises(ValueError, match="2 \\*\\* 31 elements"):
        flash.flash_attention(q, q, q, full(2**17, 2**17, "meta"))
