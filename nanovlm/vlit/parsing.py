"""Conversations out of what a generator wrote.

The system prompt asks for {"User": "…", "AI": "…", "User": "…", "AI": "…"}: one object whose keys repeat, of which a
plain JSON reader keeps the last pair alone. Language models also write several objects or a list of them, fences around
them, {"role", "content"} turns, other names for the speakers, trailing commas, unescaped quotes, plain "User: …" lines,
and text that ends in the middle. What can be understood is kept, and said in `notes`; the rest has a name.
"""

import json
import re
from dataclasses import dataclass

from nanovlm.vlit.words import load_table

ROLES = load_table("patterns.json")["speakers"]
WORDS = {"true": "Yes", "false": "No", "null": ""}  # of values that are no text
WHO, WHAT = ("role", "from", "speaker"), ("content", "value", "text")  # keys of a turn as an object of its own
NAMES = "|".join(sorted(ROLES, key=len, reverse=True))
KEY = re.compile(rf"""["'“]\s*({NAMES})\s*["'”]\s*:\s*""", re.IGNORECASE)  # in what is meant to be JSON
LABEL = re.compile(rf"^[\s*#]*({NAMES})[\s*]*:[\s*]*", re.IGNORECASE | re.MULTILINE)  # elsewhere
FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
CLOSED = re.compile(r"""["'”]\s*[,}\]]*\s*$""")


class Unparsed(ValueError):
    """Why no conversation could be found in a text: few different messages, to be counted."""


@dataclass(frozen=True)
class Conversation:
    """turns: ("user" | "assistant", text) alternately, the user first. notes: what was unusual about its form."""

    turns: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


def _of_object(pairs):
    """The turns in the (key, value) pairs of a JSON object, repeated keys and all: tuple of (role, words)."""
    named = {key.strip().lower(): value for key, value in pairs}
    who, what = (next((named[key] for key in keys if key in named), None) for keys in (WHO, WHAT))
    role = ROLES.get(str(who).strip().lower())
    if role and isinstance(what, str):
        return ((role, what.strip()),)
    return tuple(turn for key, value in pairs for turn in _turns(value, ROLES.get(key.strip().lower())))


def _turns(value, role=None):
    """Turns in a parsed value, which a speaker's name may stand before: iterable of (role, words)."""
    if isinstance(value, tuple):  # of `_of_object`
        return value
    if isinstance(value, list):
        return [turn for inner in value for turn in _turns(inner)]
    return [(role, WORDS.get(json.dumps(value), str(value)).strip())] if role else []


DECODER = json.JSONDecoder(object_pairs_hook=_of_object, strict=False)  # strict would refuse line breaks in strings


def parse(text):
    """The conversation in a generator's answer: Conversation. Raises: Unparsed."""
    bare = FENCE.sub("", text).strip()
    turns, notes = _from_json(bare)
    if not turns or notes:
        turns, notes = max((turns, notes), _from_labels(bare), key=lambda found: len(found[0]))
    if not turns:
        raise Unparsed("no conversation" if bare else "empty answer")
    roles = [role for role, _ in turns]
    for role, other in zip(roles, roles[1:]):
        if role == other:
            raise Unparsed("two questions in a row" if role == "user" else "two answers in a row")
    if roles[-1] == "user":  # the length limit came before the answer
        turns, notes = turns[:-1], [*notes, "cut"]
    if not turns:
        raise Unparsed("no answer")
    if roles[0] == "assistant":
        raise Unparsed("begins with the answer")
    if not all(words for _, words in turns):
        raise Unparsed("empty turn")
    return Conversation(tuple(turns), tuple(dict.fromkeys(notes)))


def _from_json(text):
    """(turns, notes) of all JSON values in a text; broken ones are stepped over and noted."""
    turns, notes, place = [], [], 0
    while opening := re.search(r"[{\[]", text[place:]):
        place += opening.start()
        try:
            value, place = DECODER.raw_decode(text, place)
        except json.JSONDecodeError:
            place, notes = place + 1, ["malformed"]
        else:
            turns += _turns(value)
    return turns, notes


def _from_labels(text):
    """(turns, notes) by the speakers' names alone, as keys of broken JSON or at the beginning of lines."""
    quoted = text.find('{"') >= 0 or text.startswith(("{", "["))
    labels = list((KEY if quoted else LABEL).finditer(text))
    if not labels:
        return [], []
    ends = [label.start() for label in labels[1:]] + [len(text)]
    pieces = [(ROLES[label[1].lower()], text[label.end() : end].strip()) for label, end in zip(labels, ends)]
    turns = [(role, _unquoted(piece) if quoted else piece.removesuffix("===").strip()) for role, piece in pieces]
    if not quoted:
        return turns, ["plain text"]
    if CLOSED.search(pieces[-1][1]):
        return turns, ["malformed"]
    return turns[:-1], ["malformed", "cut"]  # a sentence that stops in the middle is no answer


def _unquoted(piece):
    """A piece without the punctuation of JSON around it, and with its escapes undone."""
    piece = re.sub(r"[\s,}\]{\[]*$", "", piece)
    piece = piece[1:] if piece[:1] in "\"'“" else piece
    piece = piece[:-1] if piece[-1:] in "\"'”" and not piece.endswith('\\"') else piece
    return piece.replace('\\"', '"').replace("\\n", "\n").replace("\\'", "'").strip()
