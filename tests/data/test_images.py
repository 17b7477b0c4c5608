"""Pictures: every kind of file becomes upright RGB, every fit a normalised square, every broken file a clear error."""

import struct
import warnings
import zlib

import numpy
import pytest
import torch
from PIL import Image

from nanovlm.data import images

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def colors(image):
    """The pixels of a picture, row by row."""
    assert image.mode == "RGB"
    return [tuple(pixel) for row in numpy.asarray(image).tolist() for pixel in row]


def saved(image, path, **options):
    image.save(path, **options)
    return images.load(path)


def noise(width, height, seed=0):
    values = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(values)


PALETTE = Image.new("P", (2, 1))
PALETTE.putpalette([255, 0, 0, 0, 0, 255])


@pytest.mark.parametrize("image, pixels, options, expected", [
    (Image.new("RGBA", (3, 1), (255, 0, 0, 255)), [(255, 0, 0, 0), (0, 0, 0, 128)], {}, [RED, WHITE, (127, 127, 127)]),
    (Image.new("LA", (2, 1), (100, 255)), [(100, 0)], {}, [(100, 100, 100), WHITE]),
    (Image.new("L", (2, 1), 100), [0], {}, [(100, 100, 100), BLACK]),
    (Image.new("1", (2, 1), 1), [0], {}, [WHITE, BLACK]),
    (PALETTE, [1], {}, [RED, (0, 0, 255)]),
    (PALETTE, [1], {"transparency": 1}, [RED, WHITE]),
    (Image.new("RGB", (2, 1), RED), [(0, 0, 7)], {"transparency": (0, 0, 7)}, [RED, WHITE]),
    (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [], {"format": "TIFF"}, [RED]),
])
def test_every_mode_lies_over_white(tmp_path, image, pixels, options, expected):
    for x, pixel in enumerate(pixels, start=1):
        image.putpixel((x, 0), pixel)
    assert colors(saved(image, tmp_path / "a.png", **options)) == expected


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, ending):
    values = numpy.array([[0, 128, 129, 255, 257, 32768, 65534, 65535]], dtype=numpy.uint16)
    image = saved(Image.fromarray(values), tmp_path / f"a.{ending}")
    assert [r for r, _, _ in colors(image)] == [0, 0, 1, 1, 1, 128, 255, 255]
    image = saved(Image.fromarray(numpy.array([[0, 65535]], dtype=numpy.int32)), tmp_path / "a.tif")
    assert colors(image) == [(0, 0, 0), WHITE]
    for value in (-1, 65536):
        Image.fromarray(numpy.array([[3, value]], dtype=numpy.int32)).save(tmp_path / "b.tif")
        with pytest.raises(ValueError, match="b.tif: pixel values .* exceed 16 bits"):
            images.load(tmp_path / "b.tif")


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 0, 255), (0, 255, 0))]
    options = {"lossless": True} if ending == "webp" else {}
    image = saved(frames[0], tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **options)
    assert set(colors(image)) == {RED}


@pytest.mark.parametrize("orientation, expected", [(1, (0, 0)), (3, (2, 1)), (6, (1, 0)), (8, (0, 2)), (2, (2, 0))])
def test_exif_rotation_is_applied(tmp_path, orientation, expected):
    """A dark corner at the top left of the stored pixels ends where a viewer shows it."""
    image, exif = Image.new("RGB", (3, 2), WHITE), Image.Exif()
    image.putpixel((0, 0), BLACK)
    exif[0x0112] = orientation
    loaded = saved(image, tmp_path / "a.png", exif=exif)
    assert loaded.size == ((3, 2) if orientation < 5 else (2, 3))
    assert loaded.getpixel(expected) == BLACK and colors(loaded).count(BLACK) == 1


@pytest.mark.parametrize("name, content", [
    (b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(b"words " * 400_000)), (b"tEXt", b"k\0" + b"v" * 70_000_000),
    (b"zTXt", b"k\0\0" + zlib.compress(b"a" * 80_000_000)), (b"iCCP", b"p\0\0" + zlib.compress(b"a" * 80_000_000)), (b"eXIf", b"no TIFF"),
    (b"gAMA", b"\0"), (b"pHYs", b"\0"),
], ids=lambda value: value.decode() if len(value) == 4 else "")  # fmt: skip
def test_what_stands_beside_the_pixels_does_not_decide_whether_a_picture_is_read(tmp_path, name, content):
    image = noise(4, 3)
    image.save(tmp_path / "a.png")
    data, checksum = (tmp_path / "a.png").read_bytes(), zlib.crc32(name + content)
    part = struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
    (tmp_path / "a.png").write_bytes(data[:33] + part + data[33:])  # behind the header
    assert colors(images.load(tmp_path / "a.png")) == colors(image)
    image.save(tmp_path / "a.webp", lossless=True, exif=b"Exif\0\0no TIFF")
    assert colors(images.load(tmp_path / "a.webp")) == colors(image)


@pytest.mark.parametrize("form", ["JPEG", "MPO"])  # phones write the second: a JPEG with further pictures behind it
def test_a_large_jpeg_is_decoded_smaller(tmp_path, monkeypatch, form):
    image = Image.linear_gradient("L").resize((100, 60)).convert("RGB")
    for limit, size in ((6000, (100, 60)), (5999, (50, 30)), (1500, (50, 30)), (1499, (25, 15)), (104, (13, 8))):
        image.save(tmp_path / "a.jpg", form, quality=95, **({"save_all": True, "append_images": [image]} if form == "MPO" else {}))
        monkeypatch.setattr(images, "MAX_PIXELS", limit)
        assert images.load(tmp_path / "a.jpg").size == size
    monkeypatch.setattr(images, "MAX_PIXELS", 90)
    with pytest.raises(images.ImageError, match="100 x 60 is 6,000 pixels, more than the limit of 90"):
        images.load(tmp_path / "a.jpg")


def test_pictures_in_memory(tmp_path):
    image = noise(4, 4)
    assert images.load(image).tobytes() == image.tobytes()
    assert colors(images.load(Image.new("RGBA", (1, 1), (0, 0, 0, 0)))) == [WHITE]
    image.save(tmp_path / "a.png")
    assert images.load((tmp_path / "a.png").read_bytes()).tobytes() == image.tobytes()
    with pytest.raises(images.ImageError, match="picture in memory: .*format that PIL cannot read"):
        images.load(b"words")


@pytest.mark.parametrize("name, content, message", [
    ("empty.png", b"", "damaged or cut short"), ("text.png", b"not a picture at all", "format that PIL cannot read"), ("", None, "a folder"),
    ("float.tif", Image.new("F", (2, 2)), "floating-point"), ("none.png", None, "no such image"),
])
def test_files_that_are_no_picture(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        content.save(tmp_path / name)
    with pytest.raises((images.ImageError, FileNotFoundError), match=f"{name}: .*{message}"):
        images.load(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL remarks on what it finds
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "tif", "bmp", "ppm"])
def test_damaged_bytes_give_a_picture_or_a_named_error(tmp_path, ending):
    rng, path = numpy.random.default_rng(0), tmp_path / f"a.{ending}"
    noise(24, 24).save(path)
    whole = numpy.frombuffer(path.read_bytes(), dtype=numpy.uint8)
    for share in (0.03, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)].tobytes())
        with pytest.raises(images.ImageError, match=f"a.{ending}: the image is damaged or cut short"):
            images.load(path)
    for _ in range(60):
        broken = whole.copy()
        broken[rng.integers(0, min(len(broken), 120), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(broken.tobytes())
        try:
            assert images.load(path).mode == "RGB"
        except images.ImageError as error:
            assert f"a.{ending}" in str(error)


def png_of(path, side):
    """A small file whose header promises side x side pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 100)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


@pytest.mark.parametrize("side, message", [
    (8001, "64,016,001 pixels, more than the limit of 64,000,000"), (50000, "decompression bomb"),
    (8000, "cut short"),  # it passes the limit, and then there are no pixels
])
def test_image_bombs(tmp_path, side, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=f"bomb.png: .*{message}"):
            images.load(png_of(tmp_path / "bomb.png", side))


def test_the_right_size_is_not_resampled_and_squash_is_two_stretches():
    image = noise(8, 8)
    for fit in images.FITS:
        assert images.to_square(image, 8, fit) is image
    image = noise(20, 31)
    twice = image.resize((31, 31), Image.Resampling.BICUBIC).resize((8, 8), Image.Resampling.BICUBIC)
    found = colors(images.to_square(image, 8, "squash"))
    assert found == colors(twice) != colors(images.to_square(image, 8, "stretch"))
    assert colors(images.to_square(image, 8, "stretch")) == colors(image.resize((8, 8), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (31, 47), (9, 50), (16, 17), (5, 7), (8, 3), (8, 9)])
def test_crop_is_resize_then_centre_crop(size):
    """CLIP's own preprocessing: shorter side to S, then the middle S x S; an odd rest lies right and below."""
    image, side = noise(*size), 8
    width, height = (side * length // min(size) for length in size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    assert colors(images.to_square(image, side, "crop")) == colors(resized.crop((left, top, left + side, top + side)))


def test_pad_keeps_all_of_the_picture_in_the_middle_of_the_mean_colour():
    wide = numpy.asarray(images.to_square(Image.new("RGB", (41, 20), RED), 41, "pad")).tolist()
    mean = [122, 116, 104]
    assert wide == [[mean] * 41] * 10 + [[list(RED)] * 41] * 20 + [[mean] * 41] * 11
    image = noise(30, 43)
    tall = images.to_square(image, 43, "pad")
    assert colors(tall.crop((6, 0, 36, 43))) == colors(image) and tall.getpixel((36, 20)) == tuple(mean)
    colored = images.Preprocessing(8, "pad", pad_color=(1, 2, 3))
    assert images.to_square(image, 43, "pad", colored).getpixel((5, 0)) == (1, 2, 3)
    assert images.to_square(image, 43, "pad", images.SIGLIP).getpixel((5, 0)) == (127, 127, 127)


def test_very_long_pictures_stay_small(monkeypatch):
    image = Image.fromarray(numpy.linspace(0, 255, 5000).astype(numpy.uint8)[:, None].repeat(3, 1)).convert("RGB")
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    monkeypatch.setattr(images, "MAX_SIDE", 100)
    assert set(colors(images.to_square(image, 16, "crop"))) <= {(127,) * 3, (128,) * 3}, "the centre"
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *args, **box: sizes.append(args[0]) or resize(self, *args, **box))
    for fit in images.FITS:
        for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
            assert images.to_square(turned, 16, fit).size == (16, 16)
    assert max(width * height for width, height in sizes) <= 10_000


@pytest.mark.parametrize("name, fit, preprocessing", [
    ("CLIPImageProcessor", "crop", images.CLIP), ("BlipImageProcessor", "stretch", images.CLIP),
    ("SiglipImageProcessor", "stretch", images.SIGLIP), ("LlavaImageProcessor", "pad", images.CLIP),
])
def test_equal_to_the_processors_of_transformers(name, fit, preprocessing):
    """At most one grey level apart, on odd sizes too; on PIL's own processors not even that."""
    processor = getattr(pytest.importorskip("transformers"), name)
    grey = 255 * torch.tensor(preprocessing.std).view(3, 1, 1)
    sizes = [(40, 30), (31, 47), (9, 50), (50, 9), (16, 17), (5, 7), (24, 24), (8, 3), (1, 1), (64, 281), (101, 100)]
    for place, (width, height) in enumerate(sizes):
        for side in (8, 21, 24):
            square = {"size": {"height": side, "width": side}}
            cut = {"size": {"shortest_edge": side}, "crop_size": side} | ({"do_pad": True} if fit == "pad" else {})
            image = noise(width, height, place)
            given = processor(**square if fit == "stretch" else cut)(image, return_tensors="pt")
            ours = images.to_pixels(image, side, fit, preprocessing)
            assert ((ours - torch.as_tensor(given["pixel_values"][0])).abs() * grey).max() <= 1.0, (width, height, side)


def test_pixels_are_normalised_channels_first():
    image = Image.new("RGB", (2, 2), (0, 255, 51))
    image.putpixel((1, 0), WHITE)
    pixels = images.to_pixels(image, 2)
    assert pixels.shape == (3, 2, 2) and pixels.dtype == torch.float32
    mean, std = torch.tensor((0.48145466, 0.4578275, 0.40821073)), torch.tensor((0.26862954, 0.26130258, 0.27577711))
    torch.testing.assert_close(pixels[:, 0, 0], (torch.tensor([0.0, 1.0, 0.2]) - mean) / std)
    torch.testing.assert_close(pixels[:, 0, 1], (1 - mean) / std)  # row 0, column 1
