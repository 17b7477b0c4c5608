"""Samples: one piece of instruction data, and the files it stands in.

A file holds LLaVA's items, as JSON lines (what `construct` writes) or as one list. Beside id, image and conversations an
item may say how it came to be; `train.py --data` passes over what it does not know:
    {"id", "image", "conversations": [{"from", "value"}, …], "task", "type": "AA" | "SI",
     "granularity": "global" | "region" | "interleaved", "provenance": {…}, "scores": {…}, "flags": […]}
AA = annotation adaption, SI = self-instruct. Files are read item by item: memory does not grow with their length.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

IMAGE = "<image>"
ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system",
}  # fmt: skip
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
BETWEEN = re.compile(r"[\s,\[\]]*")  # what stands around the objects of a list
CHUNK = 1 << 20  # characters read at once


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
    if turn.get("from") not in ROLES:
        raise ValueError(f"unknown speaker {turn.get('from')!r}; known: {', '.join(ROLES)}")
    return ROLES[turn["from"]], turn["value"]


def read(path):
    """Samples of a file.

    Args:
      path: .json or .jsonl; whether it holds a list, JSON lines or objects behind one another is found out by looking.
    Returns: iterator of (where, Sample), or (where, ValueError) for what cannot be read; where names file and line.
    Raises: FileNotFoundError; ValueError if it is no text, or holds no object at all.
    """
    found = False
    for where, item in objects(path):
        found = True
        if not isinstance(item, ValueError):
            try:
                item = sample(item)
            except ValueError as error:
                item = error
        yield where, item
    if not found:
        raise ValueError(f"{path} holds no item")


def objects(path):
    """Objects of a JSON file, one after another: iterator of (where, value), or (where, ValueError).

    Lines end at "\\n" only, as U+2028 may stand inside a text. In a file of lines a broken line costs itself alone;
    elsewhere nothing can be read behind a break.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        try:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            yield from _lines(path, file) if _is_whole(first) else _stream(path, file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def _is_whole(line):
    """Whether a first line is an object by itself; "{" and "[" alone begin something longer."""
    return line.lstrip().startswith("{") and line.rstrip().endswith("}")


def _lines(path, file):
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except ValueError as error:
                yield f"{path}, line {number}", ValueError(f"no JSON ({error})")


def _stream(path, file):
    """A list, or pretty-printed objects behind one another."""
    decoder, text, place, line, size = json.JSONDecoder(), "", 0, 1, CHUNK
    while True:
        start = BETWEEN.match(text, place).end()
        line += text.count("\n", place, start)
        place = start
        try:
            value, end = decoder.raw_decode(text, place)
        except ValueError as error:
            more = file.read(size)
            if more:
                text, place, size = text[place:] + more, 0, 2 * size  # twice as much: no long object is decoded often
                continue
            if place < len(text):
                yield f"{path}, line {line}", ValueError(f"no JSON from here on ({error})")
            return
        yield f"{path}, line {line}", value
        line += text.count("\n", place, end)
        place, size = end, CHUNK


def write_line(file, sample):
    """Append one sample to an open text file, as one line."""
    file.write(json.dumps(sample.item(), ensure_ascii=False) + "\n")
