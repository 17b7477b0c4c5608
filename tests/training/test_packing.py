"""Several documents in one row: loss and gradients are those of a row each, for every way in which pictures enter a model."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import interpreter
from nanovlm.data.batching import build_batch, packed
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.templates import Row
from nanovlm.recipes import RECIPES
from nanovlm.vlm import IGNORE
from parity import perturb
from published_models import write

NAMES = ["lynx", "mplug_owl2", "blip2", "open_flamingo", "smolvlm", "llava_phi"]  # OPT's positions are learned, Phi has no BOS
WITHOUT_CLIPS = ("open_flamingo",)
ROOM = 256
PAD = SimpleNamespace(pad=0)


@pytest.fixture(scope="module", params=NAMES)
def tiny(request):
    """(model with every parameter moved, its records)."""
    torch.manual_seed(0)
    published = RECIPES[request.param].published
    model = perturb(published.build(published.configs["tiny"]))
    for parameter in model.decoder.embedding.parameters():
        parameter.data *= 10  # words that differ, as those of a trained model do
    return model, records(model, request.param not in WITHOUT_CLIPS)


def records(model, clips):
    """Texts and pictures before, between and behind words, a clip, one picture in two documents; all labels trained."""
    size = model.vision.image_size
    shades = [Visual(f"{n}", (Image.new("RGB", (size, size), (40 * n, 9, 200 - 30 * n)),)) for n in range(4)]
    clip = Visual("clip", tuple(Image.new("RGB", (size, size), (0, 80 * n, 3)) for n in range(3 if clips else 1)))
    return [
        Record("text", (), (TURNS,), rows=(("text", row(model, (), 9)), ("short", row(model, (), 2)))),
        Record("one", (shades[0],), (TURNS,), rows=(("one", row(model, (0,), 7, shades[:1])),)),
        Record("again", (shades[0], shades[1]), (TURNS,), rows=(("again", row(model, (0, 1), 5, shades)),
                                                                ("other", row(model, (1,), 3, shades)))),
        Record("clip", (clip, *shades[2:]), (TURNS,), rows=(("clip", row(model, (2, 0), 6, (clip, *shades[2:]))),)),
    ]  # fmt: skip


TURNS = (Turn("assistant", ("what its rows say",)),)


def row(model, shown, words, visuals=()):
    """Two words, then some pictures with two words behind each, then `words` more; every word has a label, the first too."""
    ids, images = torch.randint(3, 500, (2,)).tolist(), []
    for number in shown:
        frames = visuals[number].frames
        placeholder = write(model, torch.empty(len(frames), 3, *frames[0].size))
        images.append((number, len(ids), len(ids) + len(placeholder)))
        ids += placeholder + torch.randint(3, 500, (2,)).tolist()
    ids += torch.randint(3, 500, (words,)).tolist()
    inside = {place for _, start, stop in images for place in range(start, stop)}
    return Row(ids, [IGNORE if place in inside else id for place, id in enumerate(ids)], images)


def batch_of(model, found, pack):
    return build_batch(found, None, PAD, None, model.vision.image_size, "crop", ROOM, pack=pack)


def learned(model, batch, backend):
    """Loss, trained tokens and gradients by name."""
    model.set_backend(backend)
    loss, trained = model.loss(batch)
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), trained, {name: gradient for name, gradient in zip(names, found) if gradient is not None}


def trains_alike(model, found, backend):
    """Assert that records train a model packed as they do in rows of their own: loss, trained tokens and gradients."""
    apart, together = (batch_of(model, found, pack) for pack in (False, True))
    assert len(apart.ids) == 6 and len(together.ids) < 4 and int(together.segments.max()) >= 2
    assert (together.segments >= 0).sum() == (apart.segments >= 0).sum()
    expected, trained, gradients = learned(model, apart, backend)
    loss, count, ours = learned(model, together, backend)
    assert count == trained == sum(sum(label >= 0 for label in row.labels[1:]) for one in found for _, row in one.rows)
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=2e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close = dict(atol=2e-5 * max(1.0, float(gradient.abs().max())), rtol=1e-4)
        torch.testing.assert_close(ours[name], gradient, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_packed_rows_train_as_rows_of_their_own(tiny, backend):
    trains_alike(*tiny, backend)


def test_packed_rows_under_the_fused_kernels():
    interpreter.run("packing.py")


def test_neighbours_in_a_row_are_not_seen(tiny):
    model, found = tiny
    alone = [record for record in found if record.id != "again"]
    with torch.no_grad():
        losses = [model.loss(batch_of(model, part, True))[0] for part in (found, alone, [found[2]])]
    torch.testing.assert_close(losses[0], losses[1] + losses[2], atol=1e-3, rtol=2e-6)


def test_where_documents_stand_and_how_they_fill_the_rows():
    rows = [Row(list(range(10 * n, 10 * n + length)), list(range(10 * n, 10 * n + length)), []) for n, length in enumerate((4, 3, 2))]
    record = Record("r", (), (TURNS,), rows=tuple((f"row {n}", row) for n, row in enumerate(rows)))
    batch = build_batch([record], None, PAD, None, 8, "crop", 7, pack=True)
    assert batch.ids.tolist() == [[0, 1, 2, 3, 10, 11, 12], [20, 21, 0, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, -1, -1, -1, -1, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 1, 2, 3, IGNORE, 11, 12], [IGNORE, 21] + [IGNORE] * 5]
    assert packed([5, 3, 9, 2, 1], 10) == [[2, 4], [0, 1, 3]]
    torch.manual_seed(0)
    lengths = torch.randint(1, 100, (200,)).tolist()
    rows = packed(lengths, 100)
    assert sorted(n for row in rows for n in row) == list(range(200))
    assert all(sum(lengths[n] for n in row) <= 100 for row in rows)
    assert len(rows) <= -(-sum(lengths) // 100) * 11 / 9 + 1, "what this way of packing promises (Johnson 1973)"
