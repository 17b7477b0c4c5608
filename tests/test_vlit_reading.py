"""Files of records: every form, every trap, and what is said about the records that cannot be read."""

import gzip
import json

import pytest

from nanovlm.vlit import reading
from nanovlm.vlit.reading import Unreadable, records
from nanovlm.vlit.samples import read


def item(id, image="a.jpg", answer="Red."):
    said = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": said}


ITEMS = [item(0), item("b", answer='a "quote", [a bracket], {a brace} and \\ at the end\\'), item(2, answer="two\u2028lines\n")]
FORMS = {
    "lines.jsonl": "\n".join(json.dumps(one, ensure_ascii=False) for one in ITEMS),
    "lines.json": "\n\n".join(json.dumps(one, ensure_ascii=False) for one in ITEMS) + "\n\n",
    "crlf.jsonl": "\r\n".join(json.dumps(one) for one in ITEMS),
    "list.json": json.dumps(ITEMS, ensure_ascii=False),
    "pretty.json": json.dumps(ITEMS, indent=2),
    "list.jsonl": json.dumps(ITEMS),
    "row.json": "\n".join(json.dumps(one, indent=4, ensure_ascii=False) for one in ITEMS),  # POPE's way
    "mark.json": "\ufeff" + json.dumps(ITEMS),
}


@pytest.mark.parametrize("chunk", (1, 7, 1 << 20))
@pytest.mark.parametrize("name", FORMS)
def test_all_forms_give_the_same_records(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    (tmp_path / name).write_bytes(FORMS[name].encode())
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(FORMS[name].encode()))
    for path in (tmp_path / name, packed):
        assert [value for _, value in records(path)] == ITEMS


def test_the_place_of_a_record_is_its_first_line(tmp_path):
    for name, text in FORMS.items():
        path = tmp_path / name
        path.write_bytes(text.encode())
        lines = text.split("\n")
        for where, value in records(path):
            shown, _, line = where.rpartition(", line ")
            assert shown == str(path)
            begin = "{" if name not in ("list.json", "list.jsonl", "mark.json") else ""
            assert begin in lines[int(line) - 1]
            if name.startswith(("lines", "crlf")):
                assert json.loads(lines[int(line) - 1]) == value


@pytest.mark.parametrize("name", ("lines.jsonl", "pretty.json", "row.json"))
def test_a_broken_record_breaks_no_other(tmp_path, name):
    text = FORMS[name].replace('"from": "gpt"', '"from": gpt', 1)
    (tmp_path / name).write_text(text)
    found = list(read(tmp_path / name))
    assert [isinstance(one, Unreadable) for _, one in found] == [True, False, False]
    where, error = found[0]
    line = text.split("\n").index(next(row for row in text.split("\n") if '"from": gpt' in row)) + 1
    assert where == f"{tmp_path / name}, line {line}" and "no JSON" in str(error) and '"from": gpt' in error.text


@pytest.mark.parametrize(
    "line, why",
    (
        ('{"id": 1, "id": 2, "conversations": []}', "'id' stands twice"),
        ('{"id": 1, "conversations": [{"from": "gpt", "value": "a", "value": "b"}]}', "'value' stands twice"),
        ('{"id": 1, "conversations": [{"from": "human"', "no JSON"),
        ('"a text"', "an object with id"),
        ('{"id": 1, "text": "q"}', "conversations"),
        ('{"id": 1, "conversations": [{"from": "robot", "value": "a"}]}', "robot"),
        ('{"id": 1, "conversations": [{"from": "gpt", "value": null}]}', "from and value"),
        ('{"id": 1, "image": [3], "conversations": []}', "image must be"),
        ('{"id": 1, "image": "", "conversations": [', "no JSON"),
    ),
)
def test_what_cannot_be_read_is_named_with_file_and_line(tmp_path, line, why):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(item(0)), line, json.dumps(item(2))]))
    (_, first), (where, error), (_, last) = read(path)
    assert (first.id, last.id) == ("0", "2")
    assert where == f"{path}, line 2" and why in str(error)


def test_bytes_that_are_no_text_cost_one_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1, "x": "\xff\xfe"}\n' + json.dumps(item(2)).encode())
    (where, error), (_, sample) = read(path)
    assert where.endswith("line 1") and "UTF-8" in str(error) and sample.id == "2"


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "conversations": [{"from": "gpt", "value": "\\ud83d"}]}')
    ((where, error),) = read(path)
    assert where.endswith("line 1") and "half a surrogate" in str(error)


@pytest.mark.parametrize("cut", ('[{"id": 1}, {"id": 2', '[{"id": 1},', '[{"id": 1}, {"id": "2]}'))
def test_a_file_that_ends_too_early_says_so(tmp_path, cut):
    path = tmp_path / "a.json"
    path.write_text(cut)
    (_, value), (where, error) = records(path)
    assert value == {"id": 1} and "ends here" in str(error) and where.endswith("line 1")


def test_a_bracket_too_many_ends_the_run(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"id": 1}},\n{"id": 2}]')
    with pytest.raises(ValueError, match="after the end of the list"):
        list(records(path))


@pytest.mark.parametrize("top", ({"meta": {}, "data": {}}, {"annotations": [{"image_id": 1, "caption": ""}]}, {"questions": []}))
@pytest.mark.parametrize("indent", (None, 1))
def test_other_forms_are_sent_to_convert(tmp_path, top, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(top, indent=indent))
    with pytest.raises(ValueError, match="nanovlm.data convert"):
        list(read(path))


@pytest.mark.parametrize("text", ('{"id": ', "[" + '{"a": "', '{"a": 1, "b": [\n'))
def test_a_record_without_end_is_an_error_in_bounded_memory(tmp_path, monkeypatch, text):
    monkeypatch.setattr(reading, "LONGEST", 1000)
    monkeypatch.setattr(reading, "CHUNK", 100)
    path = tmp_path / "a.json"
    path.write_text(text + "x" * 5000)
    with pytest.raises(ValueError, match=r"line 1: the record that begins here has no end"):
        list(records(path))


@pytest.mark.parametrize("text", ("", "\n \n", "[]", "[ ]\n"))
def test_an_empty_file_is_an_error(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="no record"):
        list(read(path))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(read(tmp_path / "none.json"))
