"""Tiles: a picture is shown piece by piece, and once as a whole behind the pieces.

A tower sees one square, in which the small print of a photograph is lost. So the picture is scaled up or down until its
longer side has a number of pixels, stretched a little to whole squares, and cut, row by row. The squares stand as the
frames of one visual input: every tower and bridge takes them. Marks in the row tell a model where a tile stands
(templates.Template.tile_marks).

Idefics3, arXiv:2408.12637, Sec. 2.2; SmolVLM, arXiv:2504.05299. Sizes, filter and rounding are those of transformers'
Idefics3ImageProcessor on PIL.

S side of a tile in pixels
"""

import math
from dataclasses import replace

from PIL import Image

from nanovlm.data import images

LANCZOS = Image.Resampling.LANCZOS
WHOLE = 4  # a picture that is not cut is scaled to so many S first, as by the published processor


def cut(visual, image_size, num_tiles):
    """The same visual input with its still picture cut into tiles; a clip's frames become a square each.

    Args:
      visual: records.Visual. image_size: S.
      num_tiles: of S pixels along the picture's longer side; 0 = one square of the whole; None = nothing is changed.
    Returns: records.Visual with frames of S x S, the whole last, and `grid`, (rows, columns) of the tiles or (0, 0).
    Raises: what images.load raises; ValueError for a picture that an augmentation cuts otherwise.
    """
    if num_tiles is None or visual.grid is not None:
        return visual
    if visual.view is not None:
        raise ValueError(f"{visual.key}: tiles show the whole picture, an augmentation a part; leave one of them out")
    frames = [images.load(frame) for frame in visual.frames]
    grid, squares = split(frames[0], image_size, round(num_tiles * image_size) if len(frames) == 1 else 0)
    squares += [split(frame, image_size, 0)[1][0] for frame in frames[1:]]
    return replace(visual, frames=tuple(squares), grid=grid)


def split(picture, image_size, longest):
    """((rows, columns), list of PIL images of S x S): tiles row by row, then the whole.

    longest: pixels of the longer side before the cut; 0 = no cut.
    """
    picture = picture.resize(scaled(*picture.size, longest or WHOLE * image_size), LANCZOS)
    rounded = scaled(*picture.size, math.ceil(max(picture.size) / image_size) * image_size)
    columns, rows = (math.ceil(side / image_size) for side in rounded)
    square = (image_size, image_size)
    if not longest or rows == columns == 1:
        return (0, 0), [picture.resize(square, LANCZOS)]
    picture = picture.resize((columns * image_size, rows * image_size), LANCZOS)
    corners = [(x * image_size, y * image_size) for y in range(rows) for x in range(columns)]
    tiles = [picture.crop((x, y, x + image_size, y + image_size)) for x, y in corners]
    return (rows, columns), [*tiles, picture.resize(square, LANCZOS)]


def scaled(width, height, longest):
    """(width, height) whose longer side is `longest` pixels and whose other is even."""
    aspect = width / height
    shorter = int(longest / aspect if width >= height else longest * aspect)
    shorter = max(1, shorter + shorter % 2)
    return (longest, shorter) if width >= height else (shorter, longest)


def most(num_tiles):
    """Squares that a picture becomes at most, those of a square one: int; num_tiles as of `cut`."""
    side = math.ceil(num_tiles or 0)
    return side**2 + 1 if side > 1 else 1
