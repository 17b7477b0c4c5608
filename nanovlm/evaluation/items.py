"""What a benchmark asks: items, read from files whose records may be broken and whose pictures may be missing."""

import gzip
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanovlm.data import images, json_files
from nanovlm.files import listing, replace_text


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str  # unique within the task
    question: str
    answers: tuple = ()  # what is right; str, records of annotators, or the place of the right option
    kind: str = ""  # class for the report
    group: str = ""  # what is counted together: the picture in MME, the question under rotation
    media: tuple = ()  # in order, each a path, the bytes of a file or a PIL image
    is_clip: bool = False  # it is one film, animation or folder of frames
    options: tuple[str, ...] = ()  # of a multiple choice
    extra: dict = field(default_factory=dict)  # further words of the prompt, by name
    submit: object = None  # the benchmark's own id

    @property
    def missing(self):
        """The media files that do not exist: list of Path."""
        return [one for one in self.media if isinstance(one, Path) and not one.exists()]


@dataclass
class Reading:
    """What came out of a benchmark's files: items, and problems: one line for every record that could not be read."""

    items: list = field(default_factory=list)
    problems: list = field(default_factory=list)

    def collect(self, records, make, word=""):
        """Add the items that `make(record, place)` gives; a record that breaks is a problem.

        records: (where, record) pairs, or with a word of what they are, plain records.
        """
        known = {item.id for item in self.items}
        for place, record in enumerate(records):
            where, record = (f"{word} {place}", record) if word else record
            try:
                if isinstance(record, Exception):
                    raise record
                item = make(record, place)
                if None in item.answers:  # of a test split
                    item = replace(item, answers=())
                if item.id in known:
                    raise ValueError(f"id {item.id!r} stands in the file twice")
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                words = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                self.problems.append(words if words.startswith(where) else f"{where}: {words}")
            else:
                known.add(item.id)
                self.items.append(item)
        return self

    def with_pictures(self, folder):
        """The same, pictures found in a folder by their bare names where that is safe (images.bare_names): Reading."""
        paths = {one for item in self.items for one in item.media if isinstance(one, Path)}
        if images.bare_names(paths, folder):
            bare = lambda one: Path(folder, one.name) if isinstance(one, Path) else one
            self.items = [replace(item, media=tuple(map(bare, item.media))) for item in self.items]
        return self


def short_names(paths):
    """The ends of some paths, as long as it takes to tell them apart: list of str. Raises: ValueError for one twice."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same twice among {', '.join(map(str, paths))}")


def write_json(path, value):
    """Write a JSON value that people read."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_text(path):
    """A text file, perhaps packed by gzip: str. Raises: ValueError naming the file."""
    try:
        with json_files.open_bytes(path) as file:
            return file.read().decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: no readable text ({error})") from error


def read_json(path):
    """A JSON file as it is. Raises: ValueError naming file and line."""
    return json_files.parse(read_text(path).encode(), path)


def read_records(path):
    """(where, record) pairs of a file, see data/json_files.py; an unreadable record is a ValueError in its place."""
    found = []
    try:
        for element in json_files.records(path):
            found.append((element.where, element.value))
    except ValueError as error:  # there is no going on behind it
        found.append((str(path), error))
    return found


def find(folder, *patterns, split=""):
    """The one file of a benchmark in a folder: Path. `folder` may be the file itself.

    patterns: tried in order, as of Path.glob. split: of several files, the one with this word in its name.
    Raises: FileNotFoundError; ValueError if several fit.
    """
    folder = Path(folder)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such file or folder; --data names the benchmark's files")
    for pattern in patterns:
        found = [path for path in listing(folder, pattern) if path.is_file()]
        found = [path for path in found if split and split in path.name] or found
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{folder} holds several files that fit: {names}; give one of them, or --split")
        if found:
            return found[0]
    raise FileNotFoundError(f"{folder} holds none of {', '.join(patterns)}")


def picture(folder, *names):
    """The first of several names under which a picture may lie in a folder: Path; the first of all if none does."""
    paths = [Path(folder, name) for name in names]
    return next((path for path in paths if path.exists()), paths[0])


def coco_picture(folder, image_id, split="val"):
    """Where a COCO picture may lie: by its number, with or without the prefix of 2014."""
    number = f"{int(image_id):012d}.jpg"
    old = f"COCO_{split}2014_{number}"
    return picture(folder, old, number, f"{split}2014/{old}", f"{split}2017/{number}")
