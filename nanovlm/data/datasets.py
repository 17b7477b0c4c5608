"""Data sources from the command line: LLaVA's JSON or tar shards, alone or several listed in a JSON file.

The forms are in README.md of this folder; LLaVA's is that of arXiv:2304.08485 (github.com/haotian-liu/LLaVA,
docs/Finetune_Custom_Data.md).
"""

import gzip
import os
import re
from array import array
from dataclasses import replace
from pathlib import Path

import numpy
from tqdm import tqdm

from nanovlm.data.images import bare_names
from nanovlm.data.json_files import field, open_bytes, parse, read_at, records
from nanovlm.data.records import Changed, Turn, drawn, permutation, record_of
from nanovlm.data.tar_shards import TarShards
from nanovlm.data.video import FRAMES, Clip
from nanovlm.names import check_known

KEYS = {"reader": str, "path": str, "images": str, "prompts": list, "num_frames": int, "sampling": str}
QUESTION, MARKED = "{question}", "{question?}"  # the user's words; with a question mark
DATA = "data"  # name of the source that --data makes
LISTED = 20  # missing files, or items that cannot be used, named one by one in an error


class LlavaJson:
    """Source over a file of LLaVA's items, a list or one a line.

    Every item and the presence of every image are checked when the source is made. Only where an item stands in the
    file is kept: it is read again, and its images are decoded, when it is used.
    """

    def __init__(self, path, image_folder=None, name=None, seed=0, num_frames=FRAMES, sampling="uniform"):
        """
        Args:
          path: the file.
          image_folder: where relative image paths start; None = the folder of the file. Where it holds every picture,
            and none in the folders that the file names ("coco/train2017/1.jpg"), they are found by their bare names.
          name: name of the source in mixtures; None = the file's name without its ending.
          seed: int; shuffles every epoch anew, together with the epoch's number.
          num_frames, sampling: frames of every video, as in video.Clip; random ones are drawn anew at every showing.
        Raises: ValueError with file and line for everything malformed; FileNotFoundError for the file itself and for
          images; both name all at once.
        """
        self.path = Path(path)
        self.name, self.seed = self.path.stem if name is None else name, seed
        self.folder = self.path.parent if image_folder is None else Path(image_folder)
        self.clip, self.bare_names = Clip("", num_frames, sampling), False
        with open_bytes(path) as file:
            if isinstance(file, gzip.GzipFile):
                raise ValueError(f"{path}: packed by gzip; unpack it, so that any item can be read by itself")
        self.starts, self.stops = array("q"), array("q")  # bytes of every item in the file
        present, unusable = {}, []  # path of an image -> whether it is there
        for element in tqdm(records(path), desc=f"checking {self.name}", unit=" items", disable=None, delay=2):
            try:
                if isinstance(element.value, ValueError):
                    raise element.value
                record = self._record(element.value, element.where)
            except ValueError as error:
                unusable.append(str(error))
                continue
            for visual in record.visuals:
                exists = os.path.exists if isinstance(visual.frames, Clip) else os.path.isfile  # a film may be a folder
                for file in files_of(visual.frames):
                    present[file] = present.get(file) or exists(file)
            self.starts.append(element.start)
            self.stops.append(element.stop)
        if unusable:
            raise ValueError(f"{path}: {len(unusable)} item(s) cannot be used; this leaves them out and reports each: "
                             f"python -m nanovlm.data convert llava {path} OUT.jsonl{listed(unusable)}")
        if not self.starts:
            raise ValueError(f"{path}: holds no item; items with id, image and conversations were expected")
        missing = [path for path, there in present.items() if not there]
        self.bare_names = bool(missing) and bare_names(present, self.folder)
        if missing and not self.bare_names:
            found = f"{len(missing)} of {len(present)} images are missing"
            raise FileNotFoundError(f"{self.path}: {found}:{listed(missing)}")

    def __len__(self):
        return len(self.starts)

    def record(self, n):
        """The n-th record, n >= 0; every epoch of len(self) is shuffled anew.

        Raises: ValueError or OSError if the file is no longer what it was.
        """
        epoch, place = divmod(n, len(self))
        place = permutation(self.seed, epoch, length=len(self))[place]
        where = f"{self.path}, item {place + 1}"
        item = read_at(self.path, self.starts[place], self.stops[place], where)
        return drawn(self._record(item, where), (self.seed, n))

    def _record(self, item, where):
        bare = self.bare_names
        return record_of(item, where, self.clip, lambda name: str(self.folder / (Path(name).name if bare else name)))


READERS = {"llava": LlavaJson, "shards": TarShards}


def files_of(frames):
    """The files of a visual input of record_of: list of str; a film, which may be a folder of frames, is one."""
    source = frames.source if isinstance(frames, Clip) else frames
    return [source] if isinstance(source, str) else list(source)


def listed(lines):
    """The first of some lines, each on its own, and how many more there are: str."""
    more = f"\n  and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    return "".join(f"\n  {line}" for line in lines[:LISTED]) + more


def prompted(source, prompts, seed=0):
    """A source whose questions are put in other words: each user turn through one of the prompts, drawn per record.

    Instruction diversification as in Lynx, arXiv:2307.02469, Sec. 2.3.

    Args:
      source: any source.
      prompts: list of str, each with {question} or {question?} at most once, where the user's words go.
      seed: int.
    Raises: ValueError for a prompt with more of them; `record`, if one has words for which its prompt has no place.
    """
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip() or prompt.count(QUESTION) + prompt.count(MARKED) > 1:
            raise ValueError(f"prompt {prompt!r} must be words with {QUESTION} or {MARKED} at most once")

    def change(source, n):
        record, prompt = source.record(n), prompts[numpy.random.default_rng([seed, n]).integers(len(prompts))]
        where = f"record {record.id!r} of {source.name!r}"
        return replace(record, conversations=tuple(tuple(put(turn, prompt, where) for turn in turns)
                                                   for turns in record.conversations))

    return Changed(source, change)


def put(turn, prompt, where):
    """A user's turn through a prompt; blanks around the words and the visual inputs keep their places."""
    if turn.role != "user":
        return turn
    slot = next((slot for slot in (QUESTION, MARKED) if slot in prompt), None)
    before, after = prompt.split(slot) if slot else (prompt, "")
    spoken = [place for place, part in enumerate(turn.parts) if isinstance(part, str) and part.strip()]
    if spoken and slot is None:
        raise ValueError(f"{where}: it asks {turn.text.strip()!r}, for which the prompt {prompt!r} has no {QUESTION}")
    if not spoken:
        return Turn("user", (*(part for part in turn.parts if not isinstance(part, str)), (before + after).strip()))
    parts = list(turn.parts)
    parts[spoken[0]] = re.sub(r"^\s*", lambda blanks: blanks[0] + before, parts[spoken[0]])
    parts[spoken[-1]] = (asked if slot == MARKED else str.rstrip)(parts[spoken[-1]]) + after
    return Turn("user", tuple(parts))


def asked(question):
    """A question with its question mark, which some data sets leave out."""
    question = question.rstrip()
    return question if question.endswith("?") else f"{question.rstrip(' .!:;,')}?"


def listed_sources(path, seed=0, prompts=None):
    """The sources that a datasets file (see README.md) lists, and what is missing of them.

    Args:
      path: the file. seed: int, of every source's shuffling.
      prompts: dict name -> list of prompts, for datasets that have none in the file.
    Returns: (dict name -> source, dict name -> what of its files is missing), in the file's order.
    Raises: FileNotFoundError for the file itself; ValueError, naming file and dataset, for what is malformed.
    """
    path = Path(path)
    with open_bytes(path) as file:
        entries = parse(file.read(), str(path))
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: an object of name -> {{reader, path, images}}, with at least one, was expected")
    sources, missing = {}, {}
    for name, entry in entries.items():
        try:
            source = open_source(name, entry, path.parent, seed)
            ways = entry.get("prompts", (prompts or {}).get(name))
            sources[name] = prompted(source, ways, seed) if ways else source
        except FileNotFoundError as error:
            missing[name] = str(error)
        except ValueError as error:
            raise ValueError(f"{path}, dataset {name!r}: {error}") from error
    return sources, missing


def open_source(name, entry, folder, seed):
    """The source of an entry of a datasets file (see README.md) whose paths start at a folder. Raises: ValueError."""
    for key in ("reader", "path", *(entry if isinstance(entry, dict) else ())):
        check_known("unknown key", key, KEYS)
        field(entry, key, KEYS[key], "the entry")
    check_known("unknown reader", entry["reader"], READERS)
    options = {key: entry[key] for key in ("num_frames", "sampling") if key in entry}
    if "images" in entry:
        if entry["reader"] == "shards":
            raise ValueError(f"images {entry['images']}: shards hold their images; leave it out")
        options["image_folder"] = folder / entry["images"]
    return READERS[entry["reader"]](folder / entry["path"], name=name, seed=seed, **options)


def command_line_sources(data=None, images=None, datasets=None, seed=0, prompts=None):
    """What --data FILE --images FOLDER and --datasets FILE ask for, as `listed_sources`; that of --data is "data".

    Raises: as `listed_sources`; FileNotFoundError for what is missing of --data; ValueError for flags that exclude each
      other.
    """
    if images is not None and data is None:
        raise ValueError("--images is the image folder of --data FILE.json; give --data too")
    sources, missing = ({}, {}) if datasets is None else listed_sources(datasets, seed, prompts)
    if data is None:
        return sources, missing
    if DATA in sources.keys() | missing.keys():
        raise ValueError(f"{datasets}: the name {DATA!r} is taken by --data; call the dataset something else")
    reader = "shards" if Path(data).is_dir() or Path(data).suffix == ".tar" else "llava"
    entry = {"reader": reader, "path": str(data)} | ({} if images is None else {"images": str(images)})
    return {DATA: open_source(DATA, entry, Path(), seed), **sources}, missing
