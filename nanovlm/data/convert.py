"""Bring a data set into the two forms that training reads: LLaVA's JSON lines with a folder of images, or tar shards.

    OUT.jsonl             items, one a line                           or with --shards the folder OUT of .tar files
    OUT_images/           pictures that stood in base64 in the source, each once
    OUT.report.jsonl      {"where": "FILE, line N", "skipped" or "changed": why}, a line for each

The source is read record by record. What is written goes under a temporary name and is renamed when it is complete, so
that a conversion that was killed leaves nothing that looks finished. Every item is read as training would read it before
it is written; one that training would refuse is skipped and reported.
"""

import functools
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from nanovlm.data import images
from nanovlm.data.formats import dialogues, m3it, mimic_it, minigpt4
from nanovlm.data.llava_json import clip_for, record_of
from nanovlm.data.picture_formats import coco_boxes, coco_captions, folder, question_lines, vqa
from nanovlm.data.tar_shards import ShardWriter
from nanovlm.names import nearest

FORMATS = {
    "llava": dialogues, "sharegpt": dialogues, "mimic-it": mimic_it, "m3it": m3it, "minigpt4": minigpt4,
    "coco-captions": coco_captions, "coco-boxes": coco_boxes, "vqa": vqa, "qa-lines": question_lines, "folder": folder,
}  # fmt: skip
TEMPORARY = ".tmp"
ENDINGS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
REASONS_SHOWN = 10


class Store:
    """A folder of pictures, each once, called by their content."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, text):
        """A picture in base64, perhaps behind "data:image/…;base64,": the name of its file in the folder.

        Raises: ValueError if it is no base64 or no picture.
        """
        content = images.from_base64(text)
        try:
            with Image.open(io.BytesIO(content)) as image:
                ending = ENDINGS.get(image.format)
                images.load(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"base64 of no picture, or of a damaged one ({error})") from error
        if ending is None:
            raise ValueError("base64 of a picture in no format that can be written")
        name = hashlib.sha256(content).hexdigest()[:24]
        path = self.folder / name[:2] / f"{name}.{ending}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return str(path.relative_to(self.folder))


class Report:
    """What was skipped or changed: a line each in a file, counted by reason."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "w", encoding="utf-8")
        self.counts = {"skipped": Counter(), "changed": Counter()}

    def add(self, kind, where, reason):
        """kind: "skipped" or "changed". where: file and line. reason: str."""
        reason = reason.removeprefix(f"{where}: ")
        self.file.write(json.dumps({"where": where, kind: reason}, ensure_ascii=False) + "\n")
        self.counts[kind][reason] += 1

    def lines(self):
        """The counts by reason, the most frequent first: list of str."""
        lines = []
        for kind, counts in self.counts.items():
            lines += [f"{kind}: {counts.total():,}"] if counts else []
            lines += [f"  {count:,} x {reason}" for reason, count in counts.most_common(REASONS_SHOWN)]
            lines += [f"  and {len(counts) - REASONS_SHOWN:,} other reasons"] if len(counts) > REASONS_SHOWN else []
        return lines


def convert(kind, job, out, samples_per_shard=None):
    """Convert a data set.

    Args:
      kind: a key of FORMATS. job: formats.Job without `store` and `note`.
      out: Path of a .jsonl, or with samples_per_shard of a folder.
      samples_per_shard: int; None = JSON lines.
    Returns: list of str, lines that say what was done.
    Raises: ValueError or FileNotFoundError for an unknown format, an output that exists, a source that cannot be read
      on, or one that gives no item at all.
    """
    if kind not in FORMATS:
        raise ValueError(f"unknown format {kind!r}.{nearest(kind, FORMATS)}")
    if samples_per_shard is None and out.suffix != ".jsonl":
        raise ValueError(f"{out}: the name of an output ends with .jsonl; with --shards N it is a folder")
    if not job.source.exists():
        raise FileNotFoundError(f"{job.source}: no such file or folder")
    base = out.with_suffix("") if samples_per_shard is None else out
    pictures, report_path = Path(f"{base}_images"), Path(f"{base}.report.jsonl")
    for path in (out, pictures):
        if path.exists():
            raise ValueError(f"{path} is there already; remove it, or choose another name")
    halves = [Path(f"{path}{TEMPORARY}") for path in (out, pictures)]
    for half in halves:  # of a conversion that was killed
        shutil.rmtree(half, ignore_errors=True) if half.is_dir() else half.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    report, store = Report(report_path), Store(halves[1])
    job = replace(job, store=store.add, note=functools.partial(report.add, "changed"))
    with report.file:
        items = checked(kind, job, store.folder, report, samples_per_shard is not None)
        if samples_per_shard is None:
            count = write_lines(halves[0], items)
        else:
            count = write_shards(halves[0], out.name, items, samples_per_shard)
    if not count:
        none = f"{job.source}: no item could be made of it as {kind}; see {report_path}"
        raise ValueError("\n".join([none, *report.lines()]))
    if halves[1].exists() and samples_per_shard is None:
        os.replace(halves[1], pictures)
    shutil.rmtree(halves[1], ignore_errors=True)
    os.replace(halves[0], out)
    beside = f", images in {pictures}" if pictures.exists() else ""
    return [f"{count:,} items in {out}{beside}; report in {report_path}", *report.lines()]


def checked(kind, job, pictures, report, for_shards):
    """(item, paths of its pictures) of everything that training would take; for_shards: their files are needed now."""
    clip = clip_for(1, "uniform")
    root = pictures if kind in ("mimic-it", "m3it") else job.source if kind == "folder" else job.images
    root = job.source.parent if root is None else root
    there = for_shards or job.images is not None or kind in ("mimic-it", "m3it", "folder")
    for where, make in tqdm(FORMATS[kind](job), desc="converting", unit=" records", disable=None):
        try:
            for item in make():
                record = record_of(item, where, clip, lambda name: str(root / name))
                paths = [frame for visual in record.visuals for frame in frames_of(visual, clip)]
                missing = [path for path in paths if there and not os.path.exists(path)]
                if missing:
                    raise ValueError(f"picture {missing[0]} is missing")
                if for_shards and item.get("video") is not None:
                    raise ValueError("a video, which shards do not hold")
                yield item, paths
        except ValueError as error:
            report.add("skipped", where, str(error))


def frames_of(visual, clip):
    """The files of a visual input: list of str."""
    if not isinstance(visual.frames, type(clip)):
        return list(visual.frames)
    source = visual.frames.source
    return [source] if isinstance(source, str) else list(source)


def write_lines(path, items):
    """Items as JSON lines: int, how many."""
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for count, (item, _) in enumerate(items, start=1):
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return count


def write_shards(path, name, items, samples_per_shard):
    """Items with their pictures in tar shards: int, how many."""
    path.mkdir(parents=True)
    with ShardWriter(path, name, samples_per_shard) as writer:
        for item, paths in items:
            writer.add(item, [(Path(path).suffix.lstrip(".").lower(), Path(path).read_bytes()) for path in paths])
    return writer.written
