"""A scene from a user's words: "red circle left of a big blue star, text A7K"."""

import re

from nanovlm.data.scene_questions import RELATIONS, offset
from nanovlm.data.scenes import ALPHABET, COLORS, MIN_CANVAS, SHAPES, SIZES, Scene, pick, place_object, place_string
from nanovlm.names import nearest

FILLERS = ("a", "an", "the", "is", "to")
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
    if canvas < MIN_CANVAS:
        raise ValueError(f"a canvas of {canvas} px is too small; use {MIN_CANVAS} px or more")
    strings = [string.strip('"').upper() for string in STRING.findall(text)]
    described = _read_objects(STRING.sub("", text).lower())
    if len(strings) > 1:
        raise ValueError(f"a picture holds one string, found {len(strings)}: {', '.join(strings)}")
    for string in strings:
        if not 2 <= len(string) <= 3 or not set(string) <= set(ALPHABET):
            raise ValueError(f"the text {string!r} cannot be drawn; write two or three of the symbols {ALPHABET}")
    for attempt in range(ATTEMPTS):
        sizes = tuple(SIZES) if attempt < ATTEMPTS // 2 else ("small",)  # where none is said
        box = place_string(rng, strings[0], canvas) if strings else None
        objects = _pose(rng, described, sizes, box, canvas)
        if objects:
            return Scene(canvas, tuple(objects), strings[0] if strings else None, box)
    raise ValueError(
        f"found no room on {canvas} x {canvas} px for the {len(described)} objects described; use fewer or small ones"
    )


def _read_objects(text):
    """List of (relation to the object before or None, size or None, color, shape)."""
    first, *rest = SEPARATOR.split(text)
    described, last = [], None
    for separator, phrase in [(None, first), *zip(rest[::2], rest[1::2])]:
        thing = _read_object(phrase)
        if separator in RELATIONS:
            if not (thing and last):
                raise ValueError(f"{separator!r} needs an object on both sides: 'red circle {separator} blue star'")
            described.append((separator, *thing))
        elif thing:
            described.append((None, *thing))
        last = thing
    if not described:
        raise ValueError("no object is described; write for example 'red circle left of blue star'")
    return described


def _read_object(phrase):
    """(size or None, color, shape), or None if the phrase is empty."""
    words = [word for word in phrase.split() if word not in FILLERS]
    for word in words:
        if word not in WORDS:
            raise ValueError(f"unknown word {word!r}.{nearest(word, WORDS)}")
    found = [[word for word in words if word in known] for known in (SIZES, COLORS, SHAPES)]
    if not words:
        return None
    sizes, colors, shapes = found
    if len(sizes) > 1 or len(colors) != 1 or len(shapes) != 1 or len(words) != sum(map(len, found)):
        raise ValueError(
            f"{' '.join(words)!r} is not one object; write a color ({', '.join(COLORS)}) and a shape "
            f"({', '.join(SHAPES)}), small or big before them if you like, and 'and' or ',' between objects"
        )
    return (sizes or [None])[0], colors[0], shapes[0]


def _pose(rng, described, sizes, box, canvas):
    """The objects at places that fulfil every relation, or None if there was none for one of them."""
    objects = []
    for relation, size, color, shape in described:
        for _ in range(PLACES):
            thing = place_object(rng, color, shape, size or pick(rng, sizes), objects, box, canvas)
            if thing is None:
                return None
            if relation is None or offset(objects[-1], relation, thing) >= RELATION_DISTANCE:
                objects.append(thing)
                break
        else:
            return None
    return objects
