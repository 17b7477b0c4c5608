"""The fused kernels, as numpy, against attention as written in float64; started by test_flash_attention."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nanovlm.bench import kernels
from nanovlm import flash_attention as module
from nanovlm.attention import Visible, attention, causal, causal_rows, full, prefix, sliding_window
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.flash_attention import Tile, flash_attention, seen_by
from nanovlm.resampler import Resampler
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import Batch, VLM
from parity import close

assert module.INTERPRETED


def cut(length):
    """Documents of random lengths in one row, padding behind: int[length]."""
    lengths = torch.tensor([length // 3, length // 4, length // 4])
    padding = torch.full((length - int(lengths.sum()),), -1)
    return torch.cat([torch.arange(3).repeat_interleave(lengths), padding])


def scattered(rows, queries, keys):
    """Intervals in no order at all, some empty."""
    first = torch.randint(0, keys, (rows, queries))
    return Visible(first, (first + torch.randint(-3, keys, (rows, queries))).clamp(0, keys))


def islands():
    """Every query sees key 0, but those in the middle no more than it: a tile seen by all, but with a gap."""
    stop = torch.full((1, 96), 64)
    stop[:, 40:44] = 1
    return Visible(torch.zeros_like(stop), stop)


# name: (visible, rows, heads, key heads, queries, keys, channels)
CASES = {
    "causal": (causal_rows(1, 72), 1, 1, 1, 72, 72, 64),
    "ViT": (full(65, 65), 2, 1, 1, 65, 65, 88),
    "packed and padded, groups": (causal(cut(100)[None].repeat(2, 1)), 2, 4, 2, 100, 100, 16),
    "padding in front": (causal(cut(70).flip(0)[None]), 1, 1, 1, 70, 70, 64),
    "two rows, two masks": (causal(torch.stack([cut(64), torch.zeros(64).long()])), 2, 1, 1, 64, 64, 128),
    "prefix": (prefix(torch.zeros(1, 80).long(), torch.tensor([50])), 1, 2, 1, 80, 80, 32),
    "sliding window": (sliding_window(torch.zeros(1, 120).long(), 30), 1, 1, 1, 120, 120, 24),
    "chunked prefill": (Visible(torch.zeros(1, 33).long(), torch.arange(96, 129)[None]), 1, 2, 2, 33, 128, 64),
    "latest image": (Visible(torch.arange(60)[None] // 20 * 40, torch.arange(60)[None] // 20 * 40 + 40), 1, 1, 1, 60, 120, 40),
    "nothing at all": (Visible(torch.full((1, 40), 7), torch.full((1, 40), 7)), 2, 2, 2, 40, 20, 16),
    "scattered": (scattered(2, 70, 90), 2, 2, 1, 70, 90, 8),
    "a gap": (islands(), 1, 1, 1, 96, 64, 16),
    "one token": (causal_rows(1, 1), 1, 3, 1, 1, 1, 64),
    "decoding": (Visible(torch.tensor([[3], [0]]), torch.tensor([[40], [17]])), 2, 8, 2, 1, 48, 64),
    "beyond the keys": (Visible(torch.full((1, 5), -3), torch.full((1, 5), 99)), 1, 1, 1, 5, 40, 16),
    "no keys": (full(3, 0), 1, 1, 1, 3, 0, 16),
    "no queries": (full(0, 3), 1, 1, 1, 0, 3, 16),
}


def make(case, dtype=torch.float32):
    visible, rows, heads, kv_heads, queries, keys, width = case
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(rows, h, t, width).to(dtype).requires_grad_() for h, t in sizes], visible


def results(function, tensors, do, dtype):
    """Output and gradients, computed in dtype, as float64."""
    tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out = function(*tensors)
    return [x.double() for x in (out, *torch.autograd.grad(out, tensors, do.to(dtype)))]


def as_written(tensors, visible, do):
    """Output, gradients and lse, written out in torch, in float64."""
    exact, do, scale = [x.detach().double() for x in tensors], do.double(), tensors[0].shape[-1] ** -0.5
    edges, slopes = (visible.first, visible.stop), None if visible.slopes is None else visible.slopes.double()
    out, lse = module.forward_as_written(*exact, *edges, scale, slopes)
    return [out, *module.backward_as_written(do, *exact, *edges, out, lse, scale, slopes)], lse


ALIBI = ["causal", "packed and padded, groups", "padding in front", "two rows, two masks", "sliding window",
         "chunked prefill", "nothing at all", "scattered", "decoding", "no keys"]  # fmt: skip


@pytest.mark.parametrize("name, alibi", [*((name, False) for name in CASES), *((name, True) for name in ALIBI)])
def test_equals_what_is_written_in_torch(name, alibi):
    """Forward, backward and lse; with ALiBi a slope for each head, from steep to none."""
    tensors, visible = make(CASES[name])
    q, k, _ = tensors
    slopes = torch.tensor([0.9, 0.02, 0.3, 0.1, 0.6, 2.0, 0.05, 0.0])[: q.shape[1]] if alibi else None
    visible, do = replace(visible, slopes=slopes), torch.randn_like(q)
    expected, expected_lse = as_written(tensors, visible, do)
    _, lse = module.forward(*tensors, visible.first, visible.stop, q.shape[-1] ** -0.5, slopes)
    close(lse.double() / module.LOG2_E.value, expected_lse, rtol=1e-5)
    found = results(lambda *x: flash_attention(*x, visible), tensors, do, torch.float32)
    close(found, expected, rtol=1e-5)
    blind = (visible.stop.clamp(max=k.shape[2]) <= visible.first)[:, None, :, None].expand(q.shape)
    assert (found[0][blind] == 0).all() and (found[1][blind] == 0).all()


def test_alibi_stays_exact_far_from_the_start_and_with_tiles_of_other_sizes(monkeypatch):
    """Chunks of queries behind thousands of keys: bias counts from the tile, so that nothing large is rounded."""
    monkeypatch.setattr(module, "EXACT", (Tile(64, 16, 4, 1), Tile(16, 64, 4, 1), Tile(16, 64, 4, 1)))
    q, k, v = (torch.randn(1, 1, t, 16).requires_grad_() for t in (40, 3000, 3000))
    stop = torch.arange(2961, 3001)[None]
    visible = Visible(stop - 2900, stop, slopes=torch.tensor([0.84]))
    do = torch.randn_like(q)
    found = results(lambda *x: flash_attention(*x, visible), (q, k, v), do, torch.float32)
    close(found, as_written((q, k, v), visible, do)[0], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["packed and padded, groups", "ViT"])
def test_half_precision(name):
    """float16, as the interpreter multiplies bfloat16 as bits; no worse than twice torch's own."""
    tensors, visible = make(CASES[name], torch.float16)
    do = torch.randn_like(tensors[0])
    ours = results(lambda *x: flash_attention(*x, visible), tensors, do, torch.float16)
    theirs = results(lambda *x: attention(*x, visible, "sdpa"), tensors, do, torch.float16)
    for o, t, e in zip(ours, theirs, as_written(tensors, visible, do)[0]):
        assert (o - e).abs().max() <= 2 * (t - e).abs().max() + 1e-3


def test_strides_of_a_model_and_strange_ones():
    visible = causal_rows(2, 40)
    x = torch.randn(3, 2, 40, 2, 24).transpose(2, 3)  # heads of a token side by side
    wide = torch.randn(3, 2, 2, 40, 27)[..., 1:25]  # rows begin anywhere
    turned = torch.randn(3, 2, 2, 24, 40).transpose(-2, -1)
    for q, k, v in (x, wide, turned):
        out = flash_attention(q, k, v, visible)
        close(out, attention(q, k, v, visible, "reference"), rtol=1e-5)
        assert out.transpose(1, 2).is_contiguous()
    q, k, v = (part.detach().requires_grad_() for part in x)
    grads = [torch.autograd.grad(attention(q, k, v, visible, b).sum(), (q, k, v)) for b in ("triton", "reference")]
    close(*grads)  # a sum's gradient has strides of 0


def test_scale_and_large_scores():
    (q, k, v), visible = make(CASES["sliding window"])
    expected = attention(q * 0.3 * 24**0.5, k, v, visible, "reference")
    close(flash_attention(q, k, v, visible, scale=0.3), expected, rtol=1e-5)
    out = flash_attention(q * 1e4, k * 1e4, v, visible)
    close(out, attention(q * 1e4, k * 1e4, v, visible, "reference"))


def test_tiles_of_other_sizes(monkeypatch):
    """Queries and keys of a tile may differ, as they do on a GPU."""
    monkeypatch.setattr(module, "EXACT", (Tile(64, 16, 4, 1), Tile(16, 64, 4, 1), Tile(16, 64, 4, 1)))
    for name in ("scattered", "a gap"):
        test_equals_what_is_written_in_torch(name, False)


def test_only_tiles_that_are_seen_are_visited():
    """What stands in tiles that nobody sees is not read: NaN there does no harm."""
    visible = causal(torch.tensor([0, 1, 2]).repeat_interleave(64)[None])
    q, k, v = (torch.randn(1, 1, 192, 16) for _ in range(3))
    expected = flash_attention(q, k, v, visible)
    for place in (slice(64, 128), slice(128, 192)):
        v = v.clone()
        v[:, :, place] = float("nan")  # a share of 0 times NaN is NaN
        assert torch.equal(flash_attention(q, k, v, visible)[:, :, :64], expected[:, :, :64])


@pytest.mark.parametrize("name", CASES)
def test_seen_by_against_the_drawn_mask(name):
    visible, _, _, _, queries, keys, _ = CASES[name]
    if not queries or not keys:
        return
    tile = Tile(16, 32, 4, 1)
    mask = visible.mask(keys)
    turned = seen_by(visible.first, visible.stop, keys, tile)
    assert turned.shape == (len(mask), -(-keys // 32), 4) and turned.dtype == torch.int32
    for row, edges in zip(mask, turned.tolist()):
        for number, (begin, full_begin, full_end, end) in enumerate(edges):
            part = row[:, 32 * number : 32 * number + 32]
            seeing = part.any(1).nonzero().flatten().tolist()
            assert all(begin <= query < end for query in seeing)
            assert part[full_begin:full_end].all()
            assert begin % 16 == full_begin % 16 == full_end % 16 == 0 or not seeing
            whole = [q for q in range(0, queries - 15, 16) if part[q : q + 16].all()]
            if whole and len(whole) == (whole[-1] - whole[0]) // 16 + 1 and name != "a gap":
                if part.all(1).sum() == part.all(1).nonzero().max() - part.all(1).nonzero().min() + 1:
                    assert (full_begin, full_end) == (whole[0], whole[-1] + 16)


def test_a_model_learns_the_same_by_every_backend():
    """Vision, resampler and decoder of a whole model; padding, packing, grouped queries; the loss and all gradients."""
    layers = (LayerOptions(modality_adaptive=True), LayerOptions())
    decoder = Decoder(DecoderConfig(20, 32, 4, 2, 24, 16, layers))
    vision = ViT(ViTConfig(image_size=8, patch_size=4, width=16, num_layers=1, num_heads=2, mlp_width=16))
    model = VLM(vision, Resampler(16, 32, 3, 1, 2, 8, 16), decoder)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    ids = torch.randint(0, 20, (2, 11))
    ids[0, 1:4] = ids[1, 5:8] = -1
    segments = torch.tensor([[0] * 9 + [-1] * 2, [0] * 4 + [1] * 7])
    labels = ids.masked_fill((ids < 0) | (segments < 0), -100)
    positions, one = torch.arange(11).expand(2, -1), torch.ones(2, dtype=torch.long)
    batch = Batch(ids, labels, segments, positions, torch.randn(2, 3, 8, 8), one, torch.arange(2), torch.arange(2))
    found = {}
    for backend in ("reference", "sdpa", "triton"):
        model.set_backend(backend)
        loss, _ = model.loss(batch)
        found[backend] = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]
    for backend in ("reference", "sdpa"):
        close(found["triton"], found[backend], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_torch_finds_the_operators_in_order():
    (q, k, v), visible = make(CASES["decoding"])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(module.forward, (q, k, v, visible.first, visible.stop, 0.2), test_utils=tests)
    out, lse = module.forward(q, k, v, visible.first, visible.stop, 0.2)
    inputs = [x.detach() for x in (torch.randn_like(out), q, k, v, visible.first, visible.stop, out, lse)]
    torch.library.opcheck(module.backward, (*inputs, 0.2), test_utils=tests)
    slopes = torch.rand(q.shape[1])
    torch.library.opcheck(module.forward, (q, k, v, visible.first, visible.stop, 0.2, slopes), test_utils=tests)


def test_compile_checkpointing_and_autocast():
    visible = causal_rows(1, 40)
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    do = torch.randn(1, 2, 40, 16)

    def block(q, k, v):
        return flash_attention(q * 2, k, v, Visible(visible.first, visible.stop, "causal")).sin()

    expected = results(block, (q, k, v), do, torch.float32)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for function in (compiled, lambda *x: checkpoint(block, *x, use_reentrant=False)):
        close(results(function, (q, k, v), do, torch.float32), expected)
    with torch.autocast("cpu", torch.float16):
        out = flash_attention(q, k, v, visible)
    assert out.dtype == torch.float16
    close(out, flash_attention(q.half(), k.half(), v.half(), visible))
    out.sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.slow
def test_a_decoder_compiles_in_one_piece():
    """The registered operators stay in the graph, forward and backward; torch.compile finds no reason to leave it."""
    decoder = Decoder(DecoderConfig(20, 32, 4, 2, 24, 16, (LayerOptions(),) * 2))
    decoder.backend = "triton"
    x, positions = torch.randn(2, 16, 32), torch.arange(16).expand(2, -1)
    visible = causal(torch.tensor([[0] * 9 + [1] * 7, [0] * 12 + [-1] * 4]))
    weight, graphs, found = torch.randn(2, 16, 32), [], []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    for function in (decoder, torch.compile(decoder, backend=backend, fullgraph=True)):
        loss = (function(x, positions, visible, None) * weight).sum()
        found.append([loss.detach(), *torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True)])
    close(*found)
    assert len(graphs) == 1 and graphs[0].count("nanovlm.flash_attention") == 2, "once in each layer"


def test_intervals_are_checked_when_asked(monkeypatch):
    q = torch.randn(1, 1, 5, 16)
    visible = CASES["beyond the keys"][0]
    flash_attention(q, q, q, visible)
    monkeypatch.setattr(module, "CHECK_INTERVALS", True)
    with pytest.raises(ValueError, match="from -3 to 99"):
        flash_attention(q, q, q, visible)


@pytest.mark.slow
def test_the_benchmark_compares_what_is_right(monkeypatch):
    kernels.check(64, "cpu", torch.float16, tokens=64, repeats=1)
    good = module.forward
    monkeypatch.setattr(module, "forward", lambda *arguments: [good(*arguments)[0] * 1.01])
    with pytest.raises(RuntimeError, match="head width 64: out is off by"):
        kernels.check(64, "cpu", torch.float16, tokens=64, repeats=0)
