"""Records: pictures and conversations about them.

A record is some visual inputs and one or more independent conversations about them. A source gives the n-th record for
any n >= 0, the same one every time, so that the integer n is all that a checkpoint has to keep of it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from nanovlm.data.video import Clip
from nanovlm.names import nearest


@dataclass(frozen=True)
class Visual:
    """One image or one whole clip.

    key: identity; visual inputs of equal key are the same picture and are encoded once per batch.
    frames: the pictures in order, or the paths (or images.Members) where `images.load` finds them; one frame is a still
      image. Or a video.Clip, whose frames are decoded when used.
    view: augment.View through which training sees it; None = the stage's fit.
    """

    key: str
    frames: tuple[Image.Image | str | Path, ...] | Clip
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
    rows: (where, templates.Row) of its conversations, where a worker has written them ahead for one stage (prepare.py).
    regions: for each conversation (x, y), the centre of what it speaks of as shares of the picture's width and height, or
      None where it speaks of the whole; empty = all of the whole. Contrastive stages look there.
    Raises: ValueError if kinds or regions and conversations differ in number, a region's centre lies outside the picture,
      or a part names a visual input that does not exist.
    """

    id: str
    visuals: tuple[Visual, ...]
    conversations: tuple[tuple[Turn, ...], ...]
    kinds: tuple[str, ...] = ()
    rows: tuple = ()
    regions: tuple = ()

    def __post_init__(self):
        if not self.conversations:
            raise ValueError(f"record {self.id!r} has no conversation")
        if self.kinds and len(self.kinds) != len(self.conversations):
            counts = f"{len(self.kinds)} kinds for {len(self.conversations)} conversations"
            raise ValueError(f"record {self.id!r} has {counts}")
        if self.regions and len(self.regions) != len(self.conversations):
            counts = f"{len(self.regions)} regions for {len(self.conversations)} conversations"
            raise ValueError(f"record {self.id!r} has {counts}")
        for region in self.regions:
            if region is not None and not (len(region) == 2 and all(0 <= share < 1 for share in region)):
                raise ValueError(f"record {self.id!r} has the region {region}; its centre is two shares from 0 to below 1")
        for part in (part for turns in self.conversations for turn in turns for part in turn.parts):
            if not isinstance(part, str) and not 0 <= part < len(self.visuals):
                raise ValueError(f"record {self.id!r} mentions visual input {part}; it has {len(self.visuals)}")


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
