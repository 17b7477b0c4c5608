"""Procedural pictures of coloured shapes and short strings: what a scene holds, where it stands, how it is drawn.

A scene is 1 to 4 objects (8 colours, 6 shapes, 2 sizes) at continuous places off any grid, and sometimes a
string of two or three symbols, on a light noisy background. Everything is drawn from the generator passed in,
so a picture is a pure function of its seed. Four colour-shape pairs and a fifth of all strings are held out:
no training split ever shows or names them.

Captions and questions about a scene: scene_questions.py. A scene from a user's words: there, too.
"""

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Red, green, blue, yellow and teal are also easy-VQA's words, and mean the same colours there.
COLORS = {
    "red": (222, 30, 38), "green": (50, 160, 45), "blue": (40, 75, 225), "yellow": (242, 214, 20),
    "purple": (135, 45, 175), "orange": (248, 132, 18), "teal": (0, 165, 165), "pink": (250, 130, 200),
}  # fmt: skip
SHAPES = ("circle", "triangle", "square", "star", "cross", "ring")
SIZES = {"small": (6.6, 7.6), "big": (10.6, 12.0)}  # range of the radius, pixels, on any canvas
# One colour and one shape each, and none is a pair that easy-VQA shows (its shapes: circle, rectangle, triangle).
HELD_OUT = (("red", "star"), ("green", "cross"), ("purple", "circle"), ("pink", "square"))
TRAIN_PAIRS = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT)

ALPHABET = "ACEFHJKLMNPRTUXY3479"  # no look-alikes: O and 0, I and 1, S and 5, B and 8, Z and 2, Q
FONT_SIZE = 14  # pixels; capitals are then 10 pixels high
SYMBOL_GAP = 1  # pixels between symbols

GAP = 1.5  # least distance in pixels between any two things, and to the edge of the picture
MIN_CANVAS = 40  # pixels; the widest string takes 38
TRIES = 40  # places tried before an object is made small, and again before it is left out
OVERSAMPLING = 4  # shapes are drawn this much larger and averaged down, which smooths their edges
SPLITS = ("train", "new", "unseen_pairs", "reading")


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape of a scene."""

    color: str  # one of COLORS
    shape: str  # one of SHAPES
    size: str  # one of SIZES
    x: float  # centre, pixels from the left edge
    y: float  # centre, pixels from the top edge
    radius: float  # pixels; the whole shape lies within it

    @property
    def pair(self):
        """Colour and shape: "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What stands where in a picture."""

    canvas: int  # width and height, pixels
    objects: tuple[SceneObject, ...]  # in order of placing
    string: str | None = None  # two or three symbols of ALPHABET
    string_box: tuple[int, int, int, int] | None = None  # left, top, right, bottom, pixels

    @property
    def from_left(self):
        """The objects from left to right."""
        return sorted(self.objects, key=lambda thing: thing.x)

    def all(self, name):
        """The color, shape or pair of every object: list of str."""
        return [getattr(thing, name) for thing in self.objects]


def pick(rng, items):
    """One item of a sequence, all equally likely (several times faster than rng.choice)."""
    return items[int(rng.random() * len(items))]


def in_held_out_fifth(text):
    """Whether a text belongs to the fixed fifth of all texts that training never shows: bool."""
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "big") % 5 == 0


def sample_string(rng, held_out=False):
    """A string of two or three symbols, from the held-out fifth or from the rest."""
    while True:
        string = "".join(pick(rng, ALPHABET) for _ in range(pick(rng, (2, 3))))
        if in_held_out_fifth(string) == held_out:
            return string


@functools.lru_cache(maxsize=None)
def _glyph(symbol):
    """Ink of one symbol as an L image, cut at its left and right; all are equally high."""
    font = ImageFont.load_default(size=FONT_SIZE)
    left, _, right, _ = font.getbbox(symbol)
    top, bottom = font.getbbox(ALPHABET)[1::2]
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), symbol, fill=255, font=font)
    return image


def place_string(rng, string, canvas):
    """A random box at least a pixel inside the picture: (left, top, right, bottom), pixels."""
    width, height = sum(_glyph(symbol).width + SYMBOL_GAP for symbol in string) - SYMBOL_GAP, _glyph(string[0]).height
    left, top = (1 + int(rng.random() * (canvas - side - 1)) for side in (width, height))
    return left, top, left + width, top + height


def symbol_centres(scene):
    """The symbols of a scene's string and where they stand: list of (symbol, x, y), pixels; empty without a string."""
    centres = []
    if scene.string:
        left, top, _, bottom = scene.string_box
        for symbol in scene.string:
            width = _glyph(symbol).width
            centres.append((symbol, left + width / 2, (top + bottom) / 2))
            left += width + SYMBOL_GAP
    return centres


def place_object(rng, color, shape, size, objects, box, canvas):
    """A SceneObject at a random place, GAP pixels away from `objects` and the string's `box`; None if none is free."""
    low, high = SIZES[size]
    radius = low + rng.random() * (high - low)
    margin = radius + GAP
    for _ in range(TRIES):
        x, y = (margin + rng.random() * (canvas - 2 * margin) for _ in range(2))
        things = [(other.x, other.y, other.radius) for other in objects]
        if box:
            left, top, right, bottom = box
            things.append((min(max(x, left), right), min(max(y, top), bottom), 0))  # its nearest point
        if all(math.hypot(x - a, y - b) >= radius + other + GAP for a, b, other in things):
            return SceneObject(color, shape, size, x, y, radius)
    return None


def sample_scene(rng, max_objects, split, with_string, min_objects=1, canvas=64):
    """Draw a Scene at random. Raises: ValueError if a number is out of range.

    max_objects, min_objects: range of the number of objects, all counts equally likely. An object for which no place is
      free becomes small, then is left out, so crowded small canvases may hold fewer (never none).
    split: "train" and "new" use the training pairs and strings, "unseen_pairs" only held-out pairs, "reading" only
      held-out strings.
    """
    if not 1 <= min_objects <= max_objects or canvas < MIN_CANVAS:
        raise ValueError(f"{min_objects} to {max_objects} objects on {canvas} px: at least 1 object, min_objects no "
                         f"larger than max_objects, and a canvas of {MIN_CANVAS} px or more are needed")
    pairs = HELD_OUT if split == "unseen_pairs" else TRAIN_PAIRS
    string = sample_string(rng, held_out=split == "reading") if with_string else None
    box = place_string(rng, string, canvas) if string else None
    objects = []
    for _ in range(min_objects + int(rng.random() * (max_objects - min_objects + 1))):
        color, shape = pick(rng, pairs)
        repeat = rng.random()
        if objects and repeat < 0.3:  # so that counts above 1 are common
            repeated = (objects[-1].color, shape) if repeat < 0.15 else (color, objects[-1].shape)
            color, shape = repeated if repeated in pairs else (color, shape)  # it may be a pair of the other kind
        placed = place_object(rng, color, shape, pick(rng, ("small", "big")), objects, box, canvas)
        placed = placed or place_object(rng, color, shape, "small", objects, box, canvas)
        if placed:
            objects.append(placed)
    if not objects:  # a string in the middle of a small canvas
        return sample_scene(rng, max_objects, split, with_string, min_objects, canvas)
    return Scene(canvas, tuple(objects), string, box)


def _turned(angle):
    """A point of the unit circle, clockwise from the top: complex, x to the right and y down."""
    return complex(math.sin(angle), -math.cos(angle))


_ARM = math.asin(0.3)  # half the width of a cross's arm, as an angle
_CORNERS = _turned(-_ARM), _turned(_ARM), complex(0.3, -0.3)  # of one of its arms
_POLYGONS = {  # corners in the unit disc, clockwise
    "triangle": [_turned(math.tau * i / 3) for i in range(3)],
    "square": [_turned(math.tau * (i + 0.5) / 4) for i in range(4)],
    "star": [_turned(math.tau * i / 10) * (0.42 if i % 2 else 1) for i in range(10)],
    "cross": [corner * 1j**quarter for quarter in range(4) for corner in _CORNERS],
}
_RING_HOLE = 0.55  # radius of the hole, of the ring's
_MAX_TILT = 0.2  # radians


def _mask(thing, tilt):
    """The shape as an L image with smooth edges, and the pixel where its corner belongs."""
    left, top = (math.floor(centre - thing.radius) for centre in (thing.x, thing.y))
    side = math.ceil(2 * thing.radius) + 1
    radius = thing.radius * OVERSAMPLING
    x, y = (thing.x - left) * OVERSAMPLING, (thing.y - top) * OVERSAMPLING
    mask = Image.new("L", (side * OVERSAMPLING, side * OVERSAMPLING))
    draw = ImageDraw.Draw(mask)
    if thing.shape in _POLYGONS:
        turn = complex(math.cos(tilt), math.sin(tilt)) * radius
        corners = [point * turn for point in _POLYGONS[thing.shape]]
        draw.polygon([(x + corner.real, y + corner.imag) for corner in corners], fill=255)
    else:
        draw.circle((x, y), radius, fill=255)
    if thing.shape == "ring":
        draw.circle((x, y), radius * _RING_HOLE, fill=0)
    return mask.reduce(OVERSAMPLING), (left, top)


@functools.lru_cache(maxsize=8)
def _grain(canvas):
    """Gaussian noise, float32[4 canvas, 12 canvas], rows of RGB; pictures show parts of it, for drawing it is slow."""
    grain = np.random.default_rng(canvas).standard_normal((4 * canvas, 4 * canvas), dtype=np.float32)
    return grain.repeat(3, axis=1)


def render(scene, rng):
    """Draw a Scene: a light noisy background, tilted shapes, varied colours, dark symbols: PIL RGB image."""
    canvas = scene.canvas
    tone = (205 + 40 * rng.random() + 12 * (rng.random(3) - 0.5)).astype(np.float32)
    strength = np.float32(3 + 6 * rng.random())
    top, left = int(3 * canvas * rng.random()), int(3 * canvas * rng.random())
    noise = _grain(canvas)[top : top + canvas, 3 * left : 3 * (left + canvas)]  # the same in all channels
    pixels = (strength * noise + np.tile(tone, canvas)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels.reshape(canvas, canvas, 3))
    for thing in scene.objects:
        mask, corner = _mask(thing, _MAX_TILT * (2 * rng.random() - 1))
        color = [value + int(shift) for value, shift in zip(COLORS[thing.color], rng.random(3) * 20 - 10)]
        image.paste(tuple(min(max(value, 0), 255) for value in color), corner, mask)
    if scene.string:
        left, top = scene.string_box[:2]
        ink = 15 + int(rng.random() * 40)
        for symbol in scene.string:
            glyph = _glyph(symbol)
            image.paste((ink, ink, ink), (left, top), glyph)
            left += glyph.width + SYMBOL_GAP
    return image
