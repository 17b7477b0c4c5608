"""Files of samples: every form, every trap, and what is said about the records that cannot be read."""

import gzip
import json

import pytest

from nanovlm.vlit.samples import Unreadable, read


def item(id, image="a.jpg", answer="Red."):
    said = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": said}


ITEMS = [item("0"), item("b", answer='a "quote", [a bracket], {a brace} and \\'), item("2", answer="two\u2028lines\n")]
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


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_give_the_same_samples(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name].encode())
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(FORMS[name].encode()))
    for path in (tmp_path / name, packed):
        assert [sample.item() for _, sample in read(path)] == ITEMS
        assert all(where.startswith(f"{path}, line ") for where, _ in read(path))


@pytest.mark.parametrize(
    "line, why",
    (
        ('{"id": 1, "id": 2, "conversations": []}', "'id' stands twice"),
        ('{"id": 1, "conversations": [{"from": "gpt", "value": "a", "value": "b"}]}', "'value' stands twice"),
        ('{"id": 1, "conversations": [{"from": "human"', "malformed JSON"),
        ('"a text"', "an object with id"),
        ('{"id": 1, "text": "q"}', "conversations missing"),
        ('{"conversations": []}', "id missing"),
        ('{"id": 1, "conversations": [{"from": "robot", "value": "a"}]}', "unknown speaker 'robot'"),
        ('{"id": 1, "conversations": [{"from": "gpt", "value": null}]}', "from and value"),
        ('{"id": 1, "conversations": [{"from": "gpt", "value": "\\ud83d"}]}', "not text"),
        ('{"id": 1, "conversations": "hello"}', "must be a list"),
        ('{"id": 1, "image": [3], "conversations": []}', "image must be"),
        ('{"id": 1, "task": 3, "conversations": []}', "task must be"),
    ),
)
def test_what_cannot_be_read_is_named_with_file_and_line(tmp_path, line, why):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(item("0")), line, json.dumps(item("2"))]))
    (_, first), (where, error), (_, last) = read(path)
    assert (first.id, last.id) == ("0", "2")
    assert isinstance(error, Unreadable) and why in str(error) and error.text == line
    assert where == f"{path}, line 2" and str(path) not in str(error)


def test_bytes_that_are_no_text_cost_one_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1, "x": "\xff\xfe"}\n' + json.dumps(item("2")).encode())
    (where, error), (_, sample) = read(path)
    assert where.endswith("line 1") and "UTF-8" in str(error) and sample.id == "2"


@pytest.mark.parametrize("cut", ('[{"id": 1,\n "x": 2', '[{"id": 1, "conversations": []},\n'))
def test_a_list_that_breaks_off_names_the_line(tmp_path, cut):
    path = tmp_path / "a.json"
    path.write_text(cut)
    with pytest.raises(ValueError, match="a.json, line 2"):
        list(read(path))


@pytest.mark.parametrize(
    "top", ({"meta": {}, "data": {}}, {"annotations": [{"image_id": 1, "caption": ""}]}, {"questions": []})
)
@pytest.mark.parametrize("indent", (None, 1))
def test_other_forms_are_sent_to_convert(tmp_path, top, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(top, indent=indent))
    with pytest.raises(ValueError, match="nanovlm.data convert"):
        list(read(path))


@pytest.mark.parametrize("text", ("", "\n \n", "[]", "[ ]\n"))
def test_an_empty_file_is_an_error(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="no record"):
        list(read(path))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(read(tmp_path / "none.json"))
