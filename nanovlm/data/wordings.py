"""The questions of scenes and easy-VQA in many wordings (as Lynx does, arXiv:2307.02469, Sec. 2.3).

wordings.json holds for each kind of question how the data sets ask it, as patterns whose groups fill the wordings; some
wordings to train with, and what may stand around them; and others, written before anything was trained, for tests alone.

`said_of` tells what stands in the squares of a picture, one word each for size, colour, shape and place.

rehearsal.json holds questions about anything and what SmolLM2-135M-Instruct replied to them before it was touched: a
model that goes on giving these replies forgets less (arXiv:1606.09282 calls it learning without forgetting).
"""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy

from nanovlm.data import easy_vqa
from nanovlm.data.records import Changed, Record, Turn
from nanovlm.data.scene_questions import REGIONS, with_article
from nanovlm.data.scenes import COLORS, SHAPES, SIZES, pick

REHEARSAL = json.loads(Path(__file__).with_name("rehearsal.json").read_text())  # [question, reply]
WORDINGS = json.loads(Path(__file__).with_name("wordings.json").read_text())
AROUND = WORDINGS.pop("around")  # what stands before and behind a question in training, three times in ten each
SAID = (tuple(SIZES), tuple(dict.fromkeys((*COLORS, *easy_vqa.COLORS))), tuple(dict.fromkeys((*SHAPES, *easy_vqa.SHAPES))),
        tuple(place for row in REGIONS for place in row))  # what a square says of a thing, one of each
WORDS = "", *itertools.chain(*SAID)  # the first is said where no thing is


def reword(question, words, rng):
    """A question in other words. words: "train" or "held_out". Raises: ValueError for a question of no known kind."""
    for kind in WORDINGS.values():
        for pattern in kind["asked"]:
            if found := re.fullmatch(pattern, question):
                slots = found.groupdict()
                text = pick(rng, kind[words]).format(**slots, a=with_article(slots.get("thing", "")))
                if words != "train":
                    return text
                before, behind = (pick(rng, ways) if rng.random() < 0.3 else "" for ways in AROUND)
                return f"{before} {text} {behind}".strip()
    raise ValueError(f"{question!r} fits no pattern of wordings.json; add its kind there")


def reworded(record, words, seed):
    """A Record whose questions are put in other words, each drawn anew. seed: tuple of int. Else as `reword`."""
    rng = numpy.random.default_rng(seed)

    def put(turn):
        return Turn("user", tuple(part if isinstance(part, int) else reword(part, words, rng) for part in turn.parts))

    talks = tuple(tuple(put(turn) if turn.role == "user" else turn for turn in talk) for talk in record.conversations)
    return dataclasses.replace(record, conversations=talks)


def diversified(source, seed=0):
    """A source whose questions are asked in the wordings to train with."""
    return Changed(source, lambda source, n: reworded(source.record(n), "train", (seed, n)))


def said_of(record, side):
    """What squares say of the things whose centres are there: {place in a grid: [place in WORDS or -1 = unknown] * 4}."""
    names, found = {}, {}
    for (x, y), (*_, name) in zip(record.regions, record.conversations):
        names.setdefault(int(side * y) * side + int(side * x), []).extend(name.text.partition(" at the ")[::2])
    for square, told in names.items():
        words = sorted({*" ".join(told).split(), *told}, key=len)  # "top right" comes behind "right"
        found[square] = [[-1, *(WORDS.index(word) for word in words if word in kind)][-1] for kind in SAID]
    return found


def remind(source, n):
    """Record n of REHEARSAL, every second one beside the picture of record n of `source`."""
    question, answer = REHEARSAL[n % len(REHEARSAL)]
    visuals = source.record(n).visuals if n % 2 else ()
    turns = Turn("user", (*range(len(visuals)), question)), Turn("assistant", (answer,))
    return Record(f"rehearsal/{n}", visuals, (turns,), ("rehearsal",))


def rehearsed(source):
    """A source of REHEARSAL with the pictures of another source."""
    return Changed(source, remind)
