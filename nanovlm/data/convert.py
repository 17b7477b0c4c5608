"""Bring a data set into the two forms that training reads: LLaVA's JSON lines with a folder of images, or tar shards.

    OUT.jsonl             items, one a line                           or with --shards the folder OUT of .tar files
    OUT_images/           pictures that stood in base64 in the source, each once
    OUT.report.jsonl      {"where": "FILE, line N", "skipped" or "changed": why}, a line for each

The source is read record by record. What is written goes under a temporary name and is renamed when it is complete, so
that a conversion that was killed leaves nothing that looks finished. Every item is read as training would read it
before it is written; one that training would refuse is skipped and reported.

Captions and labels are replies to a question without words ("<image>" alone): what is asked is a matter of the mixture,
which draws a prompt for each record (datasets.prompted).

Schemas: ShareGPT as in lm-sys/FastChat; MIMIC-IT, arXiv:2306.05425, its repository's docs; M3IT, arXiv:2306.04387, its
data card; MiniGPT-4, Vision-CAIR/MiniGPT-4, dataset/README_2_STAGE.md; COCO, cocodataset.org/#format-data; VQA v2,
visualqa.org/download, in whose form TextVQA, VizWiz and OK-VQA are shared too.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections import Counter
from dataclasses import replace as replace_field
from pathlib import Path

from tqdm import tqdm

from nanovlm.data import images
from nanovlm.data.datasets import asked, files_of
from nanovlm.data.json_files import Element, elements, field, parse, read_at, records, text_field
from nanovlm.data.records import ROLES, files_in, record_of, spoken, with_system
from nanovlm.data.tar_shards import write_shards
from nanovlm.data.video import PICTURES, Clip
from nanovlm.files import listing, new_folder, replace
from nanovlm.names import check_known

SPEAKERS = {"user": "human", "assistant": "gpt"}  # role -> who speaks it in LLaVA's files
FILMS = ("DC_", "TVC_", "E4D_")  # of MIMIC-IT: the sets whose pictures are frames of one video
ALIGNMENT = "###Human:|###Assistant:|<Img><ImageHere></Img>"  # marks in MiniGPT-4's files of instructions
DETAILED = "Describe the image in detail."  # what Lynx asks about MiniGPT-4's pictures (its Table 13)
REASONS_SHOWN = 10


class Output:
    """What a conversion writes beside its items: pictures, each once, called by their content, and the report."""

    def __init__(self):
        self.folder = self.file = None  # set when they are opened
        self.items = 0
        self.counts = {"skipped": Counter(), "changed": Counter()}

    def store(self, text):
        """Write a picture in base64: the name of its file in the folder. Raises: ValueError if it is none."""
        if not isinstance(text, str):
            raise ValueError(f"a picture in base64 was expected, found {text!r:.60}")
        content = images.from_base64(text)
        with images.opened(content) as image:
            images.load(image)
            ending = image.format.lower().replace("jpeg", "jpg")
        digest = hashlib.sha256(content).hexdigest()[:24]
        path = self.folder / digest[:2] / f"{digest}.{ending}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return f"{digest[:2]}/{path.name}"

    def note(self, kind, where, reason):
        """A line of the report. kind: "skipped" or "changed". where: file and line. reason: str."""
        reason = reason.removeprefix(f"{where}: ")
        self.file.write(json.dumps({"where": where, kind: reason}, ensure_ascii=False) + "\n")
        self.counts[kind][reason] += 1

    def summary(self):
        """The counts of the most frequent reasons: list of str, lines."""
        lines = []
        for kind, counts in self.counts.items():
            lines += [f"{kind}: {counts.total():,}"] if counts else []
            lines += [f"  {count:,} x {reason}" for reason, count in counts.most_common(REASONS_SHOWN)]
        return lines


# Each format is a function (args, output) -> (records, make): json_files.Elements, and a function that makes of the
# value of one and where it stands an item (see README.md), or None. A ValueError of it costs that record alone.


def exchange(question, answer, pictures=0, films=0):
    """A question, behind the placeholders of what it shows, and its reply, as LLaVA writes turns."""
    question = "\n".join(["<video>"] * films + ["<image>"] * pictures + ([question] if question else []))
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def pictured(id, image, question, answer):
    """An item about one picture. Raises: ValueError without an answer."""
    if not answer:
        raise ValueError(f"no caption of {image}, or no answer about it")
    return {"id": id, "image": image, "conversations": exchange(question, answer, 1)}


def dialogues(args, output):
    """LLaVA's and ShareGPT's list of {id, image?, conversations}.

    What stands at the start or end of a dialogue without an answer is left out.
    """
    def make(one, where):
        turns, cut, said = [], "", spoken(one, where)
        if said and said[0][0] == "system":
            output.note("changed", where, "the system's words now stand in front of the first question")
        for place, (speaker, value) in enumerate(with_system(said), start=1):
            role = SPEAKERS.get(ROLES.get(speaker), speaker)  # unknown ones are found as in training
            if role == "gpt" and not turns:
                output.note("changed", where, "begins with the assistant: its first turn is left out")
            elif not value.strip() or role == "system" or (turns and turns[-1]["from"] == role):
                cut = f"cut before turn {place}, which is empty or no answer to the one before"
                break
            else:
                turns.append({"from": role, "value": value})
        if turns and turns[-1]["from"] == "human":
            turns.pop()
            cut = cut or "ends with a question: it is left out"
        if not turns:
            raise ValueError("no question with an answer")
        if cut:
            output.note("changed", where, cut)
        id, pictures = one["id"] if isinstance(one.get("id"), (str, int)) else where, files_in(one, "image", where)
        one.pop("messages", None)
        if pictures and not {"image", "images"} & one.keys():  # named within the messages
            one["image"] = pictures
        return one | {"id": id, "conversations": turns}

    return records(args.source), make


def mimic_it(args, output):
    """MIMIC-IT: {data: {id: {instruction, answer, image_ids, rel_ins_ids}}}, pictures in a file id -> base64.

    Related records about the same pictures are rounds of one dialogue, which is written once. Others are examples for
    learning in context: args.in_context of them come first.
    """
    if args.images is None or args.images.suffix == ".parquet":
        raise ValueError(f"{args.source}: MIMIC-IT's pictures stand in a second file; name its .json (id -> base64), "
                         "not the .parquet, with --images")
    pictures, told = {}, set()
    for element in elements(args.images):
        try:
            pictures[element.key] = output.store(element.value)
        except ValueError as error:
            output.note("changed", element.where, f"picture {element.key!r} cannot be used: {error}")
    places = {element.key: (element.start, element.stop, element.where) for element in elements(args.source, "data")}

    def make(named, where):
        id, one = named
        if id in told:
            return None
        related = [other for other in one.get("rel_ins_ids") or [] if other != id]
        lost = [other for other in related if other not in places]
        if lost:
            raise ValueError(f"related record {lost[0]!r} is not in the file")
        found = {id: one} | {other: read_at(args.source, *places[other]) for other in related}
        same = [other for other in related if found[other].get("image_ids") == one.get("image_ids")]
        examples = [other for other in related if other not in same]
        if len(examples) > args.in_context:
            output.note("changed", where, "related records about other pictures are left out (--in-context N puts N of "
                        "them in front)")
        item = {"id": id, "image": [], "video": [], "conversations": []}
        for member in [*examples[: args.in_context], id, *same]:
            record = found[member]
            names = [] if member in same else field(record, "image_ids", list)
            missing = [name for name in names if name not in pictures]
            if missing:
                raise ValueError(f"picture {missing[0]!r} is not in {args.images}")
            names = [pictures[name] for name in names]
            film = bool(names) and member.startswith(FILMS)
            item["video" if film else "image"] += [names] if film else names
            said = (text_field(record, name) for name in ("instruction", "answer"))
            item["conversations"] += exchange(*said, 0 if film else len(names), film)
        told.update([id, *same])
        return {name: value for name, value in item.items() if value}

    return (replace_field(one, value=(one.key, one.value)) for one in elements(args.source, "data")), make


def m3it(args, output):
    """M3IT: lines of {instruction, inputs, outputs, image_base64_str}; older files say input, output, img_str."""
    def make(one, where):
        words = [text_field(one, "instruction"), field(one, ("inputs", "input"), str).strip()]
        answer = text_field(one, ("outputs", "output"))
        encoded = field(one, ("image_base64_str", "image", "img_str"), (str, list))
        names = [output.store(text) for text in ([encoded] if isinstance(encoded, str) else encoded)]
        turns = exchange("\n".join(filter(None, words)), answer, len(names))
        return {"id": one.get("id", where), "conversations": turns} | ({"image": names} if names else {})

    return records(args.source), make


def minigpt4(args, output):
    """MiniGPT-4's second stage: {annotations: [{image_id, caption}]}, pictures image/{id}.jpg."""
    text = args.prompts.read_text(encoding="utf-8-sig") if args.prompts else DETAILED
    prompts = [" ".join(line.split()) for line in re.sub(ALIGNMENT, " ", text).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts}: holds no instruction; one a line is expected")
    name = args.image_name or "image/{id}.jpg"

    def make(one, where):
        id = field(one, "image_id", (str, int))
        question = args.question or random.Random(str(id)).choice(prompts)  # a function of the record alone
        return pictured(id, name.format(id=id), question, text_field(one, "caption"))

    return elements(args.source, "annotations"), make


def coco(args, say):
    """Items about a COCO file's pictures; say: function(annotation, its picture) -> (question, answer)."""
    pictures = {field(one.value, "id", (int, str), one.where): one.value for one in elements(args.source, "images")}

    def make(one, where):
        id, image_id = (field(one, name, (int, str)) for name in ("id", "image_id"))
        if image_id not in pictures:
            raise ValueError(f"image_id {image_id!r} is none of the {len(pictures)} pictures in the file")
        picture = pictures[image_id]
        return pictured(f"{image_id}-{id}", text_field(picture, "file_name"), *say(one, picture))

    return elements(args.source, "annotations"), make


def coco_boxes(args, output):
    """COCO's instances_*.json: what stands in a box? The box is text, as in LLaVA: left, top, right, bottom as shares
    of the picture, "[0.370, 0.584, 0.504, 0.709]"."""
    names = {field(one.value, "id", int, one.where): text_field(one.value, "name", one.where)
             for one in elements(args.source, "categories")}  # fmt: skip
    question = args.question or "What is in the region {box}?"

    def say(one, picture):
        category, box = field(one, "category_id", int), field(one, "bbox", list)
        if category not in names:
            raise ValueError(f"category_id {category} is none of the file's {len(names)} categories")
        if one.get("iscrowd"):
            raise ValueError(f"a crowd, whose box holds more than one {names[category]}")
        if not picture.get("width") or not picture.get("height"):
            raise ValueError(f"the file does not say how large picture {picture['id']!r} is")
        if len(box) != 4 or not all(isinstance(side, (int, float)) for side in box) or min(box[2:]) < 0:
            raise ValueError(f"bbox must be left, top, width and height in pixels, found {box!r}")
        (left, top, width, height), across, down = box, picture["width"], picture["height"]
        shares = (left / across, top / down, (left + width) / across, (top + height) / down)
        text = ", ".join(f"{min(max(share, 0), 1):.3f}" for share in shares)
        return question.replace("{box}", f"[{text}]"), names[category]

    return coco(args, say)


def commonest(answers):
    """What most annotators answered, of equally many the one given first: str, "" without any."""
    given = Counter(str(answer).strip() for answer in answers if str(answer).strip())
    return given.most_common(1)[0][0] if given else ""


def vqa(args, output):
    """VQA's two files: the answer agreed on, or the one that most annotators gave."""
    if args.annotations is None:
        raise ValueError(f"{args.source}: VQA's answers stand in a second file; name it with --annotations")
    answers = {}  # question id -> (answer, picture that it is about)
    for element in elements(args.annotations, "annotations"):
        one, where = element.value, element.where
        given = field(one, "answers", list, where)
        said = [answer if isinstance(answer, str) else field(answer, "answer", str, where) for answer in given]
        answer = one.get("multiple_choice_answer") or commonest(said)
        answers[field(one, "question_id", (int, str), where)] = answer.strip(), one.get("image_id")

    def make(one, where):
        id, image_id = (field(one, name, (int, str)) for name in ("question_id", "image_id"))
        if id not in answers:
            raise ValueError(f"question_id {id!r} has no annotation in {args.annotations}")
        answer, about = answers[id]
        if about not in (None, image_id):
            raise ValueError(f"the question is about picture {image_id!r}, its annotation about {about!r}")
        return pictured(id, picture_name(image_id, args), asked(text_field(one, "question")), answer)

    return elements(args.source, "questions"), make


def picture_name(id, args):
    """The file of a picture that is named by number or without ending."""
    if args.image_name:
        return args.image_name.format(id=id)
    if isinstance(id, int):
        return f"COCO_train2014_{id:012d}.jpg"
    return id if Path(id).suffix else f"{id}.jpg"


def question_lines(args, output):
    """Lines of {image, question or text, answer, answers or label}, as Open-VQA, POPE and many others have them."""
    def make(one, where):
        question = asked(text_field(one, ("question", "text")))
        answers = field(one, ("answer", "answers", "label"), (str, list))
        answer = commonest([answers] if isinstance(answers, str) else answers)
        ids = (one.get(name) for name in ("question_id", "id", "index"))
        id = next((id for id in ids if isinstance(id, (str, int))), where)
        return pictured(id, picture_name(field(one, "image", (int, str)), args), question, answer)

    return records(args.source), make


def folder(args, output):
    """A folder of pictures: the .txt beside a picture is its caption; without one, its folder's name is its class."""
    if not args.source.is_dir():
        raise FileNotFoundError(f"{args.source}: no such folder of pictures")
    text = args.names.read_text(encoding="utf-8-sig") if args.names else ""
    if text.lstrip().startswith("{"):  # {"n01440764": "tench"}, or lines "n01440764 tench, Tinca tinca"
        names = parse(text.encode(), str(args.names))
    else:
        names = {line.split()[0]: line.split(maxsplit=1)[-1] for line in text.split("\n") if line.strip()}
    names = {key: str(value).split(",")[0].strip() for key, value in names.items()}  # the first of several counts

    def make(path, where):
        caption, place = path.with_suffix(".txt"), path.relative_to(args.source)
        kind = place.parent.name
        if caption.exists():
            answer = caption.read_text(encoding="utf-8-sig").strip()
        elif names and kind not in names:
            raise ValueError(f"{path}: {args.names} has no name for {kind!r}")
        else:
            answer = names.get(kind, kind.replace("_", " "))
        return pictured(str(place), str(place), args.question, answer)

    paths = (path for path in listing(args.source, "**/*") if path.suffix.lower() in PICTURES)
    return (Element(str(path), path, 0, 0) for path in paths), make


FORMATS = {
    "llava": dialogues, "sharegpt": dialogues, "mimic-it": mimic_it, "m3it": m3it, "minigpt4": minigpt4,
    "coco-captions": lambda args, output: coco(args, lambda one, picture: (args.question, text_field(one, "caption"))),
    "coco-boxes": coco_boxes, "vqa": vqa, "qa-lines": question_lines, "folder": folder,
}  # fmt: skip
OWN_PICTURES = ("mimic-it", "m3it")  # formats whose pictures are written


def add_flags(add):
    """The flags of the command; add: `add_argument` of its parser."""
    add("format", help=", ".join(FORMATS))
    add("source", type=Path, help="file or folder")
    add("out", type=Path, help="OUT.jsonl, or with --shards a folder")
    add("--shards", type=int, metavar="N", help="write tar shards of N samples")
    add("--images", type=Path, metavar="FOLDER", help="where the pictures lie; of mimic-it the file that holds them")
    add("--annotations", type=Path, metavar="FILE", help="of vqa: the file with the answers")
    add("--question", default="", help="put to every picture without one; of coco-boxes with {box}; default: no words")
    add("--prompts", type=Path, metavar="FILE", help="of minigpt4: instructions, one a line, drawn for each picture")
    add("--names", type=Path, metavar="FILE", help="of folder: names of the classes, JSON or lines of FOLDER NAME")
    add("--image-name", default="", metavar="NAME", help="a picture's file, such as COCO_val2014_{id:012d}.jpg")
    add("--in-context", type=int, default=0, metavar="N", help="of mimic-it: put N related examples in front")


def convert(args):
    """Convert a data set, by the values of the flags: list of str, lines that say what was done.

    Raises: ValueError or FileNotFoundError for flags or files that cannot be used, or if no item can be made of them.
    """
    out, shards = args.out, args.shards
    check_known("unknown format", args.format, FORMATS)
    if shards is None and out.suffix != ".jsonl":
        raise ValueError(f"{out}: the name of an output ends with .jsonl; with --shards N it is a folder")
    if not args.source.exists():
        raise FileNotFoundError(f"{args.source}: no such file or folder")
    base = out.with_suffix("") if shards is None else out
    pictures, report = Path(f"{base}_images"), Path(f"{base}.report.jsonl")
    for path in (out, pictures):
        if path.exists():
            raise ValueError(f"{path} is there already; remove it, or choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    output = Output()

    def write(path):
        """Write everything; the pictures are in place before the items, which `path` holds, are."""
        with open(report, "w", encoding="utf-8") as output.file, new_folder(pictures) as output.folder:
            items = usable(args, output)
            if shards is None:
                with open(path, "w", encoding="utf-8") as written:
                    written.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item, _ in items)
            else:
                write_shards(path, out.name, items, shards)
            if not output.items:
                none = f"{args.source}: no item could be made of it as {args.format}; see {report}"
                raise ValueError("\n".join([none, *output.summary()]))
        if shards or not any(pictures.iterdir()):
            shutil.rmtree(pictures)

    if shards is None:
        replace(out, write)
    else:
        with new_folder(out) as path:
            write(path)
    beside = f", images in {pictures}" if pictures.exists() else ""
    return [f"{output.items:,} items in {out}{beside}; report in {report}", *output.summary()]


def usable(args, output):
    """(item, paths of its pictures) of everything that training would take; what else there is, is reported."""
    found, make = FORMATS[args.format](args, output)
    own = args.format in OWN_PICTURES
    root = output.folder if own else args.images or (args.source if args.source.is_dir() else args.source.parent)
    for element in tqdm(found, desc="converting", unit=" records", disable=None):
        try:
            if isinstance(element.value, ValueError):
                raise element.value
            item = make(element.value, element.where)
            if item is None:
                continue
            record = record_of(item, element.where, Clip("", 1), lambda name: str(root / name))
            paths = [path for visual in record.visuals for path in files_of(visual.frames)]
            missing = [path for path in paths if (args.images or args.shards) and not os.path.exists(path)]
            if missing:
                raise ValueError(f"picture {missing[0]} is missing")
            if args.shards and item.get("video") is not None:
                raise ValueError("a video, which shards do not hold")
        except ValueError as error:
            output.note("skipped", element.where, str(error))
        else:
            output.items += 1
            yield item, paths
