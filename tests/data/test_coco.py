"""Annotation files of COCO and VQA."""

import json

import pytest

from nanovlm.data import convert

IMAGES = [{"id": 7, "file_name": "7.jpg", "width": 640, "height": 480, "license": 3}, {"id": 9, "file_name": "9.jpg"}]


def write(tmp_path, name="some.json", **content):
    path = tmp_path / name
    path.write_text(json.dumps({"info": {}, **content}))
    return path


def caption(**changes):
    return {"id": 1, "image_id": 7, "caption": " A dog.\n"} | changes


def box(**changes):
    return {"id": 1, "image_id": 7, "category_id": 18, "bbox": [1, 2.5, 3, 4], "iscrowd": 0, "segmentation": []} | changes


def test_captions_by_picture(tmp_path):
    path = write(tmp_path, annotations=[caption(), caption(id=2, caption="Wet.")], images=IMAGES)
    seven, nine = convert.Picture(7, "7.jpg", 640, 480), convert.Picture(9, "9.jpg")
    assert convert.by_picture(path, convert.captions) == {
        seven: [convert.Caption(1, 7, "A dog."), convert.Caption(2, 7, "Wet.")], nine: [],
    }  # fmt: skip


def test_boxes_with_the_names_of_their_categories(tmp_path):
    kinds = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 3, "name": "car"}]
    listed = [box(), box(id=2, category_id=3, iscrowd=1, bbox=[0, 0, 0, 9])]
    path = write(tmp_path, images=IMAGES, annotations=listed, categories=kinds)
    assert [one for one, _ in convert.boxes(path)] == [
        convert.Box(1, 7, "dog", (1.0, 2.5, 3.0, 4.0)), convert.Box(2, 7, "car", (0.0, 0.0, 0.0, 9.0), True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "read, content, message",
    [
        (convert.captions, {"annotations": [caption(caption="  ")]}, "line 1, item 1: field 'caption' is empty"),
        (convert.captions, {"annotations": [caption(), {"id": 1}]}, "item 2: field 'image_id' is missing; found 'id'"),
        (convert.captions, {"annotations": [caption(image_id=8)]}, "item 1: image_id 8 is none of the 2 pictures"),
        (convert.captions, {"annotations": [3]}, "item 1: an object with id was expected, found int"),
        (convert.captions, {"annotations": [caption(id=True)]}, "field 'id' must be a int or str, found True"),
        (convert.captions, {"sentences": []}, "one key 'annotations' was expected, found 'info', 'images', 'categories'"),
        (convert.captions, {"annotations": [], "images": IMAGES[:1] * 2}, "item 2: picture id 7 stands in the file twice"),
        (convert.boxes, {"annotations": [box(category_id=5)]}, "item 1: category_id 5 is none of the file's 1 categories"),
        (convert.boxes, {"annotations": [box(bbox=[1, 2, 3])]}, "bbox must be left, top, width and height in pixels"),
        (convert.boxes, {"annotations": [box(bbox=[1, 2, -3, 4])]}, "bbox must be"),
        (convert.boxes, {"annotations": [box(bbox=["1", 2, 3, 4])]}, "bbox must be"),
    ],
)
def test_what_is_wrong_is_named(read, content, message, tmp_path):
    path = write(tmp_path, **{"images": IMAGES, "categories": [{"id": 18, "name": "dog"}], **content})
    with pytest.raises(ValueError) as caught:
        convert.by_picture(path, read)
    assert str(path) in str(caught.value) and message in str(caught.value)


def asked(**changes):
    return {"question_id": 70, "image_id": 7, "question": "What is it?"} | changes


def answered(**changes):
    answers = [{"answer": "dog", "answer_id": 1, "answer_confidence": "yes"}, {"answer": "cat"}]
    return {"question_id": 70, "image_id": 7, "answers": answers, "multiple_choice_answer": "dog",
            "answer_type": "other", "question_type": "what is"} | changes


def read(tmp_path, questions, annotations):
    paths = [write(tmp_path, "q.json", questions=questions), write(tmp_path, "a.json", annotations=annotations)]
    return [one for one, _ in convert.questions(*paths)]


def test_questions_with_their_answers(tmp_path):
    others = {"question_id": 71, "answers": ["blue"]}  # neither ids nor types
    found = read(tmp_path, [asked(), asked(question_id=71, image_id="b")], [others, answered()])
    assert found == [convert.Question(70, 7, "What is it?", ("dog", "cat"), "dog", "other", "what is"),
                     convert.Question(71, "b", "What is it?", ("blue",))]
    alone = [one for one, _ in convert.questions(tmp_path / "q.json")]
    assert alone == [convert.Question(70, 7, "What is it?"), convert.Question(71, "b", "What is it?")]


@pytest.mark.parametrize(
    "questions, annotations, message",
    [
        ([asked(), asked()], [answered()], r"q.json, line 1, item 2: question_id 70 stands in the file twice"),
        ([asked()], [answered(), answered()], r"a.json, line 1, item 2: question_id 70 is annotated twice"),
        ([asked(question_id=5)], [answered()], r"q.json, line 1, item 1: question_id 5 has no annotation in .*a.json"),
        ([asked()], [answered(), answered(question_id=6)], r"a.json, line 1, item 2: question_id 6 is no question of"),
        ([asked()], [answered(image_id=8)], r"about picture 7, its annotation in .*a.json, line 1, item 1 about 8"),
        ([asked()], [answered(answers=[{"text": "x"}])], r"a.json, line 1, item 1: field 'answer' is missing"),
        ([asked()], [answered(answers="dog")], r"field 'answers' must be a list, found 'dog'"),
        ([asked(question=" ")], [answered()], r"q.json, line 1, item 1: field 'question' is empty"),
    ],
)
def test_questions_and_answers_that_do_not_fit(questions, annotations, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, questions, annotations)
