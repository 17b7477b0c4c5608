"""COCO's annotation files and VQA's: captions, boxes with their categories, questions with ten answers each.

Formats: COCO, cocodataset.org/#format-data (captions_*.json, instances_*.json); VQA v2, visualqa.org/download (two files,
questions and annotations), in which TextVQA, VizWiz and OK-VQA are shared too. Read record by record, see json_files.py;
polygons are dropped on the way.
"""

from dataclasses import dataclass

from nanovlm.data.json_files import elements


@dataclass(frozen=True)
class Picture:
    """One picture of a COCO file. width, height: pixels; None where the file does not say."""

    id: int
    file_name: str
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class Caption:
    """One sentence about a picture."""

    id: int
    image_id: int
    text: str


@dataclass(frozen=True)
class Box:
    """One object. box: left, top, width, height in pixels. is_crowd: it stands for a group of objects."""

    id: int
    image_id: int
    category: str
    box: tuple[float, float, float, float]
    is_crowd: bool = False


@dataclass(frozen=True)
class Question:
    """One question about a picture.

    answers: what each annotator said; empty in a test split. answer: the one agreed on, or None.
    """

    id: int | str
    image_id: int | str
    text: str
    answers: tuple[str, ...] = ()
    answer: str | None = None
    answer_type: str = ""
    question_type: str = ""


def field(record, name, kinds, where):
    """A field of a record.

    Args:
      record: dict. name: of the field. kinds: type or types that it may have. where: "FILE, line N", for messages.
    Raises: ValueError if it is missing or of another type.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: an object with {name} was expected, found {type(record).__name__}")
    if name not in record:
        raise ValueError(f"{where}: field {name!r} is missing; found {', '.join(map(repr, record)) or 'nothing'}")
    value = record[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{where}: field {name!r} must be a {expected}, found {value!r}")
    return value


def text_field(record, name, where):
    """As `field`: words, without the blanks and line breaks around them. Raises: ValueError if there are none."""
    text = field(record, name, str, where).strip()
    if not text:
        raise ValueError(f"{where}: field {name!r} is empty")
    return text


def pictures(path):
    """The pictures of a COCO file: dict id -> Picture. Raises: ValueError naming file and line."""
    found = {}
    for element in elements(path, "images"):
        one, where = element.value, element.where
        id = field(one, "id", (int, str), where)
        if id in found:
            raise ValueError(f"{where}: picture id {id!r} stands in the file twice")
        sizes = (field(one, side, int, where) if side in one else None for side in ("width", "height"))
        found[id] = Picture(id, text_field(one, "file_name", where), *sizes)
    return found


def captions(path):
    """The sentences of a captions file, one by one.

    Yields: (Caption, where it stands). Raises: ValueError naming file and line.
    """
    for element in elements(path, "annotations"):
        one, where = element.value, element.where
        yield Caption(*(field(one, name, (int, str), where) for name in ("id", "image_id")),
                      text_field(one, "caption", where)), where


def categories(path):
    """The categories of an instances file: dict id -> name. Raises: ValueError naming file and line."""
    return {field(element.value, "id", int, element.where): text_field(element.value, "name", element.where)
            for element in elements(path, "categories")}


def boxes(path):
    """The objects of an instances file, one by one.

    Yields: (Box, where it stands). Raises: ValueError naming file and line.
    """
    names = categories(path)
    for element in elements(path, "annotations"):
        one, where = element.value, element.where
        category = field(one, "category_id", int, where)
        if category not in names:
            raise ValueError(f"{where}: category_id {category} is none of the file's {len(names)} categories")
        box = field(one, "bbox", list, where)
        if len(box) != 4 or not all(isinstance(side, (int, float)) for side in box) or min(box[2:]) < 0:
            raise ValueError(f"{where}: bbox must be left, top, width and height in pixels, found {box!r}")
        ids = (field(one, name, (int, str), where) for name in ("id", "image_id"))
        yield Box(*ids, names[category], tuple(map(float, box)), bool(one.get("iscrowd", 0))), where


def by_picture(path, read):
    """Everything that a COCO file says, by picture.

    Args:
      path: the file. read: `captions` or `boxes`.
    Returns: dict Picture -> list of Caption or Box; a picture without any has an empty list.
    Raises: ValueError naming file and line, also for an annotation of a picture that the file does not list.
    """
    known = pictures(path)
    found = {id: [] for id in known}
    for one, where in read(path):
        if one.image_id not in found:
            raise ValueError(f"{where}: image_id {one.image_id!r} is none of the {len(known)} pictures in the file")
        found[one.image_id].append(one)
    return {known[id]: said for id, said in found.items()}


def questions(path, annotations=None):
    """The questions of a VQA file, with the answers of another.

    Args:
      path: the file with `questions`. annotations: the file with `annotations`; None = none (a test split).
    Yields: (Question, where it stands).
    Raises: ValueError naming file and line; also where a question has no annotation, or an annotation no question.
    """
    answered = {} if annotations is None else _answers(annotations)
    known = set()
    for element in elements(path, "questions"):
        one, where = element.value, element.where
        id, image_id = (field(one, name, (int, str), where) for name in ("question_id", "image_id"))
        if id in known:
            raise ValueError(f"{where}: question_id {id!r} stands in the file twice")
        known.add(id)
        if annotations is not None and id not in answered:
            raise ValueError(f"{where}: question_id {id!r} has no annotation in {annotations}")
        truth, truth_where = answered.get(id, ({}, where))
        if truth.get("image_id", image_id) != image_id:
            raise ValueError(f"{where}: the question is about picture {image_id!r}, its annotation in {truth_where} about "
                             f"{truth['image_id']!r}")
        yield Question(id, image_id, text_field(one, "question", where), truth.get("answers", ()), truth.get("answer"),
                       truth.get("answer_type", ""), truth.get("question_type", "")), where
    left = answered.keys() - known
    if left:
        raise ValueError(f"{answered[min(left, key=str)][1]}: question_id {min(left, key=str)!r} is no question of {path}"
                         f" ({len(left)} such in all)")


def _answers(path):
    """question_id -> (fields of its Question, where)."""
    found = {}
    for element in elements(path, "annotations"):
        one, where = element.value, element.where
        id = field(one, "question_id", (int, str), where)
        if id in found:
            raise ValueError(f"{where}: question_id {id!r} is annotated twice")
        given = field(one, "answers", list, where)
        said = tuple(answer if isinstance(answer, str) else field(answer, "answer", str, where) for answer in given)
        kept = {"answers": said}
        if "multiple_choice_answer" in one:
            kept["answer"] = text_field(one, "multiple_choice_answer", where)
        kept |= {name: field(one, name, str, where) for name in ("answer_type", "question_type") if name in one}
        kept |= {"image_id": one["image_id"]} if "image_id" in one else {}
        found[id] = kept, where
    return found
