"""The fast loss against the readable one: rows that share pictures, scores in chunks; values, gradients, what is alive."""

import pytest
import torch
import torch.nn.functional as F

from live_bytes import LiveBytes
from nanovlm.training.language_loss import is_chunked, language_loss, LARGE_VOCABULARY, linear_cross_entropy, wanted_states
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.lora import add
from nanovlm.projector import LinearProjector
from nanovlm.vlm import IGNORE, IMAGE_TOKEN, VLM
from random_models import image_batch, randomise, small_vlm, text_batch


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


def test_large_scores_low_precision_and_autocast():
    hidden, weight, _, labels = make(20)
    loss = linear_cross_entropy(hidden * 1e4, weight, labels)
    torch.testing.assert_close(loss, eager(hidden * 1e4, weight, labels))
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


@pytest.mark.parametrize("trained", ["both", "hidden"])
def test_no_scores_of_all_rows_are_ever_alive(trained):
    """1,024 tokens of 576 channels, an eighth of SmolLM2's 49,152 words: bytes at most 1 / 2.5 of eager's."""
    hidden, weight, _, labels = make(1024, 576, 6144)
    weight.requires_grad_(trained == "both")
    peaks = []
    for function in (eager, linear_cross_entropy):
        hidden.grad = weight.grad = None
        with LiveBytes([hidden, weight]) as memory:
            function(hidden, weight, labels).backward()
        peaks.append(memory.peak - (1024 + 6144) * 576 * 4)
    full = 1024 * 6144 * 4
    assert peaks[0] >= 2 * full  # the measurement sees what eager keeps
    assert peaks[1] < full
    assert peaks[1] * 2.5 <= peaks[0]


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, weight, bias, labels = make(600, 600, 4000)
    with torch.no_grad(), LiveBytes([hidden, weight]) as memory:
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    assert memory.peak - 4600 * 600 * 4 < 2.2 * 256 * 4000 * 4  # the scores of one chunk, and of the one before
    torch.testing.assert_close(loss, eager(hidden, weight, labels, bias).detach())


def text_model(vocab_size=40, **options):
    config = DecoderConfig(vocab_size, 16, 2, 2, 24, 12, (LayerOptions(),), **options)
    return randomise(VLM(None, LinearProjector(4, 16), Decoder(config)))


def some_text():
    ids = torch.randint(0, 40, (3, 9))
    return text_batch(ids, ids.masked_fill(torch.rand(3, 9) < 0.4, IGNORE))


HEADS = {"own": {}, "tied": dict(tied_head=True), "with bias": dict(head_bias=True)}


@pytest.mark.parametrize("head", HEADS)
def test_the_model_loses_the_same_by_either_form(head, monkeypatch):
    model, batch, found = text_model(**HEADS[head]), some_text(), []
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
    model, batch = text_model(), some_text()
    add(model, rank=2, alpha=4.0, where="lm_head")
    randomise(model)
    expected, _ = model.loss(batch)
    assert torch.equal(language_loss(model, batch, chunked=True)[0], expected)


# ---- rows that share their pictures

I = IMAGE_TOKEN


def repeated_batch():
    """Pictures in front, several rows about each."""
    return image_batch(
        ids=[[I, I, I, 4, 5, 6, 0], [7, 8, 9, 0, 0, 0, 0], [I, I, I, 10, 0, 12, 13], [I, I, I, 14, 0, 0, 0],
             [I, I, I, 15, 16, 0, 0]],
        segments=[[0] * 6 + [-1], [0] * 3 + [-1] * 4, [0] * 7, [0] * 4 + [-1] * 3, [0] * 5 + [-1] * 2],
        labels=[[I, I, I, IGNORE, 5, 6, IGNORE], [IGNORE, 8, 9] + [IGNORE] * 4, [I, I, I, 10, IGNORE, 12, 13],
                [I, I, I, 14] + [IGNORE] * 3, [I, I, I, IGNORE, 16, IGNORE, IGNORE]],
        frames=[1, 1], shown=[1, 0, 1, 1], owner=[0, 2, 3, 4],
    )  # fmt: skip


def uneven_batch():
    """One picture; two long rows, of which only one shows it, and three short ones."""
    return image_batch(
        ids=[[I, I, I, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 0, 0], *[[I, I, I, 4, 0, 0, 0, 0]] * 3],
        segments=[[0] * 8, [0] * 6 + [-1] * 2, *[[0] * 4 + [-1] * 4] * 3],
        labels=[[I, I, I, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, *[IGNORE] * 2], *[[I, I, I, 4, *[IGNORE] * 4]] * 3],
        frames=[1], shown=[0, 0, 0, 0], owner=[0, 2, 3, 4],
    )  # fmt: skip


def one_token():
    """A picture of one token, and a row without it whose positions differ."""
    positions = [[0, 1, 2, 3], [0, 1, 2, 3], [9, 1, 2, 3]]
    return image_batch([[I, 5, 6, 7], [I, 8, 9, 10], [11, 12, 13, 14]], [1], [0, 0], [0, 1], positions=positions)


def any_positions():
    positions = [[3, 4, 6, 7, 9], [3, 4, 6, 8, 9], [0, 5, 6, 7, 20]]
    return image_batch([[I, I, I, 4, 5], [I, I, I, 5, 6], [3, 4, 5, 6, 7]], [1], [0, 0], [0, 1], positions=positions)


def chats():
    """Two pictures; all rows begin with the words 4 and 5 and then ask; what is behind the answer is not trained."""
    ids = [[I, I, I, 4, 5, 6, 7, 8, 9], [I, I, I, 4, 5, 10, 7, 11, 0], [4, 5, 6, 12, 0, 0, 0, 0, 0], [I, I, I, 4, 5, 6, 7, 13, 9]]
    labels = [[IGNORE] * 7 + [8, IGNORE], [IGNORE] * 7 + [11, IGNORE], [IGNORE] * 3 + [12] + [IGNORE] * 5,
              [IGNORE] * 7 + [13, IGNORE]]
    segments = [[0] * 9, [0] * 8 + [-1], [0] * 4 + [-1] * 5, [0] * 9]
    return image_batch(ids, [1, 1], [0, 0, 1], [0, 1, 3], labels=labels, segments=segments)


# make a batch -> what the decoder runs: pictures, then short and long rows, each [rows, columns]
SHAREABLE = {
    repeated_batch: [(2, 3), (2, 1), (3, 3)], uneven_batch: [(1, 3), (3, 1), (2, 5)],
    one_token: [(1, 1), (2, 2), (1, 3)], any_positions: [(1, 3), (2, 1), (1, 4)], chats: [(2, 5), (3, 2), (1, 3)],
}  # fmt: skip


def not_shareable():
    """Batches for which a picture's keys would not be the same in all rows, or that gain nothing."""
    yield "behind a word", image_batch([[3, I, I, I, 4], [I, I, I, 4, 5], [I, I, I, 4, 6]], [1, 1], [0, 1, 1], [0, 1, 2])
    yield "two in a row", image_batch([[I, I, I, I, I, I, 4], [I, I, I, 5, 6, 7, 8]], [1, 1], [0, 1, 0], [0, 0, 1])
    yield "shown once each", image_batch([[I, I, I, 4, 5], [I, I, I, 5, 6]], [1, 1], [1, 0], [0, 1])
    two = [[I, I, I, 4, 5], [I, I, I, 5, 6]]
    yield "packed", image_batch(two, [1], [0, 0], [0, 1], segments=[[0] * 5, [0] * 4 + [1]])
    pads = dict(segments=[[-1] + [0] * 4, [0] * 5], positions=[[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    yield "padding in front", image_batch([[0, I, I, I, 4], [I, I, I, 5, 6]], [1], [0, 0], [0, 1], **pads)
    yield "padding inside", image_batch(
        [[I, I, I, 0, 4], [I, I, I, 5, 6]], [1], [0, 0], [0, 1], segments=[[0, 0, 0, -1, 0], [0] * 5]
    )
    yield "other positions", image_batch(two, [1], [0, 0], [0, 1], positions=[[0, 1, 2, 3, 4], [0, 2, 4, 6, 8]])


def calls(model, batch):
    """Run the loss: (it, the decoder's calls, their [rows, columns])."""
    found = []
    hook = model.decoder.register_forward_pre_hook(lambda module, args: found.append(tuple(args[0].shape[:2])))
    loss = language_loss(model, batch)
    hook.remove()
    return loss, found


FAMILIES = {
    "llama": dict(),
    "adaptive": dict(layers=(LayerOptions(modality_adaptive=True),) * 2),
    "phi": dict(norm="layer", ffn="plain", activation="gelu_tanh", parallel=True, rotary_width=2),
    "opt": dict(norm="layer", ffn="plain", activation="relu", tied_head=True, rotary_width=0, position_offset=2),
    "mpt": dict(norm="layer_no_bias", ffn="plain", activation="gelu", tied_head=True, rotary_width=0, alibi=(0.9, 0.4, 0.2, 0.1)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make_batch", SHAREABLE)
def test_a_picture_runs_once_with_the_states_loss_and_gradient_of_whole_rows(make_batch, family):
    options = FAMILIES[family]
    model, batch = small_vlm(num_latents=1 if make_batch is one_token else 3, **options), make_batch()
    (loss, trained), found = calls(model, batch)
    assert found == SHAREABLE[make_batch]
    expected, count = model.loss(batch)
    assert trained == count
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    names, parameters = zip(*model.named_parameters())
    both = [torch.autograd.grad(one, parameters, allow_unused=True) for one in (loss, expected)]
    for name, one, other in zip(names, *both):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}")
        else:  # what the loss does not depend on
            assert not any(grad is not None and grad.any() for grad in (one, other)), name
    states, real = model.hidden(batch), batch.segments >= 0
    words = real & (batch.ids != IMAGE_TOKEN)
    for wanted in (words, real, words & (batch.positions % 2 == 0)):
        for lean in (True, False):
            found = wanted_states(model, batch, wanted, lean)
            torch.testing.assert_close(found, states[wanted], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch", [pytest.param(batch, id=name) for name, batch in not_shareable()])
def test_rows_that_cannot_share_run_themselves(batch):
    model = small_vlm()
    (loss, _), found = calls(model, batch)
    assert found == [tuple(batch.ids.shape)] and loss.item() == model.loss(batch)[0].item()


def test_others_that_run_themselves():
    model, ids = small_vlm("projector"), torch.full((3, 20), 4)
    ids[0, :9] = ids[1, :9] = ids[2, :18] = I
    assert calls(model, image_batch(ids, [1, 2], [0, 0, 1], [0, 1, 2]))[1] == [(3, 20)]  # clips of unequal length
    late = one_token()
    late.positions[1] += 1
    assert calls(small_vlm(num_latents=1), late)[1] == [(3, 4)]
    assert language_loss(small_vlm(), repeated_batch(), share=False)[1] == 9


def test_a_lean_loss_leaves_out_the_gradients_that_are_zero():
    model, batch = small_vlm(layers=(LayerOptions(modality_adaptive=True),) * 2), repeated_batch()
    after_image = torch.zeros_like(batch.ids, dtype=torch.bool)
    after_image[:, 1:] = (batch.ids[:, :-1] == IMAGE_TOKEN) & (batch.ids[:, 1:] != IMAGE_TOKEN)

    def gradients(lean):
        model.zero_grad()
        loss, trained = language_loss(model, batch, lean=lean)
        loss.backward()
        return (loss.item(), trained), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    quiet = batch.labels.masked_fill(after_image, IGNORE)
    for labels, left_out in ((batch.labels, set()), (quiet, {"decoder.layers.1.norm_2.vision.weight"})):
        batch.labels = labels  # an image token predicts a word; none does
        (loss, whole), (lean_loss, lean) = gradients(False), gradients(True)
        assert loss == lean_loss and whole.keys() - lean.keys() == left_out
        assert not any(whole[name].any() for name in left_out)
        for name, value in lean.items():
            torch.testing.assert_close(value, whole[name], atol=1e-6, rtol=1e-5)
