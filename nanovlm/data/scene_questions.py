"""What is said about scenes: captions, questions, texts without pictures, and scenes from a user's words.

Every question has exactly one right, short answer by construction: what is ambiguous, or too close to call by eye,
is not asked. Training never names a held-out colour-shape pair, not even to say that it is absent.
"""

import itertools
import re
from string import ascii_uppercase as LETTERS

import numpy as np

from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.scenes import (
    ALPHABET, COLORS, HELD_OUT, in_held_out_fifth, MIN_CANVAS, pick, place_object, place_string, render,
    sample_scene, sample_string, Scene, SHAPES, SIZES, SPLITS, symbol_centres, TRAIN_PAIRS,
)
from nanovlm.names import check_known

REGION_MARGIN = 2.0  # pixels an object's centre keeps from the borders of its ninth of the picture
RELATION_MARGIN = 4.0  # pixels between two centres before one is called left of or above the other
OPEN_SHARE = 0.75  # of the relations drawn; open questions are ambiguous more often: half of those asked are open
REGIONS = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
OPPOSITE_RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE_RELATIONS)
RANKS = ("first", "second", "third")  # of the symbols of a text

CAPTION_PROMPTS = ("describe the image.", "what is in the image?", "what do you see?", "give a caption for the image.")
SHORT_CAPTION_PROMPTS = ("list the objects.", "name the objects in the image.", "what objects are there?")
NAME_PROMPT = "name one thing in the image."
READING_PROMPTS = ("what does the text say?", "what is the text?", "read the text.")


def with_article(words):
    """The words with their article: "a red circle", "an orange star"."""
    return f"an {words}" if words.startswith("orange") else f"a {words}"


def place_of(thing, canvas):
    """The ninth of the picture that holds a SceneObject's centre: a word of REGIONS."""
    return REGIONS[int(3 * thing.y / canvas)][int(3 * thing.x / canvas)]


def offset(thing, relation, anchor):
    """Pixels by which one SceneObject is left of (right of, above, below) another; negative = on the other side."""
    distance = thing.x - anchor.x if relation in ("left of", "right of") else thing.y - anchor.y
    return -distance if relation in ("left of", "above") else distance


def caption(scene):
    """Every object from left to right with size, colour, shape and place, then the text."""
    words = [f"a {thing.size} {thing.pair} at the {place_of(thing, scene.canvas)}" for thing in scene.from_left]
    return ", ".join(words + ([f'text "{scene.string}"'] if scene.string else []))


def caption_words(scene):
    """Every object from left to right by colour and shape alone, then the text: "red circle, blue star, text A7K"."""
    return ", ".join([thing.pair for thing in scene.from_left] + ([f"text {scene.string}"] if scene.string else []))


def all_names(scene):
    """What can be said in few words of each thing in a scene: of every object colour and shape, either alone, size with
    shape, shape with place; every symbol of the text, alone and with its rank. Returns: list of (name, x, y), with the
    thing's centre in pixels."""
    names = []
    for thing in scene.objects:
        words = [thing.pair, thing.shape, thing.color, f"{thing.size} {thing.shape}"]
        words.append(f"{thing.shape} at the {place_of(thing, scene.canvas)}")
        names += [(name, thing.x, thing.y) for name in words]
    for rank, (symbol, x, y) in zip(RANKS, symbol_centres(scene)):
        names += [(symbol, x, y), (f"{rank} {symbol}", x, y)]
    return names


# Questions: (scene, rng, pairs that may be named although absent) -> (question, answer), or None if this draw has none.


def _names(thing, scene):
    """The words that point at this object and no other, of two: shape alone; colour and shape."""
    return [getattr(thing, kind) for kind in ("shape", "pair") if scene.all(kind).count(getattr(thing, kind)) == 1]


def _attribute(asked, named, forms):
    """Questions for one attribute of the only object that another attribute names."""
    def make(scene, rng, pairs):
        thing = pick(rng, scene.objects)
        name = getattr(thing, named)
        return None if scene.all(named).count(name) > 1 else (pick(rng, forms).format(name), getattr(thing, asked))

    return make


def _count(scene, rng, pairs):
    form, thing, likely_there = rng.random(), pick(rng, scene.objects), rng.random() < 0.75
    if form < 1 / 3:
        words, number = "objects", len(scene.objects)
    elif form < 2 / 3:
        color = thing.color if likely_there else pick(rng, tuple(COLORS))
        words, number = f"{color} objects", scene.all("color").count(color)
    else:
        shape = thing.shape if likely_there else pick(rng, SHAPES)
        words, number = shape + ("es" if shape == "cross" else "s"), scene.all("shape").count(shape)
    return f"how many {words} are there?", str(number)


def _existence(scene, rng, pairs):
    """Yes and no equally often; most of the absent pairs share colour or shape with an object that is there."""
    form, thing, present = rng.random(), pick(rng, scene.objects), rng.random() < 0.5
    kind = "color" if form < 0.2 else "shape" if form < 0.4 else "pair"
    known = {"color": COLORS, "shape": SHAPES, "pair": map(" ".join, pairs)}[kind]
    words, absent = getattr(thing, kind), [word for word in known if word not in scene.all(kind)]
    if not present:
        alike = [pair for pair in absent if {*pair.split()} & {thing.color, thing.shape}] if 0.4 <= form < 0.8 else ()
        if not absent:
            return None
        words = pick(rng, alike or absent)
    words += " object" if kind == "color" else ""
    return f"is there {with_article(words)}?", "yes" if present else "no"


def _place(scene, rng, pairs):
    thing, lines = pick(rng, scene.objects), (scene.canvas / 3, 2 * scene.canvas / 3)
    names = _names(thing, scene)
    if not names or any(abs(value - line) < REGION_MARGIN for value in (thing.x, thing.y) for line in lines):
        return None
    return f"where is the {pick(rng, names)}?", place_of(thing, scene.canvas)


def _relation(scene, rng, pairs):
    anchor, relation, is_open = pick(rng, scene.objects), pick(rng, RELATIONS), rng.random() < OPEN_SHARE
    others = [thing for thing in scene.objects if thing is not anchor]
    if not others or scene.all("pair").count(anchor.pair) > 1:
        return None
    if is_open:
        offsets = [offset(thing, relation, anchor) for thing in others]
        there = [thing for thing, pixels in zip(others, offsets) if pixels > 0]
        if len(there) != 1 or min(map(abs, offsets)) < RELATION_MARGIN:
            return None
        return f"what is {relation} the {anchor.pair}?", there[0].pair
    thing = pick(rng, others)
    pixels = offset(thing, relation, anchor)
    if abs(pixels) < RELATION_MARGIN or scene.all("pair").count(thing.pair) > 1:
        return None
    # a relation and its opposite are drawn equally often, so yes and no are too
    return f"is the {thing.pair} {relation} the {anchor.pair}?", "yes" if pixels > 0 else "no"


def _size(scene, rng, pairs):
    thing = pick(rng, scene.objects)
    names = _names(thing, scene)
    return (f"is the {pick(rng, names)} big or small?", thing.size) if names else None


QUESTIONS = {
    "color": _attribute("color", "shape", ("what color is the {}?", "what is the color of the {}?")),
    "shape": _attribute("shape", "color", ("what shape is the {} object?", "what is the {} shape?")),
    "count": _count, "existence": _existence, "place": _place, "relation": _relation, "size": _size,
    "reading": lambda scene, rng, pairs: (pick(rng, READING_PROMPTS), scene.string) if scene.string else None,
}  # fmt: skip
CAPTIONS = {
    "caption": lambda scene, rng, pairs: (pick(rng, CAPTION_PROMPTS), caption(scene)),
    "short_caption": lambda scene, rng, pairs: (pick(rng, SHORT_CAPTION_PROMPTS), caption_words(scene)),
}
TYPES = {**QUESTIONS, **CAPTIONS}


def pick_weighted(rng, weights):
    """A key of {key: weight}, as likely as its weight."""
    draw = rng.random() * sum(weights.values())
    for key, weight in weights.items():
        draw -= weight
        if draw < 0:
            break
    return key


def ask(scene, rng, number, weights, pairs=TRAIN_PAIRS):
    """Different questions about a scene.

    Args:
      scene: Scene. rng: numpy Generator.
      number: how many; fewer come back if the scene gives no more.
      weights: {type: weight above 0}, types as in TYPES.
      pairs: colour-shape pairs that may be named although absent.
    Returns: list of (type, question, answer).
    """
    assert number >= 1, number
    found = {}
    for _ in range(6 * number):
        kind = pick_weighted(rng, weights)
        # three draws, so that types which often have no question are asked nearly as often as the others
        made = next(filter(None, (TYPES[kind](scene, rng, pairs) for _ in range(3))), None)
        if made:
            found.setdefault(kind if kind == "reading" else made[0], (kind, *made))  # read a text only once
            if len(found) == number:
                break
    return list(found.values())


def chosen(weights, known, wanted):
    """{type: weight} of those wanted whose weight is above 0; weights: a source's, None = all equally often.

    Raises: ValueError for a type that is not known, or if none is left.
    """
    weights = dict.fromkeys(known, 1.0) if weights is None else weights
    for name in weights:
        check_known("unknown type", name, known)
    left = {name: weights[name] for name in wanted if weights.get(name, 0) > 0}
    if not left:
        raise ValueError(f"none of the types {[*wanted]} has a weight above 0")
    return left


# The source of drawn scenes.

KINDS = ("captions", "questions", "both", "names")
MAX_PICTURES = 100  # drawn before a record gives up finding one about which its types of question can be asked


class Scenes:
    """Source of drawn scenes with captions or questions; endless, `length` is what counts as an epoch."""

    def __init__(self, split="train", kind="questions", seed=0, max_objects=4, min_objects=1, questions_per_picture=6,
                 string_share=0.3, canvas=64, weights=None, length=10_000):
        """
        Args:
          split: "train"; "new" = other pictures of the same distribution; "unseen_pairs" = only held-out pairs;
            "reading" = only held-out strings, one in every picture, and only the reading question.
          kind: "captions" (one), "questions", "both" (the caption first), or "names": all that can be said in few words
            of each thing, conversations of their own with its centre as region; for these, questions_per_picture and
            weights mean nothing.
          seed: int, 0 or more.
          max_objects, min_objects: range of the number of objects.
          questions_per_picture: at most this many, all different.
          string_share: share of pictures with a string, 0 to 1.
          canvas: width and height, pixels. Objects keep their size in pixels.
          weights: {type: weight}, types as in TYPES; one left out is never used. None = all equally often.
          length: records per epoch; record(n) goes on beyond it with new pictures.
        Raises: ValueError for a name that does not exist, or no type with a weight above 0.
        """
        check_known("unknown split", split, SPLITS)
        check_known("unknown kind", kind, KINDS)
        if split == "reading":
            kind, string_share, weights = "questions", 1.0, {"reading": 1.0}
        self.name, self.split, self.kind, self.seed, self.length = f"scenes_{split}", split, kind, seed, length
        self.max_objects, self.min_objects = max_objects, min_objects
        self.string_share, self.canvas = string_share, canvas
        wanted = ("captions", 1, CAPTIONS), ("questions", questions_per_picture, QUESTIONS)
        self.wanted = [(number, chosen(weights, TYPES, types))
                       for users, number, types in wanted if kind in (users, "both")]
        # all that the pictures depend on, so that the same ones have the same key whatever is asked about them
        self.key = f"{self.name}/{seed}/{canvas}/{min_objects}-{max_objects}/{string_share}"
        self.pairs = HELD_OUT if split == "unseen_pairs" else TRAIN_PAIRS

    def __len__(self):
        return self.length

    def scene(self, n):
        """The Scene of record n."""
        return self._draw(n)[0]

    def record(self, n):
        """Record n, n >= 0: one picture, each conversation one question about it and its answer."""
        scene, picture, asked = self._draw(n)
        kinds, questions, answers = zip(*asked)
        conversations = tuple((Turn("user", (0, question)), Turn("assistant", (answer,)))
                              for question, answer in zip(questions, answers))
        named = all_names(scene) if self.kind == "names" else ()
        regions = tuple((x / self.canvas, y / self.canvas) for _, x, y in named)
        return Record(picture.key, (picture,), conversations, kinds, regions=regions)

    def _draw(self, n):
        """(Scene, Visual, list of (type, question, answer)) of record n."""
        for attempt in range(MAX_PICTURES):
            rng = np.random.default_rng((self.seed, SPLITS.index(self.split), n, attempt))
            with_string = rng.random() < self.string_share
            scene = sample_scene(rng, self.max_objects, self.split, with_string, self.min_objects, self.canvas)
            picture = Visual(f"{self.key}/{n}.{attempt}", (render(scene, rng),))
            asked = [made for number, weights in self.wanted for made in ask(scene, rng, number, weights, self.pairs)]
            if self.kind == "names":
                asked = [("name", NAME_PROMPT, name) for name, _, _ in all_names(scene)]
            if asked:
                return scene, picture, asked
        raise ValueError(f"none of {MAX_PICTURES} pictures of up to {self.max_objects} objects gave a question of the "
                         f"types {', '.join(self.wanted[-1][1])}; allow more objects, more strings or more types")


# Text-only instructions: scenes in words, small facts, and plain captions, for training the language model alone.
#
# No picture belongs to them. The same colour-shape pairs and strings are held out as from the pictures, and a part of
# their own: a fixed fifth of all described scenes, sums, spellings and phrases is only in the split "new".

OPPOSITES = (("left", "right"), ("above", "below"), ("big", "small"), ("top", "bottom"), ("yes", "no"),
             ("hot", "cold"), ("light", "dark"), ("up", "down"), ("day", "night"), ("old", "new"))
PHRASE_WORDS = tuple(word for pair in OPPOSITES for word in pair)
STREAM = 100  # added to the split's number, so that pictures of the same seed draw other random numbers
CAPTION_QUESTIONS = {name: 1.0 for name in QUESTIONS if name != "relation"}  # a caption does not tell all relations


def _related(rng):
    """Two different pairs in a relation: (one, relation, other), the pairs in words; and as a sentence."""
    one, other = pick(rng, TRAIN_PAIRS), pick(rng, TRAIN_PAIRS)
    while other == one:
        other = pick(rng, TRAIN_PAIRS)
    one, relation, other = " ".join(one), pick(rng, RELATIONS), " ".join(other)
    return one, relation, other, f"{with_article(one)} is {relation} {with_article(other)}"


def _described_relation(rng):
    """One sentence and a question about it, which turns it round in half of the cases."""
    one, relation, other, sentence = _related(rng)
    if rng.random() < 0.5:
        one, relation, other = other, OPPOSITE_RELATIONS[relation], one
    if rng.random() < 0.5:
        return f"{sentence}. what is {relation} the {other}?", one, sentence
    present = rng.random() < 0.5
    asked = relation if present else OPPOSITE_RELATIONS[relation]
    return f"{sentence}. is the {one} {asked} the {other}?", "yes" if present else "no", sentence


def _opposite(rng):
    pair = pick(rng, OPPOSITES)
    word, opposite = pair if rng.random() < 0.5 else pair[::-1]
    return f"what is the opposite of {word}?", opposite, None


def _addition(rng):
    """Sums up to 18; a sum and its commuted form are held out together."""
    one, other = int(rng.random() * 10), int(rng.random() * 10)
    return f"what is {one} plus {other}?", str(one + other), f"{min(one, other)} plus {max(one, other)}"


def _spelling(rng):
    string = sample_string(rng)
    return f"spell {string}.", " ".join(string), f"spell {string}"


def _next_letter(rng):
    at = int(rng.random() * (len(LETTERS) - 1))
    return f"which letter comes after {LETTERS[at]}?", LETTERS[at + 1], None


def _word_of_phrase(rng):
    words = [pick(rng, PHRASE_WORDS) for _ in range(pick(rng, (2, 3, 4)))]
    phrase, end = " ".join(words), pick(rng, ("first", "last"))
    return f"what is the {end} word of: {phrase}", words[0 if end == "first" else -1], phrase


def _repeat(rng):
    """Words in any order, to be said again: what teaches to look for what came before."""
    words = [pick(rng, (*PHRASE_WORDS, *SHAPES, *LETTERS)) for _ in range(3 + int(6 * rng.random()))]
    phrase = " ".join(words)
    return f"repeat: {phrase}", phrase, phrase


# Each: rng -> (question, answer, text that decides whether it is held out; None = trained as a whole, never "new").
FACTS = {"described_relation": _described_relation, "opposite": _opposite, "addition": _addition, "spelling": _spelling,
         "next_letter": _next_letter, "word_of_phrase": _word_of_phrase, "repeat": _repeat}
DESCRIPTIONS = {  # how a scene is told, and what can then be asked about it
    "described": (caption, CAPTION_QUESTIONS),
    "listed": (caption_words, {name: 1.0 for name in ("color", "shape", "count", "existence", "reading")}),
}
TEXT_TYPES = (*DESCRIPTIONS, *FACTS, "plain_caption")
NOT_HELD_OUT = ("opposite", "next_letter")


class SceneTexts:
    """Source of text-only records of one conversation each; endless, `length` is what counts as an epoch."""

    def __init__(self, split="train", seed=0, max_objects=4, string_share=0.3, weights=None, length=10_000,
                 questions_per_text=1):
        """
        Args:
          split: "train" or "new" (only the held-out part; opposites and letters have none and are absent from it).
          seed: int, 0 or more.
          max_objects: at most this many objects in a described scene.
          string_share: share of described scenes with a text, 0 to 1.
          weights: {type: weight}, types as in TEXT_TYPES; one left out is never used. None = all equally often.
            "described" and "listed" give records of the kinds "described_color", "listed_count", …
          length: records per epoch; record(n) goes on beyond it with new texts.
          questions_per_text: exchanges about a described scene at most, one after the other in one conversation.
        Raises: ValueError for a name that does not exist, or no type with a weight above 0.
        """
        check_known("unknown split", split, ("train", "new"))
        unused = NOT_HELD_OUT if split == "new" else ()
        self.weights = chosen(weights, TEXT_TYPES, [name for name in weights or TEXT_TYPES if name not in unused])
        self.name, self.split, self.seed, self.length = f"scene_texts_{split}", split, seed, length
        self.max_objects, self.string_share, self.questions_per_text = max_objects, string_share, questions_per_text

    def __len__(self):
        return self.length

    def record(self, n):
        """Record n, n >= 0: a question and its answer, or for "plain_caption" an assistant turn alone."""
        new = self.split == "new"
        rng = np.random.default_rng((self.seed, STREAM + new, n))
        drawn, said, key = pick_weighted(rng, self.weights), [], None
        while not said or key is not None and in_held_out_fifth(key) != new:
            kind, said, key = self._make(rng, drawn)
        spoken = zip(itertools.cycle(("user", "assistant")), said)
        turns = tuple(Turn(role, (words,)) for role, words in spoken if words)
        return Record(f"{self.name}/{self.seed}/{n}", (), (turns,), (kind,))

    def _make(self, rng, kind):
        """(kind; questions and answers in turn, perhaps none; the text that decides whether they are held out)."""
        if kind in FACTS:
            question, answer, key = FACTS[kind](rng)
            return kind, [question, answer], key
        with_string = rng.random() < self.string_share
        scene = sample_scene(rng, self.max_objects, self.split, with_string)
        if kind == "plain_caption":
            key = pick(rng, (caption(scene), caption_words(scene), _related(rng)[-1]))
            return kind, [None, key], key
        tell, questions = DESCRIPTIONS[kind]
        key, asked = tell(scene), ask(scene, rng, self.questions_per_text, questions)
        said = [words for _, *exchange in asked for words in exchange]
        return (f"{kind}_{asked[0][0]}", [f"{key}. {said[0]}", *said[1:]], key) if asked else (kind, [], key)


# A scene from a user's words: "red circle left of a big blue star, text A7K".

FILLERS = ("a", "an", "the", "is", "to")
KNOWN = {"size": SIZES, "color": COLORS, "shape": SHAPES}
WORDS = (*COLORS, *SHAPES, *SIZES, *RELATIONS, *FILLERS, "and", "text", "reading")
SEPARATOR = re.compile(rf"\s*(\b(?:{'|'.join(RELATIONS)}|and)\b|[,/])\s*")
STRING = re.compile(r"\b(?:text|reading)\b\s*(\"[^\"]*\"|\w*)", re.IGNORECASE)
RELATION_DISTANCE = 6.0  # pixels between centres: clear to the eye, and to every question about the relation
PLACES = 20  # free places tried for one object before the whole scene begins anew
ATTEMPTS = 500  # scenes begun before the picture counts as too crowded


def parse_scene(text, rng, canvas=64):
    """Pose a scene as described; what is not said (places, sizes) is drawn at random.

    Args:
      text: objects as "[small | big] COLOR SHAPE", with "left of", "right of", "above" or "below" (which relate the
        object before to the one after), "and", "," or "/" between them; at most one string, as 'text A7K' or
        'reading "A7K"'.
      rng: numpy Generator.
      canvas: width and height, pixels.
    Returns: Scene. It may hold held-out pairs and strings.
    Raises: ValueError for an unknown word (with the nearest known one), an incomplete object or relation, a string that
      is not two or three symbols of ALPHABET, no object at all, or if no room was found.
    """
    strings = [string.strip('"').upper() for string in STRING.findall(text)]
    if len(strings) > 1:
        raise ValueError(f"a picture holds one string, found {len(strings)}: {', '.join(strings)}")
    string = strings[0] if strings else None
    if strings and not (2 <= len(string) <= 3 and set(string) <= set(ALPHABET)):
        raise ValueError(f"the text {string!r} cannot be drawn; write two or three of the symbols {ALPHABET}")
    described, before = [], None  # (relation to the object before or None, {"size", "color", "shape"})
    pieces = [None, *SEPARATOR.split(STRING.sub("", text).lower())]
    for separator, phrase in zip(pieces[::2], pieces[1::2]):
        thing, relation = _read_object(phrase), separator if separator in RELATIONS else None
        if relation and not (thing and before):
            raise ValueError(f"{relation!r} needs an object on both sides: 'red circle {relation} blue star'")
        if thing:
            described.append((relation, thing))
        before = thing
    if not described:
        raise ValueError("no object is described; write for example 'red circle left of blue star'")
    if canvas < MIN_CANVAS:
        raise ValueError(f"a canvas of {canvas} px is too small; use {MIN_CANVAS} px or more")
    for attempt in range(ATTEMPTS):
        sizes = tuple(SIZES) if attempt < ATTEMPTS // 2 else ("small",)  # where none is said
        box = place_string(rng, string, canvas) if strings else None
        objects = _pose(rng, described, sizes, box, canvas)
        if objects:
            return Scene(canvas, tuple(objects), string, box)
    raise ValueError(f"found no room on {canvas} x {canvas} px for the {len(described)} objects described")


def _read_object(phrase):
    """{"size" if it is said, "color", "shape"}; empty if the phrase is."""
    words = [word for word in phrase.split() if word not in FILLERS]
    for word in words:
        check_known("unknown word", word, WORDS)
    found = {kind: word for word in words for kind, known in KNOWN.items() if word in known}
    if words and (len(found) < len(words) or not {"color", "shape"} <= found.keys()):
        raise ValueError(f"{' '.join(words)!r} is not one object; write a color ({', '.join(COLORS)}) and a shape "
                         f"({', '.join(SHAPES)}), small or big before them, and 'and' or ',' between objects")
    return found


def _pose(rng, described, sizes, box, canvas):
    """The objects at places that fulfil every relation, or None if there was none for one of them."""
    objects = []
    for relation, thing in described:
        for _ in range(PLACES):
            size = thing.get("size") or pick(rng, sizes)
            placed = place_object(rng, thing["color"], thing["shape"], size, objects, box, canvas)
            if placed is None:
                return None
            if relation is None or offset(objects[-1], relation, placed) >= RELATION_DISTANCE:
                objects.append(placed)
                break
        else:
            return None
    return objects
