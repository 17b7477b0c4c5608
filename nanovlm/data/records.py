"""Records: pictures and conversations about them, and the reader of LLaVA's JSON.

A record is some visual inputs and one or more independent conversations about them. A source gives the n-th record for
any n >= 0, the same one every time, so that the integer n is all that a checkpoint has to keep of it.

File format of the reader: LLaVA, arXiv:2304.08485, as in github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from nanovlm.names import nearest

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
MISSING_SHOWN = 20  # missing files named one by one in the error


@dataclass(frozen=True)
class Visual:
    """One image or one whole clip.

    key: identity; visual inputs of equal key are the same picture and are encoded once per batch.
    frames: the pictures in order, or the paths where `images.load` finds them; one frame is a still image.
    view: augment.View through which training sees it; None = the stage's fit.
    """

    key: str
    frames: tuple[Image.Image | str | Path, ...]
    view: Any = None

    def __post_init__(self):
        if not self.frames:
            raise ValueError(f"visual input {self.key!r} has no frame; an image is one frame, a clip several")


@dataclass(frozen=True)
class Turn:
    """What one speaker says.

    role: "user" or "assistant".
    parts: text, and integers i where visual input i of the record stands.
    """

    role: str
    parts: tuple[str | int, ...]

    def __post_init__(self):
        if self.role not in ("user", "assistant"):
            raise ValueError(f"unknown role {self.role!r}.{nearest(self.role, ('user', 'assistant'))}")

    @property
    def text(self):
        """The words alone, without the visual inputs: str."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Record:
    """Some visual inputs and independent conversations about them; each conversation becomes its own row.

    kinds: question type of each conversation, for evaluation; empty = not stated.
    Raises: ValueError if kinds and conversations differ in number, or a part names a visual input that does not exist.
    """

    id: str
    visuals: tuple[Visual, ...]
    conversations: tuple[tuple[Turn, ...], ...]
    kinds: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.conversations:
            raise ValueError(f"record {self.id!r} has no conversation")
        if self.kinds and len(self.kinds) != len(self.conversations):
            counts = f"{len(self.kinds)} kinds for {len(self.conversations)} conversations"
            raise ValueError(f"record {self.id!r} has {counts}")
        for part in (part for turns in self.conversations for turn in turns for part in turn.parts):
            if not isinstance(part, str) and not 0 <= part < len(self.visuals):
                raise ValueError(f"record {self.id!r} mentions visual input {part}; it has {len(self.visuals)}")


def check_order(roles, last="assistant"):
    """Raise ValueError unless user and assistant take turns and `last` speaks last; one assistant turn alone is fine.

    roles: sequence of "user" | "assistant".
    """
    if not roles:
        raise ValueError("the conversation is empty; it needs at least one turn")
    for place, (one, other) in enumerate(zip(roles, roles[1:]), start=1):
        if one == other:
            raise ValueError(f"turns {place} and {place + 1} are both by the {one}; user and assistant must alternate")
    if roles[-1] != last:
        raise ValueError(f"the conversation ends with the {roles[-1]}; it must end with the {last}")
    if len(roles) > 1 and roles[0] != "user":
        raise ValueError("the conversation begins with the assistant; a dialogue begins with the user")


@functools.lru_cache(maxsize=64)
def permutation(seed, epoch, length):
    """Order of one epoch: int64[length], a function of its arguments alone."""
    return numpy.random.default_rng([seed, epoch]).permutation(length)


class LlavaJson:
    """Source over a LLaVA-style .json (a list) or .jsonl (one item a line) file.

    An item: {"id": …, "image": "a.jpg" or ["a.jpg", …] (absent in text-only items),
    "conversations": [{"from": "human" or "gpt", "value": "<image>\\nWhat?"}, …], "kind": optional question type}.
    The file and the presence of every image are checked when the source is made; images are decoded when used.
    """

    def __init__(self, path, image_folder=None, name=None, seed=0):
        """
        Args:
          path: the .json or .jsonl file.
          image_folder: where relative image paths start; None = the folder of the file.
          name: name of the source in mixtures; None = the file's name without its ending.
          seed: int; shuffles every epoch anew, together with the epoch's number.
        Raises: ValueError with file and line or item for anything malformed; FileNotFoundError for the file itself
          and for images, all of them at once.
        """
        self.path = Path(path)
        self.name = self.path.stem if name is None else name
        self.seed = seed
        folder = self.path.parent if image_folder is None else Path(image_folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such image folder (wanted by {self.path})")
        self.records = [_read(item, folder, where) for where, item in _items(self.path)]
        if not self.records:
            raise ValueError(f"{self.path}: holds no item; items with id, image and conversations were expected")
        _check_images(self.path, self.records)

    def __len__(self):
        return len(self.records)

    def record(self, n):
        """The n-th record, n >= 0; every epoch of len(self) is shuffled anew."""
        epoch, place = divmod(n, len(self))
        return self.records[permutation(self.seed, epoch, len(self))[place]]


def _items(path):
    """(where, item) for every item of the file."""
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: the reader knows .json (one list) and .jsonl (one item a line), not {path.suffix!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the LLaVA-style .json or .jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark, as Windows editors write it, is no error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    if path.suffix == ".jsonl":
        # not splitlines(), which would also cut at U+2028 inside a string
        lines = [(line, content) for line, content in enumerate(text.split("\n"), start=1) if content.strip()]
        return [(f"{path}, line {line}", _parse(content, path, line)) for line, content in lines]
    items = _parse(text, path, 1)
    if not isinstance(items, list):
        raise ValueError(f"{path}: a list of items was expected, found {type(items).__name__}")
    return [(f"{path}, item {number}", item) for number, item in enumerate(items, start=1)]


def _parse(text, path, first_line):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}, line {line}, column {error.colno}: malformed JSON: {error.msg}") from error


def _read(item, folder, where):
    if not isinstance(item, dict):
        found = type(item).__name__
        raise ValueError(f"{where}: an object with id, image and conversations was expected, found {found}")
    for field, kinds in (("id", (str, int)), ("conversations", (list,))):
        _field(item, field, kinds, where)
    where = f"{where} (id {item['id']!r})"
    paths = _image_paths(item, folder, where)
    turns = tuple(_turn(turn, f"{where}, turn {place}") for place, turn in enumerate(item["conversations"], start=1))
    try:
        check_order([role for role, _ in turns])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    placeholders = sum(len(pieces) - 1 for _, pieces in turns)
    if placeholders != len(paths):
        raise ValueError(
            f"{where}: {placeholders} placeholder(s) {PLACEHOLDER} in the human turns but {len(paths)} image(s); "
            f"every image needs its {PLACEHOLDER} where it stands"
        )
    kinds = (_field(item, "kind", (str,), where),) if "kind" in item else ()
    visuals = tuple(Visual(path, (path,)) for path in paths)
    return Record(str(item["id"]), visuals, (_number(turns),), kinds)


def _field(item, field, kinds, where):
    if field not in item:
        raise ValueError(f"{where}: field {field!r} is missing; found {', '.join(map(repr, item)) or 'nothing'}")
    if not isinstance(item[field], kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{where}: field {field!r} must be a {names}, found {item[field]!r}")
    return item[field]


def _image_paths(item, folder, where):
    """The item's images as paths: list of str; empty in text-only items."""
    if item.get("image") is None:
        return []
    images = item["image"] if isinstance(item["image"], list) else [item["image"]]
    for image in images:
        if not isinstance(image, str) or not image:
            raise ValueError(f"{where}: field 'image' must be a path or a list of paths, found {image!r}")
    return [str(folder / image) for image in images]


def _turn(turn, where):
    """(role, pieces of text between the placeholders)."""
    if not isinstance(turn, dict):
        raise ValueError(f"{where}: an object with from and value was expected, found {type(turn).__name__}")
    speaker, value = (_field(turn, field, (str,), where) for field in ("from", "value"))
    if speaker not in ROLES:
        raise ValueError(f"{where}: unknown speaker {speaker!r}.{nearest(speaker, ROLES)}")
    if not value.strip():
        raise ValueError(f"{where}: the {ROLES[speaker]} says nothing; remove the item or give the turn its text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        raise ValueError(f"{where}: not text: {error}") from error
    # what the assistant writes is text, whatever it looks like
    return ROLES[speaker], value.split(PLACEHOLDER) if ROLES[speaker] == "user" else [value]


def _number(turns):
    """Turns with the visual inputs numbered in order of appearance."""
    number, numbered = 0, []
    for role, pieces in turns:
        parts = [pieces[0]]
        for piece in pieces[1:]:
            parts += [number, piece]
            number += 1
        numbered.append(Turn(role, tuple(part for part in parts if part != "")))
    return tuple(numbered)


def _check_images(path, records):
    """Raise FileNotFoundError that names the missing images of all records at once."""
    wanted = dict.fromkeys(visual.key for record in records for visual in record.visuals)
    missing = [image for image in wanted if not os.path.isfile(image)]
    if missing:
        shown = "".join(f"\n  {image}" for image in missing[:MISSING_SHOWN])
        rest = f"\n  and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(wanted)} images are missing:{shown}{rest}")
