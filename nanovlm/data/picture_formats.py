"""Annotated pictures as LLaVA's items: COCO's captions and boxes, VQA's questions, lines of questions, folders.

Each format is a function as in formats.py.
"""

import functools
import json
from collections import Counter
from pathlib import Path

from nanovlm.data import coco
from nanovlm.data.coco import field, text_field
from nanovlm.data.formats import each, first_of, pictured
from nanovlm.data.json_files import records
from nanovlm.data.video import PICTURES


def asked(question):
    """A question with its question mark, which some data sets leave out."""
    question = question.rstrip()
    return question if question.endswith("?") else f"{question.rstrip(' .!:;,')}?"


def coco_captions(job):
    """COCO's captions_*.json: an item per sentence."""
    known = coco.pictures(job.source)

    def make(one, where):
        return pictured(f"{one.image_id}-{one.id}", picture_of(one, known, where).file_name, job.question, one.text)

    for one, where in coco.captions(job.source):
        yield where, functools.partial(make, one, where)


def picture_of(one, known, where):
    """The coco.Picture of an annotation. Raises: ValueError if the file does not list it."""
    if one.image_id not in known:
        raise ValueError(f"{where}: image_id {one.image_id!r} is none of the {len(known)} pictures in the file")
    return known[one.image_id]


def coco_boxes(job):
    """COCO's instances_*.json: what stands in a box? The box is text: left, top, right, bottom as shares of the sides."""
    known = coco.pictures(job.source)

    def make(one, where):
        picture = picture_of(one, known, where)
        if one.is_crowd:
            raise ValueError(f"{where}: a crowd, whose box holds more than one {one.category}")
        if not picture.width or not picture.height:
            raise ValueError(f"{where}: the file does not say how large picture {picture.id!r} is")
        question = (job.question or "What is in the region {box}?").replace("{box}", box_text(one.box, picture))
        return pictured(f"{one.image_id}-{one.id}", picture.file_name, question, one.category)

    for one, where in coco.boxes(job.source):
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

    for one, where in coco.questions(job.source, job.annotations):
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
