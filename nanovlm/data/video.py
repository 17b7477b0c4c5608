"""Video: from a folder or list of frames, an animation (GIF, WebP, PNG) or a film file to a few upright RGB pictures.

Films (mp4 and whatever else FFmpeg knows) need the package `av`, which is loaded only for them. Frames are chosen over
the whole clip: one per segment, either its middle or, as in Lynx (arXiv:2307.02469, its code), a random one.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image

from nanovlm.data import images
from nanovlm.names import nearest

SAMPLINGS = ("uniform", "random")
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what a folder of frames may hold
ANIMATIONS = (".gif", ".webp", ".png", ".apng")
MAX_FRAMES = 100_000  # of one clip; a film of an hour has about 100,000
MAX_ANIMATION_PIXELS = 500_000_000  # of all frames of an animation, since each is drawn over the one before it


@dataclass(frozen=True)
class Clip:
    """A clip that is decoded when used: `len` is known at once, iterating loads its frames.

    source, num_frames, sampling: as in `load`. seed: tuple of int, decides random frames.
    """

    source: str | tuple[str, ...]
    num_frames: int
    sampling: str = "uniform"
    seed: tuple[int, ...] = ()

    def __len__(self):
        return self.num_frames

    def __iter__(self):
        return iter(load(self.source, self.num_frames, self.sampling, numpy.random.default_rng(self.seed)))

    def __getitem__(self, place):
        return list(self)[place]


def load(path, num_frames, sampling="uniform", rng=None, max_pixels=images.MAX_PIXELS):
    """Some frames of a clip in order of time.

    Args:
      path: of a folder of pictures (in the order of the numbers in their names), an animation or a film; or a list of
        pictures, paths or PIL images. A still picture is a clip of one frame.
      num_frames: int; a clip that has fewer gives all of them, some more than once.
      sampling: "uniform", the middle of every segment, or "random", any frame of it.
      rng: numpy.random.Generator for "random"; None = seed 0.
      max_pixels: int, largest width x height of a frame; read from the header, before decoding.
    Returns: list of PIL.Image.Image of mode RGB.
    Raises: FileNotFoundError; images.ImageError for what is empty, too large, too long, damaged or no video;
      ImportError for a film without `av`.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"unknown sampling {sampling!r}.{nearest(sampling, SAMPLINGS)}")
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; at least 1 is needed")
    rng = numpy.random.default_rng(0) if rng is None else rng

    def places(total, name):
        if not 1 <= total <= MAX_FRAMES:
            raise images.ImageError(f"{name}: it has {total:,} frames; from 1 to {MAX_FRAMES:,} are expected")
        return uniform_places(total, num_frames) if sampling == "uniform" else random_places(total, num_frames, rng)

    if not isinstance(path, (str, Path)):
        return _pictures(list(path), places, "the list of frames", max_pixels)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such video")
    if path.is_dir():
        return _pictures(frame_files(path), places, path, max_pixels)
    if path.suffix.lower() in PICTURES + ANIMATIONS:
        return _animation(path, places, max_pixels)
    return _film(path, places, max_pixels)


def uniform_places(total, num_frames):
    """The middle of each of num_frames equal segments: list of int in rising order, repeated where total is smaller."""
    return [(2 * place + 1) * total // (2 * num_frames) for place in range(num_frames)]


def random_places(total, num_frames, rng):
    """One random frame of each of num_frames segments that differ by one frame at most; which are longer is random too.

    A clip with fewer frames gives all of them and random repeats, in order. Returns: list of int.
    """
    if total < num_frames:
        return sorted([*range(total), *rng.integers(total, size=num_frames - total).tolist()])
    lengths = numpy.full(num_frames, total // num_frames)
    lengths[rng.choice(num_frames, total % num_frames, replace=False)] += 1
    ends = lengths.cumsum()
    return rng.integers(ends - lengths, ends).tolist()


def frame_files(folder):
    """The pictures of a folder, frame 2 before frame 10: list of Path."""
    paths = [path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES]
    return sorted(paths, key=lambda path: [(int(part), "") if part.isdecimal() else (0, part)
                                           for part in re.split(r"(\d+)", path.name)])  # fmt: skip


def _pictures(frames, places, name, max_pixels):
    return [images.load(frames[place], max_pixels) for place in places(len(frames), name)]


def _animation(path, places, max_pixels):
    with images.opened(path, max_pixels) as image:
        total = image.n_frames if hasattr(image, "n_frames") else 1
        chosen = places(total, path)
        pixels = image.width * image.height * total
        if total > 1 and pixels > MAX_ANIMATION_PIXELS:
            limit = f"more than the limit of {MAX_ANIMATION_PIXELS:,}; make it smaller, or a film of it"
            raise images.ImageError(f"{path}: its {total} frames are {pixels:,} pixels, {limit}")
        loaded = {}
        for place in sorted(set(chosen)):
            image.seek(place)
            loaded[place] = images.load(image)
        return [loaded[place] for place in chosen]


def _film(path, places, max_pixels):
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{path}: films are read through the package av; pip install av, or give a folder of frames or a GIF"
        ) from error
    try:
        total = _count(av, path, max_pixels)
        while True:
            chosen = places(total, path)
            loaded, seen = _decoded(av, path, set(chosen))
            if loaded.keys() >= set(chosen):
                return [loaded[place] for place in chosen]
            total = seen  # fewer frames than packets: half pictures, or the end is missing
    except av.FFmpegError as error:
        raise images.ImageError(f"{path}: not a video, or damaged ({error}); copy or download it again") from error


def _count(av, path, max_pixels):
    """Packets of the film, nearly always one a frame; what the header says is often missing."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise images.ImageError(f"{path}: no moving pictures in it, only sound or text")
        stream = container.streams.video[0]
        if stream.width * stream.height > max_pixels:
            raise images.ImageError(
                f"{path}: frames of {stream.width} x {stream.height} pixels are more than the limit of {max_pixels:,}"
            )
        return sum(1 for packet in container.demux(stream) if packet.size)


def _decoded(av, path, chosen):
    """Frames at the chosen places, upright: dict place -> RGB image, and how many were decoded for them."""
    loaded, seen = {}, 0
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for place, frame in enumerate(container.decode(video=0)):
            seen = place + 1
            if place in chosen:
                image = frame.to_image()
                loaded[place] = image.rotate(frame.rotation, expand=True) if frame.rotation else image
            if len(loaded) == len(chosen):
                break
    return loaded, seen
