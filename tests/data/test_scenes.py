"""Scenes: what is placed where, and what is drawn. The pictures are measured, not compared."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from nanovlm.data import scenes
from nanovlm.data.scenes import (
    ALPHABET, COLORS, HELD_OUT, SHAPES, SIZES, Scene, SceneObject, TRAIN_PAIRS, in_held_out_fifth, place_string, render,
    sample_scene, symbol_centres,
)

FIRST_HELD_OUT = ["AA", "AU", "A3", "CE", "CH", "CL"]  # the first six in the order of ALPHABET; they must never change


def generator(*seed):
    return np.random.default_rng(seed)


def sampled(number, split="train", with_string=False, max_objects=4, **options):
    return [sample_scene(generator(0, n), max_objects, split, with_string, **options) for n in range(number)]


def pixels_of(scene, *seed):
    return np.asarray(render(scene, generator(*seed))).astype(float)


def distance_to_box(thing, box):
    left, top, right, bottom = box
    return math.hypot(max(left - thing.x, 0, thing.x - right), max(top - thing.y, 0, thing.y - bottom))


def test_symbols_stand_side_by_side_in_the_string_s_box():
    scene = Scene(64, (), "HHH", place_string(generator(0), "HHH", 64))
    left, top, right, bottom = scene.string_box
    (_, first, _), (_, second, y), (_, third, _) = symbol_centres(scene)
    assert second == (left + right) / 2 and y == (top + bottom) / 2
    assert second - first == third - second == (right - left + 1) / 3  # a symbol and the pixel behind it
    assert symbol_centres(Scene(64, ())) == []


def test_four_pairs_and_a_fifth_of_the_strings_are_held_out_always_the_same():
    assert len(HELD_OUT) == len({color for color, _ in HELD_OUT}) == len({shape for _, shape in HELD_OUT}) == 4
    easy_vqa = set(itertools.product(("red", "green", "blue", "yellow", "teal"), ("circle", "triangle")))
    assert not set(HELD_OUT) & easy_vqa and set(TRAIN_PAIRS) == set(itertools.product(COLORS, SHAPES)) - set(HELD_OUT)
    strings = ["".join(symbols) for length in (2, 3) for symbols in itertools.product(ALPHABET, repeat=length)]
    for length in (2, 3):
        share = np.mean([in_held_out_fifth(string) for string in strings if len(string) == length])
        assert 0.17 < share < 0.23
    assert [string for string in strings if in_held_out_fifth(string)][:6] == FIRST_HELD_OUT


@pytest.mark.parametrize("canvas", [40, 48, 64, 96])
def test_things_lie_inside_and_apart(canvas):
    gaps, edges = [], []
    for scene in sampled(300, with_string=True, canvas=canvas):
        left, top, right, bottom = scene.string_box
        assert 1 <= left < right <= canvas - 1 and 1 <= top < bottom <= canvas - 1
        for thing in scene.objects:
            edges.append(min(thing.x, thing.y, canvas - thing.x, canvas - thing.y) - thing.radius)
            gaps.append(distance_to_box(thing, scene.string_box) - thing.radius)
        for one, other in itertools.combinations(scene.objects, 2):
            gaps.append(math.dist((one.x, one.y), (other.x, other.y)) - one.radius - other.radius)
    assert 1.5 <= min(edges) < 1.6 and 1.5 - 1e-6 <= min(gaps) < 1.6


@pytest.mark.parametrize("canvas", [48, 96])
def test_sizes_do_not_depend_on_the_canvas_and_fill_their_range(canvas):
    radii = {"small": [], "big": []}
    for thing in (thing for scene in sampled(500, canvas=canvas) for thing in scene.objects):
        radii[thing.size].append(thing.radius)
    for size, (low, high) in SIZES.items():
        assert low <= min(radii[size]) < low + 0.02 and high - 0.02 < max(radii[size]) <= high
    assert 0.3 < len(radii["big"]) / len(radii["big"] + radii["small"]) < 0.54  # fewer fit on small ones


def test_numbers_pairs_strings_and_neighbours_are_drawn_as_documented():
    counts = Counter(len(scene.objects) for scene in sampled(1200))
    assert set(counts) == {1, 2, 3, 4} and all(0.2 < count / 1200 < 0.3 for count in counts.values())
    assert set(Counter(len(scene.objects) for scene in sampled(100, max_objects=3, min_objects=2))) == {2, 3}
    for split, pairs, held_out in (("train", TRAIN_PAIRS, False), ("new", TRAIN_PAIRS, False),
                                   ("unseen_pairs", HELD_OUT, False), ("reading", TRAIN_PAIRS, True)):
        drawn = sampled(800, split, with_string=True)
        assert {(thing.color, thing.shape) for scene in drawn for thing in scene.objects} == set(pairs)
        assert {in_held_out_fifth(scene.string) for scene in drawn} == {held_out}
        lengths = Counter(len(scene.string) for scene in drawn)
        assert set(lengths) == {2, 3} and 0.4 < lengths[2] / 800 < 0.6
        assert set("".join(scene.string for scene in drawn)) == set(ALPHABET)
    twos = [scene.objects for scene in sampled(3000, max_objects=2, min_objects=2) if len(scene.objects) == 2]
    same_color = np.mean([one.color == other.color for one, other in twos])
    same_shape = np.mean([one.shape == other.shape for one, other in twos])
    # 0.15 repeat it on purpose (a twelfth of them gives a held-out pair and is not done), 0.85 / 8 or / 6 by chance
    assert abs(same_color - (0.15 * 11 / 12 + 0.85 / 8)) < 0.03
    assert abs(same_shape - (0.15 * 11 / 12 + 0.85 / 6)) < 0.03


def test_a_crowded_picture_makes_objects_small_but_is_never_empty(monkeypatch):
    crowded = sampled(60, max_objects=12, min_objects=12, canvas=48)
    sizes = Counter(thing.size for scene in crowded for thing in scene.objects)
    assert max(len(scene.objects) for scene in crowded) < 12 and sizes["small"] > 1.5 * sizes["big"] > 0
    monkeypatch.setattr(scenes, "TRIES", 1)
    assert all(scene.objects for scene in sampled(300, with_string=True, canvas=40, max_objects=1))


@pytest.mark.parametrize("options", [dict(max_objects=0), dict(min_objects=0), dict(max_objects=2, min_objects=3),
                                     dict(canvas=39)])
def test_impossible_numbers_are_refused(options):
    with pytest.raises(ValueError, match="objects on"):
        sampled(1, **options)


def coverage(shape, radius, seed, x=32.3, y=31.6):
    """Share of each pixel that the shape covers: float[64, 64], from one drawn blue on a plain background."""
    thing = SceneObject("blue", shape, "big", x, y, radius)
    red = pixels_of(Scene(64, (thing,)), seed)[..., 0]
    ground, ink = np.median(red[:16]), np.median(np.sort(red.ravel())[:20])
    return np.where(abs(red - ground) < 40, 0, (ground - red) / (ground - ink)).clip(0, 1)


def polygon_area(corners):
    return abs(sum(ax * by - bx * ay for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]))) / 2


STAR = [(r * math.sin(i * math.pi / 5), r * math.cos(i * math.pi / 5)) for i, r in enumerate([1, 0.42] * 5)]
AREAS = {"circle": math.pi, "ring": math.pi * (1 - 0.55**2), "square": 2.0, "triangle": 3 * math.sqrt(3) / 4,
         "star": polygon_area(STAR), "cross": 0.6**2 + 4 * 0.6 * (math.sqrt(1 - 0.3**2) - 0.3)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [5.2, 9.3])
def test_shapes_have_their_area_their_center_and_stay_in_their_radius(shape, radius):
    covered = sum(coverage(shape, radius, seed) for seed in range(8)) / 8
    ys, xs = np.mgrid[0:64, 0:64] + 0.5
    assert covered.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.09)
    assert (xs * covered).sum() / covered.sum() == pytest.approx(32.3, abs=0.3)
    assert (ys * covered).sum() / covered.sum() == pytest.approx(31.6, abs=0.3)
    reach = np.hypot(xs - 32.3, ys - 31.6)[covered > 0.15].max()
    assert radius - 1.2 < reach < radius + 0.8


def test_shapes_tilt_a_little_to_both_sides():
    tilts = []
    for seed in range(150):
        covered = coverage("triangle", 9.5, seed)
        top = np.flatnonzero(covered.sum(1))[0]
        rows = covered[top : top + 2]
        x = (np.arange(64) + 0.5) @ rows.sum(0) / rows.sum()
        tilts.append(math.asin(np.clip((x - 32.3) / 9.0, -1, 1)))
    assert 0.15 < max(tilts) < 0.26 and -0.26 < min(tilts) < -0.15 and abs(np.mean(tilts)) < 0.04


def test_the_color_stands_at_the_center_of_every_object_and_varies_a_little():
    shifts = []
    for n, scene in enumerate(sampled(300)):
        picture = pixels_of(scene, n)
        for thing in scene.objects:
            x = thing.x + (0.775 * thing.radius if thing.shape == "ring" else 0)  # in the middle of the ring's band
            shift = picture[int(thing.y), int(x)] - COLORS[thing.color]
            assert abs(shift).max() <= 10 or thing.shape == "ring" and thing.size == "small"
            if thing.shape == "ring":
                assert picture[int(thing.y), int(thing.x)].min() > 150  # the hole shows the background
            elif thing.color == "green":
                shifts.append(shift)
    assert np.abs(np.mean(shifts, axis=0)).max() < 2 and np.min(shifts) <= -8 and np.max(shifts) >= 8
    assert np.min(np.std(shifts, axis=0)) > 4  # every channel on its own


def test_background_is_light_and_noisy():
    pictures = np.stack([pixels_of(Scene(64, ()), n) for n in range(200)])
    tones, noises = pictures.mean((1, 2)), pictures.std((1, 2))
    assert 195 < tones.min() < 206 and 244 < tones.max() < 253
    assert 3 < abs(tones - tones.mean(1, keepdims=True)).max() < 9
    dark = tones.max(1) < 225  # where nothing is cut off at white
    assert 2.8 < noises[dark].min() < 3.6 and 8.3 < noises[dark].max() < 9.4
    grain = (pictures - pictures.mean((1, 2), keepdims=True))[dark].mean(-1)
    correlations = np.corrcoef(grain.reshape(len(grain), -1)) - np.eye(len(grain))
    assert abs(correlations).max() < 0.2  # hardly two pictures have the same part of the noise
    assert np.ptp(pictures[dark][..., 0] - pictures[dark][..., 1], axis=(1, 2)).max() <= 1  # the same in all channels
    for one, other in itertools.combinations([*COLORS.values(), (225, 225, 225), (35, 35, 35)], 2):
        assert math.dist(one, other) > 75


def test_strings_are_dark_symbols_that_fill_their_box():
    inks = []
    for n, scene in enumerate(sampled(150, with_string=True)):
        picture = pixels_of(Scene(64, (), scene.string, scene.string_box), n)
        left, top, right, bottom = scene.string_box
        inked = picture.min(-1) < 150
        rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
        assert top <= rows[0] <= top + 1 and bottom - 2 <= rows[-1] < bottom and bottom - top == 10
        assert left <= columns[0] <= left + 2 and right - 3 <= columns[-1] < right
        runs = np.flatnonzero(np.diff(inked.any(0)[left - 1 : right + 1].astype(int)) == 1)
        assert len(runs) == len(scene.string)  # a blank column between two symbols
        inks.append(picture.min())
    assert 15 <= min(inks) < 20 and 45 < max(inks) < 70
