"""Pictures: from any file a camera or a browser makes to the numbers a Vision Transformer reads.

Preprocessing as in CLIP (arXiv:2103.00020): bicubic, then the mean and standard deviation of its training pictures.
`Preprocessing` holds what another model does otherwise; the numbers are those of `transformers`' image processors.

    C channels, S side of the square in pixels, F frames
"""

import base64
import binascii
import contextlib
import io
import math
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of red, green, blue between 0 and 1
STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and deviation: pixels between -1 and 1
MAX_PIXELS, MAX_SIDE = 64_000_000, 8_000  # of what is decoded or made
IN_MEMORY = "picture in memory"  # for messages
FITS = ("crop", "pad", "stretch", "squash")
PNG = b"\x89PNG\r\n\x1a\n"  # how a file of this form begins
OF_PIXELS = (b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf")  # parts of it that are read, beside those in capitals
DECODING_ERRORS = (OSError, SyntaxError, EOFError, ValueError, IndexError, struct.error, Image.DecompressionBombError)


class ImageError(ValueError):
    """A picture that cannot be used; the message names its file."""


@dataclass(frozen=True)
class Member:
    """A picture inside a larger file, such as a tar: `size` bytes from byte `offset` of the file `path`."""

    path: str
    offset: int
    size: int
    name: str

    def __str__(self):
        return f"{self.path}/{self.name}"

    def read(self):
        """Its bytes."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def load(source):
    """Any picture as upright RGB; of an animation the first frame; transparency over white.

    A picture of more than MAX_PIXELS is refused by its header, but for a JPEG, which is decoded at a half, a quarter or
    an eighth of its size.

    Args:
      source: path, Member, the bytes of a file, a PIL image, or an array uint8[H, W, 3].
    Returns: PIL.Image.Image of mode RGB.
    Raises: FileNotFoundError; ImageError if it is empty, too large, damaged or no image.
    """
    if isinstance(source, numpy.ndarray):
        try:
            source = Image.fromarray(source)
        except (TypeError, ValueError) as error:
            found = f"{source.dtype}{list(source.shape)}"
            raise ImageError(f"an array {found} is no picture; expected uint8[H, W, 3]") from error
    name = IN_MEMORY if isinstance(source, (bytes, Image.Image)) else source
    with contextlib.nullcontext(source) if isinstance(source, Image.Image) else opened(source) as image:
        image.load()
        with contextlib.suppress(*DECODING_ERRORS):  # of what is written beside the pixels
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # PIL's own conversion clips everything above 255 to white
            values = numpy.asarray(image).astype(numpy.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ImageError(f"{name}: pixel values {values.min()} to {values.max()} exceed 16 bits; save it in 16")
            image = Image.fromarray(((values * 255 + 32767) // 65535).astype(numpy.uint8))
        if image.mode == "F":
            raise ImageError(f"{name}: floating-point pixels have no agreed white; save the picture with 8 or 16 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB") if image.mode != "RGB" else image


def bare_names(paths, folder):
    """Whether missing pictures are found in a folder by their names without folders: bool; a warning tells if they are.

    Only where that can give no wrong one: no picture lies in a folder of its own, no two share a name, all are there.
    """
    missing = [path for path in paths if not os.path.exists(path)]
    bare = {Path(folder, Path(path).name) for path in paths}
    structured = any(os.path.exists(path) and Path(path).parent != Path(folder) for path in paths)
    found = missing and not structured and len(bare) == len(paths) and all(path.exists() for path in bare)
    if found:
        warnings.warn(f"pictures are found in {folder} by their bare names, {Path(missing[0]).name} for {missing[0]}")
    return bool(found)


def from_base64(text):
    """The bytes of a picture in base64, perhaps behind "data:image/…;base64," and in lines. Raises: ImageError."""
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except binascii.Error as error:
        raise ImageError(f"no base64 ({error})") from error


@contextlib.contextmanager
def opened(source):
    """A picture file whose header is read; whatever breaks while it is decoded becomes an ImageError.

    Args and errors: as in `load`, of which this is the first half.
    """
    if isinstance(source, (bytes, Member)):
        content, source = (source, IN_MEMORY) if isinstance(source, bytes) else (source.read(), source)
        file = io.BytesIO(content)
    elif not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"a {type(source).__name__} is no picture; expected a path, a PIL image or uint8[H, W, 3]")
    elif os.path.isdir(source):
        raise ImageError(f"{source}: a folder, not an image")
    elif not os.path.exists(source):
        raise FileNotFoundError(f"{source}: no such image")
    else:
        file = open(source, "rb")
    with file:
        try:
            is_png = file.read(len(PNG)) == PNG
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
                image = Image.open(io.BytesIO(bare_png(file.read())) if is_png else file)
            width, height = image.size
            scale = math.ceil(math.log2(max(1, width * height / MAX_PIXELS)) / 2)
            if scale and image.format in ("JPEG", "MPO"):  # which PIL can decode smaller; phones write the second
                image.draft(None, (width >> scale, height >> scale))
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{source}: {width} x {height} is {width * height:,} pixels, more than the limit of "
                                 f"{MAX_PIXELS:,}; scale it down")
            yield image
        except ImageError:
            raise
        except DECODING_ERRORS as error:
            raise ImageError(f"{source}: the image is damaged or cut short, or of a format that PIL cannot read "
                             f"({error}); copy it again") from error


def bare_png(data):
    """A PNG's bytes without texts, colour profiles and the like, long or broken ones of which PIL refuses."""
    kept, place = [PNG], len(PNG)
    while place < len(data):
        stop = place + 12 + int.from_bytes(data[place : place + 4])  # length, name, content, checksum
        name = data[place + 4 : place + 8]
        if name[:1].isupper() or name in OF_PIXELS:
            kept.append(data[place:stop])
        place = stop
    return b"".join(kept)


@dataclass(frozen=True)
class Preprocessing:
    """How one model wants its pictures."""

    image_size: int  # S in pixels
    fit: str = "crop"  # crop: shorter side to S, centre kept; pad: to a square; stretch; squash: stretched twice
    mean: tuple[float, float, float] = MEAN  # of red, green, blue between 0 and 1
    std: tuple[float, float, float] = STD
    pad_color: tuple[int, int, int] | None = None  # with "pad", 0 to 255; None = the mean, rounded down
    resample: int = Image.Resampling.BICUBIC  # PIL's number of the filter
    zoom: float = 1.0  # with "crop": the shorter side before the cut / S


CLIP = Preprocessing(224)  # also LLaVA-Phi's and Lynx's, at their sizes
SIGLIP = Preprocessing(224, "stretch", HALF, HALF)


def to_pixels(image, image_size, fit="crop", preprocessing=CLIP):
    """One picture of mode RGB as the numbers a ViT reads: float32[3, S, S].

    image_size: S in pixels. preprocessing: of which the colours count; size and fit are those given here.
    fit: "crop" (shorter side to S, centre kept), "pad" (a square of the longer side in the mean colour, then to S),
      "stretch", or "squash" (stretched to a square of the longer side, then to S).
    """
    return normalise(numpy.asarray(to_square(image, image_size, fit, preprocessing))[None], preprocessing)[0]


def to_square(image, image_size, fit, preprocessing=CLIP):
    """A picture fitted to S x S, args as in `to_pixels`: PIL.Image.Image; one of this size is returned as it is."""
    assert fit in FITS, f"unknown fit {fit!r}"
    size, resample, shorter, longer = (image_size, image_size), preprocessing.resample, *sorted(image.size)
    zoomed = round(image_size * preprocessing.zoom) if fit == "crop" else image_size
    if image.size == size and zoomed == image_size:
        return image
    if fit == "crop":  # the shorter side to S, perhaps zoomed, then the centre
        width, height = (zoomed * side // shorter for side in image.size)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        box = (left, top, left + image_size, top + image_size)
        if width * height <= MAX_PIXELS:
            return image.resize((width, height), resample).crop(box)
        return image.resize(size, resample, box=[side * shorter / zoomed for side in box])  # of a very long picture
    if fit != "stretch" and longer**2 > MAX_PIXELS:  # too large a square for the memory
        scale, longer = MAX_SIDE / longer, MAX_SIDE
        image = image.resize([max(1, round(side * scale)) for side in image.size], resample)
    if fit == "squash":
        image = image.resize((longer, longer), resample)
    if fit == "pad":
        border = preprocessing.pad_color or tuple(int(value * 255) for value in preprocessing.mean)
        padded = Image.new("RGB", (longer, longer), border)
        padded.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
        image = padded
    return image.resize(size, resample)


def normalise(frames, preprocessing=CLIP):
    """uint8[F, S, S, 3] -> float32[F, 3, S, S]: (x / 255 - mean) / std."""
    pixels = torch.tensor(frames).permute(0, 3, 1, 2).contiguous().float()  # F C S S
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return pixels.div_(255).sub_(mean).div_(std)  # in place: new memory costs more than the arithmetic
