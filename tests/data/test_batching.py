"""Batches: rows, padding, pictures shared between rows, and what happens to rows that are too long."""

import os

import pytest
import torch
from PIL import Image

from nanovlm.data import batching, images
from nanovlm.data.augment import View
from nanovlm.data.batching import Report, build_batch, contrastive_batch, pixels_of
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.templates import LYNX, NANO, Template, segments, write
from nanovlm.vlm import IGNORE, IMAGE_TOKEN

INLINE = Template(turn_prefix="\n")


def picture(shade, frames=1):
    return Visual(f"shade {shade}", tuple(Image.new("RGB", (8, 8), (shade + f, 0, 0)) for f in range(frames)))


def talk(question, answer, *pictures):
    return Turn("user", (*pictures, question)), Turn("assistant", (answer,))


def counted(image_size, frames):
    """Image tokens of a visual input: depends on both arguments, so that swapping them shows."""
    return image_size // 4 + 10 * (frames - 1)


def batch_of(records, tokenizer, template=NANO, max_tokens=99, **options):
    return build_batch(records, template, tokenizer, counted, 8, "crop", max_tokens, **options)


RECORDS = [
    Record("one", (picture(10),), (talk("what?", "a cat", 0), talk("is this a cat?", "yes it is", 0))),
    Record("two", (), (talk("hi", "hello"),)),
    Record("three", (picture(20, 2), picture(10)), (talk("which?", "this", 0, 1), talk("?", "a", 1))),
]


def test_every_conversation_and_round_is_a_row_padded_on_the_right(tokenizer):
    batch, counts = batch_of(RECORDS, tokenizer), {"one": [2], "two": [], "three": [12, 2]}
    rows = [write(segments(c, NANO), tokenizer, counts[r.id]) for r in RECORDS for c in r.conversations]
    longest = max(len(row.ids) for row in rows)
    for name, padding, written in (
        ("ids", tokenizer.pad, [row.ids for row in rows]), ("labels", IGNORE, [row.labels for row in rows]),
        ("segments", -1, [[0] * len(row.ids) for row in rows]),
        ("positions", 0, [[*range(len(row.ids))] for row in rows]),
    ):
        assert vars(batch)[name].tolist() == [row + [padding] * (longest - len(row)) for row in written], name
    assert all(values.dtype == torch.int64 for name, values in vars(batch).items() if name != "pixels")
    talks = talk("what?", "a cat", 0) + talk("sure?", "yes")
    record = Record("r", (picture(1),), (talks, talk("hi", "hello")))
    batch = batch_of([record], tokenizer, LYNX)
    rows = [write(segments(talk, LYNX), tokenizer, [2]) for talk in (talks[:2], talks, record.conversations[1])]
    assert [ids[: len(row.ids)].tolist() for ids, row in zip(batch.ids, rows)] == [row.ids for row in rows]
    assert batch.shown.tolist() == [0, 0] and batch.owner.tolist() == [0, 1]


def test_a_picture_is_encoded_once_and_appears_where_rows_show_it(tokenizer):
    batch = batch_of(RECORDS, tokenizer)
    assert batch.frames.tolist() == [1, 2]  # shade 10, and the clip; shade 10 again is not a third
    assert batch.shown.tolist() == [0, 0, 1, 0, 0] and batch.owner.tolist() == [0, 1, 3, 3, 4]
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 20, 21)]
    assert torch.equal(batch.pixels, torch.stack([images.to_pixels(frame, 8) for frame in frames]))
    record = Record("r", (picture(1), picture(2)), ((Turn("user", (1, "a", 0, 1)), Turn("assistant", ("b",))),))
    batch = batch_of([record], tokenizer, INLINE)
    assert batch.frames.tolist() == [1, 1] and batch.shown.tolist() == [0, 1, 0] and batch.owner.tolist() == [0, 0, 0]
    assert batch.pixels[0, 0, 0, 0] > batch.pixels[1, 0, 0, 0]  # picture(2) appears first
    unused = Record("r", (picture(1),), (talk("hi", "hello"),))  # a picture that no turn mentions is not encoded
    for record in (RECORDS[1], unused):
        batch = batch_of([record], tokenizer)
        assert batch.pixels is None and batch.frames.shape == batch.shown.shape == batch.owner.shape == (0,)


def test_cuts_are_on_the_right_and_counted(tokenizer):
    record = Record("r", (picture(1),), (talk("q", "ABCDEF", 0), talk("q", "A", 0)))
    whole, report = batch_of([record], tokenizer), Report()
    length = whole.ids.shape[1] - 4
    cut = batch_of([record], tokenizer, max_tokens=length, report=report)
    assert torch.equal(cut.ids[0], whole.ids[0, :length]) and torch.equal(cut.labels[0], whole.labels[0, :length])
    assert report == Report(rows=2, truncated_rows=1, truncated_tokens=4)
    batch_of([record], tokenizer, report=report)
    batch_of([record], tokenizer, max_tokens=length - 1, report=report)
    assert report == Report(rows=6, truncated_rows=2, truncated_tokens=9)
    batch_of([record], tokenizer, max_tokens=length + 4)
    with pytest.raises(ValueError, match=f"'r', conversation 0 has {length + 4} tokens, more than max_tokens {length + 3}"):
        batch_of([record], tokenizer, max_tokens=length + 3)  # cut only where it is counted
    silent = Template(answer_prefix="", end_with_eos=False)
    with pytest.raises(ValueError, match="record 'r', conversation 1 has no trained token"):
        batch_of([Record("r", (), (talk("q", "a"), talk("q", "")))], tokenizer, silent)


def test_no_cut_through_a_picture_but_a_later_one_may_go(tokenizer):
    turns = (*talk("q", "A", 0), Turn("user", ("and ", 1)), Turn("assistant", ("B",)))
    record = Record("r", (picture(1), picture(2)), (turns,))
    ids = batch_of([record], tokenizer, INLINE).ids[0]
    start = (ids == IMAGE_TOKEN).nonzero()[2].item()
    for keep, shown in ((start, [0]), (start + 2, [0, 1])):
        batch = batch_of([record], tokenizer, INLINE, keep, report=Report())
        assert batch.ids.tolist() == [ids[:keep].tolist()]
        assert batch.shown.tolist() == shown and len(batch.pixels) == len(shown)
    with pytest.raises(ValueError, match=f"'r', conversation 0: cutting it to max_tokens {start + 1} would cut"):
        batch_of([record], tokenizer, INLINE, start + 1, report=Report())


def caption(name, shade, text):
    return Record(name, (picture(shade),), ((Turn("user", (0, "describe")), Turn("assistant", (text,))),))


def test_contrastive_batch(tokenizer):
    texts = ["a cat", "this is a cat", "A", "B"]
    records = [caption(str(n), n, text) for n, text in enumerate(texts[:2])]
    turns = (Turn("assistant", (0, "A")),), talk("other", "B"), talk("more", "a cat"), talk("q", "A")
    records.append(Record("2", (picture(2),), turns, regions=((0.25, 0.5), None, (0.25, 0.5), (0.75, 0))))
    pixels, ids, lengths, right, looks = contrastive_batch(records, tokenizer, 8, "crop", 20)
    rows = [[tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] for text in texts]
    assert looks.tolist() == [[0, -1, -1], [1, -1, -1], [2, 0.25, 0.5], [2, -1, -1], [2, 0.75, 0]]
    assert right.int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert right.dtype == torch.bool and lengths.tolist() == [len(row) for row in rows] and lengths.dtype == torch.int64
    longest = max(map(len, rows))
    assert ids.tolist() == [row + [tokenizer.pad] * (longest - len(row)) for row in rows]
    assert torch.equal(pixels, torch.stack([images.to_pixels(picture(n).frames[0], 8) for n in range(3)]))
    records, report = [caption("r", 1, "ABCDEF")], Report()
    with pytest.raises(ValueError, match="record 'r' has 8 tokens, more than max_tokens 7"):
        contrastive_batch(records, tokenizer, 8, "crop", 7)
    _, ids, lengths, _, _ = contrastive_batch(records, tokenizer, 8, "crop", 7, report)
    assert ids.tolist() == [[tokenizer.bos, *tokenizer.encode("ABCDEF")]] and lengths.tolist() == [7]
    assert report == Report(1, 1, 1)


@pytest.mark.parametrize("visuals, turns, regions, message", [
    ((), talk("q", "a"), (), "has 0 visual inputs"),
    ((picture(1), picture(2)), talk("q", "a"), (), "has 2 visual inputs"),
    ((picture(1, frames=2),), talk("q", "a"), (), "needs one picture"),
    ((picture(1),), talk("q", " "), (), "has no caption"),
    ((picture(1),), (Turn("user", ("q",)),), (), "has no caption"),
    ((Visual("wide", (Image.new("RGB", (9, 8)),)),), talk("q", "A"), ((0.5, 0.5),), "but has 9 x 8 pixels"),
    ((Visual("seen", (Image.new("RGB", (8, 8)),), View()),), talk("q", "A"), ((0.5, 0.5),), "without augmentation"),
])
def test_what_cannot_be_contrasted(tokenizer, visuals, turns, regions, message):
    with pytest.raises(ValueError, match=f"record 'r' .*{message}"):
        contrastive_batch([Record("r", visuals, (turns,), regions=regions)], tokenizer, 8, "crop", 20)


@pytest.fixture
def loaded(monkeypatch):
    """The pictures that were decoded, of which none are kept at first."""
    loaded, load = [], images.load
    monkeypatch.setattr(images, "load", lambda source: loaded.append(source) or load(source))
    batching.cached.cache_clear()
    yield loaded
    batching.cached.cache_clear()


def test_files_are_decoded_once_as_long_as_they_stay_the_same(tmp_path, loaded):
    path = tmp_path / "a.png"

    def pixels(fit="crop", size=8, preprocessing=images.CLIP, view=None):
        return pixels_of([Visual("a", (str(path),), view)], size, fit, preprocessing)

    for shade in (10, 90, 10):  # the file is replaced, later and later
        picture = Image.new("RGB", (16, 12), (shade, 0, 0))
        picture.save(path)
        os.utime(path, ns=(0, len(loaded)))
        for options in ({}, {"fit": "pad"}, {"size": 9}, {"fit": "pad", "preprocessing": images.SIGLIP}):
            before, (size, fit, how) = len(loaded), ({"size": 8, "fit": "crop", "preprocessing": images.CLIP} | options).values()
            expected = images.to_pixels(picture, size, fit, how)[None]
            first = pixels(**options)
            assert torch.equal(first, expected)
            first.zero_()
            assert torch.equal(pixels(**options), expected), "the caller's changes are the caller's"
            assert len(loaded) == before + 1
    pixels(view=View(seed=(1,))), pixels(view=View(seed=(1,)))
    assert len(loaded) == 3 * 4 + 2, "through a view nothing is kept"
    path.unlink()
    with pytest.raises(FileNotFoundError, match="a.png: no such image"):
        pixels()


def test_the_cache_keeps_to_its_memory(tmp_path, loaded, monkeypatch):
    monkeypatch.setattr(batching, "MAX_CACHED", 2 * 8 * 8 * 3)
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    kept = [batching.fitted(tmp_path / f"{name}.png", None, 8, "crop", images.CLIP) for name in "abacaca"]
    assert [path.stem for path in loaded] == ["a", "b", "c"]  # c drives b out, which was unused for longest
    batching.fitted(tmp_path / "b.png", None, 8, "crop", images.CLIP)
    assert [path.stem for path in loaded] == ["a", "b", "c", "b"]
    with pytest.raises(ValueError, match="read-only"):
        kept[0][0] = 1
