"""Bring a data set into the two forms that training reads: LLaVA's JSON lines with a folder of images, or tar shards.

    OUT.jsonl             items, one a line                           or with --shards the folder OUT of .tar files
    OUT_images/           pictures that stood in base64 in the source, each once
    OUT.report.jsonl      {"where": "FILE, line N", "skipped" or "changed": why}, a line for each

The source is read record by record. What is written goes under a temporary name and is renamed when it is complete, so
that a conversion that was killed leaves nothing that looks finished. Every item is read as training would read it before
it is written; one that training would refuse is skipped and reported.
"""

import functools
import hashlib
import io
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from nanovlm.data import images
from nanovlm.data.json_files import elements, read_at, records
from nanovlm.data.llava_json import clip_for, record_of
from nanovlm.data.tar_shards import ShardWriter
from nanovlm.data.video import PICTURES
from nanovlm.names import nearest


# COCO's annotation files and VQA's: captions, boxes with their categories, questions with ten answers each.
#
# Formats: COCO, cocodataset.org/#format-data (captions_*.json, instances_*.json); VQA v2, visualqa.org/download (two files,
# questions and annotations), in which TextVQA, VizWiz and OK-VQA are shared too. Read record by record, see json_files.py;
# polygons are dropped on the way.


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


# Instruction data of others as LLaVA's items: ShareGPT, MIMIC-IT, M3IT, MiniGPT-4. More in picture_formats.py.
#
# Each format is a function that reads its files and yields, record by record, where it stands and a function that makes
# its items, so that a record that breaks breaks nothing but itself. Captions and labels are replies to a question without
# words ("<image>" alone): what is asked is a matter of the mixture, which draws a prompt for each record (datasets.py).
#
# Schemas: ShareGPT as in lm-sys/FastChat; MIMIC-IT, arXiv:2306.05425, its repository's docs; M3IT, arXiv:2306.04387, its
# data card; MiniGPT-4, Vision-CAIR/MiniGPT-4, dataset/README_2_STAGE.md.


SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "chatgpt": "gpt", "bing": "gpt",
            "bard": "gpt", "system": "system"}  # fmt: skip
FILMS = ("DC_", "TVC_", "E4D_")  # of MIMIC-IT: the sets whose pictures are frames of one video
ALIGNMENT = ("###Human:", "###Assistant:", "<Img><ImageHere></Img>")  # of MiniGPT-4's files of instructions
DETAILED = "Describe the image in detail."  # what Lynx asks about MiniGPT-4's pictures (its Table 13)


@dataclass(frozen=True)
class Job:
    """What a conversion is told.

    source: the file or folder. images: where pictures lie, or of MIMIC-IT the file that holds them; or None.
    annotations: the second file of VQA; or None. question: str put to every picture that has none, "" = no words.
    prompts: file with one instruction a line; or None. names: file that names the folders' classes; or None.
    image_name: how a picture's file is called, with {id}. in_context: how many of MIMIC-IT's examples come first.
    store: function(text in base64) -> name of the picture's file. note: function(where, what was changed).
    """

    source: Path
    images: Path | None = None
    annotations: Path | None = None
    question: str = ""
    prompts: Path | None = None
    names: Path | None = None
    image_name: str = ""
    in_context: int = 0
    store: Callable | None = None
    note: Callable | None = None


def exchange(question, answer):
    """A question and its reply, as LLaVA writes turns."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def shown(words, count=1):
    """Placeholders of `count` pictures in front of a question's words."""
    return "\n".join(["<image>"] * count + ([words] if words else []))


def pictured(id, image, question, answer):
    """One item about one picture."""
    return [{"id": id, "image": image, "conversations": exchange(shown(question), answer)}]


def each(found, make, job):
    """(where, function that makes the items) of json_files.Elements; one that could not be read raises its error."""
    def run(element):
        if isinstance(element.value, ValueError):
            raise element.value
        return make(element, job)

    for element in found:
        yield element.where, functools.partial(run, element)


def dialogues(job):
    """LLaVA's and ShareGPT's: a list of {id, image?, conversations}."""
    return each(records(job.source), dialogue, job)


def dialogue(element, job):
    """One dialogue with its turns in order. What stands at its start or end without an answer is left out, and noted."""
    item, where = element.value, element.where
    said = field(item, "conversations", list, where)
    turns, system, cut = [], [], ""
    for place, turn in enumerate(said, start=1):
        speaker, value = (field(turn, name, str, f"{where}, turn {place}") for name in ("from", "value"))
        if speaker not in SPEAKERS:
            raise ValueError(f"{where}, turn {place}: unknown speaker {speaker!r}; known: {', '.join(SPEAKERS)}")
        role = SPEAKERS[speaker]
        if role == "system" and not turns:
            system.append(value.strip())
        elif not turns and role == "gpt":
            job.note(where, "begins with the assistant: its first turn is left out")
        elif not value.strip() or role == "system" or (turns and turns[-1]["from"] == role):
            cut = f"cut before turn {place}, " + ("which is empty" if not value.strip() else f"a second one by the {role}")
            break
        else:
            turns.append({"from": role, "value": value})
    if turns and turns[-1]["from"] == "human":
        turns.pop()
        cut = cut or "ends with a question: it is left out"
    if not turns:
        raise ValueError(f"{where}: no question with an answer in its {len(said)} turns")
    if cut:
        job.note(where, cut)
    if any(system):
        job.note(where, "the system's words now stand in front of the first question")
        turns[0]["value"] = "\n\n".join([*filter(None, system), turns[0]["value"]])
    id = item["id"] if isinstance(item.get("id"), (str, int)) else element.where
    return [item | {"id": id, "conversations": turns}]


def mimic_it(job):
    """MIMIC-IT: {data: {id: {instruction, answer, image_ids, rel_ins_ids}}}, pictures in a file id -> base64.

    Related records about the same pictures are rounds of one dialogue, which is written once. Others are examples for
    learning in context: `job.in_context` of them come first.
    """
    if job.images is None:
        raise ValueError(f"{job.source}: MIMIC-IT's pictures stand in a second file; name it with --images")
    if job.images.suffix == ".parquet":
        raise ValueError(f"{job.images}: of MIMIC-IT's pictures the .json is read, not the .parquet; write it as id -> base64")
    pictures, places = {}, {}
    for element in elements(job.images):
        try:
            pictures[element.key] = job.store(field({"picture": element.value}, "picture", str, element.where))
        except ValueError as error:
            job.note(element.where, f"picture {element.key!r} cannot be used: {error}")
    for element in elements(job.source, "data"):
        places[element.key] = element.start, element.stop, element.where
    told = set()

    def get(id, where):
        if id not in places:
            raise ValueError(f"{where}: related record {id!r} is not in the file")
        start, stop, place = places[id]
        return read_at(job.source, start, stop, place), place

    for id, (_, _, where) in places.items():
        yield where, functools.partial(mimic_dialogue, id, get, pictures, told, job)


def mimic_dialogue(id, get, pictures, told, job):
    """One dialogue of MIMIC-IT, or none if it was told with a related record before."""
    one, where = get(id, id)
    if id in told:
        return []
    related = [other for other in one.get("rel_ins_ids") or [] if other != id]
    others = {other: get(other, where)[0] for other in related}
    same = [other for other in related if others[other].get("image_ids") == one.get("image_ids")]
    examples = [other for other in related if other not in same]
    if len(examples) > job.in_context:
        job.note(where, "related records about other pictures are left out (--in-context N puts N of them in front)")
    images, turns, films = [], [], []
    for member in [*examples[: job.in_context], id, *same]:
        value, place = get(member, where)
        again = member in same
        ids = field(value, "image_ids", list, place)
        missing = [name for name in ids if name not in pictures]
        if missing:
            raise ValueError(f"{place}: picture {missing[0]!r} is not in {job.images}")
        names = [] if again else [pictures[name] for name in ids]
        film = bool(names) and member.startswith(FILMS)
        films += [names] if film else []
        images += [] if film else names
        head = "<video>\n" if film else ""
        question = head + shown(text_field(value, "instruction", place), 0 if film else len(names))
        turns += exchange(question, text_field(value, "answer", place))
    told.update([id, *same])
    item = {"id": id} | ({"image": images} if images else {}) | ({"video": films} if films else {})
    return [item | {"conversations": turns}]


def m3it(job):
    """M3IT: lines of {instruction, inputs, outputs, image_base64_str}; older files say input, output, img_str."""
    return each(records(job.source), m3it_item, job)


def first_of(record, names, where):
    """The first of several names that a record has, for `field`. Raises: ValueError if it has none of them."""
    found = [name for name in names if isinstance(record, dict) and name in record]
    return found[0] if found else (field(record, names[0], object, where), names[0])[1]


def m3it_item(element, job):
    """One record of M3IT."""
    one, where = element.value, element.where
    given = field(one, first_of(one, ("inputs", "input"), where), str, where).strip()
    words = [text_field(one, "instruction", where), given]
    answer = text_field(one, first_of(one, ("outputs", "output"), where), where)
    encoded = field(one, first_of(one, ("image_base64_str", "image", "img_str"), where), (str, list), where)
    encoded = [encoded] if isinstance(encoded, str) else encoded
    images = [job.store(field({"picture": text}, "picture", str, where)) for text in encoded]
    question = shown("\n".join(filter(None, words)), len(images))
    item = {"id": one.get("id", element.where), "conversations": exchange(question, answer)}
    return [item | ({"image": images} if images else {})]


def minigpt4(job):
    """MiniGPT-4's second stage: {annotations: [{image_id, caption}]}, pictures image/{id}.jpg."""
    prompts = [DETAILED] if job.prompts is None else instructions(job.prompts)
    name = job.image_name or "image/{id}.jpg"

    def make(element, job):
        id = field(element.value, "image_id", (str, int), element.where)
        question = job.question or random.Random(str(id)).choice(prompts)  # a function of the record alone
        return pictured(id, name.format(id=id), question, text_field(element.value, "caption", element.where))

    return each(elements(job.source, "annotations"), make, job)


def instructions(path):
    """The lines of a file of instructions without the marks of MiniGPT-4's dialogue. Raises: ValueError if it has none."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    for mark in ALIGNMENT:
        lines = [line.replace(mark, " ") for line in lines]
    lines = [" ".join(line.split()) for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no instruction; one a line is expected")
    return lines


# Annotated pictures as LLaVA's items: COCO's captions and boxes, VQA's questions, lines of questions, folders.
#
# Each format is a function as in formats.py.


def asked(question):
    """A question with its question mark, which some data sets leave out."""
    question = question.rstrip()
    return question if question.endswith("?") else f"{question.rstrip(' .!:;,')}?"


def coco_captions(job):
    """COCO's captions_*.json: an item per sentence."""
    known = pictures(job.source)

    def make(one, where):
        return pictured(f"{one.image_id}-{one.id}", picture_of(one, known, where).file_name, job.question, one.text)

    for one, where in captions(job.source):
        yield where, functools.partial(make, one, where)


def picture_of(one, known, where):
    """The coco.Picture of an annotation. Raises: ValueError if the file does not list it."""
    if one.image_id not in known:
        raise ValueError(f"{where}: image_id {one.image_id!r} is none of the {len(known)} pictures in the file")
    return known[one.image_id]


def coco_boxes(job):
    """COCO's instances_*.json: what stands in a box? The box is text: left, top, right, bottom as shares of the sides."""
    known = pictures(job.source)

    def make(one, where):
        picture = picture_of(one, known, where)
        if one.is_crowd:
            raise ValueError(f"{where}: a crowd, whose box holds more than one {one.category}")
        if not picture.width or not picture.height:
            raise ValueError(f"{where}: the file does not say how large picture {picture.id!r} is")
        question = (job.question or "What is in the region {box}?").replace("{box}", box_text(one.box, picture))
        return pictured(f"{one.image_id}-{one.id}", picture.file_name, question, one.category)

    for one, where in boxes(job.source):
        yield where, functools.partial(make, one, where)


def box_text(box, picture):
    """Left, top, width, height in pixels -> "[0.370, 0.584, 0.504, 0.709]": left, top, right, bottom, as LLaVA has it."""
    left, top, width, height = box
    shares = (left / picture.width, top / picture.height, (left + width) / picture.width, (top + height) / picture.height)
    return f"[{', '.join(f'{min(max(share, 0), 1):.3f}' for share in shares)}]"


def vqa(job):
    """VQA's two files: the answer that most annotators gave; of equally many the one given first."""
    if job.annotations is None:
        raise ValueError(f"{job.source}: VQA's answers stand in a second file; name it with --annotations")

    def make(one, where):
        given = [answer.strip() for answer in one.answers if answer.strip()]
        answer = one.answer or (Counter(given).most_common(1)[0][0] if given else None)
        if answer is None:
            raise ValueError(f"{where}: no answer")
        return pictured(one.id, picture_name(one.image_id, job), asked(one.text), answer)

    for one, where in questions(job.source, job.annotations):
        yield where, functools.partial(make, one, where)


def picture_name(id, job):
    """The file of a picture that is named by number or without ending."""
    if job.image_name:
        return job.image_name.format(id=id)
    if isinstance(id, int):
        return f"COCO_train2014_{id:012d}.jpg"
    return id if Path(id).suffix else f"{id}.jpg"


def question_lines(job):
    """Lines of {image, question or text, answer, answers or label}, as Open-VQA, POPE and many others have them."""
    return each(records(job.source), question_line, job)


def question_line(element, job):
    """One question; of several answers the most frequent."""
    one, where = element.value, element.where
    question = asked(text_field(one, first_of(one, ("question", "text"), where), where))
    answers = field(one, first_of(one, ("answer", "answers", "label"), where), (str, list), where)
    answers = [answer for answer in ([answers] if isinstance(answers, str) else answers) if str(answer).strip()]
    if not answers:
        raise ValueError(f"{where}: no answer")
    id = next((one[name] for name in ("question_id", "id", "index") if isinstance(one.get(name), (str, int))), where)
    answer = str(Counter(map(str, answers)).most_common(1)[0][0]).strip()
    return pictured(id, picture_name(field(one, "image", (str, int), where), job), question, answer)


def folder(job):
    """A folder of pictures: the .txt beside a picture is its caption; without one, its own folder's name is its class."""
    if not job.source.is_dir():
        raise FileNotFoundError(f"{job.source}: no such folder of pictures")
    names = class_names(job.names) if job.names else {}
    for path in sorted(job.source.rglob("*")):
        if path.suffix.lower() in PICTURES:
            yield str(path), functools.partial(folder_item, path, names, job)


def folder_item(path, names, job):
    """One picture and its caption or class."""
    caption, place = path.with_suffix(".txt"), path.relative_to(job.source)
    if caption.exists():
        answer = caption.read_text(encoding="utf-8-sig").strip()
        if not answer:
            raise ValueError(f"{caption}: empty")
    elif place.parent.name:
        answer = names.get(place.parent.name, place.parent.name.replace("_", " "))
        if names and place.parent.name not in names:
            raise ValueError(f"{path}: {job.names} has no name for {place.parent.name!r}")
    else:
        raise ValueError(f"{path}: neither a caption in {caption.name} nor a folder that names its class")
    return pictured(str(place), str(place), job.question, answer)


def class_names(path):
    """Names of classes: {"n01440764": "tench", …} in JSON, or lines "n01440764 tench, Tinca tinca": the first name counts."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("{"):
        return {key: str(value).split(",")[0].strip() for key, value in json.loads(text).items()}
    pairs = (line.split(maxsplit=1) for line in text.split("\n") if line.strip())
    return {pair[0]: pair[-1].split(",")[0].strip() for pair in pairs}


FORMATS = {
    "llava": dialogues, "sharegpt": dialogues, "mimic-it": mimic_it, "m3it": m3it, "minigpt4": minigpt4,
    "coco-captions": coco_captions, "coco-boxes": coco_boxes, "vqa": vqa, "qa-lines": question_lines, "folder": folder,
}  # fmt: skip
TEMPORARY = ".tmp"
ENDINGS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
REASONS_SHOWN = 10


class Store:
    """A folder of pictures, each once, called by their content."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, text):
        """A picture in base64, perhaps behind "data:image/…;base64,": the name of its file in the folder.

        Raises: ValueError if it is no base64 or no picture.
        """
        content = images.from_base64(text)
        try:
            with Image.open(io.BytesIO(content)) as image:
                ending = ENDINGS.get(image.format)
                images.load(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"base64 of no picture, or of a damaged one ({error})") from error
        if ending is None:
            raise ValueError("base64 of a picture in no format that can be written")
        name = hashlib.sha256(content).hexdigest()[:24]
        path = self.folder / name[:2] / f"{name}.{ending}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return str(path.relative_to(self.folder))


class Report:
    """What was skipped or changed: a line each in a file, counted by reason."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "w", encoding="utf-8")
        self.counts = {"skipped": Counter(), "changed": Counter()}

    def add(self, kind, where, reason):
        """kind: "skipped" or "changed". where: file and line. reason: str."""
        reason = reason.removeprefix(f"{where}: ")
        self.file.write(json.dumps({"where": where, kind: reason}, ensure_ascii=False) + "\n")
        self.counts[kind][reason] += 1

    def lines(self):
        """The counts by reason, the most frequent first: list of str."""
        lines = []
        for kind, counts in self.counts.items():
            lines += [f"{kind}: {counts.total():,}"] if counts else []
            lines += [f"  {count:,} x {reason}" for reason, count in counts.most_common(REASONS_SHOWN)]
            lines += [f"  and {len(counts) - REASONS_SHOWN:,} other reasons"] if len(counts) > REASONS_SHOWN else []
        return lines


def convert(kind, job, out, samples_per_shard=None):
    """Convert a data set.

    Args:
      kind: a key of FORMATS. job: formats.Job without `store` and `note`.
      out: Path of a .jsonl, or with samples_per_shard of a folder.
      samples_per_shard: int; None = JSON lines.
    Returns: list of str, lines that say what was done.
    Raises: ValueError or FileNotFoundError for an unknown format, an output that exists, a source that cannot be read
      on, or one that gives no item at all.
    """
    if kind not in FORMATS:
        raise ValueError(f"unknown format {kind!r}.{nearest(kind, FORMATS)}")
    if samples_per_shard is None and out.suffix != ".jsonl":
        raise ValueError(f"{out}: the name of an output ends with .jsonl; with --shards N it is a folder")
    if not job.source.exists():
        raise FileNotFoundError(f"{job.source}: no such file or folder")
    base = out.with_suffix("") if samples_per_shard is None else out
    pictures, report_path = Path(f"{base}_images"), Path(f"{base}.report.jsonl")
    for path in (out, pictures):
        if path.exists():
            raise ValueError(f"{path} is there already; remove it, or choose another name")
    halves = [Path(f"{path}{TEMPORARY}") for path in (out, pictures)]
    for half in halves:  # of a conversion that was killed
        shutil.rmtree(half, ignore_errors=True) if half.is_dir() else half.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    report, store = Report(report_path), Store(halves[1])
    job = replace(job, store=store.add, note=functools.partial(report.add, "changed"))
    with report.file:
        items = checked(kind, job, store.folder, report, samples_per_shard is not None)
        if samples_per_shard is None:
            count = write_lines(halves[0], items)
        else:
            count = write_shards(halves[0], out.name, items, samples_per_shard)
    if not count:
        none = f"{job.source}: no item could be made of it as {kind}; see {report_path}"
        raise ValueError("\n".join([none, *report.lines()]))
    if halves[1].exists() and samples_per_shard is None:
        os.replace(halves[1], pictures)
    shutil.rmtree(halves[1], ignore_errors=True)
    os.replace(halves[0], out)
    beside = f", images in {pictures}" if pictures.exists() else ""
    return [f"{count:,} items in {out}{beside}; report in {report_path}", *report.lines()]


def checked(kind, job, pictures, report, for_shards):
    """(item, paths of its pictures) of everything that training would take; for_shards: their files are needed now."""
    clip = clip_for(1, "uniform")
    root = pictures if kind in ("mimic-it", "m3it") else job.source if kind == "folder" else job.images
    root = job.source.parent if root is None else root
    there = for_shards or job.images is not None or kind in ("mimic-it", "m3it", "folder")
    for where, make in tqdm(FORMATS[kind](job), desc="converting", unit=" records", disable=None):
        try:
            for item in make():
                record = record_of(item, where, clip, lambda name: str(root / name))
                paths = [frame for visual in record.visuals for frame in frames_of(visual, clip)]
                missing = [path for path in paths if there and not os.path.exists(path)]
                if missing:
                    raise ValueError(f"picture {missing[0]} is missing")
                if for_shards and item.get("video") is not None:
                    raise ValueError("a video, which shards do not hold")
                yield item, paths
        except ValueError as error:
            report.add("skipped", where, str(error))


def frames_of(visual, clip):
    """The files of a visual input: list of str."""
    if not isinstance(visual.frames, type(clip)):
        return list(visual.frames)
    source = visual.frames.source
    return [source] if isinstance(source, str) else list(source)


def write_lines(path, items):
    """Items as JSON lines: int, how many."""
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for count, (item, _) in enumerate(items, start=1):
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return count


def write_shards(path, name, items, samples_per_shard):
    """Items with their pictures in tar shards: int, how many."""
    path.mkdir(parents=True)
    with ShardWriter(path, name, samples_per_shard) as writer:
        for item, paths in items:
            writer.add(item, [(Path(path).suffix.lstrip(".").lower(), Path(path).read_bytes()) for path in paths])
    return writer.written
