"""The questions of scenes and easy-VQA in many wordings (as Lynx does, arXiv:2307.02469, Sec. 2.3).

wordings.json holds for each kind of question how the data sets ask it, as patterns whose groups fill the wordings; some
wordings to train with; and others, written before anything was trained, for tests alone.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy

from nanovlm.data.records import Changed, Turn
from nanovlm.data.scene_questions import with_article

WORDINGS = json.loads(Path(__file__).with_name("wordings.json").read_text())


def reword(question, words, rng):
    """A question in other words. words: "train" or "held_out". Raises: ValueError for a question of no known kind."""
    for kind in WORDINGS.values():
        for pattern in kind["asked"]:
            if found := re.fullmatch(pattern, question):
                slots, ways = found.groupdict(), kind[words]
                return ways[rng.integers(len(ways))].format(**slots, a=with_article(slots.get("thing", "")))
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
