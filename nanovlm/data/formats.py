"""Instruction data of others as LLaVA's items: ShareGPT, MIMIC-IT, M3IT, MiniGPT-4. More in picture_formats.py.

Each format is a function that reads its files and yields, record by record, where it stands and a function that makes
its items, so that a record that breaks breaks nothing but itself. Captions and labels are replies to a question without
words ("<image>" alone): what is asked is a matter of the mixture, which draws a prompt for each record (datasets.py).

Schemas: ShareGPT as in lm-sys/FastChat; MIMIC-IT, arXiv:2306.05425, its repository's docs; M3IT, arXiv:2306.04387, its
data card; MiniGPT-4, Vision-CAIR/MiniGPT-4, dataset/README_2_STAGE.md.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanovlm.data.coco import field, text_field
from nanovlm.data.json_files import elements, read_at, records

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
