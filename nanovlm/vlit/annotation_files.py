"""The files of the review's sources, read into annotations (Sec. 4.2.1: COCO 2014 with what was added to it).

    captions_*.json, instances_*.json                      COCO
    *_questions.json, *_annotations.json                   VQA, both files
    cocotext*.json                                         COCO-Text, arXiv:1601.07140
    cocottributes*.json                                    COCO Attributes, ECCV 2016 (see attribute_file)
    caps_boxes*.jsonl                                      LLaVA's captions and boxes, a line for each picture
Which is which is found out from their keys. A record that cannot be read is a problem with file and line, and costs
nothing but itself.
"""

import re
from collections import Counter
from pathlib import Path

from nanovlm.data import convert
from nanovlm.data.json_files import elements, records
from nanovlm.vlit.annotations import Annotation, Collection, checked_box, share_box

VOTES = 0.5  # share of the workers above which an object has an attribute, as in the authors' demo
EITHER = re.compile(r"^[\w' -]+\bor\b[\w' -]+$", re.IGNORECASE)  # "yes or no" answers nothing


def read(paths):
    """Everything that some annotation files say: Collection.

    Args:
      paths: of files; in any order.
    Raises: FileNotFoundError; ValueError for a file of none of the known forms.
    """
    kinds = {Path(path): kind_of(Path(path)) for path in paths}
    found = Collection()
    for kind, (_, _, reader) in READERS.items():
        for path in (path for path, its in kinds.items() if its == kind):
            reader(found, path)
    if found.questions:
        found.skipped["questions without an answer"] += len(found.questions)
    return found


def kind_of(path):
    """Which of READERS a file is for: str. Only its beginning is read. Raises: FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    if path.suffix in (".jbl", ".pkl", ".joblib"):
        raise ValueError(f"{path}: a pickle can run any program and is not opened; make JSON of it once:\n  {TO_JSON}")
    for key in ("annotations", "questions", "anns", "ann_vecs", None):
        try:
            first = next(iter(records(path) if key is None else elements(path, key)), None)
        except ValueError:
            continue
        told = first.value.keys() if first is not None and isinstance(first.value, dict) else ()
        for kind, (its_key, needed, _) in READERS.items():
            if its_key == key and needed <= set(told):
                return kind
    forms = "; ".join(f"{kind}: {(key + ' with ') if key else ''}{', '.join(needed) or 'vectors'}"
                      for kind, (key, needed, _) in READERS.items())  # fmt: skip
    raise ValueError(f"{path} is none of the known annotation files ({forms})")


def image_file(found, path):
    """The pictures that a COCO file lists."""

    def add(element, where):
        one = element.value
        size = (convert.field(one, side, int, where) if side in one else 0 for side in ("width", "height"))
        found.picture(convert.field(one, "id", (int, str), where), convert.text_field(one, "file_name", where), *size)

    found.each(path, "images", add)


def caption_file(found, path):
    """captions_*.json."""
    image_file(found, path)

    def add(element, where):
        one = element.value
        id, image = (convert.field(one, name, (int, str), where) for name in ("id", "image_id"))
        words = convert.text_field(one, "caption", where)
        found.picture(image).annotations.append(Annotation(f"caption/{id}", "caption", words))

    found.each(path, "annotations", add)


def instance_file(found, path):
    """instances_*.json."""
    image_file(found, path)
    names = convert.categories(path)

    def add(element, where):
        one = element.value
        id, image = (convert.field(one, name, (int, str), where) for name in ("id", "image_id"))
        category, picture = convert.field(one, "category_id", int, where), found.picture(image)
        if category not in names:
            raise ValueError(f"category_id {category} is none of the file's {len(names)} categories")
        box = share_box(convert.field(one, "bbox", list, where), picture)
        note = Annotation(f"object/{id}", "object", names[category], box=box, is_crowd=bool(one.get("iscrowd", 0)))
        picture.annotations.append(note)
        found.objects[str(id)] = picture, note

    found.each(path, "annotations", add)


def attribute_file(found, path):
    """cocottributes*.json: COCO Attributes, its pickled dictionary as JSON.

    attributes: list of {id, name}. ann_vecs: {patch: one share of workers for each attribute, in order of their ids}.
    patch_id_to_ann_id: {patch: id in instances_*.json}.
    """
    named, patches = {}, {}
    found.each(path, "attributes", lambda element, where: named.update({element.value["id"]: element.value["name"]}))
    found.each(path, "patch_id_to_ann_id", lambda element, where: patches.update({element.key: str(element.value)}))
    names = [named[id] for id in sorted(named)]

    def add(element, where):
        votes, object_id = element.value, patches.get(element.key)
        if not isinstance(votes, list) or len(votes) != len(names):
            raise ValueError(f"{len(names)} shares of votes were expected, found {votes!r:.60}")
        if object_id not in found.objects:
            found.skipped["attributes of objects in none of the files"] += 1
            return
        picture, owner = found.objects[object_id]
        for name, share in zip(names, votes):
            if share > VOTES:
                id = f"attribute/{element.key}/{name}"
                picture.annotations.append(Annotation(id, "attribute", name, box=owner.box, of=owner.id))

    found.each(path, "ann_vecs", add)


def text_file(found, path):
    """cocotext*.json: COCO-Text; what is not legible is skipped."""

    def add_image(element, where):
        one = element.value
        found.picture(one.get("id", element.key), one.get("file_name", ""), one.get("width", 0), one.get("height", 0))

    def add(element, where):
        one = element.value
        if one.get("legibility", "legible") != "legible" or not one.get("utf8_string", "").strip():
            found.skipped["illegible texts"] += 1
            return
        picture = found.picture(convert.field(one, "image_id", (int, str), where))
        box = share_box(convert.field(one, "bbox", list, where), picture)
        characters = one["utf8_string"].strip()
        picture.annotations.append(Annotation(f"ocr/{one.get('id', element.key)}", "ocr", characters, box=box))

    found.each(path, "imgs", add_image)
    found.each(path, "anns", add)


def question_file(found, path):
    """VQA's questions, and those of TextVQA, VizWiz and OK-VQA in the same form."""

    def add(element, where):
        one = element.value
        id, image = (convert.field(one, name, (int, str), where) for name in ("question_id", "image_id"))
        found.questions[str(id)] = image, convert.text_field(one, "question", where)

    found.each(path, "questions", add)


def answer_file(found, path):
    """VQA's answers: the one agreed on, or the commonest of the annotators'."""

    def add(element, where):
        one = element.value
        id = str(convert.field(one, "question_id", (int, str), where))
        answers = [answer if isinstance(answer, str) else answer["answer"] for answer in one.get("answers", ())]
        answer = one.get("multiple_choice_answer") or (Counter(answers).most_common(1)[0][0] if answers else "")
        if id not in found.questions:
            raise ValueError(f"question_id {id} is a question in none of the files")
        image, question = found.questions.pop(id)
        if EITHER.match(answer) or not answer.strip():
            found.skipped["answers that leave it open"] += 1
            return
        found.picture(image).annotations.append(Annotation(f"vqa/{id}", "vqa", answer.strip(), question))

    found.each(path, "annotations", add)


def described_file(found, path):
    """LLaVA's lines {id, image, captions, instances: [{category, bbox in shares}]}."""

    def add(element, where):
        one = element.value
        notes = [Annotation(f"caption/{one['id']}/{n}", "caption", convert.text_field({"caption": words}, "caption", where)) for n, words in enumerate(one["captions"])]  # fmt: skip
        notes += [Annotation(f"object/{one['id']}/{n}", "object", convert.text_field(thing, "category", where),
                             box=checked_box(thing["bbox"])) for n, thing in enumerate(one["instances"])]  # fmt: skip
        found.picture(one["id"], convert.text_field(one, "image", where)).annotations.extend(notes)

    found.each(path, None, add)


READERS = {  # form -> (key that holds its records, what the first of them has, reader), in the order of reading
    "captions": ("annotations", {"image_id", "caption"}, caption_file),
    "instances": ("annotations", {"image_id", "category_id"}, instance_file),
    "attributes": ("ann_vecs", set(), attribute_file),
    "COCO-Text": ("anns", {"image_id", "bbox"}, text_file),
    "questions": ("questions", {"question_id", "question"}, question_file),
    "answers": ("annotations", {"question_id"}, answer_file),
    "captions and boxes": (None, {"captions", "instances"}, described_file),
}
TO_JSON = (
    """python -c "import joblib, json; d = joblib.load('FILE.jbl'); json.dump({'attributes': d['attributes'], """
    """'patch_id_to_ann_id': {int(k): int(v) for k, v in d['patch_id_to_ann_id'].items()}, """
    """'ann_vecs': {int(k): list(map(float, v)) for k, v in d['ann_vecs'].items()}}, open('cocottributes.json', 'w'))\""""
)
