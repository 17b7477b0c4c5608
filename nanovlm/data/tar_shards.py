"""Tar shards: samples side by side in a few large files, as the package webdataset reads them.

    coco-000000.tar    000000.json   an item as in llava_json.py; "image": ["0.jpg", …] are the endings of its pictures
                       000000.0.jpg
                       000001.json
                       …
    index.json         {"coco-000000.tar": {"bytes": …, "samples": …}, …}

A sample is what shares a name up to its first dot. Shards from elsewhere hold a picture and its caption (.jpg and .txt,
or .json with "caption", as img2dataset writes them): the caption becomes the reply to a question without words, which
the prompts of a datasets file fill in.

Disks and networks like to read one large file after the other. So an epoch shuffles the shards, and the samples within
each: which shard record n comes from needs only the number of samples of each, and where they stand in it only the
shard that is being read.
"""

import functools
import json
import os
import tarfile
from io import BytesIO
from pathlib import Path

import numpy
from tqdm import tqdm

from nanovlm.data.images import Member
from nanovlm.data.json_files import parse
from nanovlm.data.llava_json import FRAMES, clip_for, drawn, record_of
from nanovlm.data.records import Record, Turn, Visual, permutation

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
          seed, num_frames, sampling: as in llava_json.LlavaJson; a clip is a list of frames here, never a film.
        Raises: FileNotFoundError; ValueError naming the shard that is no tar, cut short or without samples.
        """
        path = Path(path)
        self.name, self.seed, self.clip = path.stem if name is None else name, seed, clip_for(num_frames, sampling)
        self.shards = shards_of(path)
        self.counts = numpy.array(counts(self.shards))
        empty = [str(shard) for shard, count in zip(self.shards, self.counts) if not count]
        if empty:
            raise ValueError(f"{empty[0]}: holds no sample; samples of .json, or of a picture and its .txt, were expected")
        self.length = int(self.counts.sum())

    def __len__(self):
        return self.length

    def record(self, n):
        """The n-th record, n >= 0; every epoch shuffles the shards and the samples of each anew.

        Raises: ValueError naming shard and sample for one that is malformed, or a shard that cannot be read.
        """
        epoch, place = divmod(n, len(self))
        order, starts = self._order(epoch)
        position = int(numpy.searchsorted(starts, place, side="right")) - 1
        shard = int(order[position])
        within = shuffled(self.seed, epoch, shard, int(self.counts[shard]))[place - starts[position]]
        samples = members(self.shards[shard])
        if len(samples) != self.counts[shard]:
            raise ValueError(f"{self.shards[shard]}: {len(samples)} samples, but {self.counts[shard]} when it was counted; "
                             f"remove {INDEX} beside it")
        key, found = samples[within]
        return drawn(self._record(self.shards[shard], key, found), (self.seed, n))

    def _order(self, epoch):
        """Shards in the order of an epoch, and which place of the epoch each begins at."""
        order = permutation(self.seed, epoch, len(self.shards))
        return order, numpy.concatenate([[0], self.counts[order].cumsum()[:-1]])

    def _record(self, shard, key, found):
        where = f"{shard}, sample {key!r}"

        def locate(name):
            if name not in found:
                raise ValueError(f"{where}: no {name!r}; it holds {', '.join(found)}")
            return found[name]

        item = parse(found["json"].read(), f"{where}, .json") if "json" in found else {}
        if isinstance(item, dict) and "conversations" not in item:
            return captioned(item, key, found, where)
        return record_of(item, where, self.clip, locate)


def shards_of(path):
    """The .tar files of a folder, or the one file: list of Path. Raises: FileNotFoundError."""
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not path.exists() or not shards:
        raise FileNotFoundError(f"{path}: {'no .tar in this folder' if path.exists() else 'no such file or folder'}")
    return shards


def captioned(item, key, found, where):
    """A picture and its caption as a record. Raises: ValueError if one of the two is missing."""
    picture = next((found[ending] for ending in PICTURES if ending in found), None)
    if "txt" in found:
        try:
            caption = found["txt"].read().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}, .txt: not UTF-8 text ({error})") from error
    else:
        caption = item.get("caption")
    if picture is None or not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"{where}: a picture and a caption, or a .json with conversations, were expected; "
                         f"it holds {', '.join(found)}")
    turns = (Turn("user", (0,)), Turn("assistant", (caption.strip(),)))
    return Record(key, (Visual(str(picture), (picture,)),), (turns,))


@functools.lru_cache(maxsize=64)
def shuffled(seed, epoch, shard, length):
    """Order of a shard's samples in an epoch: int64[length]."""
    return numpy.random.default_rng([seed, epoch, shard]).permutation(length)


@functools.lru_cache(maxsize=SHARDS_OPEN)
def members(path):
    """The samples of a shard in their order: list of (key, {ending: images.Member}).

    Raises: ValueError if it is no tar, packed, or cut short.
    """
    samples, size = {}, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for one in tar:
                if one.isfile():
                    folder, _, base = one.name.rpartition("/")
                    key, _, ending = base.partition(".")
                    if one.offset_data + one.size > size:
                        raise tarfile.ReadError(f"{one.name} reaches beyond its end")
                    member = Member(str(path), one.offset_data, one.size, one.name)
                    samples.setdefault(f"{folder}/{key}" if folder else key, {})[ending.lower()] = member
    except tarfile.TarError as error:
        raise ValueError(f"{path}: no tar, packed, or cut short ({error}); unpack it, or copy it again") from error
    return list(samples.items())


def counts(shards):
    """Samples of each shard: list of int. From the index beside them where it fits the shard, else counted (minutes)."""
    index = shards[0].parent / INDEX
    known = parse(index.read_bytes(), str(index)) if index.exists() else {}
    found = []
    for shard in tqdm(shards, desc="counting samples", unit=" shards", disable=None, delay=2):
        entry = known.get(shard.name)
        fits = isinstance(entry, dict) and entry.get("bytes") == os.path.getsize(shard)
        found.append(entry["samples"] if fits else len(members(shard)))
    return found


def write_index(folder):
    """Count the samples of a folder's shards and write them down: str, what was found. Errors: as TarShards."""
    shards = shards_of(folder)
    found = counts(shards)
    entries = {shard.name: {"bytes": os.path.getsize(shard), "samples": count} for shard, count in zip(shards, found)}
    save_index(folder, entries)
    return f"{sum(found):,} samples in {len(shards):,} shards, written to {folder / INDEX}"


def save_index(folder, entries):
    """Write index.json, whole or not at all."""
    temporary = folder / f"{INDEX}.tmp"
    temporary.write_text(json.dumps(entries, indent=1))
    os.replace(temporary, folder / INDEX)


class ShardWriter:
    """Writes samples into shards; a context at whose end the index is written."""

    def __init__(self, folder, name, samples_per_shard=1000):
        """
        Args: folder: Path that exists. name: how the shards' names begin. samples_per_shard: int.
        """
        self.folder, self.name, self.samples_per_shard = folder, name, samples_per_shard
        self.tar, self.written, self.index = None, 0, {}

    def add(self, item, pictures):
        """One sample.

        Args:
          item: dict, as in llava_json.py; image is set here. pictures: list of (ending such as "jpg", bytes).
        """
        if self.written % self.samples_per_shard == 0:
            self._close()
            path = self.folder / f"{self.name}-{len(self.index):06d}.tar"
            self.tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)
        names = [f"{n}.{ending}" for n, (ending, _) in enumerate(pictures)]
        item = {key: value for key, value in item.items() if key != "image"} | ({"image": names} if names else {})
        contents = [("json", json.dumps(item, ensure_ascii=False).encode()),
                    *zip(names, (content for _, content in pictures))]
        for ending, content in contents:
            header = tarfile.TarInfo(f"{self.written:09d}.{ending}")  # no time, no owner: equal data gives equal bytes
            header.size = len(content)
            self.tar.addfile(header, BytesIO(content))
        self.written += 1

    def _close(self):
        if self.tar is not None:
            self.tar.close()
            path = Path(self.tar.name)
            before = sum(entry["samples"] for entry in self.index.values())
            self.index[path.name] = {"bytes": os.path.getsize(path), "samples": self.written - before}
            self.tar = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._close()
        save_index(self.folder, self.index)
