"""Masks against a loop over tokens, attention against a loop over everything, RoPE against complex numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanovlm.attention import BACKENDS as ALL_BACKENDS, Visible, apply_rope, attention, attention_weights, causal, causal_rows, documents, full, prefix, rope_tables, sliding_window  # fmt: skip

BACKENDS = ("reference", "sdpa")  # the third has its own tests
SEGMENTS = {
    "plain": [[0, 0, 0, 0, 0]], "one token": [[0]],
    "packed": [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]],
    "padding behind": [[0, 0, 0, -1, -1], [0, 0, 0, 0, 0]],
    "padding in front": [[-1, -1, 0, 0, 0], [-1, -1, -1, -1, 0]],
    "packed and padded": [[-1, 0, 0, 1, 1, -1, -1], [0, 0, 1, 2, 2, 2, -1]],
    "nothing but padding": [[-1, -1, -1], [0, 0, 0]],
}
ONE_DOCUMENT = ("plain", "one token", "padding behind", "padding in front", "nothing but padding")


def judge(segments, may):
    """Draw a mask pair by pair: may(row, t, s) for tokens t and s of one document."""
    rows, length = segments.shape
    mask = torch.zeros(rows, length, length, dtype=torch.bool)
    for b, row in enumerate(segments.tolist()):
        for t in range(length):
            for s in range(length):
                mask[b, t, s] = row[t] >= 0 and row[s] == row[t] and may(b, t, s)
    return mask


@pytest.mark.parametrize("name", SEGMENTS)
def test_causal_judged_token_by_token(name):
    segments = torch.tensor(SEGMENTS[name])
    visible = causal(segments).check(segments.shape[1])
    assert visible.pattern == "intervals"
    assert torch.equal(visible.mask(segments.shape[1]), judge(segments, lambda b, t, s: s <= t))


@pytest.mark.parametrize("name", SEGMENTS)
def test_sliding_window_judged_token_by_token(name):
    segments = torch.tensor(SEGMENTS[name])
    for window in (1, 2, 3, 10):
        visible = sliding_window(segments, window).check(segments.shape[1])
        assert torch.equal(visible.mask(segments.shape[1]), judge(segments, lambda b, t, s: 0 <= t - s < window))


@pytest.mark.parametrize("name", ONE_DOCUMENT)
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


def test_causal_rows_and_full():
    rows = causal_rows(3, 5).check(5)
    assert rows.pattern == "causal"
    assert torch.equal(rows.mask(5), torch.ones(3, 5, 5).tril().bool())
    assert torch.equal(rows.mask(5), causal(torch.zeros(3, 5, dtype=torch.long)).mask(5))
    everything = full(4, 7).check(7)
    assert everything.pattern == "full"
    assert everything.mask(7).shape == (1, 4, 7) and everything.mask(7).all()
    assert full(1, 2, "meta").first.device.type == causal_rows(1, 2, "meta").stop.device.type == "meta"


def test_documents_are_a_causal_row_of_known_lengths():
    got, want = documents([3, 1, 4]), causal(torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2]]))
    assert torch.equal(got.first, want.first) and torch.equal(got.stop, want.stop)
    assert got.pattern == "documents" and got.lengths == (3, 1, 4)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match=r"prefixes of \[2, 3\] tokens in rows of \[2, 2\]"):
        prefix(torch.tensor([[0, 0, -1], [-1, 0, 0]]), torch.tensor([2, 3]))
    with pytest.raises(ValueError, match="window 0"):
        sliding_window(torch.zeros(1, 3, dtype=torch.long), 0)
    zeros, fives = torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), 5)
    visible = Visible(zeros, fives)
    assert visible.check(5) is visible
    with pytest.raises(ValueError, match="from 0 to 5, but keys 0 to 4"):
        visible.check(4)
    with pytest.raises(ValueError, match="from -1 to 5"):
        Visible(torch.tensor([[0, -1]]), fives).check(5)
    with pytest.raises(ValueError, match="differ, or are not"):
        Visible(zeros, fives.expand(2, 2)).check(5)
    with pytest.raises(ValueError, match="differ, or are not"):
        Visible(zeros[0], fives[0]).check(5)


def naive_attention(q, k, v, mask):
    """One query, one head, one row at a time; differentiable."""
    rows, heads, length, width = q.shape
    group = heads // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(rows):
        for h in range(heads):
            for t in range(length):
                seen = [s for s in range(k.shape[2]) if mask[b if len(mask) > 1 else 0, t, s]]
                if not seen:
                    continue
                scores = torch.stack([(q[b, h, t] * k[b, h // group, s]).sum() / math.sqrt(width) for s in seen])
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
@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_backends_equal_the_loop_and_its_gradients(backend, name, num_kv_heads):
    visible = VISIBLE[name]()
    num_keys = 5 if name in ("packed", "causal", "documents") else 7
    sizes = ((4, 5), (num_kv_heads, num_keys), (num_kv_heads, num_keys))
    tensors = [torch.randn(2, heads, length, 3, requires_grad=True) for heads, length in sizes]
    weight = torch.randn(2, 4, 5, 3)
    expected = naive_attention(*tensors, visible.mask(num_keys))
    found = attention(*tensors, visible, backend)
    blind = (visible.stop <= visible.first)[:, None, :, None].expand_as(found)
    assert (found[blind] == 0).all()
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    expected_grads = torch.autograd.grad((expected * weight).sum(), tensors)
    for grad, expected_grad in zip(torch.autograd.grad((found * weight).sum(), tensors), expected_grads):
        torch.testing.assert_close(grad, expected_grad, atol=2e-6, rtol=1e-5)


def test_weights_are_shares():
    q, k, v = (torch.randn(2, heads, length, 4) for heads, length in ((4, 5), (2, 7), (2, 7)))
    visible = some_intervals()
    weights = attention_weights(q, k, visible)
    sees = (visible.stop > visible.first)[:, None, :].expand(2, 4, 5)
    assert weights.shape == (2, 4, 5, 7)
    torch.testing.assert_close(weights.sum(-1), sees.float())
    assert (weights[~visible.mask(7)[:, None].expand(2, 4, 5, 7)] == 0).all()
    out = weights @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, attention(q, k, v, visible, "reference"))


def test_reference_scores_in_float32():
    q, k, v = (torch.randn(1, 2, 6, 8).bfloat16() for _ in range(3))
    visible = causal_rows(1, 6)
    out = attention(q, k, v, visible, "reference")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(q.float(), k.float(), v.float(), visible, "reference").bfloat16())
    assert attention(q, k, v, visible, "sdpa").dtype == torch.bfloat16


@pytest.mark.parametrize("pattern", ["full", "causal", "packed"])
@pytest.mark.parametrize("autocast", [False, True])
def test_sdpa_on_a_cpu_works_in_float32(autocast, pattern):
    q, k, v = (torch.randn(2, heads, 5, 8).bfloat16() for heads in (4, 2, 2))
    visible = VISIBLE[pattern]() if pattern != "full" else full(5, 5)
    expected = attention(q.float(), k.float(), v.float(), visible, "sdpa").bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(attention(q, k, v, visible, "sdpa"), expected)


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


def test_unknown_backend_and_heads_without_a_multiple():
    q = torch.randn(1, 3, 2, 4)
    assert ALL_BACKENDS == ("reference", "sdpa", "triton")
    torch.testing.assert_close(attention(q, q, q, full(2, 2)), attention(q, q, q, full(2, 2), "sdpa"), rtol=0, atol=0)
    with pytest.raises(ValueError, match="unknown attention backend 'spda'. Did you mean 'sdpa'?"):
        attention(q, q, q, full(2, 2), "spda")
    for num_kv_heads in (2, 6):
        k = torch.randn(1, num_kv_heads, 2, 4)
        with pytest.raises(ValueError, match=f"3 query heads cannot share {num_kv_heads} key heads"):
            attention(q, k, k, full(2, 2))


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
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_rope_turns_the_first_channels_only():
    x = torch.randn(1, 2, 3, 10)
    positions = torch.tensor([[1, 2, 3]])
    cos, sin = rope_tables(positions, 4, 10000.0)
    turned = apply_rope(x, cos, sin)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    torch.testing.assert_close(turned[..., :4], apply_rope(x[..., :4], cos, sin), rtol=0, atol=0)
    assert (turned[..., :4] != x[..., :4]).all()
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_rope_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 6)

    def score(query_position, key_position):
        cos, sin = rope_tables(torch.tensor([[query_position]]), 6, 10.0)
        turned_q = apply_rope(q, cos, sin)
        cos, sin = rope_tables(torch.tensor([[key_position]]), 6, 10.0)
        return float((turned_q * apply_rope(k, cos, sin)).sum())

    assert score(5, 2) == pytest.approx(score(103, 100), abs=1e-4)
    assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-6)
    assert abs(score(5, 2) - score(2, 5)) > 1e-2
    assert abs(score(5, 2) - score(5, 3)) > 1e-2
