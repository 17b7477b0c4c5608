"""Augmentation: boxes are drawn as documented, the same ones for the same seed and record, in training alone."""

import dataclasses
import math
import statistics

import numpy
import pytest
import torch
from PIL import Image

import tiny_recipe
from nanovlm.data import images
from nanovlm.data.augment import AUGMENTATIONS, View, augmented
from nanovlm.data.batching import pixels_of
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.training.progress import Stopped
from nanovlm.training.stages import AUGMENTATIONS as NAMES
from test_trainer import losses, make, train


def noise(width, height, seed=0):
    values = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(values)


class Source:
    """Record n shows picture n % 3, and a clip."""

    name = "source"

    def __len__(self):
        return 3

    def record(self, n):
        clip = Visual(f"clip {n % 3}", (noise(30, 20, n % 3), noise(30, 20, n % 3)))
        picture = Visual(f"picture {n % 3}", (noise(30, 20, n % 3),))
        talk = Turn("user", (0, 1, "what?")), Turn("assistant", ("that",))
        return Record(str(n), (picture, clip), (talk,))


def boxes(view, width, height, number=4000):
    return [dataclasses.replace(view, seed=(seed,)).box(width, height) for seed in range(number)]


@pytest.mark.parametrize("name, scale, flip", [("crop", (0.9, 1.0), 0.0), ("crop_flip", (0.5, 1.0), 0.5)])
def test_areas_ratios_and_mirrors_are_drawn_as_documented(name, scale, flip):
    """On a large square no draw of BLIP-2's is refused, but those wider or higher than the picture."""
    view, side = AUGMENTATIONS[name], 1000
    drawn = boxes(view, side, side)
    assert all(0 <= left < right <= side and 0 <= top < bottom <= side for (left, top, right, bottom), _ in drawn)
    sizes = [(right - left, bottom - top) for (left, top, right, bottom), _ in drawn]
    areas, ratios = [w * h / side**2 for w, h in sizes], [w / h for w, h in sizes]
    assert scale[0] - 0.005 < min(areas) < scale[0] + 0.02 and scale[1] - 0.02 < max(areas) <= scale[1]
    assert 0.745 < min(ratios) and max(ratios) < 1.34
    assert abs(statistics.mean(map(math.log, ratios))) < 0.02, "as often higher as wider"
    assert abs(statistics.mean(flipped for _, flipped in drawn) - flip) <= 0.03 * (flip > 0)


def test_boxes_lie_everywhere():
    """Small parts of a fixed shape: uniform areas, uniform places, from the first pixel to the last."""
    view = View(scale=(0.01, 0.04), ratio=(0.5, 2.0))
    drawn = [box for box, _ in boxes(view, 200, 100, 6000)]
    lefts = [left / (200 - right + left) for left, _, right, _ in drawn]
    tops = [top / (100 - bottom + top) for _, top, _, bottom in drawn]
    for values in (lefts, tops):
        assert statistics.quantiles(values, n=4) == pytest.approx([0.25, 0.5, 0.75], abs=0.04)
    assert min(lefts) == 0 == min(tops) and max(lefts) == 1 == max(tops)


@pytest.mark.parametrize("size, box", [
    ((400, 20), (186, 0, 213, 20)), ((20, 400), (0, 186, 20, 213)), ((1, 1), (0, 0, 1, 1)), ((1, 50), (0, 24, 1, 25))])
def test_a_picture_too_long_gives_its_middle(size, box):
    """Its own shorter side, and as much of the longer as the ratio allows."""
    assert boxes(View(), *size, number=5) == [(box, False)] * 5


def test_a_view_is_the_resized_part():
    image, found = noise(40, 30), set()
    for seed in range(20):
        view = View((0.5, 1.0), flip=0.5, seed=(seed,))
        box, flipped = view.box(40, 30)
        part = image.crop(box).resize((8, 8), Image.Resampling.BICUBIC)
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else part
        assert view.apply(image, 8).tobytes() == part.tobytes()
        found.add(flipped)
    assert found == {True, False}
    whole = View((1.0, 1.0), (1.0, 1.0)).apply(noise(9, 9), 9)
    assert whole.tobytes() == noise(9, 9).tobytes()


def test_a_view_depends_on_seed_source_record_and_place_alone_and_a_clip_has_one():
    def views(seed, name="source"):
        source = Source()
        source.name = name
        return [visual for n in range(6) for visual in augmented(source, "crop_flip", seed).record(n).visuals]

    assert len({visual.view.seed for visual in views(5)}) == 12, "another in every epoch, and for every visual input"
    assert len({visual.key for visual in views(5)}) == 12, "two views of a picture are two pictures"
    seen = [[visual.view for visual in some] for some in (views(5), views(5), views(6), views(5, "other"))]
    assert seen[0] == seen[1] and not {*seen[0]} & {*seen[2]} and not {*seen[0]} & {*seen[3]}
    source = augmented(Source(), "crop_flip", 5)
    assert (source.name, len(source), source.record(4).conversations) == ("source", 3, Source().record(4).conversations)
    assert augmented(source, "none", 0) is source and tuple(AUGMENTATIONS) == NAMES
    visual = augmented(Source(), "crop_flip", 0).record(1).visuals[1]
    square = numpy.asarray(visual.view.apply(visual.frames[0], 8))
    for preprocessing in (images.CLIP, images.SIGLIP):
        want = images.normalise(numpy.stack([square] * 2), preprocessing)
        assert torch.equal(pixels_of([visual], 8, "pad", preprocessing), want), "a view goes before the fit"


class Pictures(tiny_recipe.Squares):
    """Squares with something to see in them."""

    def record(self, n):
        record = super().record(n)
        visuals = tuple(dataclasses.replace(visual, frames=(noise(12, 9, n % 10),)) for visual in record.visuals)
        return dataclasses.replace(record, visuals=visuals)


def test_a_resumed_run_sees_the_same_views(tmp_path):
    recipe = dataclasses.replace(tiny_recipe.RECIPE, sources=tiny_recipe.RECIPE.sources | {"pictures": Pictures})

    def run(name, augmentation, **options):
        return make(tmp_path / name, recipe, stages=["align"], set=[f"align.augmentation={augmentation}"], **options)

    with pytest.raises(Stopped):
        train(run("stopped", "crop_flip", max_minutes=0))
    for name, augmentation in (("stopped", "crop_flip"), ("whole", "crop_flip"), ("plain", "none")):
        train(run(name, augmentation))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole") != losses(tmp_path / "plain")
