"""Video: from a folder or list of frames, an animation (GIF, WebP, PNG) or a film file to a few upright RGB pictures.

Films (mp4 and whatever else FFmpeg knows) need the package `av`, which is loaded only for them. Frames are chosen over
the whole clip: one per segment, either its middle or, as in Lynx (arXiv:2307.02469, its code), a random one.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy

from nanovlm.data import images
from nanovlm.files import listing
from nanovlm.names import check_known

FRAMES = 5  # of a video in a data set, unless told otherwise; as in Lynx
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what a folder of frames may hold
MAX_FRAMES = 100_000  # of one clip; a film of an hour has about 100,000
MAX_ANIMATION_PIXELS = 500_000_000  # of all frames of an animation, since each is drawn over the one before it


@dataclass(frozen=True)
class Clip:
    """A clip that is decoded when used: `len` is known at once, iterating loads its frames in order of time.

    source: path of a folder of pictures (in the order of the numbers in their names), an animation or a film; or
      several pictures, paths or PIL images. A still picture is a clip of one frame.
    num_frames: int; a clip that has fewer gives all of them, some more than once.
    sampling: "uniform", the middle of every segment, or "random", any frame of it. seed: tuple of int, decides which.
    Raises: ValueError for an unknown sampling or num_frames below 1; when it is decoded, FileNotFoundError, ImportError
      for a film without `av`, images.ImageError for what is empty, too large, too long, damaged or no video.
    """

    source: str | tuple[str, ...]
    num_frames: int
    sampling: str = "uniform"
    seed: tuple[int, ...] = ()

    def __post_init__(self):
        check_known("unknown sampling", self.sampling, ("uniform", "random"))
        if self.num_frames < 1:
            raise ValueError(f"num_frames is {self.num_frames}; at least 1 is needed")

    def __len__(self):
        return self.num_frames

    def __iter__(self):
        return iter(load(self))

    def __getitem__(self, place):
        return list(self)[place]


def load(clip):
    """The frames of a Clip: list of PIL.Image.Image of mode RGB."""
    source, name, read = clip.source, "the list of frames", _pictures
    if isinstance(source, (str, Path)):
        name = source = Path(source)
        if not source.exists():
            raise FileNotFoundError(f"{source}: no such video")
        if not source.is_dir():
            read = _animation if source.suffix.lower() in (*PICTURES, ".apng") else _film
    chosen = []

    def choose(total):
        """Places of the frames to load, in rising order."""
        if not 1 <= total <= MAX_FRAMES:
            raise images.ImageError(f"{name}: it has {total:,} frames; from 1 to {MAX_FRAMES:,} are expected")
        if clip.sampling == "uniform":
            chosen[:] = uniform_places(total, clip.num_frames)
        else:
            chosen[:] = random_places(total, clip.num_frames, numpy.random.default_rng(clip.seed))
        return sorted(set(chosen))

    loaded = dict(read(source, choose))
    return [loaded[place] for place in chosen]


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
    paths = [path for path in listing(folder) if path.suffix.lower() in PICTURES]
    return sorted(paths, key=lambda path: [(int(part), "") if part.isdecimal() else (0, part)
                                           for part in re.split(r"(\d+)", path.name)])  # fmt: skip


def _pictures(source, choose):
    """(place, frame) of the places that `choose` takes, as images.load gives it."""
    pictures = frame_files(source) if isinstance(source, Path) else source
    for place in choose(len(pictures)):
        yield place, images.load(pictures[place])


def _animation(path, choose):
    """As `_pictures`."""
    with images.opened(path) as image:
        total = getattr(image, "n_frames", 1)
        places, pixels = choose(total), image.width * image.height * total
        if total > 1 and pixels > MAX_ANIMATION_PIXELS:
            raise images.ImageError(f"{path}: its {total} frames are {pixels:,} pixels, more than the limit of "
                                    f"{MAX_ANIMATION_PIXELS:,}; make it smaller, or a film of it")
        for place in places:
            image.seek(place)
            yield place, images.load(image)


def _film(path, choose):
    """As `_pictures`."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: films need the package av; pip install av, or give frames or a GIF") from error
    try:
        total = _count(av, path)
        while True:
            places = choose(total)
            with av.open(str(path)) as container:
                container.streams.video[0].thread_type = "AUTO"
                total = 0
                for place, frame in enumerate(container.decode(video=0)):
                    if place in places:
                        image = frame.to_image()
                        yield place, image.rotate(frame.rotation, expand=True) if frame.rotation else image
                    if place == places[-1]:
                        return
                    total = place + 1  # fewer frames than packets: half pictures, or the end is missing
    except (av.FFmpegError, IndexError) as error:  # without moving pictures
        raise images.ImageError(f"{path}: not a video, or damaged ({error}); copy or download it again") from error


def _count(av, path):
    """Packets of the film, nearly always one a frame; what the header says is often missing."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if stream.width * stream.height > images.MAX_PIXELS:
            size = f"{stream.width} x {stream.height}"
            raise images.ImageError(f"{path}: frames of {size} pixels are more than the limit of {images.MAX_PIXELS:,}")
        return sum(1 for packet in container.demux(stream) if packet.size)
