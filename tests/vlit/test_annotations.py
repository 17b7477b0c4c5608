"""Annotation files of every source become one form; bad records are named and cost themselves alone."""

import json
from pathlib import Path

import pytest
from vlit_data import GOLDEN, PHOTOS

from nanovlm.vlit.annotations import Picture, kind_of, read, share_box


@pytest.fixture(scope="module")
def photos():
    return read(PHOTOS)


def written(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def instances(**changes):
    return {
        "images": [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}],
        "categories": [{"id": 3, "name": "car"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [20, 10, 100, 50]} | changes],
    }


def test_each_source_is_known_by_its_keys():
    kinds = {path.name: kind_of(path) for path in map(Path, [*PHOTOS, GOLDEN / "caps_boxes.jsonl"])}
    assert kinds == {
        "captions_photos.json": "captions", "instances_photos.json": "instances", "cocotext_photos.json": "COCO-Text",
        "cocottributes_photos.json": "attributes", "v2_questions_photos.json": "questions",
        "v2_annotations_photos.json": "answers", "caps_boxes.jsonl": "captions and boxes",
    }  # fmt: skip


def test_all_that_is_known_meets_at_its_picture_and_what_is_skipped_is_counted(photos):
    astronaut = photos.pictures["1"]
    assert (astronaut.file_name, astronaut.width, astronaut.height) == ("astronaut.jpg", 192, 192)
    assert astronaut.of_kind("caption")[0].value == "A smiling woman in an orange space suit holds a helmet."
    found = [(one.kind, one.question, one.value) for one in astronaut.annotations if one.kind in ("object", "ocr", "vqa")]
    assert found == [
        ("object", "", "person"), ("ocr", "", "COLLINS"),
        ("vqa", "What color is the suit?", "orange"), ("vqa", "Is she smiling?", "yes"),
    ]  # fmt: skip
    assert photos.problems == []
    told = {one.value: one.of for picture in photos.pictures.values() for one in picture.of_kind("attribute")}
    assert told == {"smiling": "object/101", "furry": "object/102", "shiny": "object/104"}  # standing had just a half
    assert photos.skipped["attributes of objects in none of the files"] == 1
    assert photos.skipped["illegible texts"] == 1
    assert photos.skipped["answers that leave it open"] == 1  # "full or empty"
    assert [one.value for one in photos.pictures["3"].of_kind("vqa")] == ["1"]


def test_boxes_become_shares_of_the_picture_and_end_at_its_edges():
    picture = Picture("7", width=200, height=100)
    assert share_box([20, 10, 100, 50], picture) == (0.1, 0.1, 0.6, 0.6)
    assert share_box([-10, 90, 400, 20], picture) == (0.0, 0.9, 1.0, 1.0)
    for box in ([20, 10, 0, 5], [250, 0, 9, 9], [1, 2, 3]):
        with pytest.raises(ValueError, match="no area|left, top, width"):
            share_box(box, picture)


def test_llavas_lines_hold_captions_and_boxes():
    found = read([GOLDEN / "caps_boxes.jsonl"])
    assert len(found.pictures) == 20 and not found.problems
    donuts = found.pictures["296284"]  # the id of COCO, without the zeros in front
    assert donuts.file_name == "000000296284.jpg" and len(donuts.of_kind("caption")) == 5
    assert donuts.of_kind("object")[0].box == (0.37, 0.584, 0.504, 0.709)


@pytest.mark.parametrize(("changes", "words"), [
    ({"category_id": 9}, "category_id 9 is none of the file's 1 categories"),
    ({"bbox": [0, 0]}, "bbox must be left, top, width and height"),
    ({"bbox": "0 0 1 1"}, "bbox must be left, top, width and height in pixels, found"),
    ({"image_id": 8}, "size of picture 8 is not stated"),
    ({"image_id": None}, "'image_id' must be a"),
])  # fmt: skip
def test_a_bad_record_is_named_and_costs_itself_alone(tmp_path, changes, words):
    content = instances()
    content["annotations"].append(content["annotations"][0] | {"id": 2} | changes)
    found = read([written(tmp_path, "instances.json", content)])
    assert [one.id for one in found.pictures["7"].annotations] == ["object/1"]
    (problem,) = found.problems
    assert words in problem and f"{tmp_path / 'instances.json'}, line 1, item 2" in problem


def test_a_file_cut_short_keeps_what_stands_before_the_break(tmp_path):
    text = (GOLDEN / "captions_photos.json").read_text()
    path = written(tmp_path, "captions.json", text[: text.index("An espresso")])
    found = read([path])
    assert sum(len(picture.annotations) for picture in found.pictures.values()) == 5
    assert len(found.problems) == 1 and f"{path}, line " in found.problems[0]


def test_answers_without_their_questions_and_questions_without_answers_are_told(tmp_path):
    asked = [{"question_id": n, "image_id": 5, "question": words} for n, words in ((1, "How many?"), (2, "Why"))]
    ten = [{"answer": "two"}] * 6 + [{"answer": "three"}] * 4  # no answer_id, as in VizWiz's copies
    told = [{"question_id": n, "image_id": 5, "answers": ten} for n in (1, 9)]
    questions = written(tmp_path, "q.json", {"questions": asked})
    answers = written(tmp_path, "a.json", {"annotations": told})
    found = read([answers, questions])
    assert [(one.question, one.value) for one in found.pictures["5"].annotations] == [("How many?", "two")]
    assert found.skipped["questions without an answer"] == 1
    assert "question_id 9 is a question in none of the files" in found.problems[0]


def test_unknown_missing_and_pickled_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="none of the known annotation files"):
        read([written(tmp_path, "x.json", {"data": []})])
    with pytest.raises(FileNotFoundError, match="absent.json: no such file"):
        read([tmp_path / "absent.json"])
    with pytest.raises(ValueError, match="(?s)a pickle can run any program.*joblib.load"):
        read([written(tmp_path, "cocottributes.jbl", "")])
