"""A box drawn on a picture, so that a question can be about "the object in the square box"."""

import os
from pathlib import Path

from PIL import ImageDraw

from nanovlm.data.images import load

COLOR = (255, 0, 0)
WIDTH = 1 / 150  # of the longer side, but at least 2 pixels


def marked(picture, box):
    """A picture with a box around something.

    Args:
      picture: path or PIL image. box: left, top, right, bottom as shares of the picture.
    Returns: PIL.Image.Image of mode RGB, as large as the picture; the line lies outside the box where there is room.
    Raises: images.ImageError, FileNotFoundError.
    """
    image = load(picture).copy()
    line = max(2, round(max(image.size) * WIDTH))
    sides = [share * size for share, size in zip(box, image.size * 2)]
    left, top = (max(0, round(side) - line) for side in sides[:2])
    right, bottom = (min(size - 1, round(side) + line - 1) for side, size in zip(sides[2:], image.size))
    ImageDraw.Draw(image).rectangle((left, top, right, bottom), outline=COLOR, width=line)
    return image


def write_marked(picture, box, path):
    """Write a marked picture, unless it is there already; a kill leaves the whole file or none.

    path: Path of a .png. Args and Raises else as of `marked`.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        marked(picture, box).save(unfinished, format="PNG")
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
