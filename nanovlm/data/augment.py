"""Random views of training pictures: a part of random size and shape, perhaps mirrored, drawn anew at every showing.

A view is a function of the run's seed, the source and the number of the record, so that a resumed run sees the same.
Mirroring is wrong where an answer says left or right, and for letters.

Inception's crop, arXiv:1409.4842, Sec. 6, drawn as in torchvision's RandomResizedCrop. "crop" is Lynx's (its code: 90
to 100 % of the area, never mirrored), "crop_flip" BLIP-2's and mPLUG-Owl2's (LAVIS: 50 to 100 %, mirrored half the
time).
"""

import math
import zlib
from dataclasses import dataclass, replace

import numpy
from PIL import Image, ImageOps

from nanovlm.data.records import Changed

TRIES = 10  # until the picture's own shape, cut to the limits of the ratio, is taken


@dataclass(frozen=True)
class View:
    """One random view of a picture."""

    scale: tuple[float, float] = (0.9, 1.0)  # smallest and largest share of the area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # smallest and largest width / height
    flip: float = 0.0  # chance of being mirrored
    seed: tuple[int, ...] = ()  # decides everything random

    def box(self, width, height):
        """(left, top, right, bottom) of the part, in pixels, and whether it is mirrored."""
        random = numpy.random.default_rng(self.seed)
        flipped = random.random() < self.flip
        for _ in range(TRIES):
            area = width * height * random.uniform(*self.scale)
            aspect = math.exp(random.uniform(*map(math.log, self.ratio)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
                break
        else:
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


def augmented(source, augmentation, seed):
    """A source for training, whose visual inputs have views of their own; the frames of a clip share theirs.

    source: with name, length and record(n). augmentation: a key of AUGMENTATIONS; "none" gives the source itself.
    seed: int, the run's.
    """
    view, name = AUGMENTATIONS[augmentation], zlib.crc32(source.name.encode())

    def through_views(source, n):
        record, visuals = source.record(n), []
        for place, visual in enumerate(record.visuals):
            own = replace(view, seed=(seed, name, n, place))
            visuals.append(replace(visual, key=f"{visual.key}, view {own.seed}", view=own))
        return replace(record, visuals=tuple(visuals))

    return source if view is None else Changed(source, through_views)
