"""Every schema trap that published instruction data is known for, put to quality and filter."""

import base64
import io
import json

import pytest
from PIL import Image

from nanovlm.data.__main__ import main as data_main
from nanovlm.vlit.__main__ import main
from nanovlm.vlit.indicators import Survey, measure


def turns(*said, roles=("human", "gpt")):
    return [{"from": roles[place % len(roles)], "value": text} for place, text in enumerate(said)]


def png():
    file = io.BytesIO()
    Image.new("RGB", (300, 300), (200, 30, 30)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "coco").mkdir()
    Image.new("RGB", (8, 8), (20, 30, 200)).save(tmp_path / "a.png")
    return tmp_path


def look(folder, *items, name="data.jsonl"):
    """The Survey of some records, pictures looked for."""
    (folder / name).write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in items))
    return Survey(folder / name, root=folder)


def filtered(folder, name="data.jsonl"):
    """(kept, dropped) of filter without annotations."""
    assert (
        main(["filter", str(folder / name), "--images", str(folder), "--out", str(folder / "out"), "--without-report"])
        == 0
    )
    return [
        [json.loads(line) for line in (folder / "out" / f"{kind}.jsonl").read_text().split("\n") if line]
        for kind in ("kept", "dropped")
    ]


GOOD = {
    "placeholder in front": {"id": 1, "image": "a.png", "conversations": turns("<image>\nWhat is it?", "Blue.")},
    "placeholder behind": {"id": "1", "image": "a.png", "conversations": turns("What is it?\n<image>", "Blue.")},
    "text alone": {"id": 1, "conversations": turns("What is two and two?", "Four.")},
    "with another folder": {
        "id": 1,
        "image": "coco/train2017/a.png",
        "conversations": turns("<image>What is it?", "Blue."),
    },
    "base64": {"id": 1, "image": png(), "conversations": turns("<image>What is it?", "Red.")},
    "base64 with prefix": {
        "id": 1,
        "image": "data:image/png;base64," + png(),
        "conversations": turns("<image>What is it?", "Red."),
    },
    "two pictures": {"id": 1, "image": ["a.png", "a.png"], "conversations": turns("<image><image>Which?", "Both.")},
    "ShareGPT": {"id": "x_1", "conversations": turns("Hello?", "Hi.", roles=("user", "chatgpt"))},
    "Bing": {"id": "x_1", "conversations": turns("Hello?", "Hi.", roles=("human", "bing"))},
    "system first": {"id": 1, "conversations": turns("Be kind.", "Hello?", "Hi.", roles=("system", "human", "gpt"))},
    "line separator": {"id": 1, "conversations": turns("What\u2028is it?", "A line\u2029break.")},
}
BAD = {
    "begins with gpt": ({"id": 1, "conversations": turns("Hi.", "Hello?", "Yes.", roles=("gpt", "human"))}, "turns"),
    "empty turn": ({"id": 1, "conversations": turns("Hello?", " ")}, "turns"),
    "same speaker twice": ({"id": 1, "conversations": turns("Hello?", "Who?", "Yes.", roles=("human", "human", "gpt"))}, "turns"),
    "no turn": ({"id": 1, "conversations": []}, "turns"),
    "no placeholder": ({"id": 1, "image": "a.png", "conversations": turns("What is it?", "Blue.")}, "placeholders"),
    "no picture": ({"id": 1, "conversations": turns("<image>What is it?", "Blue.")}, "placeholders"),
    "more placeholders": ({"id": 1, "image": "a.png", "conversations": turns("<image><image>?", "Blue.")}, "placeholders"),
    "missing": ({"id": 1, "image": "b.png", "conversations": turns("<image>?", "Blue.")}, "image"),
    "damaged base64": ({"id": 1, "image": "data:image/png;base64,!!!", "conversations": turns("<image>?", "Blue.")}, "image"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_is_allowed_is_no_defect(folder, name):
    found = look(folder, GOOD[name])
    assert (found.records, found.unreadable, found.defective) == (1, 0, 0) and found.num_pairs == 1
    kept, dropped = filtered(folder)
    assert kept == [GOOD[name]] and dropped == []


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_is_dropped_by_name(folder, name):
    record, rule = BAD[name]
    whole = {"id": 2, "conversations": turns("Hello?", "Hi.")}
    kept, dropped = [], []
    found = look(folder, record, whole)
    if name != "damaged base64":  # quality looks whether pictures are there, filter opens them
        assert found.defective == 1 and found.defects == {rule: 1} and "data.jsonl, line 1" in found.problems[0][0]
    kept, dropped = filtered(folder)
    assert kept == [whole] and [one["record"] for one in dropped] == [record]
    assert any(why.startswith(f"defect: {rule}") for why in dropped[0]["reasons"]) and "line 1" in dropped[0]["where"]


def test_unreadable_records_are_counted_and_named(folder):
    lines = [json.dumps({"id": n, "conversations": turns(f"What is {n}?", "A number.")}) for n in range(3)]
    lines.insert(1, '{"id": 7, "id": 8, "conversations": []}')
    lines.insert(3, '{"id": 9, "conversations"')
    (folder / "data.jsonl").write_text("\n".join(lines))
    found = Survey(folder / "data.jsonl", root=folder)
    assert (found.records, found.unreadable) == (3, 2)
    assert [where.rpartition(", ")[2] for where, _ in found.problems] == ["line 2", "line 4"]
    _, dropped = filtered(folder)
    assert [one["where"].rpartition(", ")[2] for one in dropped] == ["line 2", "line 4"]
    assert [one["text"] for one in dropped] == [lines[1], lines[3]]


def test_pretty_printed_objects_in_a_row(folder):
    items = [{"id": n, "conversations": turns(f"What is {n}?", "A number.")} for n in range(4)]
    (folder / "data.json").write_text("\n".join(json.dumps(one, indent=4) for one in items))
    assert Survey(folder / "data.json", root=folder).records == 4


CONVERTED = {
    "mimic-it": {
        "meta": {},
        "data": {"A_1": {"instruction": "What is it?", "answer": "Blue.", "image_ids": ["a"], "rel_ins_ids": []}},
    },
    "minigpt4": {"annotations": [{"image_id": "a", "caption": "A blue square."}]},
}


@pytest.mark.parametrize("form", CONVERTED)
def test_other_forms_are_refused_with_the_way_out(folder, form, capsys):
    (folder / "data.json").write_text(json.dumps(CONVERTED[form]))
    assert main(["quality", str(folder / "data.json"), "--out", str(folder / "out")]) == 2
    assert "nanovlm.data convert" in capsys.readouterr().err


def test_what_convert_makes_can_be_measured(folder):
    lines = [{"instruction": "What is it?", "inputs": "", "outputs": "Red.", "image_base64_str": [png()]}]
    (folder / "m3it.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data_main(["convert", "m3it", str(folder / "m3it.jsonl"), str(folder / "ours.jsonl")])
    measured, found = measure(folder / "ours.jsonl", root=folder / "ours_images")
    assert found.num_pairs == 1 and found.defective == 0
    assert next(one for one in measured if one.key == "T").value == 1
