"""Captions and questions about scenes.

Every question has exactly one right, short answer by construction: what is ambiguous, or too close to call by eye,
is not asked. Training never names a held-out colour-shape pair, not even to say that it is absent.
"""

from nanovlm.data.scenes import COLORS, SHAPES, TRAIN_PAIRS, pick, symbol_centres

REGION_MARGIN = 2.0  # pixels an object's centre keeps from the borders of its ninth of the picture
RELATION_MARGIN = 4.0  # pixels between two centres before one is called left of or above the other
OPEN_SHARE = 0.75  # of the relations drawn; open questions are ambiguous more often: half of those asked are open
REGIONS = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
RELATIONS = ("left of", "right of", "above", "below")
RANKS = ("first", "second", "third")  # of the symbols of a text

CAPTION_PROMPTS = ("describe the image.", "what is in the image?", "what do you see?", "give a caption for the image.")
SHORT_CAPTION_PROMPTS = ("list the objects.", "name the objects in the image.", "what objects are there?")
NAME_PROMPT = "name one thing in the image."
READING_PROMPTS = ("what does the text say?", "what is the text?", "read the text.")


def pair_words(thing):
    """Colour and shape of a SceneObject: "red circle"."""
    return f"{thing.color} {thing.shape}"


def with_article(words):
    """The words with their article: "a red circle", "an orange star"."""
    return f"an {words}" if words.startswith("orange") else f"a {words}"


def place_of(thing, canvas):
    """The ninth of the picture that holds a SceneObject's centre: a word of REGIONS."""
    row, column = int(3 * thing.y / canvas), int(3 * thing.x / canvas)
    return REGIONS[row][column]


def offset(thing, relation, anchor):
    """Pixels by which one SceneObject is left of (right of, above, below) another; negative = on the other side."""
    distance = thing.x - anchor.x if relation in ("left of", "right of") else thing.y - anchor.y
    return -distance if relation in ("left of", "above") else distance


def caption(scene):
    """Every object from left to right with size, colour, shape and place, then the text."""
    things = sorted(scene.objects, key=lambda thing: thing.x)
    words = [f"a {thing.size} {pair_words(thing)} at the {place_of(thing, scene.canvas)}" for thing in things]
    return ", ".join(words + ([f'text "{scene.string}"'] if scene.string else []))


def _listed(scene, name):
    words = [name(thing) for thing in sorted(scene.objects, key=lambda thing: thing.x)]
    return ", ".join(words + ([f"text {scene.string}"] if scene.string else []))


def caption_words(scene):
    """Every object from left to right by colour and shape alone, then the text: "red circle, blue star, text A7K"."""
    return _listed(scene, pair_words)


def all_names(scene):
    """What can be said in few words of each thing in a scene: of every object colour and shape, either alone, size with
    shape, shape with place; every symbol of the text, alone and with its rank. Returns: list of (name, x, y), with the
    thing's centre in pixels."""
    names = []
    for thing in scene.objects:
        words = [pair_words(thing), thing.shape, thing.color, f"{thing.size} {thing.shape}"]
        words.append(f"{thing.shape} at the {place_of(thing, scene.canvas)}")
        names += [(name, thing.x, thing.y) for name in words]
    for rank, (symbol, x, y) in zip(RANKS, symbol_centres(scene)):
        names += [(symbol, x, y), (f"{rank} {symbol}", x, y)]
    return names


def _names(thing, scene):
    """The words that point at this object and no other, of two: shape alone; colour and shape."""
    names = []
    if sum(other.shape == thing.shape for other in scene.objects) == 1:
        names.append(thing.shape)
    if sum(pair_words(other) == pair_words(thing) for other in scene.objects) == 1:
        names.append(pair_words(thing))
    return names


def _color(scene, rng, pairs):
    thing = pick(rng, scene.objects)
    if sum(other.shape == thing.shape for other in scene.objects) > 1:
        return None
    return pick(rng, ("what color is the {}?", "what is the color of the {}?")).format(thing.shape), thing.color


def _shape(scene, rng, pairs):
    thing = pick(rng, scene.objects)
    if sum(other.color == thing.color for other in scene.objects) > 1:
        return None
    return pick(rng, ("what shape is the {} object?", "what is the {} shape?")).format(thing.color), thing.shape


def _count(scene, rng, pairs):
    form, thing, likely_there = rng.random(), pick(rng, scene.objects), rng.random() < 0.75
    if form < 1 / 3:
        return "how many objects are there?", str(len(scene.objects))
    if form < 2 / 3:
        color = thing.color if likely_there else pick(rng, tuple(COLORS))
        return f"how many {color} objects are there?", str(sum(other.color == color for other in scene.objects))
    shape = thing.shape if likely_there else pick(rng, SHAPES)
    plural = shape + ("es" if shape == "cross" else "s")
    return f"how many {plural} are there?", str(sum(other.shape == shape for other in scene.objects))


def _existence(scene, rng, pairs):
    """Yes and no equally often; most of the absent pairs share colour or shape with an object that is there."""
    form, thing, present = rng.random(), pick(rng, scene.objects), rng.random() < 0.5
    if form < 0.2:
        there = {other.color for other in scene.objects}
        words = (thing.color if present else pick(rng, [color for color in COLORS if color not in there])) + " object"
    elif form < 0.4:
        there = {other.shape for other in scene.objects}
        words = thing.shape if present else pick(rng, [shape for shape in SHAPES if shape not in there])
    elif present:
        words = pair_words(thing)
    else:
        there = {(other.color, other.shape) for other in scene.objects}
        absent = [pair for pair in pairs if pair not in there]
        alike = [pair for pair in absent if pair[0] == thing.color or pair[1] == thing.shape]
        if not absent:
            return None
        words = " ".join(pick(rng, alike if alike and form < 0.8 else absent))
    return f"is there {with_article(words)}?", "yes" if present else "no"


def _place(scene, rng, pairs):
    thing, third = pick(rng, scene.objects), scene.canvas / 3
    names, lines = _names(thing, scene), (third, 2 * third)
    if not names or any(abs(value - line) < REGION_MARGIN for value in (thing.x, thing.y) for line in lines):
        return None
    return f"where is the {pick(rng, names)}?", place_of(thing, scene.canvas)


def _relation(scene, rng, pairs):
    anchor, relation, is_open = pick(rng, scene.objects), pick(rng, RELATIONS), rng.random() < OPEN_SHARE
    others = [thing for thing in scene.objects if thing is not anchor]
    if not others or any(pair_words(thing) == pair_words(anchor) for thing in others):
        return None
    if is_open:
        offsets = [offset(thing, relation, anchor) for thing in others]
        there = [thing for thing, pixels in zip(others, offsets) if pixels > 0]
        if len(there) != 1 or min(map(abs, offsets)) < RELATION_MARGIN:
            return None
        return f"what is {relation} the {pair_words(anchor)}?", pair_words(there[0])
    thing = pick(rng, others)
    pixels = offset(thing, relation, anchor)
    if abs(pixels) < RELATION_MARGIN or sum(pair_words(other) == pair_words(thing) for other in others) > 1:
        return None
    # a relation and its opposite are drawn equally often, so yes and no are too
    return f"is the {pair_words(thing)} {relation} the {pair_words(anchor)}?", "yes" if pixels > 0 else "no"


def _size(scene, rng, pairs):
    thing = pick(rng, scene.objects)
    names = _names(thing, scene)
    return (f"is the {pick(rng, names)} big or small?", thing.size) if names else None


def _reading(scene, rng, pairs):
    return (pick(rng, READING_PROMPTS), scene.string) if scene.string else None


def _caption(scene, rng, pairs):
    return pick(rng, CAPTION_PROMPTS), caption(scene)


def _short_caption(scene, rng, pairs):
    return pick(rng, SHORT_CAPTION_PROMPTS), caption_words(scene)


# Each: (scene, rng, pairs that may be named although absent) -> (question, answer), or None if this draw has none.
QUESTIONS = {"color": _color, "shape": _shape, "count": _count, "existence": _existence, "place": _place,
             "relation": _relation, "size": _size, "reading": _reading}
CAPTIONS = {"caption": _caption, "short_caption": _short_caption}
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
      scene: Scene.
      rng: numpy Generator.
      number: how many; fewer come back if the scene gives no more.
      weights: {type: weight above 0}, types as in TYPES.
      pairs: colour-shape pairs that may be named although absent.
    Returns: list of (type, question, answer).
    """
    found = {}
    for _ in range(6 * number):
        kind = pick_weighted(rng, weights)
        # three draws, so that types which often have no question are asked nearly as often as the others
        made = next(filter(None, (TYPES[kind](scene, rng, pairs) for _ in range(3))), None)
        if made:
            question, answer = made
            found.setdefault(kind if kind == "reading" else question, (kind, question, answer))  # read a text only once
            if len(found) == number:
                break
    return list(found.values())
