"""Batches: records become rows of ids with labels, and the pictures that stand in them, each encoded once.

    B rows, T tokens, F frames, M visual inputs, S appearances of visual inputs, S x S also a picture's size in pixels
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from nanovlm.data import images, templates
from nanovlm.data.frame_cache import FRAMES
from nanovlm.vlm import IGNORE, Batch


@dataclass
class Report:
    """What batching had to cut; hand the same one to every call and print it.

    rows: rows written. truncated_rows: rows cut to max_tokens. truncated_tokens: tokens lost by that.
    """

    rows: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0

    def add(self, other):
        """Count in what another Report has counted."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def build_batch(records, template, tokenizer, num_image_tokens, image_size, fit, max_tokens, report=None, pad_to=1,
                preprocessing=images.CLIP):
    """One row per conversation (or per reply: Template.rounds), padded on the right; each picture is encoded once.

    Args:
      records: list of Record.
      template: templates.Template.
      tokenizer: Tokenizer.
      num_image_tokens: function (image_size in pixels, number of frames) -> image tokens of a visual input.
      image_size, fit, preprocessing: as in images.to_pixels.
      max_tokens: int, length of a row at most, image tokens included.
      report: Report that counts the rows cut to max_tokens; None = a longer row is an error.
      pad_to: int, T is the longest row rounded up to a multiple of this (but max_tokens at most).
    Returns: Batch; pixels is None when no picture is shown.
    Raises: ValueError without records; naming the record, for a conversation without trained token, or a row that is
      too long and may not be cut, or whose cut would leave no trained token or a part of a picture.
    """
    if not records:
        raise ValueError("a batch needs at least one record")
    rows, owners, shown, visuals = [], [], [], {}
    for record in records:
        counts = [num_image_tokens(image_size, len(visual.frames)) for visual in record.visuals]
        for where, conversation in _conversations(record, template):
            row = templates.write(_segments(conversation, template, where), tokenizer, counts)
            row = _checked(row, max_tokens, report, where)
            for visual in (record.visuals[image[0]] for image in row.images):
                place, _ = visuals.setdefault(visual.key, (len(visuals), visual))
                shown.append(place)
                owners.append(len(rows))
            rows.append(row)
    length = max(len(row.ids) for row in rows)
    length = min(-(-length // pad_to) * pad_to, max_tokens)
    ids, labels, segments, positions = _pad(rows, length, tokenizer.pad)
    visuals = [visual for _, visual in visuals.values()]
    return Batch(
        ids=ids,
        labels=labels,
        segments=segments,
        positions=positions,
        pixels=pixels_of(visuals, image_size, fit, preprocessing) if visuals else None,
        frames=torch.tensor([len(visual.frames) for visual in visuals], dtype=torch.long),
        shown=torch.tensor(shown, dtype=torch.long),
        owner=torch.tensor(owners, dtype=torch.long),
    )


def prompt_row(conversation, template, tokenizer, num_image_tokens, max_tokens):
    """Ids of a prompt for generation.

    Args:
      conversation: sequence of Turn that ends with the user.
      num_image_tokens: for each visual input of the record, the image tokens that it becomes.
      max_tokens: int, tokens of the prompt at most: the context less the reply.
    Returns: templates.Row; nothing of it is cut.
    Raises: ValueError if it is too long or the turns are out of order.
    """
    row = templates.write(templates.prompt(conversation, template), tokenizer, num_image_tokens)
    if len(row.ids) > max_tokens:
        raise ValueError(
            f"the prompt has {len(row.ids)} tokens, there is room for {max_tokens}; shorten it or drop earlier turns"
        )
    return row


def pixels_of(visuals, image_size, fit, preprocessing=images.CLIP):
    """The frames of visual inputs, behind one another.

    Args:
      visuals: list of Visual, at least one frame in all.
      image_size, fit, preprocessing: as in images.to_pixels.
    Returns: float32[F, 3, S, S].
    """
    def square(frame, view):
        frame = images.load(frame)
        fitted = view.apply(frame, image_size) if view else images.to_square(frame, image_size, fit, preprocessing)
        return numpy.array(fitted)

    squares = []
    for visual in visuals:
        for frame in visual.frames:
            if isinstance(frame, (str, Path)) and visual.view is None:
                how = (image_size, fit, preprocessing.border)
                squares.append(FRAMES.get(frame, how, functools.partial(square, frame, None)))
            else:
                squares.append(square(frame, visual.view))
    return images.normalise(numpy.stack(squares), preprocessing)


def contrastive_batch(records, tokenizer, image_size, fit, max_tokens, report=None, preprocessing=images.CLIP):
    """Pictures and their captions, for a contrastive loss.

    Args:
      records: list of B Record with one picture each; every conversation ends with a caption of it.
      tokenizer, image_size, fit, max_tokens, report, preprocessing: as in `build_batch`.
    Returns: (pixels float32[B, 3, S, S], ids int64[C, T]: BOS, caption, EOS, padding on the right; lengths int64[C];
      right bool[B, C]: whether a caption is one of a picture's). The C captions are all different.
    Raises: ValueError for a record without exactly one picture or without a caption, or a caption that is too long.
    """
    captions, pairs = {}, []  # ids of a caption -> its place; (picture, place of a caption)
    for picture, record in enumerate(records):
        where = f"record {record.id!r}"
        if [len(visual.frames) for visual in record.visuals] != [1]:
            raise ValueError(
                f"{where} has {len(record.visuals)} visual inputs; a contrastive batch needs one picture each"
            )
        for conversation in record.conversations:
            turn = conversation[-1]
            if turn.role != "assistant" or not turn.text.strip():
                raise ValueError(f"{where} has no caption; its conversations must end with the assistant saying one")
            ids = [tokenizer.bos, *tokenizer.encode(turn.text), tokenizer.eos]
            row = _checked(templates.Row(ids, list(ids)), max_tokens, report, where)
            pairs.append((picture, captions.setdefault(tuple(row.ids), len(captions))))
    rows = [templates.Row(list(ids), list(ids)) for ids in captions]
    ids, _, _, _ = _pad(rows, max(map(len, captions)), tokenizer.pad)
    right = torch.zeros(len(records), len(captions), dtype=torch.bool)
    right[tuple(torch.tensor(pairs).T)] = True
    pixels = pixels_of([record.visuals[0] for record in records], image_size, fit, preprocessing)
    return pixels, ids, torch.tensor([len(row) for row in captions]), right


def _conversations(record, template):
    """(where, conversation) of every row of a record."""
    for number, conversation in enumerate(record.conversations):
        for part in templates.rounds(conversation, template):
            yield f"record {record.id!r}, conversation {number}", part


def _segments(conversation, template, where):
    try:
        return templates.segments(conversation, template)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _checked(row, max_tokens, report, where):
    """The row, cut to max_tokens where that is allowed."""
    if not row.num_trained:
        raise ValueError(f"{where} has no trained token; the assistant must say something")
    if report is not None:
        report.rows += 1
    if len(row.ids) <= max_tokens:
        return row
    if report is None:
        raise ValueError(
            f"{where} has {len(row.ids)} tokens, more than max_tokens {max_tokens}; raise max_tokens or shorten it"
        )
    kept = templates.Row(
        row.ids[:max_tokens], row.labels[:max_tokens], [image for image in row.images if image[1] < max_tokens]
    )
    if any(stop > max_tokens for _, _, stop in kept.images):
        raise ValueError(
            f"{where}: cutting it to max_tokens {max_tokens} would cut a picture's image tokens; raise max_tokens"
        )
    if not kept.num_trained:
        raise ValueError(f"{where}: cut to max_tokens {max_tokens} it has no trained token left; raise max_tokens")
    report.truncated_rows += 1
    report.truncated_tokens += len(row.ids) - max_tokens
    return kept


def _pad(rows, length, pad):
    """ids, labels, segments, positions: int64[B, length] each."""
    ids = numpy.full((len(rows), length), pad)
    labels = numpy.full_like(ids, IGNORE)
    segments = numpy.full_like(ids, -1)
    positions = numpy.zeros_like(ids)
    for b, row in enumerate(rows):
        tokens = len(row.ids)
        ids[b, :tokens] = row.ids
        labels[b, :tokens] = row.labels
        segments[b, :tokens] = 0
        positions[b, :tokens] = range(tokens)
    return tuple(torch.from_numpy(values) for values in (ids, labels, segments, positions))
