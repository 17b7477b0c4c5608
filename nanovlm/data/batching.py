"""Batches: records become rows of ids with labels, and the pictures that stand in them, each encoded once.

    B rows, T tokens, F frames, M visual inputs, S appearances of visual inputs, S x S also a picture's size in pixels
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from nanovlm.data import images, templates, tiles
from nanovlm.vlm import IGNORE, Batch

MAX_CACHED = 256 * 2**20  # bytes of picture files kept as decoded: about 800 of 336 x 336 pixels, or 20,000 of 64 x 64
CHARACTERS = 4  # of English text in one token, roughly


@dataclass
class Report:
    """What batching had to cut; hand the same one to every call and print it."""

    rows: int = 0  # written
    truncated_rows: int = 0  # cut to max_tokens
    truncated_tokens: int = 0  # lost by that


def build_batch(records, template, tokenizer, num_image_tokens, image_size, fit, max_tokens, report=None,
                preprocessing=images.CLIP, pack=False, num_tiles=None):
    """One row per conversation (or per reply: Template.rounds), padded on the right; each picture is encoded once.

    Packed, a row holds as many conversations as fit into max_tokens, each a document of its own: positions begin anew
    and no document sees another (attention.causal), so that the loss is that of the unpacked rows.

    Args:
      records: list of Record.
      template: templates.Template.
      tokenizer: Tokenizer.
      num_image_tokens: function (image_size in pixels, number of frames) -> image tokens of a visual input.
      image_size, fit, preprocessing: as in images.to_pixels.
      max_tokens: int, length of a row at most, image tokens included.
      report: Report that counts the rows cut to max_tokens; None = a longer row is an error.
      pack: bool, several conversations in one row.
      num_tiles: as in tiles.cut; None = pictures are not cut into tiles.
    Returns: Batch; pixels is None when no picture is shown.
    Raises: ValueError, naming the record, for a conversation without trained token, or a row that is
      too long and may not be cut, or whose cut would leave no trained token or a part of a picture.
    """
    rows, pictures, visuals = [], [], {}  # per conversation: its row, and where its pictures stand among the visuals
    for record in records:
        record = written(record, template, tokenizer, num_image_tokens, image_size, num_tiles)
        for where, row in record.rows:
            rows.append(cut(row, max_tokens, report, where))
            seen = [record.visuals[image[0]] for image in rows[-1].images]
            pictures.append([visuals.setdefault(visual.key, (len(visuals), visual))[0] for visual in seen])
    documents = packed([len(row.ids) for row in rows], max_tokens) if pack else [[n] for n in range(len(rows))]
    texts = pad([[rows[n] for n in row] for row in documents], tokenizer.pad)
    visuals = [visual for _, visual in visuals.values()]
    pixels = pixels_of(visuals, image_size, fit, preprocessing) if visuals else None
    frames = torch.tensor([len(visual.frames) for visual in visuals], dtype=torch.long)
    shown = torch.tensor([place for row in documents for n in row for place in pictures[n]], dtype=torch.long)
    owner = torch.tensor([b for b, row in enumerate(documents) for n in row for _ in pictures[n]], dtype=torch.long)
    return Batch(*texts, pixels, frames, shown, owner)


def written(record, template, tokenizer, num_image_tokens, image_size, num_tiles):
    """The record with its pictures in tiles and its rows, unless it has them. Args and errors: as `build_batch`."""
    if record.rows:
        return record
    visuals, rows = record.visuals, []
    if num_tiles is not None:
        visuals = tuple(tiles.cut(visual, image_size, num_tiles) for visual in visuals)
    pictures = [templates.picture_ids(visual, template, tokenizer, num_image_tokens(image_size, len(visual.frames)))
                for visual in visuals]
    for number, conversation in enumerate(record.conversations):
        for part in templates.rounds(conversation, template):
            row = templates.write(templates.segments(part, template), tokenizer, pictures)
            rows.append((f"record {record.id!r}, conversation {number}", row))
    return replace(record, visuals=visuals, rows=tuple(rows))


def cut(row, max_tokens, report, where):
    """The templates.Row, cut to max_tokens where a report counts it. Errors, behind `where`: as `build_batch`."""
    lost = max(0, len(row.ids) - max_tokens)
    if lost and report is None:
        raise ValueError(f"{where} has {len(row.ids)} tokens, more than max_tokens {max_tokens}; raise it")
    seen = [image for image in row.images if image[1] < max_tokens]
    kept = templates.Row(row.ids[:max_tokens], row.labels[:max_tokens], seen)
    if seen and seen[-1][2] > max_tokens:
        raise ValueError(f"{where}: cutting it to max_tokens {max_tokens} would cut a picture's tokens; raise it")
    if not kept.num_trained:
        raise ValueError(f"{where} has no trained token within max_tokens {max_tokens}; raise it, or add a reply")
    if report is not None:
        report.rows += 1
        report.truncated_rows += lost > 0
        report.truncated_tokens += lost
    return kept


def packed(lengths, room):
    """Documents of so many tokens put into rows of `room`, the longest first, each where least is left: [[int]]."""
    rows, free = [], []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fitting = [b for b, left in enumerate(free) if left >= lengths[n]]
        b = min(fitting, key=lambda b: free[b], default=len(rows))
        if b == len(rows):
            rows.append([])
            free.append(room)
        rows[b].append(n)
        free[b] -= lengths[n]
    return rows


def pad(documents, padding):
    """ids, labels, segments, positions: int64[B, T] each; documents: the Rows that stand in each of the B rows."""
    columns = [], [], [], []
    for rows in documents:
        columns[0].append([id for row in rows for id in row.ids])
        # nothing before it predicts the first token, least of all the document before
        columns[1].append([label for row in rows for label in (IGNORE, *row.labels[1:])])
        columns[2].append([segment for segment, row in enumerate(rows) for _ in row.ids])
        columns[3].append([position for row in rows for position in range(len(row.ids))])
    return [pad_sequence([*map(torch.tensor, column)], batch_first=True, padding_value=value)
            for column, value in zip(columns, (padding, IGNORE, -1, 0))]


def pixels_of(visuals, image_size, fit, preprocessing=images.CLIP):
    """The frames of a list of Visual, behind one another: float32[F, 3, S, S]. Args: as images.to_pixels."""
    squares = [fitted(frame, visual.view, image_size, fit, preprocessing)
               for visual in visuals for frame in visual.frames]
    return images.normalise(numpy.stack(squares), preprocessing)


def fitted(frame, view, image_size, fit, preprocessing):
    """One frame as the square that the ViT sees: uint8[S, S, 3]. An unchanged file is decoded once, but for a View."""
    if view is not None or not isinstance(frame, (str, Path)) or not os.path.exists(frame):
        return square(frame, view, image_size, fit, preprocessing)
    status = os.stat(frame)
    return cached(image_size)(frame, None, image_size, fit, preprocessing, status.st_size, status.st_mtime_ns)


@functools.cache
def cached(image_size):
    """`square` that remembers those of this size in MAX_CACHED bytes; what was used longest ago goes first."""
    return functools.lru_cache(MAX_CACHED // (3 * image_size**2))(square)


def square(frame, view, image_size, fit, preprocessing, *identity):
    """As `fitted`, read-only, for it may be kept. identity: what tells a file from the one it replaced."""
    picture = images.load(frame)
    seen = view.apply(picture, image_size) if view else images.to_square(picture, image_size, fit, preprocessing)
    pixels = numpy.array(seen)
    pixels.setflags(write=False)
    return pixels


def contrastive_batch(records, tokenizer, image_size, fit, max_tokens, report=None, preprocessing=images.CLIP):
    """Pictures and their captions, for a contrastive loss.

    Args:
      records: list of B Record with one picture each; every conversation ends with a caption of it.
      tokenizer, image_size, fit, max_tokens, report, preprocessing: as in `build_batch`.
    Returns: (pixels float32[B, 3, S, S], ids int64[C, T]: BOS, caption, EOS, padding on the right; lengths int64[C];
      right bool[R, C]: whether a caption is right for a look; looks). The C captions are all different. A look is a
      picture as a whole or a region of one: looks float32[R, 3] holds picture, x and y as shares, -1 for the whole.
    Raises: ValueError for a record without exactly one picture or without a caption, a caption that is too long, or
      regions of a picture that is not seen as it is.
    """
    captions, looks, pairs = {}, {}, []  # ids of a caption -> its place; look -> its place; (look, place of a caption)
    for picture, record in enumerate(records):
        for caption, region in captions_of(record):
            ids = [tokenizer.bos, *tokenizer.encode(caption), tokenizer.eos]
            row = cut(templates.Row(ids, ids), max_tokens, report, f"record {record.id!r}")
            look = looks.setdefault((picture, *(region or (-1, -1))), len(looks))
            pairs.append((look, captions.setdefault(tuple(row.ids), len(captions))))
    ids = pad([[templates.Row(ids, ids)] for ids in captions], tokenizer.pad)[0]
    right = torch.zeros(len(looks), len(captions), dtype=torch.bool)
    right[tuple(torch.tensor(pairs).T)] = True
    pixels = pixels_of([record.visuals[0] for record in records], image_size, fit, preprocessing)
    looks = torch.tensor(list(looks), dtype=torch.float32)
    return pixels, ids, torch.tensor([len(ids) for ids in captions]), right, looks


def captions_of(record):
    """What is said of a record's one picture: list of (caption, region or None). Errors: as `contrastive_batch`."""
    where = f"record {record.id!r}"
    if [len(visual.frames) for visual in record.visuals] != [1]:
        raise ValueError(f"{where} has {len(record.visuals)} visual inputs; a contrastive batch needs one picture each")
    if record.regions:  # places in the picture must be the same shares of it once it is made square
        visual = record.visuals[0]
        width, height = images.load(visual.frames[0]).size
        if visual.view or width != height:
            raise ValueError(f"{where} has regions; its picture must be square and seen without augmentation, but has "
                             f"{width} x {height} pixels")
    last = [conversation[-1] for conversation in record.conversations]
    if any(turn.role != "assistant" or not turn.text.strip() for turn in last):
        raise ValueError(f"{where} has no caption; its conversations must end with the assistant saying one")
    return list(zip((turn.text for turn in last), record.regions or (None,) * len(last)))


@dataclass(frozen=True)
class Preparation:
    """What one stage does with a record before it can be batched: pictures are fitted, conversations written
    as rows. It needs no model, so that workers do it ahead; the batch is that of the record itself to the last bit.

    image_size, fit, preprocessing: as in images.to_pixels.
    template, tokenizer, num_image_tokens, max_tokens, num_tiles: as in `build_batch`. Without a template (a contrastive
      stage) only the pictures are made ready, and every record must be one picture with captions.
    """

    image_size: int
    fit: str
    preprocessing: images.Preprocessing = images.CLIP
    template: Any = None
    tokenizer: Any = None
    num_image_tokens: Callable | None = None
    max_tokens: int = 0
    num_tiles: float | None = None

    def __call__(self, record):
        """The record with pictures fitted and rows written. Raises: ValueError or OSError, naming record or file."""
        if self.template is None:
            captions_of(record)  # for its errors, before its picture is changed
        else:
            how = self.template, self.tokenizer, self.num_image_tokens, self.image_size, self.num_tiles
            record = written(record, *how)
            for where, row in record.rows:
                cut(row, self.max_tokens, Report(), where)  # for its errors; the batch counts what is cut
        return replace(record, visuals=tuple(map(self._fit, record.visuals)))

    def _fit(self, visual):
        if visual.view is None and all(isinstance(frame, Image.Image) for frame in visual.frames):
            return visual  # in memory already
        squares = (fitted(frame, visual.view, self.image_size, self.fit, self.preprocessing) for frame in visual.frames)
        return replace(visual, frames=tuple(map(Image.fromarray, squares)), view=None)

    def length(self, record):
        """About how many tokens a record has, without tokenising it: int."""
        characters = sum(len(turn.text) for turns in record.conversations for turn in turns)
        visuals = (self.num_image_tokens(self.image_size, len(visual.frames)) for visual in record.visuals)
        return characters // CHARACTERS + sum(visuals)
