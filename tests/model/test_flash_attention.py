"""The fused kernels against the equation, in the interpreter; bad arguments; the switch."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import interpreter
from nanovlm.attention import BACKENDS, Visible, attention, full
from parity import close

flash = pytest.importorskip("nanovlm.flash_attention")


@pytest.mark.slow
@pytest.mark.parametrize("slow", [False, True])
def test_kernels_in_the_interpreter(slow):
    interpreter.run("flash_attention.py", slow=slow)


def test_without_gpu_and_interpreter_it_says_so(monkeypatch):
    monkeypatch.setattr(flash, "INTERPRETED", False)
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match="need a GPU, or .*TRITON_INTERPRET=1.*'sdpa'"):
        attention(q, q, q, full(3, 3), "triton")
    assert BACKENDS == ("reference", "sdpa", "triton")
    q = torch.empty(1, 1, 2**17, 64, device="meta").as_strided((1, 1, 2**17, 64), (64, 64, 2**14, 1))
    with pytest.raises(ValueError, match="2 \\*\\* 31 elements"):
        flash.flash_attention(q, q, q, full(2**17, 2**17, "meta"))


@pytest.mark.parametrize("capability, width, key", [
    ((9, 0), 64, (90, 64)), ((9, 0), 88, (90, 96)), ((9, 0), 128, (90, 128)), ((8, 6), 8, (80, 64)), ((12, 0), 96, (80, 128)),
])  # fmt: skip
def test_tiles_of_a_gpu_are_such_that_a_kernel_can_have(capability, width, key, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    half = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"), shape=(1, 1, 1, width))
    exact = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"), shape=(1, 1, 1, width))
    assert flash.tiles_for(half) is flash.TILES[key] and flash.tiles_for(exact) is flash.EXACT
    for tile in (*flash.TILES[key], *flash.EXACT):
        assert {tile.queries, tile.keys} <= {32, 64, 128} and tile.warps in (4, 8)
        assert tile.stages == 1 if tile in flash.EXACT else tile.stages in (2, 3)


def test_rows_that_cannot_be_read_in_pieces_of_16_bytes_are_copied():
    x = torch.zeros(2, 3, 4, 24)
    for good in (x[..., :16], x.transpose(1, 2), torch.zeros(1, 1, 1, 17)[..., 1:]):
        assert flash.readable(good) is good
    for bad in (torch.zeros(2, 3, 4, 25)[..., :16], x.transpose(2, 3)):
        assert flash.readable(bad) is not bad and torch.equal(flash.readable(bad), bad)


def shaped(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


Q, GOOD = shaped(2, 4, 3, 16), full(3, 5)
K = shaped(2, 2, 5, 16)
BAD = {
    r"channels.; given are q torch.float32 \(4, 3, 16\)": (shaped(4, 3, 16), K, K, GOOD),
    "one type.* k torch.float16": (Q, K.half(), K, GOOD),
    "one type.* q torch.float64": (Q.double(), K.double(), K.double(), GOOD),
    r"one device.* stop torch.int64 \(1, 3\) on meta": (Q, K, K, Visible(GOOD.first, GOOD.stop.to("meta"))),
    r"8 to 128 channels.* q .*, 12\) on": (Q[..., :12], K[..., :12], K[..., :12], GOOD),
    r"8 to 128 channels.* q .*, 136\) on": (shaped(2, 4, 3, 136), K, K, GOOD),
    r"rows and channels of q.* v torch.float32 \(2, 2, 6, 16\)": (Q, K, shaped(2, 2, 6, 16), GOOD),
    r"rows and channels of q.* k torch.float32 \(1, 2, 5, 16\)": (Q, K[:1], K[:1], GOOD),
    "a multiple of key heads": (Q, shaped(2, 3, 5, 16), shaped(2, 3, 5, 16), GOOD),
    r"q's tokens.* first torch.int64 \(1, 4\)": (Q, K, K, full(4, 5)),
    r"q's tokens.* stop torch.int64 \(2, 3\)": (Q, K, K, Visible(GOOD.first, GOOD.stop.expand(2, 3))),
    "int32 or int64.* first torch.float32": (Q, K, K, Visible(GOOD.first.float(), GOOD.stop)),
    "slopes are float32, one for each head": (Q, K, K, Visible(GOOD.first, GOOD.stop, slopes=torch.ones(2))),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        flash.flash_attention(*BAD[message])


@pytest.mark.parametrize("heads, kv_heads, slopes", [(2, 2, None), (4, 2, None), (4, 2, [0.9, 0.4, 0.1, 0.0])])
def test_as_written_equals_the_reference_and_its_gradients(heads, kv_heads, slopes):
    """Intervals in no order, some empty; what is written out in torch is what autograd finds."""
    q, k, v = (torch.randn(2, h, t, 8).double().requires_grad_() for h, t in ((heads, 7), (kv_heads, 9), (kv_heads, 9)))
    first = torch.randint(0, 9, (2, 7))
    visible = Visible(first, (first + torch.randint(-2, 9, (2, 7))).clamp(0, 9))
    assert (visible.stop <= visible.first).any()
    slopes = None if slopes is None else torch.tensor(slopes)
    bias = 0 if slopes is None else slopes[:, None, None] * torch.arange(9)
    (k_all, v_all), mask = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v)), visible.mask(9)[:, None]
    scale = 0.3
    weights = (q @ k_all.transpose(-2, -1) * scale + bias).masked_fill(~mask, -1e300).softmax(-1).masked_fill(~mask, 0)
    expected, do = weights @ v_all, torch.randn_like(q)
    out, lse = flash.forward_as_written(q, k, v, visible.first, visible.stop, scale, slopes)
    close(out, expected)
    found = flash.backward_as_written(do, q, k, v, visible.first, visible.stop, out, lse, scale, slopes)
    close(found, torch.autograd.grad(expected, (q, k, v), do))
    single = [x.detach().float() for x in (q, k, v)]
    scaled = flash.forward_as_written(*single, visible.first, visible.stop, 8**-0.5, slopes)[0]
    close(scaled, attention(*single, replace(visible, slopes=slopes), "reference"))
