"""Records: pictures and conversations about them, and how an item of a data set becomes one.

A record is some visual inputs and one or more independent conversations about them. A source gives the n-th record for
any n >= 0, the same one every time, so that the integer n is all that a checkpoint has to keep of it.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from nanovlm.data.json_files import field
from nanovlm.data.video import Clip
from nanovlm.names import check_known

ROLES = {"human": "user", "user": "user"} | dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant")
SHOWN = ("image", "image_url")  # types of the parts of a message that are pictures


@dataclass(frozen=True)
class Visual:
    """One image or one whole clip.

    key: identity; visual inputs of equal key are the same picture and are encoded once per batch.
    frames: the pictures in order, or the paths (or images.Members) where `images.load` finds them; one frame is a still
      image. Or a video.Clip, whose frames are decoded when used.
    view: augment.View through which training sees it; None = the stage's fit.
    grid: (rows, columns) of a picture whose frames are its tiles and the whole, see tiles.cut; None = not cut.
    """

    key: str
    frames: tuple[Image.Image | str | Path, ...] | Clip
    view: Any = None
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Turn:
    """What one speaker says.

    role: "user" or "assistant".
    parts: text, and integers i where visual input i of the record stands.
    """

    role: str
    parts: tuple[str | int, ...]

    @property
    def text(self):
        """The words alone: str."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def visuals(self):
        """The visual inputs alone, by number: list of int."""
        return [part for part in self.parts if not isinstance(part, str)]


@dataclass(frozen=True)
class Record:
    """Some visual inputs and independent conversations about them; each conversation becomes its own row.

    kinds: question type of each conversation, for evaluation; empty = not stated.
    rows: (where, templates.Row) of its conversations, where a worker has written them ahead (batching.Preparation).
    regions: for each conversation (x, y), the centre of what it speaks of as shares of the picture's width and height,
      or None where it speaks of the whole; empty = all of the whole. Contrastive stages look there.
    Raises: ValueError if kinds or regions and conversations differ in number, or a part names a visual input that does
      not exist.
    """

    id: str
    visuals: tuple[Visual, ...]
    conversations: tuple[tuple[Turn, ...], ...]
    kinds: tuple[str, ...] = ()
    rows: tuple = ()
    regions: tuple = ()

    def __post_init__(self):
        if not self.conversations or {len(self.kinds), len(self.regions)} - {0, len(self.conversations)}:
            raise ValueError(f"record {self.id!r} has {len(self.conversations)} conversations, {len(self.kinds)} kinds "
                             f"and {len(self.regions)} regions; each conversation has one, or none has")
        named = [visual for turns in self.conversations for turn in turns for visual in turn.visuals]
        if not {*named} <= {*range(len(self.visuals))}:
            raise ValueError(f"record {self.id!r} mentions visual inputs {named}; it has {len(self.visuals)}")


@dataclass(frozen=True)
class Changed:
    """A source of as many records as another, and of its name, that gives others.

    source: with name, length and record(n). change: function (source, n) -> Record n.
    """

    source: Any
    change: Callable

    @property
    def name(self):
        """The source's."""
        return self.source.name

    def __len__(self):
        return len(self.source)

    def record(self, n):
        """Record n of the source, changed."""
        return self.change(self.source, n)


def check_order(roles, last="assistant", where=""):
    """Raise ValueError, behind `where`, unless user and assistant alternate and `last` ends; a lone reply is fine."""
    alternate = all(one != other for one, other in zip(roles, roles[1:]))
    if not roles or not alternate or roles[-1] != last or (len(roles) > 1 and roles[0] != "user"):
        raise ValueError(f"{where}the turns are by {', '.join(roles) or 'nobody'}; user and assistant must alternate, "
                         f"from the user to the {last}")


@functools.lru_cache(maxsize=64)
def permutation(*seed, length):
    """The order of one epoch: int64[length], a function of the arguments. seed: integers, the epoch among them."""
    return numpy.random.default_rng(seed).permutation(length)


def drawn(record, seed):
    """The record with the random frames of this showing: seed, a tuple of integers, decides them."""
    visuals = list(record.visuals)
    for place, one in enumerate(visuals):
        if isinstance(one.frames, Clip) and one.frames.sampling == "random":
            visuals[place] = replace(one, key=f"{one.key}, frames of {seed}", frames=replace(one.frames, seed=seed))
    return replace(record, visuals=tuple(visuals))


def record_of(item, where, clip, locate):
    """One item in LLaVA's form (see README.md) as a Record. Raises: ValueError naming the place for anything malformed.

    where: "FILE, line N", for messages. clip: video.Clip, all but its source.
    locate: function(name of a picture or film in the item) -> what images.load or video.Clip opens.
    """
    field(item, "id", (str, int), where)
    where = f"{where} (id {item['id']!r})"
    said = with_system(spoken(item, where))

    def find(name):
        if name.startswith("data:"):
            raise ValueError(f"{where}: a picture in base64 ({name[:30]}…); write it to a file, and name that")
        return locate(name.replace("\\", "/"))  # which Windows writes the other way round

    shown = {"<image>": [Visual(str(path), (path,)) for path in map(find, files_in(item, "image", where))]}
    found = files_in(item, "video", where)
    if found:  # elsewhere <video> is a word
        sources = [find(one) if isinstance(one, str) else tuple(map(find, one)) for one in found]
        shown["<video>"] = [Visual(str(source), replace(clip, source=source)) for source in sources]
    waiting = {placeholder: iter(visuals) for placeholder, visuals in shown.items()}
    said = in_front(said, {name: len(visuals) for name, visuals in shown.items()})
    turns, visuals, asked = [], [], Counter()
    for place, (speaker, words) in enumerate(said, start=1):
        here = f"{where}, turn {place}"
        role = role_of(speaker, words, ROLES, here)
        if not words.strip():
            raise ValueError(f"{here}: the {role} says nothing; remove the item or give the turn its text")
        parts = [words]  # what the assistant writes is text, whatever it looks like
        if role == "user":
            parts = [piece for piece in re.split(f"({'|'.join(shown)})", words) if piece]
            for n, piece in enumerate(parts):
                if piece in shown:
                    asked[piece] += 1
                    parts[n] = len(visuals)
                    visuals.append(next(waiting[piece], None))
        turns.append(Turn(role, tuple(parts)))
    check_order([turn.role for turn in turns], where=f"{where}: ")
    for placeholder, given in shown.items():
        if asked[placeholder] != len(given):
            kind = placeholder.strip("<>")
            raise ValueError(f"{where}: {asked[placeholder]} placeholder(s) {placeholder} in the human turns but "
                             f"{len(given)} {kind}(s); every {kind} needs its {placeholder} where it stands")
    kinds = (field(item, "kind", str, where),) if "kind" in item else ()
    return Record(str(item["id"]), tuple(visuals), (tuple(turns),), kinds)


def is_empty(value):
    """Whether a field of an item says nothing: null, "", [], a table's NaN, or a list of these."""
    return value is None or value == "" or value != value or isinstance(value, list) and all(map(is_empty, value))


def files_in(item, name, where):
    """What an item lists under "image" or "video": list of file names, of a video perhaps of lists of its frames."""
    value = next((item[key] for key in (name, f"{name}s") if not is_empty(item.get(key))), None)
    if value is None and name == "image":  # OpenAI's and Qwen's messages name it where it is shown
        contents = [turn.get("content") for turn in item.get("messages", item.get("conversations"))]
        parts = [part for content in contents if isinstance(content, list) for part in content if part["type"] in SHOWN]
        named = [part.get(part["type"]) for part in parts]
        value = [one["url"] if isinstance(one, dict) and "url" in one else one for one in named]
    if is_empty(value):
        return []
    several = isinstance(value, list) and (name == "image" or list in map(type, value))
    found = value if several else [value]
    for one in found:
        for path in one if name == "video" and isinstance(one, list) and one else [one]:
            if not isinstance(path, str) or not path or "://" in path:
                raise ValueError(f"{where}: field {name!r} must be a path on this machine, found {path!r:.100}")
    return found


def spoken(item, where):
    """What is said in an item, in LLaVA's form or OpenAI's, perhaps in parts: list of (lower-case speaker, words)."""
    said = []
    for place, turn in enumerate(field(item, ("messages", "conversations"), list, where), start=1):
        here = f"{where}, turn {place}"
        speaker, words = field(turn, ("role", "from"), str, here), field(turn, ("content", "value"), (str, list), here)
        if isinstance(words, list):
            words = "".join("<image>" if field(part, "type", str, here) in SHOWN else field(part, "text", str, here)
                            for part in words)
        said.append((speaker.lower(), words))
    return said


def with_system(said):
    """What is said, the system's first words in front of the first question (or they are it): as `spoken`."""
    start = next((place for place, (speaker, _) in enumerate(said) if speaker != "system"), len(said))
    words, rest = [text for _, text in said[:start] if text.strip()], said[start:]
    if words and rest and ROLES.get(rest[0][0]) == "user":
        words.append(rest.pop(0)[1])
    return [("human", "\n\n".join(words)), *rest] if words else rest


def in_front(said, shown):
    """What is said, pictures that no question mentions, {placeholder: number}, in front of the first: as `spoken`."""
    asked = [place for place, (speaker, _) in enumerate(said) if ROLES.get(speaker) == "user"]
    text = "".join(said[place][1] for place in asked)
    front = [name for name, number in shown.items() if name not in text for _ in range(number)]
    if front and asked:
        speaker, words = said[asked[0]]
        said[asked[0]] = speaker, "\n".join([*front, words])
    return said


def role_of(speaker, words, roles, where):
    """The role of a speaker, {speaker: role}, who says words. Raises: ValueError."""
    check_known(f"{where}: unknown speaker", speaker, roles)
    try:
        words.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        raise ValueError(f"{where}: not text: {error}") from error
    return roles[speaker]
