"""Data sources from the command line: one LLaVA-style file, or a JSON file that lists several.

    {"captions": {"reader": "llava", "path": "captions.json", "images": "pictures",
                  "prompts": ["{question} Be brief."]},
     "dialogues": {"reader": "llava", "path": "dialogues.jsonl"},
     "pairs": {"reader": "shards", "path": "cc3m"}}

The reader "llava" takes a .json or .jsonl (llava_json.py), "shards" a folder of .tar files (tar_shards.py), which hold
their pictures. Relative paths start at the folder of that file. prompts (optional) are the ways to put a question; one is drawn per
record. num_frames and sampling ("uniform" or "random", both optional) say which frames of a video are shown.
"""

import dataclasses
import json
from pathlib import Path

import numpy

from nanovlm.data.llava_json import LlavaJson
from nanovlm.data.records import Turn
from nanovlm.data.tar_shards import TarShards
from nanovlm.names import nearest

READERS = ("llava", "shards")
KEYS = {"reader": str, "path": str, "images": str, "prompts": list, "num_frames": int, "sampling": str}
VIDEO_KEYS = ("num_frames", "sampling")
REQUIRED = ("reader", "path")
QUESTION = "{question}"
DATA = "data"  # name of the source that --data makes


class Prompted:
    """A source whose questions are put in other words: each user turn through one of the prompts, drawn per record."""

    def __init__(self, source, prompts, seed=0):
        """
        Args:
          source: any source.
          prompts: list of str, each with {question} once, where the user's words go.
          seed: int.
        Raises: ValueError for a prompt without {question}, or no prompt.
        """
        if not prompts:
            raise ValueError(f"prompts is empty; give at least one, for example {QUESTION!r}, or leave it out")
        for prompt in prompts:
            if not isinstance(prompt, str) or prompt.count(QUESTION) != 1:
                raise ValueError(f"prompt {prompt!r} must hold {QUESTION} exactly once")
        self.name, self.source, self.prompts, self.seed = source.name, source, tuple(prompts), seed

    def __len__(self):
        return len(self.source)

    def record(self, n):
        """The n-th record of the source, its questions put through a prompt that (seed, n) draws."""
        record = self.source.record(n)
        prompt = self.prompts[numpy.random.default_rng([self.seed, n]).integers(len(self.prompts))]
        conversations = (tuple(_put(turn, prompt) for turn in turns) for turns in record.conversations)
        return dataclasses.replace(record, conversations=tuple(conversations))


def read_datasets(path, seed=0):
    """The sources that a datasets file lists.

    Args:
      path: the JSON file, see the head of this module.
      seed: int, of every source's shuffling.
    Returns: dict name -> source, in the file's order.
    Raises: ValueError, naming file and dataset, for anything malformed or unknown; FileNotFoundError with everything
      that is missing, of all datasets at once.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such datasets file")
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: malformed JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{path}: an object of name -> {{reader, path, images}}, with at least one, was expected")
    for name, entry in listed.items():
        _check_entry(entry, f"{path}, dataset {name!r}")
    sources, missing = {}, []
    for name, entry in listed.items():
        try:
            sources[name] = _source(name, entry, path, seed)
        except FileNotFoundError as error:
            missing.append(f"dataset {name!r}: {error}")
    if missing:
        summary = f"{path}: {len(missing)} of {len(listed)} datasets are incomplete"
        raise FileNotFoundError("\n".join([summary, *missing]))
    return sources


def command_line_sources(data=None, images=None, datasets=None, seed=0):
    """What --data FILE --images FOLDER and --datasets FILE ask for.

    Args:
      data, images, datasets: paths or None.
      seed: int, of every source's shuffling.
    Returns: dict name -> source; the one of --data is called "data"; empty if nothing was asked for.
    Raises: as `read_datasets`; ValueError for images without data, or a listed dataset that takes the name "data" too.
    """
    if images is not None and data is None:
        raise ValueError("--images is the image folder of --data FILE.json; give --data too")
    sources = {} if datasets is None else read_datasets(datasets, seed)
    if data is None:
        return sources
    if DATA in sources:
        raise ValueError(f"{datasets}: the name {DATA!r} is taken by --data; call the dataset something else")
    return {DATA: LlavaJson(data, images, DATA, seed), **sources}


def _check_entry(entry, where):
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: an object with reader and path was expected, found {type(entry).__name__}")
    for key, value in entry.items():
        if key not in KEYS:
            raise ValueError(f"{where}: unknown key {key!r}.{nearest(key, KEYS)}")
        if not isinstance(value, KEYS[key]):
            raise ValueError(f"{where}: {key} must be a {KEYS[key].__name__}, found {value!r}")
    for key in REQUIRED:
        if key not in entry:
            raise ValueError(f"{where}: {key} is missing")
    if entry["reader"] not in READERS:
        raise ValueError(f"{where}: unknown reader {entry['reader']!r}.{nearest(entry['reader'], READERS)}")
    if entry["reader"] == "shards" and "images" in entry:
        raise ValueError(f"{where}: shards hold their images; leave out the key images")


def _source(name, entry, path, seed):
    videos = {key: entry[key] for key in VIDEO_KEYS if key in entry}
    if entry["reader"] == "shards":
        source = TarShards(path.parent / entry["path"], name, seed, **videos)
    else:
        folder = path.parent / entry["images"] if "images" in entry else None
        source = LlavaJson(path.parent / entry["path"], folder, name, seed, **videos)
    if "prompts" not in entry:
        return source
    try:
        return Prompted(source, entry["prompts"], seed)
    except ValueError as error:
        raise ValueError(f"{path}, dataset {name!r}: {error}") from error


def _put(turn, prompt):
    """A user's turn through a prompt; blanks around the words and the visual inputs keep their places."""
    if turn.role != "user":
        return turn
    before, after = prompt.split(QUESTION)
    parts = list(turn.parts)
    spoken = [place for place, part in enumerate(parts) if isinstance(part, str) and part.strip()]
    if not spoken:
        return Turn("user", (*(part for part in parts if not isinstance(part, str)), (before + after).strip()))
    first, last = spoken[0], spoken[-1]
    words = parts[first].lstrip()
    parts[first] = parts[first][: len(parts[first]) - len(words)] + before + words
    parts[last] = parts[last].rstrip() + after
    return Turn("user", tuple(parts))
