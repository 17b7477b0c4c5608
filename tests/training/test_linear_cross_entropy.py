"""The chunked loss against scores and F.cross_entropy: values, gradients, and what is alive meanwhile."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanovlm.training.linear_cross_entropy import is_chunked, language_loss, LARGE_VOCABULARY, linear_cross_entropy
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.lora import add
from nanovlm.projector import LinearProjector
from nanovlm.vlm import Batch, VLM


class PeakBytes(TorchDispatchMode):
    """The most bytes of storage, made within, that were alive at once; independent of the allocator."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.add(x.untyped_storage(), before)
        self.peak = max(self.peak, self.alive)
        return out

    def add(self, storage, before):
        address = storage.data_ptr()
        if address in self.known or address in before:
            return
        self.known.add(address)
        self.alive += storage.nbytes()
        weakref.finalize(storage, self.remove, address, storage.nbytes())

    def remove(self, address, size):
        self.known.discard(address)
        self.alive -= size


def make(rows=600, width=24, words=90, dtype=torch.float32):
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(words, width) * 0.5).to(dtype).requires_grad_()
    bias = torch.randn(words).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, words, (rows,))


def eager(hidden, weight, labels, bias=None):
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 600, 0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_eager_with_gradients(rows, with_bias):
    hidden, weight, bias, labels = make(rows)
    bias = bias if with_bias else None
    wanted = [x for x in (hidden, weight, bias) if x is not None]
    losses = [function(hidden, weight, labels, bias) for function in (linear_cross_entropy, eager)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-5)
    ours, theirs = (torch.autograd.grad(loss / 7.0, wanted) for loss in losses)  # the caller divides
    for f, e in zip(ours, theirs):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all"])
def test_frozen_parts_get_no_gradient(frozen):
    hidden, weight, bias, labels = make(300)
    parts = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, x in parts.items():
        x.requires_grad_(frozen not in (name, "all"))
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    torch.testing.assert_close(loss, eager(hidden, weight, labels, bias))
    if frozen == "all":
        assert not loss.requires_grad
        return
    loss.backward()
    assert {name for name, x in parts.items() if x.grad is None} == {frozen}


def test_large_scores_do_not_overflow():
    hidden, weight, _, labels = make(20)
    loss = linear_cross_entropy(hidden * 1e4, weight, labels)
    torch.testing.assert_close(loss, eager(hidden * 1e4, weight, labels))


def test_low_precision_and_autocast():
    hidden, weight, bias, labels = make(600, dtype=torch.bfloat16)
    exact = torch.autograd.grad(eager(hidden.double(), weight.double(), labels), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels)
    theirs = torch.autograd.grad(eager(hidden, weight, labels), (hidden, weight))
    assert loss.dtype == torch.float32
    for f, t, e in zip(torch.autograd.grad(loss, (hidden, weight)), theirs, exact):
        assert f.dtype == torch.bfloat16
        assert (f - e).abs().max() <= 1.5 * (t - e).abs().max()
    hidden, weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        under = linear_cross_entropy(hidden, weight, labels)
        under.backward()
    torch.testing.assert_close(under, loss)
    assert weight.grad.dtype == torch.float32


def test_a_second_backward_pass_is_refused():
    hidden, weight, _, labels = make(10)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("trained", ["both", "hidden"])
def test_no_scores_of_all_rows_are_ever_alive(trained):
    """1,024 tokens of 576 channels, an eighth of SmolLM2's 49,152 words: bytes at most 1 / 2.5 of eager's."""
    hidden, weight, _, labels = make(1024, 576, 6144)
    weight.requires_grad_(trained == "both")
    peaks = []
    for function in (eager, linear_cross_entropy):
        hidden.grad = weight.grad = None
        with PeakBytes() as memory:
            function(hidden, weight, labels).backward()
        peaks.append(memory.peak)
    full = 1024 * 6144 * 4
    assert peaks[0] >= 2 * full  # the measurement sees what eager keeps
    assert peaks[1] < full
    assert peaks[1] * 2.5 <= peaks[0]


def test_meta_tensors_are_counted_too():
    hidden, weight, bias, labels = (x.to("meta") for x in make(300))
    assert linear_cross_entropy(hidden, weight, labels, bias).shape == ()


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, weight, bias, labels = make(600, 600, 4000)
    with torch.no_grad(), PeakBytes() as memory:
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    assert memory.peak < 2.2 * 256 * 4000 * 4  # the scores of one chunk, and of the one before
    torch.testing.assert_close(loss, eager(hidden, weight, labels, bias).detach())


def test_shapes_that_do_not_fit():
    hidden, weight, bias, labels = make(10)
    for arguments, message in (
        ((hidden[:, :5], weight, labels), r"hidden \(10, 5\) and weight \(90, 24\)"),
        ((hidden, weight, labels[:9]), r"labels \(9,\) must be one for each of the 10"),
        ((hidden, weight, labels, bias[:3]), r"bias \(3,\) must be one for each of the 90"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)
    with pytest.raises((RuntimeError, IndexError)):
        linear_cross_entropy(hidden, weight, labels + 90)


def text_model(vocab_size=40, **options):
    config = DecoderConfig(vocab_size, 16, 2, 2, 24, 12, (LayerOptions(),), **options)
    model = VLM(None, LinearProjector(4, 16), Decoder(config))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


def text_batch(rows=3, length=9):
    ids = torch.randint(0, 40, (rows, length))
    labels = ids.masked_fill(torch.rand(rows, length) < 0.4, -100)
    nothing = torch.zeros(0, dtype=torch.long)
    positions = torch.arange(length).expand(rows, -1)
    return Batch(ids, labels, torch.zeros_like(ids), positions, None, nothing, nothing, nothing)


HEADS = {"own": {}, "tied": dict(tied_head=True), "with bias": dict(head_bias=True)}


@pytest.mark.parametrize("head", HEADS)
def test_the_model_loses_the_same_by_either_form(head, monkeypatch):
    model, batch, found = text_model(**HEADS[head]), text_batch(), []
    for chunked in (False, True):
        if chunked:  # its scores are never asked for
            monkeypatch.setattr(model.decoder, "logits", None)
        model.zero_grad()
        loss, trained = language_loss(model, batch, chunked=chunked)
        (loss / trained).backward()
        found.append((loss.detach(), trained, {name: p.grad for name, p in model.decoder.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_large_vocabularies_choose_it_and_low_rank_heads_do_not():
    assert not is_chunked(text_model())
    with torch.device("meta"):
        assert is_chunked(text_model(LARGE_VOCABULARY))
    model, batch = text_model(), text_batch()
    add(model, rank=2, alpha=4.0, where="lm_head")
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    expected, _ = model.loss(batch)
    assert torch.equal(language_loss(model, batch, chunked=True)[0], expected)
