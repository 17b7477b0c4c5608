"""What people have noted about pictures, read from the files of the review's sources into one form.

The review (Sec. 4.2.1) takes COCO 2014 with {caption, object, attribute, OCR, visual question answering}:
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
from dataclasses import dataclass, field
from pathlib import Path

from nanovlm.data import coco
from nanovlm.data.json_files import elements, records

KINDS = ("caption", "object", "attribute", "ocr", "vqa", "region")
VOTES = 0.5  # share of the workers above which an object has an attribute, as in the authors' demo
EITHER = re.compile(r"^[\w' -]+\bor\b[\w' -]+$", re.IGNORECASE)  # "yes or no" answers nothing


@dataclass(frozen=True)
class Annotation:
    """One note about one picture.

    id: unique, "KIND/…". value: the sentence, the category, the attribute, the characters or the answer.
    question: of kind vqa. box: left, top, right, bottom as shares of the picture, or None.
    of: the object's id, of an attribute. is_crowd: an object that stands for a group of unknown number.
    source: file name.
    """

    id: str
    kind: str
    value: str
    question: str = ""
    box: tuple[float, float, float, float] | None = None
    of: str = ""
    is_crowd: bool = False
    source: str = ""


@dataclass
class Picture:
    """One picture and the notes about it. width, height: pixels, 0 = not stated."""

    id: str
    file_name: str = ""
    width: int = 0
    height: int = 0
    annotations: list = field(default_factory=list)

    def of_kind(self, kind):
        """Its annotations of a kind: list of Annotation."""
        return [one for one in self.annotations if one.kind == kind]


@dataclass
class Collection:
    """What came out of the files.

    pictures: dict id -> Picture. problems: one line for every record that could not be read. skipped: Counter of what
    was read and left out, by reason.
    """

    pictures: dict = field(default_factory=dict)
    problems: list = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)
    objects: dict = field(default_factory=dict)  # COCO's id of an instance -> (Picture, Annotation)
    questions: dict = field(default_factory=dict)  # question id -> (picture id, question), until it is answered

    def picture(self, id, file_name="", width=0, height=0):
        """The picture of an id, made if there is none yet; what is known about it is added up."""
        id = str(int(id)) if str(id).isdigit() else str(id)
        one = self.pictures.setdefault(id, Picture(id))
        one.file_name, one.width, one.height = one.file_name or file_name, one.width or width, one.height or height
        return one

    def each(self, path, key, add):
        """Call `add(record, where)` for the records of a file; what it raises becomes a problem."""
        try:
            for element in records(path) if key is None else elements(path, key):
                try:
                    if isinstance(element.value, ValueError):
                        raise element.value
                    add(element, element.where)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    words = str(error)
                    self.problems.append(words if words.startswith(str(path)) else f"{element.where}: {words}")
        except ValueError as error:  # the file ends in the middle of a record: what stood before it is kept
            self.problems.append(str(error))


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


def share_box(box, picture):
    """A box as shares of a picture, cut off at its edges.

    Args:
      box: [left, top, width, height] in pixels. picture: Picture.
    Returns: (left, top, right, bottom). Raises: ValueError.
    """
    if len(box) != 4 or not all(isinstance(side, (int, float)) for side in box):
        raise ValueError(f"bbox must be left, top, width and height in pixels, found {box!r}")
    if not picture.width or not picture.height:
        raise ValueError(f"the size of picture {picture.id} is not stated in any file, so its boxes cannot be placed")
    left, top, width, height = box
    sides = left / picture.width, top / picture.height, (left + width) / picture.width, (top + height) / picture.height
    return checked_box([min(1.0, max(0.0, side)) for side in sides])


def checked_box(box):
    """(left, top, right, bottom) in shares, if they are some. Raises: ValueError."""
    if len(box) != 4 or not all(isinstance(side, (int, float)) and 0 <= side <= 1 for side in box):
        raise ValueError(f"a box must be left, top, right and bottom as shares from 0 to 1, found {box!r}")
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"box {box!r} has no area")
    return tuple(box)


def image_file(found, path):
    """The pictures that a COCO file lists."""

    def add(element, where):
        one = element.value
        size = (coco.field(one, side, int, where) if side in one else 0 for side in ("width", "height"))
        found.picture(coco.field(one, "id", (int, str), where), coco.text_field(one, "file_name", where), *size)

    found.each(path, "images", add)


def caption_file(found, path):
    """captions_*.json."""
    image_file(found, path)

    def add(element, where):
        one = element.value
        id, image = (coco.field(one, name, (int, str), where) for name in ("id", "image_id"))
        words = coco.text_field(one, "caption", where)
        found.picture(image).annotations.append(Annotation(f"caption/{id}", "caption", words, source=path.name))

    found.each(path, "annotations", add)


def instance_file(found, path):
    """instances_*.json."""
    image_file(found, path)
    names = coco.categories(path)

    def add(element, where):
        one = element.value
        id, image = (coco.field(one, name, (int, str), where) for name in ("id", "image_id"))
        category, picture = coco.field(one, "category_id", int, where), found.picture(image)
        if category not in names:
            raise ValueError(f"category_id {category} is none of the file's {len(names)} categories")
        box = share_box(coco.field(one, "bbox", list, where), picture)
        note = Annotation(f"object/{id}", "object", names[category], box=box, is_crowd=bool(one.get("iscrowd", 0)), source=path.name)
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
                picture.annotations.append(Annotation(id, "attribute", name, box=owner.box, of=owner.id, source=path.name))

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
        picture = found.picture(coco.field(one, "image_id", (int, str), where))
        box = share_box(coco.field(one, "bbox", list, where), picture)
        characters = one["utf8_string"].strip()
        picture.annotations.append(Annotation(f"ocr/{one.get('id', element.key)}", "ocr", characters, box=box, source=path.name))

    found.each(path, "imgs", add_image)
    found.each(path, "anns", add)


def question_file(found, path):
    """VQA's questions, and those of TextVQA, VizWiz and OK-VQA in the same form."""

    def add(element, where):
        one = element.value
        id, image = (coco.field(one, name, (int, str), where) for name in ("question_id", "image_id"))
        found.questions[str(id)] = image, coco.text_field(one, "question", where)

    found.each(path, "questions", add)


def answer_file(found, path):
    """VQA's answers: the one agreed on, or the commonest of the annotators'."""

    def add(element, where):
        one = element.value
        id = str(coco.field(one, "question_id", (int, str), where))
        answers = [answer if isinstance(answer, str) else answer["answer"] for answer in one.get("answers", ())]
        answer = one.get("multiple_choice_answer") or (Counter(answers).most_common(1)[0][0] if answers else "")
        if id not in found.questions:
            raise ValueError(f"question_id {id} is a question in none of the files")
        image, question = found.questions.pop(id)
        if EITHER.match(answer) or not answer.strip():
            found.skipped["answers that leave it open"] += 1
            return
        found.picture(image).annotations.append(Annotation(f"vqa/{id}", "vqa", answer.strip(), question, source=path.name))

    found.each(path, "annotations", add)


def described_file(found, path):
    """LLaVA's lines {id, image, captions, instances: [{category, bbox in shares}]}."""

    def add(element, where):
        one = element.value
        notes = [Annotation(f"caption/{one['id']}/{n}", "caption", coco.text_field({"caption": words}, "caption", where),
                            source=path.name) for n, words in enumerate(one["captions"])]  # fmt: skip
        notes += [Annotation(f"object/{one['id']}/{n}", "object", coco.text_field(thing, "category", where),
                             box=checked_box(thing["bbox"]), source=path.name) for n, thing in enumerate(one["instances"])]  # fmt: skip
        found.picture(one["id"], coco.text_field(one, "image", where)).annotations.extend(notes)

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
