"""Scenes from words: what is said is posed, what is wrong is named."""

import itertools
import math

import numpy as np
import pytest

from nanovlm.data.scene_questions import parse_scene


def test_poses_what_is_said():
    for n in range(40):
        scene = parse_scene('A Red circle is left of the big blue STAR above small pink cross / teal ring, text "a7k"',
                            np.random.default_rng(n))
        red, blue, pink, teal = scene.objects
        words = [(thing.color, thing.shape) for thing in scene.objects]
        assert words == [("red", "circle"), ("blue", "star"), ("pink", "cross"), ("teal", "ring")]
        assert blue.size == "big" and pink.size == "small" and scene.string == "A7K" and scene.canvas == 64
        assert blue.x - red.x >= 6 and pink.y - blue.y >= 6
        for one, other in itertools.combinations(scene.objects, 2):
            assert math.dist((one.x, one.y), (other.x, other.y)) >= one.radius + other.radius + 1.5
        left, top, right, bottom = scene.string_box
        for thing in scene.objects:
            apart = max(left - thing.x, thing.x - right, top - thing.y, thing.y - bottom)
            assert apart >= 0.7 * thing.radius and 0 < left < right < 64 and 0 < top < bottom < 64
    assert {parse_scene("red circle", np.random.default_rng(n)).objects[0].size for n in range(20)} == {"small", "big"}


def test_relates_an_object_to_the_one_before():
    distances = []
    for n in range(150):
        one, two, three, four = parse_scene(
            "small red circle right of small blue ring below small teal star and small green ring",
            np.random.default_rng(n), 96,
        ).objects
        assert one.x - two.x >= 6 and two.y - three.y >= 6
        distances += [one.x - two.x, two.y - three.y]
    assert min(distances) < 7
    row = parse_scene("red ring left of blue ring left of teal ring left of pink ring left of red cross",
                      np.random.default_rng(0))
    assert [thing.color for thing in sorted(row.objects, key=lambda thing: thing.x)] == [
        "red", "blue", "teal", "pink", "red"]
    assert row.string is None and row.string_box is None


@pytest.mark.parametrize("text, message", [
    ("red circel", "unknown word 'circel'. Did you mean 'circle'"),
    ("red circle left blue star", "unknown word 'left'. Did you mean 'left of'"),
    ("red", "'red' is not one object"),
    ("circle", "'circle' is not one object"),
    ("red blue circle", "is not one object"),
    ("red circle ring", "is not one object"),
    ("small big red circle", "is not one object"),
    ("red circle text A7K above", "needs an object on both sides"),
    ("above red circle", "needs an object on both sides"),
    ("red circle, above blue ring", "needs an object on both sides"),
    ("red circle and and", None),
    ("", "no object is described"),
    ("text A7K", "no object is described"),
    ("red circle text A", "the text 'A' cannot be drawn"),
    ("red circle text ACEF", "the text 'ACEF' cannot be drawn"),
    ("red circle reading A0K", "the text 'A0K' cannot be drawn"),
    ("red circle text", "the text '' cannot be drawn"),
    ("red circle text AC text AE", "holds one string, found 2: AC, AE"),
    (" and ".join(["big red circle"] * 12), "found no room on 64 x 64 px for the 12 objects"),
])
def test_says_what_is_wrong(text, message):
    if message is None:
        assert len(parse_scene(text, np.random.default_rng(0)).objects) == 1
        return
    with pytest.raises(ValueError) as error:
        parse_scene(text, np.random.default_rng(0))
    assert message in str(error.value)


def test_refuses_a_tiny_canvas():
    assert parse_scene("red circle", np.random.default_rng(0), 40).canvas == 40
    with pytest.raises(ValueError, match="39 px is too small"):
        parse_scene("red circle", np.random.default_rng(0), 39)
