"""Words of instructions and answers: tokens, numbers, and names of things that can be seen, in singular and plural.

The lists stand in words.json: COCO's 80 categories with their supercategories ("groups") and what each is for ("uses",
in our own words), other words for them, and words that carry no content. A data set of another world brings its names
by `--lexicon`.
"""

import functools
import json
import re
from pathlib import Path


def load_table(name):
    """A JSON file beside this one."""
    return json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


_table = load_table("words.json")
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
NUMBERS = {word: number for number, word in enumerate(_table["numbers"].split())}
COLORS = frozenset(_table["colors"].split())
RELATIONS = _table["relations"]
STOP_WORDS = frozenset(" ".join(_table["stop words"]).split())
GROUP_OF = {name: group for group, names in _table["groups"].items() for name in names}  # category -> supercategory
COCO = frozenset(GROUP_OF)
LEXICON = COCO | frozenset(" ".join(_table["more objects"]).split())  # names of things, in the singular
USES = _table["uses"]  # category -> what follows on "A bicycle is"
SYNONYMS = _table["synonyms"]  # another word -> the category that it names
OTHER_NAMES = _table["other names"]  # category -> words that may name it, among other things
ALWAYS_SEVERAL = frozenset(_table["always several"])
SINGULARS = _table["irregular"]
PLURALS = {one: several for several, one in SINGULARS.items()}


def tokens(text):
    """Lower-case words and numbers of a text: list of str."""
    return WORD.findall(text.lower())


def content(text):
    """The words of a text that are no stop words: list of str."""
    return [word for word in tokens(text) if word not in STOP_WORDS]


@functools.lru_cache(maxsize=1 << 14)
def _singular_word(word):
    if word in SINGULARS:
        return SINGULARS[word]
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us")) else word


def singular(name):
    """A noun's singular, by rule and a short table: str. The last word of several is changed."""
    before, space, last = name.rpartition(" ")
    return SINGULARS.get(name) or f"{before}{space}{_singular_word(last)}"


def plural(name):
    """The plural of a category: str."""
    return PLURALS.get(name) or name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def number(word):
    """What a word counts: int, or None if it is no number."""
    return int(word) if word.isdecimal() else NUMBERS.get(word)


def counted(name, number):
    """A number of things in words: "one dog", "two dogs", "13 dogs", "several dogs"."""
    return f"{dict(enumerate(NUMBERS)).get(number, number)} {name if number == 1 else plural(name)}"


def one_of(name):
    """A thing with its article: "a dog", "an apple", "skis"."""
    return name if name in ALWAYS_SEVERAL else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


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
