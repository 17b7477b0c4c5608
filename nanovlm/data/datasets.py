"""Data sources from the command line: one LLaVA-style file or folder of tar shards, or a JSON file that lists several.

    {"captions": {"reader": "llava", "path": "captions.json", "images": "pictures",
                  "prompts": ["{question} Be brief."]},
     "dialogues": {"reader": "llava", "path": "dialogues.jsonl"},
     "pairs": {"reader": "shards", "path": "cc3m"}}

The reader "llava" takes a .json or .jsonl (llava_json.py), "shards" a folder of .tar files (tar_shards.py), which hold
their pictures. Relative paths start at the folder of that file. prompts (optional) are the ways to put a question; one
is drawn per record. {question} in them stands for the user's words, {question?} for the same with a question mark if it
lacks one; a prompt with neither asks about pictures that come without words (captions, labels). A recipe may bring
prompts for data sets of its mixture; those of the file come first, and [] means none. num_frames and sampling
("uniform" or "random", both optional) say which frames of a video are shown.
"""

import dataclasses
import json
from pathlib import Path

import numpy

from nanovlm.data.llava_json import LlavaJson
from nanovlm.data.convert import asked
from nanovlm.data.records import Turn
from nanovlm.data.tar_shards import TarShards
from nanovlm.names import nearest

READERS = ("llava", "shards")
KEYS = {"reader": str, "path": str, "images": str, "prompts": list, "num_frames": int, "sampling": str}
VIDEO_KEYS = ("num_frames", "sampling")
REQUIRED = ("reader", "path")
QUESTION, MARKED = "{question}", "{question?}"  # the user's words; with a question mark
DATA = "data"  # name of the source that --data makes


class Prompted:
    """A source whose questions are put in other words: each user turn through one of the prompts, drawn per record.

    Instruction diversification as in Lynx, arXiv:2307.02469, Sec. 2.3.
    """

    def __init__(self, source, prompts, seed=0):
        """
        Args:
          source: any source.
          prompts: list of str, each with {question} or {question?} at most once, where the user's words go.
          seed: int.
        Raises: ValueError for a prompt with more of them, or no prompt.
        """
        if not prompts:
            raise ValueError(f"prompts is empty; give at least one, for example {QUESTION!r}, or leave it out")
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt.strip() or prompt.count(QUESTION) + prompt.count(MARKED) > 1:
                raise ValueError(f"prompt {prompt!r} must be words with {QUESTION} or {MARKED} at most once")
        self.name, self.source, self.prompts, self.seed = source.name, source, tuple(prompts), seed

    def __len__(self):
        return len(self.source)

    def record(self, n):
        """The n-th record of the source, its questions put through a prompt that (seed, n) draws.

        Raises: ValueError if it has words of its own for which the prompt has no place.
        """
        record = self.source.record(n)
        prompt = self.prompts[numpy.random.default_rng([self.seed, n]).integers(len(self.prompts))]
        try:
            conversations = [tuple(_put(turn, prompt) for turn in turns) for turns in record.conversations]
        except ValueError as error:
            raise ValueError(f"record {record.id!r} of {self.name!r}: {error}") from error
        return dataclasses.replace(record, conversations=tuple(conversations))


def read_datasets(path, seed=0):
    """The sources of a datasets file: dict name -> source, in the file's order.

    Args and errors: as `listed_sources`; FileNotFoundError with everything that is missing, of all datasets at once.
    """
    sources, missing = listed_sources(path, seed)
    if missing:
        summary = f"{path}: {len(missing)} of {len(sources) + len(missing)} datasets are incomplete"
        raise FileNotFoundError("\n".join([summary, *(f"dataset {name!r}: {why}" for name, why in missing.items())]))
    return sources


def listed_sources(path, seed=0, prompts=None):
    """The sources that a datasets file lists, and what is missing of them.

    Args:
      path: the JSON file, see the head of this module.
      seed: int, of every source's shuffling.
      prompts: dict name -> list of prompts, for datasets that have none in the file.
    Returns: (dict name -> source, dict name -> what of its files is missing), in the file's order.
    Raises: FileNotFoundError for the file itself; ValueError, naming file and dataset, for anything malformed or unknown.
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
    sources, missing = {}, {}
    for name, entry in listed.items():
        try:
            sources[name] = _source(name, entry, path, seed, (prompts or {}).get(name, []))
        except FileNotFoundError as error:
            missing[name] = str(error)
    return sources, missing


def command_line_sources(data=None, images=None, datasets=None, seed=0, prompts=None):
    """What --data FILE --images FOLDER and --datasets FILE ask for.

    Args:
      data, images, datasets: paths or None.
      seed: int, of every source's shuffling.
      prompts: as in `listed_sources`.
    Returns: as `listed_sources`; the source of --data is called "data"; empty if nothing was asked for.
    Raises: as `listed_sources`; FileNotFoundError for what is missing of --data; ValueError for images without data, or
      a listed dataset that takes the name "data" too.
    """
    if images is not None and data is None:
        raise ValueError("--images is the image folder of --data FILE.json; give --data too")
    sources, missing = ({}, {}) if datasets is None else listed_sources(datasets, seed, prompts)
    if data is None:
        return sources, missing
    if DATA in sources.keys() | missing.keys():
        raise ValueError(f"{datasets}: the name {DATA!r} is taken by --data; call the dataset something else")
    if not (Path(data).is_dir() or Path(data).suffix == ".tar"):
        return {DATA: LlavaJson(data, images, DATA, seed), **sources}, missing
    if images is not None:
        raise ValueError(f"--images {images}: shards hold their images; leave it out")
    return {DATA: TarShards(data, DATA, seed), **sources}, missing


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


def _source(name, entry, path, seed, prompts):
    videos = {key: entry[key] for key in VIDEO_KEYS if key in entry}
    if entry["reader"] == "shards":
        source = TarShards(path.parent / entry["path"], name, seed, **videos)
    else:
        folder = path.parent / entry["images"] if "images" in entry else None
        source = LlavaJson(path.parent / entry["path"], folder, name, seed, **videos)
    prompts = entry.get("prompts", prompts)
    if not prompts:
        return source
    try:
        return Prompted(source, prompts, seed)
    except ValueError as error:
        raise ValueError(f"{path}, dataset {name!r}: {error}") from error


def _put(turn, prompt):
    """A user's turn through a prompt; blanks around the words and the visual inputs keep their places."""
    if turn.role != "user":
        return turn
    slot = next((slot for slot in (QUESTION, MARKED) if slot in prompt), None)
    before, after = prompt.split(slot) if slot else (prompt, "")
    parts = list(turn.parts)
    spoken = [place for place, part in enumerate(parts) if isinstance(part, str) and part.strip()]
    if spoken and slot is None:
        raise ValueError(f"it asks {turn.text.strip()!r}, for which the prompt {prompt!r} has no {QUESTION}")
    if not spoken:
        return Turn("user", (*(part for part in parts if not isinstance(part, str)), (before + after).strip()))
    first, last = spoken[0], spoken[-1]
    words = parts[first].lstrip()
    parts[first] = parts[first][: len(parts[first]) - len(words)] + before + words
    words = parts[last].rstrip()
    parts[last] = (asked(words) if slot == MARKED else words) + after
    return Turn("user", tuple(parts))
