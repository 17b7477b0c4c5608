"""Whether responses are right, by rule, from what people have noted about the picture (a judge:
indicators.judge_pairs).

Rules decide what annotations can decide and say nothing else; the share they decide is the coverage. They read
questions after existence, number, colour, place and relation, answers of yes or no that contradict themselves, and
names of things with an attribute that none of them has.
"""

import re
from dataclasses import dataclass

from nanovlm.evaluation.protocols import parse_verdict
from nanovlm.vlit.annotations import middle
from nanovlm.vlit.words import COCO, COLORS, SYNONYMS, load_table, named, number, singular, tokens

ANYTHING = frozenset("object thing item shape figure".split())  # words for whatever is there
DETERMINERS = frozenset("a an any the some this that these those".split())
SEEN = re.compile(
    r"(?:\s+(?:in (?:the|this) (?:image|picture|photo|scene)|visible|present|shown|there|here|at all|depicted))*\s*\??$"
)
CONTRADICTION = re.compile(r"^\W*yes\b.*\b(?:there (?:(?:is|are) not?|isn't|aren't)\b|none of)", re.DOTALL)
QUESTIONS = {kind: re.compile(form) for kind, form in load_table("patterns.json")["questions"].items()}


@dataclass(frozen=True)
class Thing:
    """One annotated object. words: its name's, and its attributes. box: left, top, right, bottom as shares, or None."""

    name: str
    words: frozenset
    box: tuple | None = None

    @property
    def colors(self):
        """The colours noted about it: set of str; an orange's name is none."""
        return self.words & COLORS - {self.name}


@dataclass(frozen=True)
class Facts:
    """What is known about one picture."""

    things: tuple  # of Thing, all that there is of the names below
    names: frozenset  # what annotators looked for, in the singular
    crowds: frozenset = frozenset()  # names of which an unknown number is there

    @property
    def heads(self):
        """The last words of the names: set of str."""
        return set(map(head, self.names))

    def is_crowd(self, phrase):
        """Whether a phrase names something of which an unknown number is there."""
        return bool(self.crowds & set(named(tokens(phrase), self.names)))

    def find(self, phrase):
        """Things that a noun phrase may mean: list of Thing; None if annotators did not look for it.

        "red circles" are the things with both words; "red objects" all that are red; "people" every person.
        """
        words = [word for word in tokens(phrase) if word not in DETERMINERS and number(word) is None]
        if not words:
            return None
        whole = singular(" ".join(words))
        name = SYNONYMS.get(whole, whole)
        if name in self.names:
            return [thing for thing in self.things if thing.name == name]
        before, last = set(words[:-1]), singular(words[-1])
        last = SYNONYMS.get(last, last)
        described = COLORS.union(*(thing.words for thing in self.things))
        if not before <= described or last not in self.heads | ANYTHING:
            return None
        meant = [thing for thing in self.things if last in ANYTHING or head(thing.name) == last]
        if before & COLORS and not all(thing.colors for thing in meant):
            return None  # colours were not noted
        return [thing for thing in meant if before <= thing.words]

    def one(self, phrase):
        """The only Thing that a phrase may mean, or None."""
        found = self.find(phrase)
        return found[0] if found and len(found) == 1 else None


def head(name):
    """The last word of a name."""
    return name.split(" ")[-1]


def facts_of(pictures):
    """What annotations.Pictures say: {key: Facts}; keys are the file's name without folder, and the id."""
    pictures = list(pictures)
    names = frozenset(one.value.lower() for picture in pictures for one in picture.of_kind("object"))
    if names & COCO:
        names |= COCO  # its annotators looked for all 80
    found = {}
    for picture in pictures:
        things, objects = [], picture.of_kind("object")
        for one in (one for one in objects if not one.is_crowd):
            words = tokens(" ".join(note.value for note in (one, *picture.attributes(one))))
            things.append(Thing(one.value.lower(), frozenset(words), one.box))
        crowds = frozenset(one.value.lower() for one in objects if one.is_crowd)
        found |= dict.fromkeys(keys_of(picture), Facts(tuple(things), names, crowds))
    return found


def keys_of(picture):
    """What a picture may be called: list of str, its id and its file's name without folder."""
    return [picture.id] + ([picture.file_name.rpartition("/")[2]] if picture.file_name else [])


def known(sample, table):
    """What a table says about a sample's one picture, or None. table: {key as of `keys_of`: anything}.

    COCO_val2014_000000525439.jpg and 000000525439.jpg are the same picture, number 525439.
    """
    if len(sample.images) != 1:
        return None
    name = sample.images[0].rpartition("/")[2]
    digits = re.search(r"(\d+)\.\w+$", name)
    keys = (name, str(int(digits[1])), f"{digits[1]}.jpg", digits[1]) if digits else (name,)
    return next((table[key] for key in keys if key in table), None)


def verify(instruction, response, facts):
    """Whether a response is right, by rule: True, False, or None where no rule can tell."""
    question = re.sub(r"\s+", " ", instruction.lower().strip())
    question = re.sub(r"^(?:<image>\s*)|(?:\s+in the (?:image|picture|photo|scene))(?=\s*\?*$)", "", question)
    answer = response.lower().strip()
    if CONTRADICTION.search(answer):
        return False
    matches = ((kind, pattern.search(question)) for kind, pattern in QUESTIONS.items())
    verdicts = (RULES[kind](found, answer, facts) for kind, found in matches if found)
    return next((verdict for verdict in verdicts if verdict is not None), None)


# Rules: (match of the question, answer, Facts) -> True, False or None


def _existence(found, answer, facts):
    said = parse_verdict(answer)
    if said is None or re.match(r"not?\b", found[1]):  # "no" to "is there no dog": some mean there is one
        return None
    things = facts.find(SEEN.sub("", found[1]))
    if things is None:
        return None
    crowd = facts.is_crowd(found[1])
    there = bool(things or crowd)
    wanted = number(found[1].split(" ")[0])
    if wanted is not None:  # "are there two dogs": of three, two are there as well, so nothing is said
        return None if crowd or found["more"] or len(things) > wanted else said == (len(things) == wanted)
    if found["more"] and (there or not said):  # "on the table": that something is there does not say that it is on it
        return None if there else True
    return said == there


def _count(found, answer, facts):
    numbers = [value for word in tokens(answer) if (value := number(word)) is not None]
    numbers = numbers or [0] * bool(re.match(r"\W*(?:no|none)\b", answer))
    things = facts.find(found[1])
    return None if things is None or not numbers or facts.is_crowd(found[1]) else numbers[0] == len(things)


def _color(found, answer, facts):
    things, said = facts.find(found[1]) or [], set(tokens(answer)) & COLORS
    noted = set().union(*(thing.colors for thing in things)) if all(thing.colors for thing in things) else set()
    return said == noted if noted and said else None


def _shape(found, answer, facts):
    heads = {head(thing.name) for thing in facts.find(found[1]) or ()}
    said = set(map(singular, tokens(answer))) & facts.heads
    return said <= heads if heads and said else None


def _where(found, answer, facts):
    thing = facts.one(found[1])
    if thing is None or thing.box is None:
        return None
    x, y = middle(thing.box)
    inside = [1 / 5 < side < 4 / 5 for side in (x, y)]
    fits = {"left": x < 1 / 2, "right": x > 1 / 2, "top": y < 1 / 2, "bottom": y > 1 / 2,
            "center": all(inside), "middle": any(inside)}  # fmt: skip
    said = fits.keys() & set(tokens(answer))
    return all(fits[word] for word in said) if said else None


def _beyond(one, relation, other):
    """Whether a thing lies left of another (right of, above, below): bool, or None unless both have boxes."""
    if not (one and other and one.box and other.box):
        return None
    (x, y), (a, b) = middle(one.box), middle(other.box)
    return {"left of": x < a, "right of": x > a, "above": y < b, "below": y > b}[relation]


def _whether(found, answer, facts):
    said, truth = parse_verdict(answer), _beyond(facts.one(found[1]), found[2], facts.one(found[3]))
    return None if said is None or truth is None else said == truth


def _which(found, answer, facts):
    truth = _beyond(facts.one(answer), found[1], facts.one(found[2]))
    return False if truth is None and answer and facts.find(answer) == [] else truth


def _either(found, answer, facts):
    """ "is the star big or small?", where attributes say which."""
    thing, options, said = facts.one(found[1]), {found[2], found[3]}, set(tokens(answer))
    true = thing.words & options if thing else ()
    return said & options == true if len(true) == 1 and said & options else None


def _attributes(found, answer, facts):
    """Names with a colour before them, such as "red circle": all must be there, as far as colours were noted."""
    if parse_verdict(answer) is not None:
        return None
    words = [singular(word) for word in tokens(answer)]
    pairs = {f"{one} {other}" for one, other in zip(words, words[1:]) if one in COLORS and other in facts.heads}
    things = [facts.find(pair) for pair in pairs]
    return None if not things or None in things else all(things)


RULES = {  # kind of QUESTIONS -> rule; the first that can tell decides
    "existence": _existence, "count": _count, "color": _color, "shape": _shape, "where": _where, "whether": _whether,
    "which": _which, "either": _either, "anything": _attributes,
}  # fmt: skip
