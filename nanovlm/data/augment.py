"""Random views of training pictures: a part of random size and shape, perhaps mirrored, drawn anew at every showing.

A view is a function of the run's seed, the source and the number of the record, so that a resumed run sees the same.
Mirroring is wrong where an answer says left or right, and for letters.

Inception's crop, arXiv:1409.4842, Sec. 6, drawn as in torchvision's RandomResizedCrop. "crop" is Lynx's (its code: 90
to 100 % of the area, never mirrored), "crop_flip" BLIP-2's and mPLUG-Owl2's (LAVIS: 50 to 100 %, mirrored half the
time).
"""

import dataclasses
import functools
import math
import zlib
from dataclasses import dataclass

import numpy
from PIL import Image, ImageOps

from nanovlm.data.records import Changed
from nanovlm.names import nearest

TRIES = 10  # until the picture's own shape, cut to the limits of the ratio, is taken


@dataclass(frozen=True)
class View:
    """One random view of a picture.

    scale: smallest and largest share of the area. ratio: smallest and largest width / height.
    flip: chance of being mirrored. seed: tuple of int, decides everything random.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    seed: tuple[int, ...] = ()

    def box(self, width, height):
        """(left, top, right, bottom) of the part, in pixels, and whether it is mirrored."""
        random = numpy.random.default_rng(self.seed)
        flipped = random.random() < self.flip
        for _ in range(TRIES):
            area = width * height * random.uniform(*self.scale)
            aspect = math.exp(random.uniform(*map(math.log, self.ratio)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.integers(width - w + 1), random.integers(height - h + 1)
                return (int(left), int(top), int(left) + w, int(top) + h), flipped
        w = max(1, min(width, round(height * self.ratio[1])))
        h = max(1, min(height, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return (left, top, left + w, top + h), flipped

    def apply(self, image, image_size):
        """The view of a picture, bicubic: PIL RGB image, image_size pixels wide and high."""
        box, flipped = self.box(*image.size)
        part = image.crop(box).resize((image_size, image_size), Image.Resampling.BICUBIC)
        return ImageOps.mirror(part) if flipped else part


AUGMENTATIONS = {"none": None, "crop": View(), "crop_flip": View((0.5, 1.0), flip=0.5)}


def through_views(view, seed, source, n):
    """Record n of a source with a view of its own for every visual input; the frames of a clip share theirs.

    Args: view: View. seed: int, the run's.
    """
    record = source.record(n)
    name = zlib.crc32(source.name.encode())
    visuals = []
    for place, visual in enumerate(record.visuals):
        own = dataclasses.replace(view, seed=(seed, name, n, place))
        visuals.append(dataclasses.replace(visual, key=f"{visual.key}, view {own.seed}", view=own))
    return dataclasses.replace(record, visuals=tuple(visuals))


def augmented(source, augmentation, seed):
    """A source for training.

    Args:
      source: with name, length and record(n). augmentation: a key of AUGMENTATIONS. seed: int, the run's.
    Returns: the source itself for "none", else one of as many records.
    Raises: ValueError for an unknown augmentation.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"unknown augmentation {augmentation!r}.{nearest(augmentation, AUGMENTATIONS)}")
    view = AUGMENTATIONS[augmentation]
    return source if view is None else Changed(source, functools.partial(through_views, view, seed))
