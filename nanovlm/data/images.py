"""Pictures: from any file a camera or a browser makes to the numbers a Vision Transformer reads.

Preprocessing as in CLIP (arXiv:2103.00020): bicubic, then the mean and standard deviation of its training pictures.

    C channels, S side of the square in pixels, F frames
"""

import os
import struct
import warnings

import numpy
import torch
from PIL import Image, ImageOps

from nanovlm.names import nearest

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of red, green, blue between 0 and 1
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 64_000_000
FITS = ("crop", "pad", "stretch")


class ImageError(ValueError):
    """A picture that cannot be used; the message names its file."""


def load(source, max_pixels=MAX_PIXELS):
    """Any picture as upright RGB; of an animation the first frame; transparency over white.

    Args:
      source: path, or a PIL image.
      max_pixels: int, largest width x height that is decoded; read from the header, before decoding.
    Returns: PIL.Image.Image of mode RGB.
    Raises: FileNotFoundError; ImageError if it is empty, too large, damaged or no image.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "picture in memory")
    if not os.path.exists(source):
        raise FileNotFoundError(f"{source}: no such image")
    if not os.path.isfile(source):
        raise ImageError(f"{source}: a folder, not an image")
    if os.path.getsize(source) == 0:
        raise ImageError(f"{source}: the file is empty (0 bytes); copy or download it again")
    with open(source, "rb") as file:
        try:
            return _decode(file, source, max_pixels)
        except ImageError:
            raise
        except Image.UnidentifiedImageError as error:
            raise ImageError(f"{source}: not an image, or of a format that PIL cannot read") from error
        except Image.DecompressionBombError as error:
            remedy = "if you trust it, raise max_pixels and PIL.Image.MAX_IMAGE_PIXELS"
            raise ImageError(f"{source}: {error}; {remedy}") from error
        except (OSError, SyntaxError, EOFError, ValueError, struct.error) as error:  # all that PIL's readers raise
            remedy = "copy or download it again"
            raise ImageError(f"{source}: the image is damaged or cut short ({error}); {remedy}") from error


def to_pixels(image, image_size, fit="crop"):
    """One picture as the numbers a ViT reads.

    Args:
      image: PIL.Image.Image of mode RGB, as `load` gives it.
      image_size: int, S in pixels.
      fit: "crop" (shorter side to S, centre kept), "pad" (longer side to S, rest in the mean colour) or "stretch".
    Returns: float32[3, S, S], CLIP-normalised.
    """
    return normalise(numpy.asarray(to_square(image, image_size, fit))[None])[0]


def to_square(image, image_size, fit):
    """A picture fitted to S x S, bicubic; one that has this size already is returned as it is.

    Args and errors: as in `to_pixels`; ValueError for an unknown fit, a size below 1 or a picture that is not RGB.
    Returns: PIL.Image.Image, S x S.
    """
    if fit not in FITS:
        raise ValueError(f"unknown fit {fit!r}.{nearest(fit, FITS)}")
    if image_size < 1:
        raise ValueError(f"image_size {image_size} must be at least 1 pixel")
    if image.mode != "RGB":
        raise ValueError(f"a picture of mode RGB was expected, found {image.mode}; images.load converts any other")
    if image.size == (image_size, image_size):
        return image
    if fit == "crop":
        return _crop(image, image_size)
    if fit == "pad":
        return _pad(image, image_size)
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC)


def normalise(frames):
    """uint8[F, S, S, 3] -> float32[F, 3, S, S]: (x / 255 - mean) / std."""
    pixels = torch.from_numpy(frames.transpose(0, 3, 1, 2).astype(numpy.float32, order="C"))  # F C S S
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def _decode(file, source, max_pixels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
        image = Image.open(file)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{source}: {width} x {height} is {width * height:,} pixels, more than the limit of {max_pixels:,}; "
            "scale it down, or pass a larger max_pixels to images.load if you trust it"
        )
    return _upright_rgb(image, source)


def _upright_rgb(image, source):
    if 0 in image.size:
        raise ImageError(f"{source}: the image has no pixels ({image.width} x {image.height})")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _to_8_bits(image, source)
    if image.mode == "F":
        raise ImageError(f"{source}: floating-point pixels have no agreed white; save the picture with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image


def _to_8_bits(image, source):
    """16-bit grey scaled to 8 bits; PIL's own conversion clips everything above 255 to white."""
    values = numpy.asarray(image).astype(numpy.int64)
    if values.min() < 0 or values.max() > 65535:
        found = f"{values.min()} to {values.max()}"
        raise ImageError(f"{source}: pixel values {found} exceed 16 bits; save it with 8 or 16")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(numpy.uint8))


def _crop(image, size):
    """Shorter side to `size`, then the centre; only the centre is computed: a very long picture costs no more."""
    shorter = min(image.size)
    box = []
    for side in image.size:
        resized = size * side // shorter
        start = round((resized - size) / 2)  # where the crop begins in the resized picture
        box.append((start * side / resized, (start + size) * side / resized))
    (left, right), (top, bottom) = box
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def _pad(image, size):
    """Longer side to `size`, in the middle of a square of the mean colour."""
    longer = max(image.size)
    width, height = (max(1, round(size * side / longer)) for side in image.size)
    square = Image.new("RGB", (size, size), tuple(int(value * 255) for value in MEAN))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return square
