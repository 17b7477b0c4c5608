"""Files that survive a kill: whole or not at all, and JSON lines."""

import pytest

from nanovlm.files import JsonLines, listing, new_folder, replace, replace_text


def test_replace_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    replace_text(path, "ä")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace(path, fail)
    assert path.read_text(encoding="utf-8") == "ä" and list(tmp_path.iterdir()) == [path]
    replace_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "folder"
    with pytest.raises(OSError), new_folder(path) as temporary:
        (temporary / "a").write_text("half")
        raise OSError
    assert not any(path.parent.iterdir())
    path.with_name("folder.tmp").mkdir()  # what a kill left
    (path.with_name("folder.tmp") / "old").write_text("")
    with new_folder(path) as temporary:
        (temporary / "a").write_text("whole")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["a"] and list(path.parent.iterdir()) == [path]
    with pytest.raises(FileExistsError, match="folder"), new_folder(path):
        pass
    (path / "a").unlink()
    with new_folder(path):  # an empty folder is in nobody's way
        pass


def test_json_lines_forget_half_a_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert list(JsonLines(path)) == []
    lines = JsonLines(path)
    assert lines.add({"a": 1}, {"a": "\u2028ü"}) == 0
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"a": 3')
    assert list(JsonLines(path)) == [{"a": 1}, {"a": "\u2028ü"}]
    assert path.read_bytes() != whole  # reading changes nothing
    again = JsonLines(path)
    start = again.add({"a": 4})
    assert start == len(whole) and again.at(start) == {"a": 4} and [one["a"] for one in again] == [1, "\u2028ü", 4]
    assert [begin for begin, _ in again.places()][-1] == start
    assert again.size() == path.stat().st_size
    again.cut(start)
    assert path.read_bytes() == whole
    path.write_bytes(b"half")
    JsonLines(path).add(5)
    assert path.read_bytes() == b"5\n"


def test_json_lines_keep_to_their_head_and_name_the_broken_line(tmp_path):
    path, head = tmp_path / "lines.jsonl", {"seed": 1, "sizes": (1, 2)}
    JsonLines(path, head).add("first")
    assert list(JsonLines(path, head)) == ["first"]
    with pytest.raises(ValueError, match=r"seed 1, now 2"):
        JsonLines(path, head | {"seed": 2})
    path.write_text('{"seed"')  # killed while it wrote the head
    assert list(JsonLines(path, head)) == [] and len(path.read_text().splitlines()) == 1
    path.write_text('{"a": 1}\n{oh\n')
    with pytest.raises(ValueError, match="lines.jsonl, line 2"):
        list(JsonLines(path))


def test_a_listing_leaves_out_what_operating_systems_put_beside_data(tmp_path):
    for name in ("b.jpg", "a.jpg", "._a.jpg", ".DS_Store", "__MACOSX/a.jpg", "sub/c.jpg", "sub/._c.jpg", ".git/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in listing(tmp_path, "**/*.jpg")] == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert [path.name for path in listing(tmp_path)] == ["a.jpg", "b.jpg", "sub"]
    assert listing(tmp_path / ".git") == [tmp_path / ".git" / "d.jpg"]  # a folder that the user names is taken as it is
