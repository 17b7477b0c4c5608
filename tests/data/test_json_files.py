"""JSON files in every form in which they are shared, read record by record."""

import gzip
import json
import re

import pytest

from nanovlm.data import json_files
from nanovlm.data.json_files import elements, read_at, records

OBJECTS = [{"id": n, "text": f"Ünïcode\u2028and \\u2028 {n}", "deep": [[1, {"a": None}]]} for n in range(5)]


@pytest.fixture(params=["small chunks", "one chunk"])
def chunk(request, monkeypatch):
    """Records that span many reads, and a file that fits into one."""
    if request.param == "small chunks":
        monkeypatch.setattr(json_files, "CHUNK", 7)


def dump(one, **options):
    return json.dumps(one, ensure_ascii=False, **options)


FORMS = {
    "a list": dump(OBJECTS),
    "a pretty list": dump(OBJECTS, indent=2),
    "lines": "\n".join(map(dump, OBJECTS)),
    "lines with blanks between and behind": "\n\n".join(map(dump, OBJECTS)) + "\r\n\n",
    "pretty objects behind one another": "\n".join(dump(one, indent=4) for one in OBJECTS),
    "a byte order mark": "\ufeff" + dump(OBJECTS),
    "lines behind a byte order mark": "\ufeff" + "\n".join(map(dump, OBJECTS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(form, chunk, tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(FORMS[form].encode())
    found = list(records(path))
    assert [one.value for one in found] == OBJECTS
    assert [read_at(path, one.start, one.stop, one.where) for one in found] == OBJECTS
    packed = tmp_path / "some.json.gz"
    packed.write_bytes(gzip.compress(FORMS[form].encode()))
    assert [one.value for one in records(packed)] == OBJECTS


def test_lists_and_members_inside_an_object(chunk, tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"info": {"images": [1]}, "images": [3, [4], "]"], "data": {"a": 1, "b": {}}}, indent=1))
    assert [one.value for one in elements(path, "images")] == [3, [4], "]"]
    assert [(one.key, one.value) for one in elements(path, "data")] == [("a", 1), ("b", {})]
    assert [one.key for one in elements(path)] == ["info", "images", "data"]
    assert [one.where for one in elements(path, "data")][1] == f"{path}, line 16, key 'b'"
    with pytest.raises(ValueError, match="one key 'annotations' was expected, found 'info', 'images', 'data'"):
        list(elements(path, "annotations"))
    (tmp_path / "empty.json").write_text('{"images": [], "data": {}}')
    assert list(elements(tmp_path / "empty.json", "images")) == list(elements(tmp_path / "empty.json", "data")) == []


def test_numbers_are_not_cut_at_the_end_of_a_chunk(monkeypatch, tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text("[123456, 1.5e10, -12]")
    for size in range(1, 22):
        monkeypatch.setattr(json_files, "CHUNK", size)
        assert [one.value for one in elements(path)] == [123456, 1.5e10, -12]
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n{"a": 1, "a": 2}\n{"a": 5}')
    found = [one.value for one in records(path)]
    assert (found[0], found[4]) == ({"a": 1}, {"a": 5})
    facts = {1: "line 2: .*column 6", 2: "line 3: .*can't decode", 3: "line 4: .*key 'a' stands twice in one object"}
    for place, fact in facts.items():
        assert isinstance(found[place], ValueError) and re.search(f"some.jsonl, {fact}", str(found[place]))


@pytest.mark.parametrize("content, message", [
    ('[{"a": 1},\n {"a": }]', "line 2, byte 18: malformed JSON"), ('[{"a": 1},\n', "line 2, byte 11: malformed JSON"),
    ('[{"a": 1}', "line 1, byte 9: malformed JSON"), ('[1,\n2] [3]', "line 2, byte 7: malformed JSON"),
    ('[1,\n{"b": {"a": 1, "a": 1}}]', "line 2, item 2: key 'a' stands twice"),
    ('{\n"a": 1,\n"b": [2\n}', "line 4, byte 18: malformed JSON"), ('[\n"\xff"]', "line 2, item 1: malformed JSON"),
])
def test_malformed_files_are_named_with_the_line(content, message, chunk, tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        list(records(path))
    assert f"{path}, " in str(caught.value) and message in str(caught.value)


def test_a_file_is_never_held_whole_and_an_endless_record_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(json_files, "CHUNK", 1000)
    held, more = [], json_files.Scanner.more
    monkeypatch.setattr(json_files.Scanner, "more", lambda scanner: (more(scanner), held.append(len(scanner.text)))[0])
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"skipped": ["x" * 50] * 999, "list": OBJECTS * 1000}))
    assert sum(1 for _ in elements(path, "list")) == 5000
    assert path.stat().st_size > 400_000 and len(held) > 100 and max(held) < 3000, "a few records"
    monkeypatch.setattr(json_files, "CHUNK", 8)
    monkeypatch.setattr(json_files, "LARGEST", 64)
    path = tmp_path / "some.json"
    path.write_text('["' + "x" * 1000 + '"]')
    with pytest.raises(ValueError, match="line 1, byte 1: malformed JSON"):
        list(records(path))
    with pytest.raises(ValueError, match="the packed file is damaged"):
        (tmp_path / "cut.gz").write_bytes(gzip.compress(b"[" + b" " * 5000 + b"1]")[:-9])
        list(records(tmp_path / "cut.gz"))
    with pytest.raises(FileNotFoundError, match="none.json: no such file"):
        list(records(tmp_path / "none.json"))
