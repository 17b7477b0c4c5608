"""What stands where on a drawn page, pixel by pixel."""

import numpy
from PIL import Image


def read_page(path):
    """uint8[height, width, 3], which may be written to."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return numpy.array(image.convert("RGB"))


def box_of(page, color):
    """(left, top, right, bottom) of the pixels of exactly this colour."""
    rows, columns = numpy.nonzero((page == color).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def inked(page, left, top, right, bottom):
    """Whether anything is drawn in a box; the box is white afterwards."""
    box = page[top:bottom, left:right]
    found = bool((box != 255).any())
    box[:] = 255
    return found


def near(box, expected):
    return all(abs(one - other) <= 2 for one, other in zip(box, expected))
