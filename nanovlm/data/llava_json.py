"""The reader of LLaVA's JSON: items with pictures or videos and a conversation become records.

File format: LLaVA, arXiv:2304.08485, as in github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md.
"""

import os
import re
from array import array
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from nanovlm.data.json_files import PACKED, read_at, records
from nanovlm.data.records import Record, Turn, Visual, check_order, permutation
from nanovlm.data.video import Clip, SAMPLINGS
from nanovlm.names import nearest

PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
MISSING_SHOWN = 20  # missing files named one by one in the error
FRAMES = 5  # of a video, unless told otherwise; as in Lynx


class LlavaJson:
    """Source over a LLaVA-style .json (a list) or .jsonl (one item a line) file.

    An item: {"id": …, "image": "a.jpg" or ["a.jpg", …] (absent in text-only items), "conversations":
    [{"from": "human" or "gpt", "value": "<image>\\nWhat?"}, …], "kind": optional question type}. Beside or instead of
    image, "video": a film, an animation or a folder of frames; or the list of its frames; or a list of such lists, for
    several. <video> stands where each is shown.
    Every item and the presence of every image are checked when the source is made. Only where an item stands in the file
    is kept: it is read again, and its images are decoded, when it is used.
    """

    def __init__(self, path, image_folder=None, name=None, seed=0, num_frames=FRAMES, sampling="uniform"):
        """
        Args:
          path: the .json or .jsonl file.
          image_folder: where relative image paths start; None = the folder of the file.
          name: name of the source in mixtures; None = the file's name without its ending.
          seed: int; shuffles every epoch anew, together with the epoch's number.
          num_frames, sampling: frames of every video, as in video.load; random ones are drawn anew at every showing.
        Raises: ValueError with file and line or item for anything malformed; FileNotFoundError for the file itself
          and for images, all of them at once.
        """
        self.path = Path(path)
        self.name = self.path.stem if name is None else name
        self.seed = seed
        folder = self.path.parent if image_folder is None else Path(image_folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such image folder (wanted by {self.path})")
        self.folder, self.clip = folder, clip_for(num_frames, sampling)
        self.starts, self.stops = array("q"), array("q")  # bytes of every item in the file
        wanted = {}  # path of an image -> whether it is there
        for element in tqdm(items_of(self.path), desc=f"checking {self.name}", unit=" items", disable=None, delay=2):
            record = self._record(element.value, element.where)
            for visual in record.visuals:
                check_presence(visual, wanted)
            self.starts.append(element.start)
            self.stops.append(element.stop)
        if not self.starts:
            raise ValueError(f"{self.path}: holds no item; items with id, image and conversations were expected")
        say_missing(self.path, wanted)

    def __len__(self):
        return len(self.starts)

    def record(self, n):
        """The n-th record, n >= 0; every epoch of len(self) is shuffled anew.

        Raises: ValueError or OSError if the file is no longer what it was.
        """
        epoch, place = divmod(n, len(self))
        place = permutation(self.seed, epoch, len(self))[place]
        where = f"{self.path}, item {place + 1}"
        item = read_at(self.path, self.starts[place], self.stops[place], where)
        return drawn(self._record(item, where), (self.seed, n))

    def _record(self, item, where):
        return record_of(item, where, self.clip, self._locate)

    def _locate(self, name):
        """The path of a picture or film; items name it with folders that may not be there: str."""
        path, bare = self.folder / name, self.folder / Path(name).name
        return str(bare if bare != path and not path.exists() and bare.exists() else path)


def clip_for(num_frames, sampling):
    """What every video of a source is, but for its frames: Clip. Raises: ValueError for values that none can have."""
    if sampling not in SAMPLINGS or num_frames < 1:
        raise ValueError(f"videos need num_frames of at least 1 and a sampling of {SAMPLINGS}")
    return Clip("", num_frames, sampling)


def items_of(path):
    """The items of a LLaVA-style file: json_files.Element each.

    Raises: ValueError for a file of another kind, or naming file and line for what is no JSON.
    """
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: the reader knows .json (one list) and .jsonl (one item a line), not {path.suffix!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the LLaVA-style .json or .jsonl")
    with open(path, "rb") as file:
        if file.read(2) == PACKED:
            raise ValueError(f"{path}: packed by gzip; unpack it, so that any item can be read by itself")
    for element in records(path):
        if isinstance(element.value, ValueError):
            raise element.value
        yield element


def drawn(record, seed):
    """The record with the random frames of this showing: seed decides them."""
    visuals = [
        replace(visual, key=f"{visual.key}, frames of {seed}", frames=replace(visual.frames, seed=seed))
        if isinstance(visual.frames, Clip) and visual.frames.sampling == "random" else visual
        for visual in record.visuals
    ]  # fmt: skip
    return replace(record, visuals=tuple(visuals)) if visuals else record


def record_of(item, where, clip, locate):
    """One item as a record.

    Args:
      item: what stands in the file. where: str, for messages. clip: video.Clip, all but its source.
      locate: function(name of a picture or film in the item) -> what images.load or video.load opens.
    Returns: Record. Raises: ValueError naming the place for anything malformed.
    """
    if not isinstance(item, dict):
        found = type(item).__name__
        raise ValueError(f"{where}: an object with id, image and conversations was expected, found {found}")
    for field, kinds in (("id", (str, int)), ("conversations", (list,))):
        _field(item, field, kinds, where)
    where = f"{where} (id {item['id']!r})"
    frames = [locate(name) for name in _names(item, where)]
    visuals = {PLACEHOLDER: [Visual(str(frame), (frame,)) for frame in frames]}
    if item.get("video") is not None:  # elsewhere <video> is a word
        clips = [replace(clip, source=source) for source in _videos(item["video"], locate, where)]
        visuals[VIDEO_PLACEHOLDER] = [Visual(str(clip.source), clip) for clip in clips]
    said = enumerate(item["conversations"], start=1)
    turns = [_turn(turn, f"{where}, turn {place}", visuals) for place, turn in said]
    try:
        check_order([role for role, _ in turns])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for placeholder, shown in visuals.items():
        placeholders = sum(pieces.count(placeholder) for role, pieces in turns if role == "user")
        kind = placeholder.strip("<>")
        if placeholders != len(shown):
            raise ValueError(
                f"{where}: {placeholders} placeholder(s) {placeholder} in the human turns but {len(shown)} {kind}(s); "
                f"every {kind} needs its {placeholder} where it stands"
            )
    kinds = (_field(item, "kind", (str,), where),) if "kind" in item else ()
    numbered, ordered = _number(turns, visuals)
    return Record(str(item["id"]), ordered, (numbered,), kinds)


def _field(item, field, kinds, where):
    if field not in item:
        raise ValueError(f"{where}: field {field!r} is missing; found {', '.join(map(repr, item)) or 'nothing'}")
    if not isinstance(item[field], kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{where}: field {field!r} must be a {names}, found {item[field]!r}")
    return item[field]


def _names(item, where):
    """The names of the item's images: list of str; empty in text-only items."""
    if item.get("image") is None:
        return []
    images = item["image"] if isinstance(item["image"], list) else [item["image"]]
    for image in images:
        if not isinstance(image, str) or not image:
            raise ValueError(f"{where}: field 'image' must be a path or a list of paths, found {image!r}")
    return images


def _videos(video, locate, where):
    """The item's videos, each as Clip.source has it."""
    several = isinstance(video, list) and any(isinstance(one, list) for one in video)
    found = []
    for one in video if several else [video]:
        frames = one if isinstance(one, list) else [one]
        if not frames or not all(isinstance(frame, str) and frame for frame in frames):
            raise ValueError(f"{where}: field 'video' must be a path or a list of frames or of such, found {video!r}")
        places = tuple(map(locate, frames))
        found.append(places[0] if isinstance(one, str) else places)
    return found


def _turn(turn, where, placeholders):
    """(role, pieces): text, and the placeholders between."""
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
    if ROLES[speaker] == "assistant":  # what the assistant writes is text, whatever it looks like
        return ROLES[speaker], [value]
    return ROLES[speaker], re.split(f"({'|'.join(placeholders)})", value)


def _number(turns, visuals):
    """(turns, visual inputs), both in order of appearance: the visual inputs are numbered, each kind taken in order."""
    waiting = {placeholder: iter(shown) for placeholder, shown in visuals.items()}
    numbered, ordered = [], []
    for role, pieces in turns:
        parts = []
        for piece in pieces:
            if role == "user" and piece in waiting:
                parts.append(len(ordered))
                ordered.append(next(waiting[piece]))
            elif piece:
                parts.append(piece)
        numbered.append(Turn(role, tuple(parts)))
    return tuple(numbered), tuple(ordered)


def check_presence(visual, wanted):
    """Note for every file of a Visual whether it is there: in wanted, dict path -> bool."""
    alone = isinstance(visual.frames, Clip) and isinstance(visual.frames.source, str)  # a film, which may be a folder
    source = visual.frames.source if isinstance(visual.frames, Clip) else visual.frames
    for path in [source] if alone else source:
        if path not in wanted:
            wanted[path] = (os.path.exists if alone else os.path.isfile)(path)


def say_missing(path, wanted):
    """Raise FileNotFoundError that names the missing images of all records at once."""
    missing = [image for image, there in wanted.items() if not there]
    if missing:
        shown = "".join(f"\n  {image}" for image in missing[:MISSING_SHOWN])
        rest = f"\n  and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(wanted)} images are missing:{shown}{rest}")
