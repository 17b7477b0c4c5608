"""What people have noted about pictures, in one form whatever file it came from.

The kinds are those of the VLIT review (Sec. 4.2.1): caption, object, attribute, OCR and visual question answering; a
region is an object or a text that is marked. The files are COCO 2014's and what was added to it:

    captions_*.json, instances_*.json                      COCO
    *_questions.json, *_annotations.json                   VQA, both files
    cocotext*.json                                         COCO-Text, arXiv:1601.07140
    cocottributes*.json                                    COCO Attributes, ECCV 2016, its pickle as JSON
    caps_boxes*.jsonl                                      LLaVA's captions and boxes, a line for each picture

Which is which is found out from their keys. A record that cannot be read is a problem with file and line, and costs
nothing but itself.
"""

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nanovlm.data.convert import commonest
from nanovlm.data.json_files import elements, field, records, text_field
from nanovlm.vlit.words import load_table

VOTES = 0.5  # share of the workers above which an object has an attribute, as in the authors' demo
EITHER = re.compile(r"^[\w' -]+\bor\b[\w' -]+$", re.IGNORECASE)  # "yes or no" answers nothing
TO_JSON = load_table("patterns.json")["pickle to JSON"]  # the command


@dataclass(frozen=True)
class Annotation:
    """One note about one picture."""

    id: str  # unique, "KIND/…"
    kind: str
    value: str  # the sentence, the category, the attribute, the characters or the answer
    question: str = ""  # of kind vqa
    box: tuple[float, float, float, float] | None = None  # left, top, right, bottom as shares of the picture
    of: str = ""  # the object's id, of an attribute
    is_crowd: bool = False  # an object that stands for a group of unknown number


@dataclass
class Picture:
    """One picture and the notes about it. width, height: pixels, 0 = not stated."""

    id: str
    file_name: str = ""
    width: int = 0
    height: int = 0
    annotations: list = dataclasses.field(default_factory=list)

    def of_kind(self, kind):
        """Its annotations of a kind: list of Annotation."""
        return [one for one in self.annotations if one.kind == kind]

    def attributes(self, thing):
        """What is noted about one of its objects: list of Annotation."""
        return [one for one in self.of_kind("attribute") if one.of == thing.id]


class Collection:
    """What came out of the files, and what they refer to."""

    def __init__(self):
        self.pictures, self.problems = {}, []  # id -> Picture; one line for every record that could not be read
        self.skipped = Counter()  # what was read and left out, by reason
        self.objects = {}  # COCO's id of an instance -> (Picture, Annotation)
        self.questions = {}  # id -> (picture's id, question), until it is answered
        self.names, self.patches = {}, {}  # of the current file's categories or attributes; patch -> id of an instance

    def picture(self, id, file_name="", width=0, height=0):
        """The picture of an id, made if there is none yet; what is known about it is added up."""
        id = str(int(id)) if str(id).isdigit() else str(id)
        one = self.pictures.setdefault(id, Picture(id))
        one.file_name, one.width, one.height = one.file_name or file_name, one.width or width, one.height or height
        return one


def read(paths):
    """Everything that files, in any order, say: Collection. Raises: FileNotFoundError; ValueError for other forms."""
    kinds, found = {Path(path): kind_of(Path(path)) for path in paths}, Collection()
    for kind, (_, sections) in READERS.items():
        for path in (path for path, its in kinds.items() if its == kind):
            found.names = {}
            for key, add in sections.items():
                add_section(found, path, key, add)
    if found.questions:
        found.skipped["questions without an answer"] += len(found.questions)
    return found


def add_section(found, path, key, add):
    """Call a reader for the records of a file; what it raises becomes a problem."""
    try:
        for one in section(path, key):
            try:
                if isinstance(one.value, ValueError):
                    raise one.value
                add(found, one.value, one.key)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                words = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
                found.problems.append(f"{one.where}: {words.removeprefix(f'{one.where}: ')}")
    except ValueError as error:  # the file breaks off: what stood before is kept
        found.problems += [str(error)] * (str(error) not in found.problems)  # once for all its sections


def section(path, key):
    """The records of a file, or of one of its keys: iterator of json_files.Element."""
    return records(path) if key is None else elements(path, key)


def kind_of(path):
    """Which of READERS a file is for: str. Only its beginning is read. Raises: FileNotFoundError, ValueError."""
    if path.suffix in (".jbl", ".pkl", ".joblib"):
        raise ValueError(f"{path}: a pickle can run any program and is not opened; make JSON of it once:\n  {TO_JSON}")
    for kind, (needed, sections) in READERS.items():
        try:
            first = next(section(path, list(sections)[-1]), None)
        except ValueError:
            continue
        if first is not None and needed <= (first.value.keys() if isinstance(first.value, dict) else set()):
            return kind
    forms = "; ".join(f"{kind}: {', '.join(needed) or 'vectors'}" for kind, (needed, _) in READERS.items())
    raise ValueError(f"{path} is none of the known annotation files, whose records have {forms}")


def share_box(box, picture):
    """[left, top, width, height] in pixels as (left, top, right, bottom) in shares of a picture, cut at its edges."""
    if not picture.width or not picture.height:
        raise ValueError(f"the size of picture {picture.id} is not stated in any file, so its boxes cannot be placed")
    try:
        left, top, width, height = box
        edges = (left, top, left + width, top + height)
        sides = [edge / size for edge, size in zip(edges, (picture.width, picture.height) * 2)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"bbox must be left, top, width and height in pixels, found {box!r}") from error
    return checked_box([min(1.0, max(0.0, side)) for side in sides])


def checked_box(box):
    """left, top, right, bottom as a tuple. Raises: ValueError unless they are shares from 0 to 1, with an area."""
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"box {box!r} has no area, or its sides are no shares from 0 to 1")
    return tuple(box)


def middle(box):
    """(x, y) of a box, shares of the picture."""
    left, top, right, bottom = box
    return (left + right) / 2, (top + bottom) / 2


def id_of(one, name):
    """A field that holds an id: str."""
    return str(field(one, name, (int, str)))


# Readers: function (Collection, record, its key)


def add_image(found, one, key):
    """A picture of COCO's, with its size in pixels where the file says it."""
    sides = (field({side: 0} | one, side, int) for side in ("width", "height"))
    found.picture(id_of(one, "id"), text_field(one, "file_name"), *sides)


def add_caption(found, one, key):
    """A caption of COCO's."""
    note = Annotation(f"caption/{id_of(one, 'id')}", "caption", text_field(one, "caption"))
    found.picture(id_of(one, "image_id")).annotations.append(note)


def add_name(found, one, key):
    """A category of COCO's, or an attribute of COCO Attributes."""
    found.names[one["id"]] = text_field(one, "name")


def add_instance(found, one, key):
    """A box of COCO's with its category, as an object of the picture."""
    id, picture, category = id_of(one, "id"), found.picture(id_of(one, "image_id")), one["category_id"]
    if category not in found.names:
        raise ValueError(f"category_id {category} is none of the file's {len(found.names)} categories")
    box, is_crowd = share_box(one["bbox"], picture), bool(one.get("iscrowd", 0))
    note = Annotation(f"object/{id}", "object", found.names[category], box=box, is_crowd=is_crowd)
    picture.annotations.append(note)
    found.objects[id] = picture, note


def add_patch(found, id, key):
    """Which object a patch of COCO Attributes shows."""
    found.patches[key] = str(id)


def add_votes(found, votes, key):
    """votes: the share of workers who see each attribute, in order of their ids."""
    names = [found.names[id] for id in sorted(found.names)]
    if not isinstance(votes, list) or len(votes) != len(names):
        raise ValueError(f"{len(names)} shares of votes were expected, found {votes!r:.60}")
    if found.patches.get(key) not in found.objects:
        found.skipped["attributes of objects in none of the files"] += 1
        return
    picture, owner = found.objects[found.patches[key]]
    picture.annotations += [Annotation(f"attribute/{key}/{name}", "attribute", name, box=owner.box, of=owner.id)
                            for name, share in zip(names, votes) if share > VOTES]  # fmt: skip


def add_text(found, one, key):
    """A legible text of COCO-Text with its box; others are counted as skipped."""
    characters = one.get("utf8_string", "").strip()
    if one.get("legibility", "legible") != "legible" or not characters:
        found.skipped["illegible texts"] += 1
        return
    picture = found.picture(id_of(one, "image_id"))
    note = Annotation(f"ocr/{one.get('id', key)}", "ocr", characters, box=share_box(one["bbox"], picture))
    picture.annotations.append(note)


def add_question(found, one, key):
    """A question of VQA, which waits for its answer."""
    found.questions[id_of(one, "question_id")] = id_of(one, "image_id"), text_field(one, "question")


def add_answer(found, one, key):
    """The answer agreed on, or the commonest of the annotators'."""
    id = id_of(one, "question_id")
    answers = [answer if isinstance(answer, str) else answer["answer"] for answer in one.get("answers", ())]
    answer = (one.get("multiple_choice_answer") or commonest(answers)).strip()
    if id not in found.questions:
        raise ValueError(f"question_id {id} is a question in none of the files")
    image, question = found.questions.pop(id)
    if EITHER.match(answer) or not answer:
        found.skipped["answers that leave it open"] += 1
    else:
        found.picture(image).annotations.append(Annotation(f"vqa/{id}", "vqa", answer, question))


def add_described(found, one, key):
    """{id, image, captions, instances: [{category, bbox in shares}]}."""
    id = one["id"]
    notes = [Annotation(f"caption/{id}/{n}", "caption", text_field({"caption": words}, "caption"))
             for n, words in enumerate(one["captions"])]  # fmt: skip
    notes += [Annotation(f"object/{id}/{n}", "object", text_field(box, "category"), box=checked_box(box["bbox"]))
              for n, box in enumerate(one["instances"])]  # fmt: skip
    found.picture(id, text_field(one, "image")).annotations += notes


READERS = {  # form -> (what the first of its records has, {key of a section: reader}, the records last), in this order
    "captions": ({"image_id", "caption"}, {"images": add_image, "annotations": add_caption}),
    "instances": ({"image_id", "category_id"},
                  {"images": add_image, "categories": add_name, "annotations": add_instance}),
    "attributes": (set(), {"attributes": add_name, "patch_id_to_ann_id": add_patch, "ann_vecs": add_votes}),
    "COCO-Text": ({"image_id", "bbox"}, {"imgs": add_image, "anns": add_text}),
    "questions": ({"question_id", "question"}, {"questions": add_question}),
    "answers": ({"question_id"}, {"annotations": add_answer}),
    "captions and boxes": ({"captions", "instances"}, {None: add_described}),
}
