"""Samples: one piece of instruction data, and the files it stands in.

A file holds LLaVA's items, as JSON lines (what `construct` writes) or as one list. Beside id, image and conversations an
item may say how it came to be; `train.py --data` passes over what it does not know:
    {"id", "image", "conversations": [{"from", "value"}, …], "task", "type": "AA" | "SI",
     "granularity": "global" | "region" | "interleaved", "provenance": {…}, "scores": {…}, "flags": […]}
AA = annotation adaption, SI = self-instruct. Files are read item by item: memory does not grow with their length.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from nanovlm.data import json_files
from nanovlm.evaluation.items import Encoded

IMAGE = "<image>"
ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system",
}  # fmt: skip
CONTAINERS = {  # key at the top of a file -> what it is; these are no records
    "data": "MIMIC-IT's or TextVQA's file", "annotations": "MiniGPT-4's or COCO's file", "questions": "a VQA question file",
}  # fmt: skip
LONGEST_PATH = 255  # characters; a longer name is a picture in base64
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


class Unreadable(ValueError):
    """Why a record cannot be read. text: the record as it stands in the file."""

    def __init__(self, why, text):
        super().__init__(why)
        self.text = text


@dataclass(frozen=True)
class Sample:
    """One conversation about some images.

    images: paths as they stand in the file. turns: (role, text) each, role "user" | "assistant" | "system"; IMAGE in a
    user's text is where an image stands. task: of Table 5 of the review, "" = not stated. fields: what else the item
    holds; it is written back as it was.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    task: str = ""
    type: str = ""
    granularity: str = ""
    provenance: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    fields: dict = field(default_factory=dict)

    @property
    def instructions(self):
        """What the user asks, without the images: list of str."""
        return [text.replace(IMAGE, "").strip() for role, text in self.turns if role == "user"]

    @property
    def responses(self):
        """What the assistant says: list of str."""
        return [text for role, text in self.turns if role == "assistant"]

    @property
    def pairs(self):
        """Every instruction that is answered, with its response: list of (str, str)."""
        turns = [(role, text.replace(IMAGE, " ").strip() if role == "user" else text.strip()) for role, text in self.turns]
        return [(one[1], other[1]) for one, other in zip(turns, turns[1:]) if (one[0], other[0]) == ("user", "assistant")]

    def item(self):
        """As it stands in a file: dict. What is empty is left out."""
        image = self.images[0] if len(self.images) == 1 else list(self.images)
        said = [{"from": SPEAKERS[role], "value": text} for role, text in self.turns]
        known = {
            "image": image, "conversations": said, "task": self.task, "type": self.type, "granularity": self.granularity,
            "provenance": self.provenance, "scores": self.scores, "flags": list(self.flags),
        }  # fmt: skip
        return {"id": self.id} | {name: value for name, value in known.items() if value} | self.fields


def sample(item):
    """An item of a file as a Sample. Raises: ValueError that says what is wrong with it."""
    if not isinstance(item, dict):
        raise ValueError(f"an object with id, image and conversations was expected, found {type(item).__name__}")
    rest = dict(item)
    if "id" not in rest or "conversations" not in rest:
        missing = [name for name in ("id", "conversations") if name not in rest]
        raise ValueError(f"{' and '.join(missing)} missing; found {', '.join(map(repr, rest)) or 'nothing'}")
    id, said, image = rest.pop("id"), rest.pop("conversations"), rest.pop("image", None)
    images = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(one, str) and one for one in images):
        raise ValueError(f"image must be a path or a list of paths, found {image!r}")
    if not isinstance(said, list):
        raise ValueError(f"conversations must be a list, found {said!r}")
    known = {}
    for name, kind in (("task", str), ("type", str), ("granularity", str), ("provenance", dict), ("scores", dict), ("flags", list)):
        value = rest.pop(name, kind())
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__}, found {value!r}")
        known[name] = value
    known["flags"] = tuple(known["flags"])
    return Sample(str(id), tuple(images), tuple(_turn(turn) for turn in said), **known, fields=rest)


def _turn(turn):
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise ValueError(f"a turn with from and value was expected, found {turn!r}")
    try:
        turn["value"].encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        raise ValueError(f"not text: {error}") from error
    if turn.get("from") not in ROLES:
        raise ValueError(f"unknown speaker {turn.get('from')!r}; known: {', '.join(ROLES)}")
    return ROLES[turn["from"]], turn["value"]


def read(path):
    """Samples of a file.

    Args:
      path: .json or .jsonl; whether it holds a list, JSON lines or objects behind one another is found out by looking.
    Returns: iterator of (where, Sample), or (where, Unreadable) for what cannot be read; where names file and line.
    Raises: FileNotFoundError; ValueError if it holds no record at all, or as a whole is of another form.
    """
    found = False
    for element in json_files.records(path):
        found, value = True, element.value
        _refuse_container(path, value)
        try:
            if isinstance(value, ValueError):
                raise value
            value = sample(value)
        except ValueError as error:
            why = str(error).removeprefix(f"{element.where}: ").removeprefix(f"{element.where}, ")
            value = Unreadable(why, text_of(path, element))
        yield element.where, value
    if not found:
        raise ValueError(f"{path} holds no record; a list or lines of objects were expected")


def text_of(path, element):
    """A record as it stands in its file: str; bytes that are no text are marked. element: json_files.Element."""
    with json_files.open_bytes(path) as file:
        file.seek(element.start)
        return file.read(element.stop - element.start).decode("utf-8", "replace").strip()


def _refuse_container(path, value):
    key = next((key for key in CONTAINERS if key in value), None) if isinstance(value, dict) else None
    if key and "conversations" not in value and isinstance(value[key], (dict, list)):
        raise ValueError(
            f"{path}: the key {key!r} at its top makes it {CONTAINERS[key]}, not a file of records; bring it into LLaVA's "
            "form with `python -m nanovlm.data convert`"
        )


def picture(name, root):
    """Where a picture of a sample is: Path, or items.Encoded.

    Args:
      name: as the sample has it: a path with its folder or without, or base64 with a data-URL prefix or without.
      root: Path, where paths start.
    Raises: FileNotFoundError.
    """
    if name.startswith("data:") or (len(name) > LONGEST_PATH and "." not in name[-6:]):
        return Encoded(name)
    for path in (Path(root) / name, Path(root) / Path(name).name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{Path(root) / name}: no such image")


def write_line(file, sample):
    """Append one sample to an open text file, as one line."""
    file.write(json.dumps(sample.item(), ensure_ascii=False) + "\n")
