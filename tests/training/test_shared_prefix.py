"""Pictures that several rows show run once: the states, losses and gradients of whole rows."""

import pytest
import torch

from nanovlm.decoder import LayerOptions
from nanovlm.training import shared_prefix
from nanovlm.training.linear_cross_entropy import language_loss
from nanovlm.vlm import IGNORE, IMAGE_TOKEN
from random_models import image_batch, small_vlm

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


def shown_by_no_row():
    batch = image_batch([[3, 4, 5], [6, 7, 8]], [1], [0], [0])
    batch.shown = batch.owner = batch.shown[:0]
    return batch


def any_positions():
    positions = [[3, 4, 6, 7, 9], [3, 4, 6, 8, 9], [0, 5, 6, 7, 20]]
    return image_batch([[I, I, I, 4, 5], [I, I, I, 5, 6], [3, 4, 5, 6, 7]], [1], [0, 0], [0, 1], positions=positions)


# make a batch -> what the decoder runs: pictures, then short and long rows, each [rows, columns]
SHAREABLE = {
    repeated_batch: [(2, 3), (2, 2), (3, 4)], uneven_batch: [(1, 3), (3, 1), (2, 6)],
    one_token: [(1, 1), (2, 3), (1, 4)], any_positions: [(1, 3), (2, 2), (1, 5)],
    shown_by_no_row: [(1, 3), (2, 3)],
}  # fmt: skip


def not_shareable():
    """Batches for which a picture's keys would not be the same in all rows, or that gain nothing."""
    yield "behind a word", image_batch([[3, I, I, I, 4], [I, I, I, 4, 5], [I, I, I, 4, 6]], [1, 1], [0, 1, 1], [0, 1, 2])
    yield "two in a row", image_batch([[I, I, I, I, I, I, 4], [I, I, I, 5, 6, 7, 8]], [1, 1], [0, 1, 0], [0, 0, 1])
    yield "twice in each row", image_batch([[I, I, I, I, I, I, 4]] * 2, [1, 1], [0, 1, 1, 0], [0, 0, 1, 1])
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


@pytest.mark.parametrize("lengths, groups", [
    ([4, 4, 4], [{0, 1, 2}]), ([9, 2, 2, 8], [{1, 2}, {0, 3}]), ([3], [{0}]), ([5, 1, 1, 1, 5, 4], [{1, 2, 3}, {0, 4, 5}]),
])  # fmt: skip
def test_short_and_long_rows_are_split_where_padding_is_least(lengths, groups):
    assert [set(rows.tolist()) for rows in shared_prefix.two_lengths(torch.tensor(lengths))] == groups


FAMILIES = {
    "llama": dict(),
    "adaptive": dict(layers=(LayerOptions(modality_adaptive=True),) * 2),
    "phi": dict(norm="layer", ffn="plain", activation="gelu_tanh", parallel=True, rotary_width=2),
    "opt": dict(norm="layer", ffn="plain", activation="relu", tied_head=True, rotary_width=0, position_offset=2),
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
            found = shared_prefix.wanted_states(model, batch, wanted, lean)
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


def test_bfloat16_keeps_a_float32_loss():
    model, batch = small_vlm(), repeated_batch()
    model.decoder.bfloat16()  # the tower and the bridge stay in float32
    loss, _ = language_loss(model, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model.loss(batch)[0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("found", [2, 4])
def test_counts_that_do_not_agree(found):
    ids = torch.tensor([[I] * found + [5] * (5 - found)] * 2)
    with pytest.raises(ValueError, match=f"{2 * found} image-token ids"):
        language_loss(small_vlm(), image_batch(ids, [1], [0, 0], [0, 1]))  # one picture, two rows
