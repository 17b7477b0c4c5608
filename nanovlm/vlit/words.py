"""Words of instructions and answers: tokens, what is no content, numbers, and names of things that can be seen.

The lists are this project's own, but for COCO's 80 categories; a data set of another world brings its names by
`--lexicon`.
"""

import functools
import re

from nanovlm.vlit.categories import GROUP_OF

WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
NUMBERS = {
    word: n for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}
COLORS = frozenset(
    "red green blue yellow purple orange teal pink black white gray grey brown beige tan gold silver maroon".split()
)
RELATIONS = (
    "left of", "right of", "above", "below", "under", "behind", "in front of", "next to", "beside", "between", "on top of",
    "inside", "near", "to the left", "to the right", "around", "across from", "underneath", "over", "at the top", "at the bottom",
)  # fmt: skip
STOP_WORDS = frozenset(
    """a about above after again all also am an and any are aren't as at be because been before being below between both but
    by can can't could couldn't did didn't do does doesn't doing don't down during each either else ever every few for from
    further get give given gives had has hasn't have haven't having he her here hers herself him himself his how i if in into
    is isn't it it's its itself just let let's like likely make may me might more most must my myself near no nor not now of
    off on once one only or other our out over own please same she should shown so some such tell than that that's the their
    them then there there's these they this those through to too under until up upon us use used using very was wasn't we
    were what what's when where where's which while who whom whose why will with within without won't would you your yours
    image picture photo photograph scene""".split()
)
COCO = frozenset(GROUP_OF)
MORE_OBJECTS = frozenset(
    """man woman boy girl child baby people crowd family player face hand head hair eye arm leg shirt dress hat shoe glove
    jacket helmet glasses bag box table desk shelf door window wall floor ceiling roof building house kitchen room bathroom
    street road sidewalk sign pole light lamp fence bridge tree grass flower plant leaf field hill mountain sky cloud sun
    beach ocean water river lake wave snow sand rock food plate dish fruit vegetable bread cheese meat drink glass coffee
    tea wine beer phone computer screen camera picture-frame mirror curtain pillow blanket towel bike motorbike vehicle van
    wheel tire plane ship ball bat racket board toy doll animal puppy kitten fish duck logo text word letter number brand
    circle square triangle star cross ring rectangle shape object""".split()
)
IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "knives": "knife", "leaves": "leaf",
    "buses": "bus", "benches": "bench", "dishes": "dish", "boxes": "box", "skis": "skis", "scissors": "scissors",
    "glasses": "glasses", "sheep": "sheep", "grass": "grass", "mice": "mouse", "couches": "couch", "beaches": "beach",
    "sandwiches": "sandwich", "toothbrushes": "toothbrush", "wine glasses": "wine glass", "crosses": "cross",
}  # fmt: skip


def tokens(text):
    """Lower-case words and numbers of a text: list of str."""
    return WORD.findall(text.lower())


def content(text):
    """The words of a text that are no stop words: list of str."""
    return [word for word in tokens(text) if word not in STOP_WORDS]


@functools.lru_cache(maxsize=1 << 14)
def _singular_word(word):
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us")):
        return word[:-1]
    return word


def singular(name):
    """A noun's singular, by rule and a short table: str. The last word of several is changed."""
    before, space, last = name.rpartition(" ")
    return IRREGULAR.get(name) or f"{before}{space}{_singular_word(last)}"


def number(word):
    """What a word counts: int, or None if it is no number."""
    if word.isdecimal():
        return int(word)
    return NUMBERS.get(word)


def named(words, known):
    """The names of things among words: list of str in the singular, those of two words first.

    words: list of str, lower-case. known: set of names of one or two words, in the singular.
    """
    found, rest = [], list(words)
    for place in range(len(words) - 1):
        pair = singular(f"{words[place]} {words[place + 1]}")
        if pair in known and rest[place] is not None:
            found.append(pair)
            rest[place : place + 2] = None, None
    return found + [name for word in rest if word is not None and (name := singular(word)) in known]
