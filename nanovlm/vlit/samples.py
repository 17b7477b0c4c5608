"""Samples: one piece of instruction data, the files it stands in, and what it breaks as far as that needs no model.

A file holds LLaVA's items, as JSON lines (what `construct` writes) or as one list. Beside id, image and conversations
an item may say how it came to be; `train.py --data` passes over what it does not know:
    {"id", "image", "conversations": [{"from", "value"}, …], "task", "type": "AA" | "SI",
     "granularity": "global" | "region" | "interleaved", "provenance": {…}, "scores": {…}, "flags": […]}
AA = annotation adaption, SI = self-instruct. Files are read item by item: memory does not grow with their length.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nanovlm.data import json_files, records
from nanovlm.data.images import ImageError, from_base64, load
from nanovlm.data.json_files import field
from nanovlm.data.records import check_order, files_in, in_front, role_of, spoken
from nanovlm.vlit.words import load_table

IMAGE = "<image>"
ROLES = records.ROLES | {"system": "system"}
CONTAINERS = {  # key at the top of a file -> what it is; these are no records
    "data": "MIMIC-IT's or TextVQA's file", "annotations": "MiniGPT-4's or COCO's file", "questions": "VQA's questions",
}  # fmt: skip
LONGEST_PATH = 255  # characters; a longer name is a picture in base64
MISSING = "no such image"
SHOWN = 20  # samples that `lint` names one by one

def pattern(forms):
    """What finds any of some forms, in capitals or not."""
    return re.compile("|".join(forms), re.IGNORECASE)


_patterns = load_table("patterns.json")
_names = _patterns["names"]  # that stand within the others
SOURCE = pattern(form.format(**_names) for form in _patterns["source"])  # requirement 8; pictures "mention" nothing
FORMAT = pattern(_patterns["format"])  # requirement 9's form where words should be
HEDGE, REGION, NEGATIVE = (pattern(_patterns[name]) for name in ("hedge", "region", "negative"))


class Unreadable(ValueError):
    """Why a record cannot be read."""


@dataclass(frozen=True)
class Sample:
    """One conversation about some images; IMAGE in a user's text is where an image stands."""

    id: str
    images: tuple[str, ...]  # paths as they stand in the file
    turns: tuple[tuple[str, str], ...]  # (role, text) each, role "user" | "assistant" | "system"
    task: str = ""  # of Table 5 of the review; "" = not stated, here and below
    granularity: str = ""
    plan: str = ""

    @property
    def responses(self):
        """What the assistant says: list of str."""
        return [text for role, text in self.turns if role == "assistant"]

    @property
    def pairs(self):
        """Every instruction that is answered, with its response: list of (str, str)."""
        turns = [(role, bare(role, text)) for role, text in self.turns]
        return [(asked, answer) for (role, asked), (other, answer) in zip(turns, turns[1:])
                if (role, other) == ("user", "assistant")]  # fmt: skip


def bare(role, text):
    """What a turn says, without the images."""
    return (text.replace(IMAGE, " ") if role == "user" else text).strip()


def make_item(id, image, texts, task, type, granularity, provenance):
    """LLaVA's item of a conversation about one picture: dict. texts: question and answer in turn."""
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    turns[0]["value"] = f"{IMAGE}\n{texts[0]}"
    return {"id": id, "image": image, "conversations": turns, "task": task, "type": type, "granularity": granularity,
            "provenance": provenance}  # fmt: skip


def sample(item, where="item"):
    """An item of a file as a Sample. Raises: ValueError that says what is wrong with it, beginning with `where`."""
    id, said = field(item, "id", object, where), spoken(item, where)
    kinds = {"task": str, "granularity": str, "provenance": dict}
    task, granularity, origin = (field({name: kind()} | item, name, kind, where) for name, kind in kinds.items())
    images = tuple(files_in(item, "image", where))
    said = enumerate(in_front(said, {IMAGE: len(images)}), start=1)
    turns = tuple((role_of(*turn, ROLES, f"{where}, turn {place}"), turn[1]) for place, turn in said)
    return Sample(str(id), images, turns, task, granularity, origin.get("plan", ""))


def read(path, doing=None):
    """Samples of a file.

    Args:
      path: .json or .jsonl; whether it holds a list, JSON lines or objects behind one another is found out by looking.
      doing: what a progress bar says; None = no bar.
    Returns: iterator of (where, Sample), or (where, Unreadable) for what cannot be read; where names file and line.
    Raises: FileNotFoundError; ValueError if it holds no record at all, or as a whole is of another form.
    """
    found, hidden = False, None if doing else True
    for element in tqdm(json_files.records(path), desc=f"{doing} {path}", unit="record", disable=hidden):
        found, value = True, element.value
        key = next((key for key in CONTAINERS if key in value), None) if isinstance(value, dict) else None
        if key and "conversations" not in value and isinstance(value[key], (dict, list)):
            raise ValueError(f"{path}: the key {key!r} at its top makes it {CONTAINERS[key]}, not a file of records; "
                             "bring it into LLaVA's form with `python -m nanovlm.data convert`")  # fmt: skip
        try:
            if isinstance(value, ValueError):
                raise value
            value = sample(value, element.where)
        except ValueError as error:
            value = Unreadable(str(error).removeprefix(element.where).lstrip(":, "))
        yield element.where, value
    if not found:
        raise ValueError(f"{path} holds no record; a list or lines of objects were expected")


def text_of(path, element):
    """A record as it stands in its file: str; bytes that are no text are marked. element: json_files.Element."""
    with json_files.open_bytes(path) as file:
        file.seek(element.start)
        return file.read(element.stop - element.start).decode("utf-8", "replace").strip()


def picture(name, root):
    """Where a picture of a sample is: Path, or its bytes. Raises: FileNotFoundError, images.ImageError.

    name: a path from root on; or base64, with a data-URL prefix or without.
    """
    if name.startswith("data:") or (len(name) > LONGEST_PATH and "." not in name[-6:]):
        return from_base64(name)
    path = Path(root) / name.replace("\\", "/")  # which Windows writes the other way round
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {MISSING}")
    return path


def defects(sample, root=None, decode=True):
    """What makes a sample bad to train on, such as talk about the text that its writer saw instead of the picture.

    root: folder where its image paths start; None = pictures are not looked at. decode: they are opened as well.
    Returns: list of (rule, words) str; rule is "turns", "placeholders", "source", "format" or "image", or the only one,
      "unreadable".
    """
    if isinstance(sample, Unreadable):
        return [("unreadable", str(sample))]
    found = []
    try:
        check_order([role for role, _ in sample.turns if role != "system"])
    except ValueError as error:
        found.append(("turns", str(error)))
    for place, (role, text) in enumerate(sample.turns, start=1):
        words = bare(role, text)
        if not words:
            found.append(("turns", f"turn {place}: the {role} says nothing"))
        for rule, pattern in (("source", SOURCE), ("format", FORMAT)):
            if role != "system" and (broken := pattern.search(words)):
                found.append((rule, f"turn {place}: {broken[0]!r}"))
    placeholders = sum(text.count(IMAGE) for role, text in sample.turns if role == "user")
    if placeholders != len(sample.images):
        found.append(("placeholders", f"{placeholders} {IMAGE} in the user's turns, {len(sample.images)} image(s)"))
    for name in sample.images if root is not None else ():
        try:
            place = picture(name, root)
            if decode:
                load(place)
        except (ImageError, OSError) as error:
            found.append(("image", str(error)))
    return found


def remarks(sample):
    """What might be better, see `lint`: list of (rule, words) str, rule being "hedge", "region" or "negative"."""
    found = [("hedge", f"turn {place}: {broken[0]!r}") for place, (role, text) in enumerate(sample.turns, start=1)
             if role == "assistant" and (broken := HEDGE.search(text))]  # fmt: skip
    if sample.granularity == "region" and not any(REGION.search(text) for _, text in sample.turns):
        found.append(("region", "nobody speaks of the marked region"))
    if sample.plan == "negative" and not any(map(NEGATIVE.search, sample.responses)):
        found.append(("negative", "no answer denies anything"))
    return found


def add_lint_flags(parser):
    """The flags of `lint`."""
    parser.add_argument("file", metavar="FILE", help="LLaVA-style .json or .jsonl")
    parser.add_argument("--images", metavar="FOLDER", help="where image paths start (default: the folder of FILE)")


def lint(args):
    """What a sample breaks, as far as it can be checked without a model.

        python -m nanovlm.vlit lint FILE [--images FOLDER]

    Defects make a sample bad to train on: no order of turns, empty ones, other pictures than placeholders, remains of
    the format, and talk about the text that the writer saw instead of the picture (requirements 3 and 8 of the review's
    system prompt; its own printed samples break them). Remarks are softer: hedging (requirement 1), questions about a
    marked region that never speak of it (2), a negative plan without a negative answer (6). `filter` drops for defects
    alone.
    """
    root = Path(args.file).parent if args.images is None else Path(args.images)
    counts, shown, total, broken = Counter(), [], 0, 0
    for where, one in read(args.file, "lint"):
        found, total = defects(one, root), total + 1
        if not isinstance(one, Unreadable):
            counts.update(rule for rule, _ in remarks(one))
        broken += bool(found)
        counts.update({rule for rule, _ in found})
        shown += [f"{where}: {rule}: {words}" for rule, words in found][: max(0, SHOWN - len(shown))]
    kinds = ", ".join(f"{rule} {count}" for rule, count in counts.most_common())
    return [*shown, f"{total} samples, {broken} with defects" + (f"; samples by rule: {kinds}" if kinds else "")]
