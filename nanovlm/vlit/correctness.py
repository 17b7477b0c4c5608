"""Whether responses are right, by rule, from what people have noted about the picture (votes.py asks a judge).

Rules decide what annotations can decide and say nothing else; the share they decide is the coverage. They read
questions after existence, number, colour, place and relation, answers of yes or no that contradict themselves, and
names of things with an attribute that none of them has.
"""

import re
from dataclasses import dataclass

from nanovlm.evaluation.protocols import parse_verdict
from nanovlm.vlit.words import COCO, COLORS, named, number, singular, tokens

ANYTHING = frozenset("object thing item shape figure".split())  # words for whatever is there
SYNONYMS = {
    "doughnut": "donut", "television": "tv", "sofa": "couch", "bike": "bicycle", "plane": "airplane", "phone": "cell phone",
    "cellphone": "cell phone", "motorbike": "motorcycle", "fridge": "refrigerator", "human": "person", "individual": "person",
}  # fmt: skip
DETERMINERS = frozenset("a an any the some this that these those".split())
SEEN = (
    r"(?:\s+(?:in (?:the|this) (?:image|picture|photo|scene)|visible|present|shown|there|here|at all|depicted))*\s*\??$"
)
EXISTENCE = re.compile(
    r"^(?:is|are) there (.+?)(?P<more>\s(?:on|in|at|near|under|behind|next|that|who|which|with|of)\s.*)?\??$"
)
SEE = re.compile(r"^(?:do|can) you see (.+?)(?P<more>\s(?:on|in|at|near|under|behind|next|that|who|with)\s.*)?\??$")
COUNT = re.compile(r"\bhow many (.+?)(?:\s(?:are|is|can|do|does|have|has|were|was|in|on|at|did|you|appear)\b.*)?\??$")
COLOR = re.compile(
    r"\bwhat(?:'s| is| are)? (?:the )?colou?r(?:s)?(?: of| is| are| do| does)? (.+?)(?:\s(?:have|has)\b.*)?\??$"
)
SHAPE = re.compile(r"\bwhat (?:shape is|is|kind of (?:thing|object) is) (the \w+ (?:object|shape|thing))\??$")
WHERE = re.compile(r"^where (?:is|are) (.+?)(?:\slocated|\spositioned)?\??$")
WHETHER = re.compile(r"^(?:is|are) (the .+?) (?:to the )?(left of|right of|above|below) (the .+?)\??$")
WHICH = re.compile(r"^what is (?:to the )?(left of|right of|above|below) (the .+?)\??$")
EITHER = re.compile(r"^(?:is|are) (the .+?) (\w+) or (\w+)\??$")
CONTRADICTION = re.compile(
    r"^\W*yes\b.*\b(?:there (?:is|are) (?:no|not)\b|there (?:isn't|aren't)\b|none of)", re.DOTALL
)


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

    @property
    def middle(self):
        """(x, y) of its box, shares of the picture."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Facts:
    """What is known about one picture.

    things: tuple of Thing, all that there is of the names in `names`. names: what annotators looked for, in the
      singular.
    crowds: names of which an unknown number is there.
    """

    things: tuple
    names: frozenset
    crowds: frozenset = frozenset()

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
        *before, last = words
        last = SYNONYMS.get(singular(last), singular(last))
        described = {word for thing in self.things for word in thing.words} | COLORS
        heads = {one.split(" ")[-1] for one in self.names}
        if not set(before) <= described or (last not in heads and last not in ANYTHING):
            return None
        meant = [thing for thing in self.things if last in ANYTHING or thing.name.split(" ")[-1] == last]
        if set(before) & COLORS and not all(thing.colors for thing in meant):
            return None  # colours were not noted
        return [thing for thing in meant if set(before) <= thing.words]


def facts_of(pictures):
    """What annotations say, by file name and by id.

    Args:
      pictures: iterable of annotations.Picture.
    Returns: {key: Facts}; keys are the file's name without folder, and the id.
    """
    pictures = list(pictures)
    names = frozenset(one.value.lower() for picture in pictures for one in picture.of_kind("object"))
    if names & COCO:
        names |= COCO  # its annotators looked for all 80
    found = {}
    for picture in pictures:
        noted = {}
        for one in picture.of_kind("attribute"):
            noted.setdefault(one.of, set()).update(tokens(one.value))
        things = tuple(
            Thing(one.value.lower(), frozenset(tokens(one.value)) | noted.get(one.id, set()), one.box)
            for one in picture.of_kind("object") if not one.is_crowd
        )  # fmt: skip
        crowds = frozenset(one.value.lower() for one in picture.of_kind("object") if one.is_crowd)
        facts = Facts(things, names, crowds)
        found |= dict.fromkeys(keys_of(picture), facts)
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
    keys = [name, *((str(int(digits[1])), f"{digits[1]}.jpg", digits[1]) if digits else ())]
    return next((table[key] for key in keys if key in table), None)


def verify(instruction, response, facts):
    """Whether a response is right, by rule: True, False, or None where no rule can tell."""
    question = re.sub(r"\s+", " ", instruction.lower().strip())
    question = re.sub(r"^(?:<image>\s*)|(?:\s+in the (?:image|picture|photo|scene))(?=\s*\?*$)", "", question)
    answer = response.lower().strip()
    if CONTRADICTION.search(answer):
        return False
    for rule in (_existence, _count, _color, _shape, _where, _whether, _which, _either, _attributes):
        verdict = rule(question, answer, facts)
        if verdict is not None:
            return verdict
    return None


def _existence(question, answer, facts):
    found = EXISTENCE.search(question) or SEE.search(question)
    said = parse_verdict(answer)
    if not found or said is None or re.match(r"not?\b", found[1]):  # "no" to "is there no dog": some mean there is one
        return None
    things = facts.find(re.sub(SEEN, "", found[1]))
    if things is None:
        return None
    crowd = facts.crowds & set(named(tokens(found[1]), facts.names))
    there = bool(things or crowd)
    wanted = number(found[1].split(" ")[0])
    if wanted is not None:  # "are there two dogs": of three, two are there as well, so nothing is said
        return None if crowd or found["more"] or len(things) > wanted else said == (len(things) == wanted)
    if found["more"] and (there or not said):  # "on the table": that something is there does not say that it is on it
        return None if there else True
    return said == there


def _count(question, answer, facts):
    found = COUNT.search(question)
    numbers = [value for word in tokens(answer) if (value := number(word)) is not None]
    if re.match(r"\W*(?:no|none)\b", answer):
        numbers = numbers or [0]
    things = facts.find(found[1]) if found and numbers else None
    if things is None or facts.crowds & set(named(tokens(found[1]), facts.names)):
        return None
    return numbers[0] == len(things)


def _color(question, answer, facts):
    found = COLOR.search(question)
    things = facts.find(found[1]) if found else None
    known = (
        {color for thing in things or () for color in thing.colors}
        if all(one.colors for one in things or ())
        else set()
    )
    said = set(tokens(answer)) & COLORS
    return said == known if known and said else None


def _shape(question, answer, facts):
    found = SHAPE.search(question)
    things = facts.find(found[1]) if found else None
    if not things:
        return None
    heads = {thing.name.split(" ")[-1] for thing in things}
    said = {singular(word) for word in tokens(answer)} & {name.split(" ")[-1] for name in facts.names}
    return said <= heads if said else None


def _where(question, answer, facts):
    found = WHERE.search(question)
    things = facts.find(found[1]) if found else None
    if not things or len(things) > 1 or things[0].box is None:
        return None
    x, y = things[0].middle
    words = set(tokens(answer))
    checks = [
        fits
        for said, fits in (
            ("left", x < 1 / 2), ("right", x > 1 / 2), ("top", y < 1 / 2), ("bottom", y > 1 / 2),
            ("center", 1 / 5 < x < 4 / 5 and 1 / 5 < y < 4 / 5), ("middle", 1 / 5 < x < 4 / 5 or 1 / 5 < y < 4 / 5),
        )
        if said in words
    ]  # fmt: skip
    return all(checks) if checks else None


def _beyond(one, relation, other):
    """Whether a thing lies left of another (right of, above, below): bool."""
    (x, y), (a, b) = one.middle, other.middle
    return {"left of": x < a, "right of": x > a, "above": y < b, "below": y > b}[relation]


def _pair(facts, *phrases):
    """The one thing that each phrase means, or None unless each means one with a box."""
    found = [facts.find(phrase) for phrase in phrases]
    return [one[0] for one in found] if all(one and len(one) == 1 and one[0].box for one in found) else None


def _whether(question, answer, facts):
    found, said = WHETHER.search(question), parse_verdict(answer)
    pair = _pair(facts, found[1], found[3]) if found and said is not None else None
    return None if pair is None else said == _beyond(pair[0], found[2], pair[1])


def _which(question, answer, facts):
    found = WHICH.search(question)
    pair = _pair(facts, answer, found[2]) if found and answer else None
    if pair is None:
        return False if found and answer and facts.find(answer) == [] else None
    return pair[0] != pair[1] and _beyond(pair[0], found[1], pair[1])


def _either(question, answer, facts):
    """ "is the star big or small?", where attributes say which."""
    found = EITHER.search(question)
    things = facts.find(found[1]) if found else None
    if not things or len(things) > 1:
        return None
    options = {found[2], found[3]}
    true, said = things[0].words & options, set(tokens(answer)) & options
    return said == true if len(true) == 1 and said else None


def _attributes(question, answer, facts):
    """Names with a colour before them, such as "red circle": all must be there, as far as colours were noted."""
    if parse_verdict(answer) is not None:
        return None
    words = [singular(word) for word in tokens(answer)]
    heads = {name.split(" ")[-1] for name in facts.names}
    pairs = {f"{one} {other}" for one, other in zip(words, words[1:]) if one in COLORS and other in heads}
    found = [facts.find(pair) for pair in pairs]
    return None if not found or None in found else all(found)
