"""Tar shards: samples side by side in a few large files, as the package webdataset reads them.

    coco-000000.tar    000000.json   an item, see README.md; "image": ["0.jpg", …] are the endings of its pictures
                       000000.0.jpg
                       000001.json
                       …
    index.json         {"coco-000000.tar": {"bytes": …, "samples": …}, …}

A sample is what shares a name up to its first dot; files whose names begin with a dot, and what has neither picture nor
text (Thumbs.db, README.md), are none. Shards from elsewhere hold a picture and its caption (.jpg and .txt, or .json
with "caption", as img2dataset writes them): the caption becomes the reply to a question without words, which the
prompts of a datasets file fill in.

Disks and networks like to read one large file after the other. So an epoch shuffles the shards, and the samples within
each: which shard record n comes from needs only the number of samples of each, and where they stand in it only the
shard that is being read.
"""

import functools
import itertools
import json
import os
import tarfile
from io import BytesIO
from pathlib import Path

import numpy
from tqdm import tqdm

from nanovlm.data.images import Member
from nanovlm.data.json_files import parse
from nanovlm.data.records import drawn, permutation, record_of
from nanovlm.data.video import FRAMES, Clip
from nanovlm.files import listing, replace_text

INDEX = "index.json"
PICTURES = ("jpg", "jpeg", "png", "webp")
SHARDS_OPEN = 4  # whose members a process remembers


class TarShards:
    """Source over the .tar files of a folder, or one such file."""

    def __init__(self, path, name=None, seed=0, num_frames=FRAMES, sampling="uniform"):
        """
        Args:
          path: the folder, or one shard.
          name: name of the source in mixtures; None = that of the folder or file.
          seed, num_frames, sampling: as in datasets.LlavaJson; a clip is a list of frames here, never a film.
        Raises: FileNotFoundError; ValueError naming the shard that is no tar, cut short or without samples.
        """
        path = Path(path)
        self.name, self.seed, self.clip = path.stem if name is None else name, seed, Clip("", num_frames, sampling)
        self.shards = shards_of(path)
        self.counts = numpy.array(counts(self.shards))
        if 0 in self.counts:
            raise ValueError(f"{self.shards[self.counts.argmin()]}: holds no sample; samples of .json, or of a picture "
                             "and its .txt, were expected")

    def __len__(self):
        return int(self.counts.sum())

    def record(self, n):
        """The n-th record, n >= 0; every epoch shuffles the shards and the samples of each anew.

        Raises: ValueError naming shard and sample for one that is malformed, or a shard that cannot be read.
        """
        epoch, place = divmod(n, len(self))
        order = permutation(self.seed, epoch, length=len(self.shards))
        ends = self.counts[order].cumsum()  # places of the epoch at which each shard ends
        position = int(numpy.searchsorted(ends, place, side="right"))
        shard = int(order[position])
        count, path = int(self.counts[shard]), self.shards[shard]
        within = permutation(self.seed, epoch, shard, length=count)[place - ends[position]]  # counted from its end
        key, files = members(path)[within]
        return drawn(self._record(f"{path}, sample {key!r}", key, files), (self.seed, n))

    def _record(self, where, key, files):
        def locate(name):
            if name not in files:
                raise ValueError(f"{where}: no {name!r}; it holds {', '.join(files)}")
            return files[name]

        item = parse(files["json"].read(), f"{where}, .json") if "json" in files else {}
        if isinstance(item, dict) and not {"conversations", "messages"} & item.keys():
            picture = next((ending for ending in PICTURES if ending in files), None)
            try:
                text = files["txt"].read().decode("utf-8-sig") if "txt" in files else ""
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}, .txt: not UTF-8 text ({error})") from error
            caption = text if text.strip() else item.get("caption")
            if picture is None or not isinstance(caption, str) or not caption.strip():
                raise ValueError(f"{where}: a picture and a caption, or a .json with conversations, were expected; "
                                 f"it holds {', '.join(files)}")
            said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption.strip()}]
            item = {"id": key, "image": picture, "conversations": said}
        return record_of(item, where, self.clip, locate)


def shards_of(path):
    """The .tar files of a folder, or the one file: list of Path. Raises: FileNotFoundError."""
    shards = listing(path, "*.tar") if path.is_dir() else [path]
    if not path.exists() or not shards:
        raise FileNotFoundError(f"{path}: no such file, or no .tar in it")
    return shards


@functools.lru_cache(maxsize=SHARDS_OPEN)
def members(path):
    """The samples of a shard in their order: list of (key, {ending: images.Member}). Raises: ValueError."""
    samples, size = {}, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for one in tar:
                folder, slash, base = one.name.rpartition("/")
                key, _, ending = base.partition(".")
                if one.isfile() and key and not folder.startswith("__MACOSX"):
                    if one.offset_data + one.size > size:
                        raise tarfile.ReadError(f"{one.name} reaches beyond its end")
                    member = Member(str(path), one.offset_data, one.size, one.name)
                    samples.setdefault(folder + slash + key, {})[ending.lower()] = member
    except tarfile.TarError as error:
        raise ValueError(f"{path}: no tar, packed, or cut short ({error}); unpack it, or copy it again") from error
    return [(key, files) for key, files in samples.items() if files.keys() & {"json", "txt", *PICTURES}]


def counts(shards):
    """Samples of each shard: list of int. From the index beside them if it fits the shard, else counted (minutes)."""
    index = shards[0].parent / INDEX
    known = parse(index.read_bytes(), str(index)) if index.exists() else {}
    found = []
    for shard in tqdm(shards, desc="counting samples", unit=" shards", disable=None, delay=2):
        entry = known.get(shard.name)
        fits = isinstance(entry, dict) and entry.get("bytes") == os.path.getsize(shard)
        found.append(entry["samples"] if fits else len(members(shard)))
    return found


def write_index(args):
    """Count the samples of the shards in args.folder and write them down: list of str. Errors: as TarShards."""
    shards = shards_of(args.folder)
    found = counts(shards)
    save_index(args.folder, {shard.name: count for shard, count in zip(shards, found)})
    return [f"{sum(found):,} samples in {len(shards):,} shards, written to {args.folder / INDEX}"]


def save_index(folder, samples):
    """Write index.json; samples: dict name of a shard -> how many it holds."""
    entries = {name: {"bytes": os.path.getsize(folder / name), "samples": count} for name, count in samples.items()}
    replace_text(folder / INDEX, json.dumps(entries, indent=1))


def write_shards(folder, name, samples, samples_per_shard=1000):
    """Write samples into shards of an existing folder, and their index.

    name: how the shards' names begin. samples: iterable of (item, see README.md, whose image is set here; paths of its
      picture files).
    """
    samples, counted = iter(samples), {}
    while shard := list(itertools.islice(samples, samples_per_shard)):
        path = folder / f"{name}-{len(counted):06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (item, paths) in enumerate(shard, start=len(counted) * samples_per_shard):
                files = {f"{n}{Path(path).suffix.lower()}": Path(path).read_bytes() for n, path in enumerate(paths)}
                item = {key: value for key, value in item.items() if key != "image"}
                item |= {"image": list(files)} if files else {}
                for ending, content in [("json", json.dumps(item, ensure_ascii=False).encode()), *files.items()]:
                    header = tarfile.TarInfo(f"{number:09d}.{ending}")  # no time, no owner: equal data, equal bytes
                    header.size = len(content)
                    tar.addfile(header, BytesIO(content))
        counted[path.name] = len(shard)
    save_index(folder, counted)
