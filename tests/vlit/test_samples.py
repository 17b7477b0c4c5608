"""Files of samples: every form, every trap that published data is known for, what is said about it, defects."""

import base64
import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from vlit_data import item, lines, png, vlit, write_lines

from nanovlm.vlit.indicators import Survey
from nanovlm.vlit.samples import IMAGE, Sample, Unreadable, defects, read, remarks, sample

SHARED = Path(os.environ.get("NANOVLM_SHARED", "absent"))
ITEMS = [item("0", "<image>\nWhat colour?", answer, image="a.jpg")
         for answer in ("Red.", 'a "quote", [a bracket], {a brace} and \\', "two\u2028lines\n")]  # fmt: skip
FORMS = {
    "lines.jsonl": "\n".join(json.dumps(one, ensure_ascii=False) for one in ITEMS),
    "pretty.json": json.dumps(ITEMS, indent=2),
    "row.json": "\n".join(json.dumps(one, indent=4, ensure_ascii=False) for one in ITEMS),  # POPE's way
}


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_give_the_same_samples(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name].encode())
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(FORMS[name].encode()))
    for path in (tmp_path / name, packed):
        assert [one for _, one in read(path)] == list(map(sample, ITEMS))
        assert all(where.startswith(f"{path}, line ") for where, _ in read(path))


@pytest.mark.parametrize("line, why", (
    ('{"id": 1, "id": 2, "conversations": []}', "'id' stands twice"),
    ('{"id": 1, "conversations": [{"from": "human"', "malformed JSON"),
    ('{"id": 1, "text": "q"}', "'conversations' is missing"),
    ('{"id": 1, "conversations": [{"from": "robot", "value": "a"}]}', "unknown speaker 'robot'"),
    ('{"id": 1, "conversations": [{"from": "gpt", "value": null}]}', "'value' must be a str"),
    ('{"id": 1, "image": [3], "conversations": []}', "must be a path"),
    ('{"id": 1, "task": 3, "conversations": []}', "'task' must be a str"),
))  # fmt: skip
def test_what_cannot_be_read_is_named_with_file_and_line(tmp_path, line, why):
    path = write_lines(tmp_path / "a.jsonl", [ITEMS[0], line, ITEMS[2]])
    (_, first), (where, error), (_, last) = read(path)
    assert [first, last] == [sample(ITEMS[0]), sample(ITEMS[2])]
    assert isinstance(error, Unreadable) and why in str(error)
    assert where == f"{path}, line 2" and str(path) not in str(error)


@pytest.mark.parametrize("text, why", (
    ('[{"id": 1,\n "x": 2', "a.json, line 2"),
    ('[{"id": 1, "conversations": []},\n', "a.json, line 2"),
    *((text, "no record") for text in ("", "\n \n", "[]", "[ ]\n")),
    *((json.dumps(top, indent=indent), "nanovlm.data convert") for indent in (None, 1) for top in (
        {"meta": {}, "data": {"A_1": {"instruction": "?", "answer": "Blue.", "image_ids": ["a"]}}},  # MIMIC-IT
        {"annotations": [{"image_id": 1, "caption": ""}]}, {"questions": []})),
))  # fmt: skip
def test_whole_files_that_are_none(tmp_path, text, why, capsys):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=why):
        list(read(tmp_path / "a.json"))
    vlit("quality", tmp_path / "a.json", "--out", tmp_path / "out", code=2)
    assert why in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), (20, 30, 200)).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / "sub" / "b.png")
    return tmp_path


def look(folder, *items):
    """(Survey, kept, dropped) of some records, pictures looked for."""
    path = write_lines(folder / "data.jsonl", items)
    vlit("filter", path, "--images", folder, "--out", folder / "out", "--without-report")
    return Survey(path, root=folder), *(lines(folder / "out" / f"{kind}.jsonl") for kind in ("kept", "dropped"))


BLUE = ("<image>\nWhat is it?", "Blue.")
GOOD = {
    "placeholder in front": item(1, *BLUE, image="a.png"),
    "placeholder behind": item("1", "What is it?\n<image>", "Blue.", image="a.png"),
    "text alone": item(1, "What is two and two?", "Four."),
    "Windows": item(1, *BLUE, image="sub\\b.png"),
    "no picture": item(1, "What is two and two?", "Four.", image=""),
    "an empty cell": item(1, "What is two and two?", "Four.", image=float("nan")),
    "an unmentioned picture": item(1, "What is it?", "Blue.", image="a.png"),
    "messages": {"id": 1, "image": "a.png", "messages": [{"role": "User", "content": "<image>\nWhat is it?"},
                                                         {"role": "Assistant", "content": "Blue."}]},
    "base64": item(1, *BLUE, image=base64.b64encode(png(200, (300, 300))).decode()),
    "two pictures": item(1, "<image><image>Which?", "Both.", image=["a.png", "a.png"]),
    "ShareGPT": item("x_1", "Hello?", "Hi.", roles=("user", "chatgpt")),
    "system first": item(1, "Be kind.", "Hello?", "Hi.", roles=("system", "human", "gpt")),
    "line separator": item(1, "What\u2028is it?", "A line\u2029break."),
    "the assistant's placeholder": item(1, "What?", "the word <image>"),
}
BAD = {
    "with another folder": (item(1, *BLUE, image="coco/train2017/a.png"), "image"),
    "ends with human": (item(1, "Hi?", "Yes.", "Who?"), "turns"),
    "empty turn": (item(1, "Hello?", " "), "turns"),
    "image alone": (item(1, "<image>", "Blue.", image="a.png"), "turns"),
    "same speaker twice": (item(1, "Hello?", "Who?", "Yes.", roles=("human", "human", "gpt")), "turns"),
    "no picture": (item(1, *BLUE), "placeholders"),
    "more placeholders": (item(1, *BLUE, "and <image>?", "Red.", image="a.png"), "placeholders"),
    "missing": (item(1, *BLUE, image="b.png"), "image"),
    "damaged base64": (item(1, *BLUE, image="data:image/png;base64,!!!"), "image"),
    "remains of the format": (item(1, "Hello?", '{"User": "a?", "AI": "b."}'), "format"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_allowed_is_no_defect(folder, name):
    found, kept, dropped = look(folder, GOOD[name])
    assert (found.records, found.unreadable, found.defective, found.num_pairs) == (1, 0, 0, 1)
    assert json.dumps(kept) == json.dumps([GOOD[name]]) and dropped == []


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_is_dropped_by_name(folder, name):
    (record, rule), whole = BAD[name], item(2, "Hello?", "Hi.")
    found, kept, dropped = look(folder, record, whole)
    if name != "damaged base64":  # quality looks whether pictures are there, filter opens them
        assert found.defective == 1 and found.defects == {rule: 1} and "data.jsonl, line 1" in found.problems[0][0]
    assert kept == [whole] and [one["record"] for one in dropped] == [record]
    assert any(why.startswith(f"defect: {rule}") for why in dropped[0]["reasons"]) and "line 1" in dropped[0]["where"]


# The words of a sample


def about(asked, answer, granularity="", plan=""):
    return Sample("1", ("a.jpg",), (("user", f"{IMAGE}\n{asked}"), ("assistant", answer)), "", granularity, plan)


def rules(found):
    return [rule for rule, _ in found]


def test_talk_about_the_source_is_found_in_questions_and_answers():
    for answer in (
        "No, the description of the picture does not mention a dog.", "According to the caption, there are two.",
        "From the information provided, there is one.", "The given text speaks of a man.",
        "Judging by the textual description, it is red.", "The image doesn't mention any animals.",
    ):  # fmt: skip
        for said in (about("Is there a dog?", answer), about(answer, "Yes.")):
            assert rules(defects(said)) == ["source"], answer
    for answer in (
        "The sign says STOP, so the text on it is an order.", "A caption is painted under the picture on the wall.",
        "Can you give me a description of the man? He mentions nothing.", "Based on the image, it is raining.",
        "The poster provides information about trains.",
    ):  # fmt: skip
        assert defects(about("What?", answer)) == [], answer


@pytest.mark.skipif(not SHARED.exists(), reason="the review is not copied here")
def test_the_reviews_own_samples_break_its_eighth_requirement():
    """At least 3 of its 41 printed answers; by hand: 6, where the image or the information "mentions" something."""
    text = (SHARED / "papers/vlit_review.txt").read_text().split("\n")
    answers = [line.partition("\t")[2] for line in text if re.match(r"A[Il] Assistant\t", line)]
    broken = [answer for answer in answers if "source" in rules(defects(about("?", answer)))]
    assert len(answers) == 41 and len(broken) == 6
    assert sum("description" in answer or "information" in answer for answer in broken) >= 3


@pytest.mark.skipif(not SHARED.exists(), reason="GPT-4's texts are not copied here")
def test_llavas_180_answers_keep_every_rule():
    folder = SHARED / "data/llava_eval/playground"
    files = (("coco2014_val_gpt4_qa_30x3.jsonl", "output"), ("coco2014_val_qa_eval/qa90_gpt4_answer.jsonl", "text"))
    samples = [about("?", one[key]) for name, key in files for one in lines(folder / name)]
    assert len(samples) == 180 and not any(defects(one) + remarks(one) for one in samples)


@pytest.mark.parametrize("said, granularity, plan, expected", (
    (("a?", "It is not clear what she holds."), "", "", ["hedge"]),
    (("Who is it?", "A man."), "region", "", ["region"]),
    (("Who is in the box?", "A man."), "region", "", []),
    (("a?", "Yes."), "", "negative", ["negative"]),
    (("a?", "There is no dog."), "", "negative", []),
))  # fmt: skip
def test_softer_remarks(said, granularity, plan, expected):
    assert rules(remarks(about(*said, granularity, plan))) == expected


def test_lint_counts_and_names(tmp_path, capsys):
    values = [item("1", "a?", "b"), "{broken", item("2", "a?", "In the given text, b")]
    path = write_lines(tmp_path / "samples.jsonl", values)
    vlit("lint", path)
    told = capsys.readouterr().out
    assert "3 samples, 2 with defects" in told and f"{path}, line 2" in told and f"{path}, line 3: source" in told
    vlit("constuct", code=2)
    assert "Did you mean 'construct'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        vlit("construct", "--annotation", "x")
    vlit()
    told = capsys.readouterr().out
    assert all(f"\n{name} " in told for name in ("construct", "lint", "quality", "filter", "compare"))
