"""Masks against a loop over tokens, attention against a loop over everything, RoPE against complex numbers."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from nanovlm.attention import (
    Visible, alibi_slopes, apply_rope, attention, causal, causal_rows, documents, full, prefix, rope_tables, sliding_window,
)
from parity import close

BACKENDS = ("reference", "sdpa")  # the third has its own tests
SEGMENTS = {
    "plain": [[0, 0, 0, 0, 0]], "one token": [[0]],
    "packed": [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]],
    "padding behind": [[0, 0, 0, -1, -1], [0, 0, 0, 0, 0]],
    "padding in front": [[-1, -1, 0, 0, 0], [-1, -1, -1, -1, 0]],
    "packed and padded": [[-1, 0, 0, 1, 1, -1, -1], [0, 0, 1, 2, 2, 2, -1]],
    "nothing but padding": [[-1, -1, -1], [0, 0, 0]],
}


def judge(segments, may):
    """Draw a mask pair by pair: may(row, t, s) for tokens t and s of one document."""
    rows, length = segments.shape
    mask = torch.zeros(rows, length, length, dtype=torch.bool)
    for b, row in enumerate(segments.tolist()):
        for t in range(length):
            for s in range(length):
                mask[b, t, s] = row[t] >= 0 and row[s] == row[t] and may(b, t, s)
    return mask


@pytest.mark.parametrize("window", [None, 1, 2, 3, 10])
@pytest.mark.parametrize("name", SEGMENTS)
def test_causal_and_sliding_window_judged_token_by_token(name, window):
    segments = torch.tensor(SEGMENTS[name])
    visible = causal(segments) if window is None else sliding_window(segments, window)
    expected = judge(segments, lambda b, t, s: 0 <= t - s < (window or 99))
    assert torch.equal(visible.check(segments.shape[1]).mask(segments.shape[1]), expected)


@pytest.mark.parametrize("name", [name for name in SEGMENTS if "packed" not in name])
def test_prefix_judged_token_by_token(name):
    segments = torch.tensor(SEGMENTS[name])
    real = (segments >= 0).sum(1)
    begins = [(row.tolist() + [0]).index(0) for row in segments]
    for wanted in range(4):
        lengths = real.clamp(max=wanted)  # differs from row to row where padding does
        visible = prefix(segments, lengths).check(segments.shape[1])
        expected = judge(segments, lambda b, t, s: s <= t or max(s, t) < begins[b] + lengths[b])
        # a token of the prefix sees all of it, a later one everything behind itself
        assert torch.equal(visible.mask(segments.shape[1]), expected)


def test_known_patterns_and_unknown_backends():
    rows, everything, packed = causal_rows(3, 5), full(4, 7), documents([3, 1, 4])
    assert (rows.pattern, everything.pattern, packed.pattern, packed.lengths) == ("causal", "full", "documents", (3, 1, 4))
    assert torch.equal(rows.mask(5), torch.ones(3, 5, 5).tril().bool())
    assert everything.mask(7).shape == (1, 4, 7) and everything.mask(7).all()
    assert torch.equal(packed.mask(8), causal(torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2]])).mask(8))
    assert full(1, 2, "meta").first.device.type == causal_rows(1, 2, "meta").stop.device.type == "meta"
    for first, num_keys, message in ((0, 6, "from 0 to 7, but keys 0 to 6"), (-1, 7, "from -1 to 7")):
        with pytest.raises(ValueError, match=message):
            Visible(everything.first + first, everything.stop).check(num_keys)
    q = torch.randn(1, 3, 2, 4)
    assert torch.equal(attention(q, q, q, full(2, 2)), attention(q, q, q, full(2, 2), "sdpa"))
    with pytest.raises(ValueError, match="unknown attention backend 'spda'. Did you mean 'sdpa'?"):
        attention(q, q, q, full(2, 2), "spda")


def naive_attention(q, k, v, mask, slopes=(0, 0, 0, 0)):
    """One query, one head, one row at a time; differentiable. slopes: what a head's score gains for each later key."""
    rows, heads, length, width = q.shape
    group = heads // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(rows):
        for h in range(heads):
            for t in range(length):
                seen = [s for s in range(k.shape[2]) if mask[b if len(mask) > 1 else 0, t, s]]
                if not seen:
                    continue
                scores = [(q[b, h, t] * k[b, h // group, s]).sum() / math.sqrt(width) + slopes[h] * s for s in seen]
                scores = torch.stack(scores)
                shares = scores.exp() / scores.exp().sum()
                out[b, h, t] = sum(share * v[b, h // group, s] for share, s in zip(shares, seen))
    return out


def some_intervals():
    """Two rows of five queries over seven keys: all, one, none at both ends, the middle."""
    return Visible(torch.tensor([[0, 3, 2, 7, 1], [0, 0, 5, 1, 0]]), torch.tensor([[7, 4, 2, 7, 5], [0, 1, 7, 6, 3]]))


VISIBLE = {
    "intervals": some_intervals,
    "full": lambda: full(5, 7),
    "packed": lambda: causal(torch.tensor([[0, 0, 1, 1, 1], [-1, 0, 0, 0, -1]])),
    "causal": lambda: causal_rows(2, 5),
    "documents": lambda: documents([2, 1, 2]),
    "causal over more keys": lambda: Visible(torch.zeros(2, 5, dtype=torch.long), torch.arange(3, 8).expand(2, 5), "causal"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VISIBLE)
@pytest.mark.parametrize("num_kv_heads, slopes", [(2, None), (4, None), (2, [0.9, 0.5, 0.3, 0.1]), (4, [2.0, 0.7, 0.4, 0.0])])
def test_backends_equal_the_loop_and_its_gradients(backend, name, num_kv_heads, slopes):
    visible = dataclasses.replace(VISIBLE[name](), slopes=None if slopes is None else torch.tensor(slopes))
    num_keys = 5 if name in ("packed", "causal", "documents") else 7
    sizes = ((4, 5), (num_kv_heads, num_keys), (num_kv_heads, num_keys))
    tensors = [torch.randn(2, heads, length, 3, requires_grad=True) for heads, length in sizes]
    weight = torch.randn(2, 4, 5, 3)
    expected = naive_attention(*tensors, visible.mask(num_keys), slopes or [0] * 4)
    found = attention(*tensors, visible, backend)
    blind = (visible.stop <= visible.first)[:, None, :, None].expand_as(found)
    assert (found[blind] == 0).all()
    close(found, expected, atol=2e-6, rtol=1e-5)
    close(*(torch.autograd.grad((out * weight).sum(), tensors) for out in (found, expected)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["full", "causal", "packed"])
@pytest.mark.parametrize("slopes", [None, [0.5, 0.25, 0.1, 0.0]])
def test_half_precision_is_float32_rounded_once(backend, pattern, slopes):
    q, k, v = (torch.randn(2, heads, 5, 8).bfloat16() for heads in (4, 2, 2))
    visible = full(5, 5) if pattern == "full" else VISIBLE[pattern]()
    visible = dataclasses.replace(visible, slopes=None if slopes is None else torch.tensor(slopes))
    expected = attention(q.float(), k.float(), v.float(), visible, backend).bfloat16()
    for autocast in (False, True)[: 1 + (backend == "sdpa")]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(attention(q, k, v, visible, backend), expected)


def test_sdpa_leaves_the_mask_out_where_the_pattern_allows(monkeypatch):
    calls, original = [], F.scaled_dot_product_attention

    def spy(*args, **options):
        calls.append(options)
        return original(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q = torch.randn(1, 4, 3, 2)
    for visible in (full(3, 3), causal_rows(1, 3), causal(torch.zeros(1, 3, dtype=torch.long)), documents([1, 2])):
        attention(q, q, q, visible, "sdpa")
        attention(q, q[:, :2], q[:, :2], visible, "sdpa")
    assert [call.get("attn_mask") is not None for call in calls] == [False] * 4 + [True] * 2 + [False] * 4
    assert [call.get("is_causal", False) for call in calls] == [False, False, True, True, False, False] + [True] * 4
    assert [call["enable_gqa"] for call in calls] == [False, True] * 3 + [False, False, True, True]


def test_alibi_slopes():
    """Of 4 and 8 heads as in the paper; of 3 and 6 by hand, dealt out from those of 4 and 8, and by the plain formula."""
    assert alibi_slopes(4) == (1 / 4, 1 / 16, 1 / 64, 1 / 256) and alibi_slopes(1) == (1 / 256,)
    assert alibi_slopes(8) == alibi_slopes(8, interleaved=False) == tuple(2.0**-h for h in range(1, 9))
    assert alibi_slopes(3) == (1 / 16, 1 / 256, 1 / 4) and alibi_slopes(6) == (1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8)
    assert alibi_slopes(3, interleaved=False) == tuple(2 ** (-8 * h / 3) for h in (1, 2, 3))
    assert alibi_slopes(2, largest=4) == (1 / 4, 1 / 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alibi_counts_distances_exactly_far_from_the_start(backend):
    """The last of 4,000 tokens weighs its neighbours as the 40th does: its place is no part of what is rounded."""
    slopes, (q, k, v) = torch.tensor([0.84, 0.25]), torch.randn(3, 1, 2, 40, 8)
    visible = dataclasses.replace(causal_rows(1, 40), slopes=slopes)
    late = Visible(visible.first + 3960, visible.stop + 3960, slopes=slopes)
    padded = (torch.cat([torch.randn(1, 2, 3960, 8), x], dim=2) for x in (k, v))
    close(attention(q, *padded, late, backend), attention(q, k, v, visible, backend), atol=2e-6, rtol=0)


def test_rope_is_a_rotation_of_complex_numbers():
    positions = torch.tensor([[0, 1, 2, 7, 30], [5, 5, 0, 1000, 3]])
    x = torch.randn(2, 3, 5, 8)
    cos, sin = rope_tables(positions, 8, 100.0)
    assert cos.shape == sin.shape == (2, 1, 5, 4) and cos.dtype == torch.float32
    turned = apply_rope(x, cos, sin)
    for b in range(2):
        for t in range(5):
            for j in range(4):
                angle = int(positions[b, t]) * 100.0 ** (-2 * j / 8)
                expected = torch.complex(x[b, :, t, j], x[b, :, t, j + 4]) * complex(math.cos(angle), math.sin(angle))
                found = torch.complex(turned[b, :, t, j], turned[b, :, t, j + 4])
                close(found, expected, atol=1e-4, rtol=1e-4)
    x = torch.randn(1, 2, 3, 10)
    positions = torch.tensor([[1, 2, 3]])
    cos, sin = rope_tables(positions, 4, 10000.0)
    turned = apply_rope(x, cos, sin)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], apply_rope(x[..., :4], cos, sin))
    assert (turned[..., :4] != x[..., :4]).all()
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16
