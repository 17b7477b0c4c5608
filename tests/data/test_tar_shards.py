"""Tar shards: written, read back in every epoch's own order, and all that can be wrong in them."""

import io
import json
import os
import tarfile

import pytest

from nanovlm.data import images, tar_shards
from nanovlm.data.datasets import command_line_sources, listed_sources
from nanovlm.data.records import Turn
from nanovlm.data.tar_shards import TarShards, write_shards
from vlit_data import asked, png


def item(n, question="<image>\nwhat?"):
    return {"id": n, "conversations": asked(question, f"number {n}")}


def write_some(folder):
    """Ten samples in shards of four, four and two; every third is text alone."""
    samples = []
    for n in range(10):
        (folder / f"{n}.PNG").write_bytes(png(n))
        shown = item(n) | {"image": "old/name.png"}, [folder / f"{n}.PNG"]
        samples.append(shown if n % 3 else (item(n, "and?"), []))
    (folder / "some").mkdir()
    write_shards(folder / "some", "some", samples, 4)
    return folder / "some"


@pytest.fixture
def folder(tmp_path):
    return write_some(tmp_path)


def write(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def test_every_epoch_holds_every_sample_once_shard_by_shard(folder):
    source, again = TarShards(folder, seed=3), TarShards(folder, seed=3)
    assert len(source) == 10 and source.name == folder.name
    epochs = [[int(source.record(10 * epoch + n).id) for n in range(10)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    orders = [list(dict.fromkeys(n // 4 for n in epoch)) for epoch in epochs]
    for epoch, order in zip(epochs, orders):
        assert sorted(epoch, key=lambda n: order.index(n // 4)) == epoch, "shard by shard"
    assert len(set(map(tuple, orders))) > 1 and len({tuple(n for n in epoch if n < 4) for epoch in epochs}) > 1
    assert [int(again.record(n).id) for n in reversed(range(40))][::-1] == sum(epochs, [])
    records = [TarShards(folder).record(n) for n in range(10)]
    for record in records:
        n = int(record.id)
        asked = Turn("user", (0, "\nwhat?")) if n % 3 else Turn("user", ("and?",))
        assert record.conversations == ((asked, Turn("assistant", (f"number {n}",))),)
        for visual in record.visuals:
            (frame,) = visual.frames
            assert images.load(frame).getpixel((0, 0)) == (n, 0, 0) and images.load(frame).size == (3, 2)
            assert visual.key == str(frame) and visual.key.endswith(f".tar/{n:09d}.0.png")
    assert sum(len(record.visuals) for record in records) == 6


def test_equal_samples_make_equal_bytes_and_an_index(folder, tmp_path_factory, monkeypatch):
    index = json.loads((folder / "index.json").read_text())
    assert {name: entry["samples"] for name, entry in index.items()} == {
        "some-000000.tar": 4, "some-000001.tar": 4, "some-000002.tar": 2,
    }  # fmt: skip
    again = write_some(tmp_path_factory.mktemp("again"))
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in os.listdir(folder))
    scanned = []
    monkeypatch.setattr(tar_shards, "members", lambda path: scanned.append(path) or [None])
    assert len(TarShards(folder)) == 10 and not scanned
    with open(folder / "some-000001.tar", "ab") as file:
        file.write(b"\0" * 512)
    assert len(TarShards(folder)) == 7 and [path.name for path in scanned] == ["some-000001.tar"]


def test_captions_from_elsewhere(tmp_path):
    """With the byte order mark of a Windows editor; an empty text beside a caption in the .json says nothing."""
    write(tmp_path / "00000.tar", {
        "000.jpg": png(1), "000.txt": "\ufeff a café\n".encode(), "000.json": b'{"caption": "other", "url": "x"}',
        "001.json": b'{"caption": "from the json"}', "001.PNG": png(2), "001.txt": b" \n", "sub/000.txt": b"deep",
        "sub/000.webp": b"cut",
    })  # fmt: skip
    source = TarShards(tmp_path / "00000.tar", name="cc3m")
    found = {record.id: record for record in map(source.record, range(3))}
    said = {id: record.conversations for id, record in found.items()}
    expected = {"000": "a café", "001": "from the json", "sub/000": "deep"}
    assert said == {id: ((Turn("user", (0,)), Turn("assistant", (text,))),) for id, text in expected.items()}
    assert images.load(found["001"].visuals[0].frames[0]).getpixel((0, 0)) == (2, 0, 0)
    with pytest.raises(images.ImageError, match="00000.tar/sub/000.webp: the image is damaged"):
        images.load(found["sub/000"].visuals[0].frames[0])


def test_what_macs_put_beside_each_file_is_no_sample(tmp_path):
    write(tmp_path / "x.tar", {"._a.jpg": b"x", "a.jpg": png(1), "sub/._b.txt": b"x", "a.txt": b"a",
                                "__MACOSX/._a.jpg": b"x", "__MACOSX/b.jpg": b"x", "Thumbs.db": b"x", "desktop.ini": b"x", "README.md": b"x"})
    (tmp_path / "._x.tar").write_bytes(b"\0\5\x16\7")
    source = TarShards(tmp_path)
    assert len(source) == 1 and source.record(0).id == "a"


@pytest.mark.parametrize("files, message", [
    ({"a.txt": b"a"}, r"x.tar, sample 'a': a picture and a caption, .* it holds txt"),
    ({"a.jpg": b"a"}, r"sample 'a': a picture and a caption, .* it holds jpg"),
    ({"a.jpg": b"a", "a.txt": b" "}, r"a picture and a caption"),
    ({"a.jpg": b"a", "a.txt": b"\xff"}, r"sample 'a', .txt: not UTF-8"),
    ({"a.json": b"{"}, r"sample 'a', .json: malformed JSON: .* column 2"),
    ({"a.json": b'{"id": 1, "image": "0.png", "conversations": []}'}, r"sample 'a': no '0.png'; it holds json"),
    ({"a.json": b"[]"}, r"sample 'a': an object with id"),
])
def test_samples_that_cannot_be_used(files, message, tmp_path):
    write(tmp_path / "x.tar", files)
    with pytest.raises(ValueError, match=message):
        TarShards(tmp_path).record(0)


def test_shards_that_cannot_be_used(folder, tmp_path_factory):
    whole = (folder / "some-000000.tar").read_bytes()
    other = tmp_path_factory.mktemp("other")
    for content, message in ((whole[:700], "cut short"), (b"x" * 2000, "no tar"), (b"\x1f\x8b" + whole, "no tar, packed")):
        (other / "bad.tar").write_bytes(content)
        tar_shards.members.cache_clear()
        with pytest.raises(ValueError, match=rf"bad.tar: .*{message}"):
            TarShards(other)
    write(other / "bad.tar", {})
    tar_shards.members.cache_clear()
    with pytest.raises(ValueError, match="bad.tar: holds no sample"):
        TarShards(other)
    for path in (other / "none", tmp_path_factory.mktemp("e")):
        with pytest.raises(FileNotFoundError, match="no such file, or no .tar"):
            TarShards(path)


def test_listed_shards(folder):
    path = folder / "sets.json"
    path.write_text(json.dumps({"pairs": {"reader": "shards", "path": ".", "prompts": ["{question} Briefly."]}}))
    source = listed_sources(path, seed=3)[0]["pairs"]
    assert [source.record(n).id for n in range(10)] == [TarShards(folder, seed=3).record(n).id for n in range(10)]
    assert source.record(0).conversations[0][0].text.endswith(" Briefly.")
    alone = command_line_sources(folder, seed=3)[0]["data"]
    assert alone.name == "data" and [alone.record(n).id for n in range(10)] == [source.record(n).id for n in range(10)]
    assert len(command_line_sources(folder / "some-000000.tar")[0]["data"]) == 4
    with pytest.raises(ValueError, match="images x: shards hold their images"):
        command_line_sources(folder, "x")
