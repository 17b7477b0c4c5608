"""Prompts that begin alike pass through the decoder once up to where they part: many questions about one picture.

A causal decoder computes the same keys and values for the same beginning, whatever comes behind it. So the beginnings
are run once each and copied into the cache of every row that has them; only the rest is run row by row. Rows end in
the same column, so their beginnings do not; the rest starts, for all of them, at the first column where some row parts
from its group, and what other rows still have in common from there on is computed again, to the same values.

B rows, P columns, U different beginnings, M columns of the longest beginning, W width, K key/value heads, D head width
"""

from dataclasses import dataclass
from itertools import takewhile

import torch

from nanovlm.attention import causal_rows
from nanovlm.shared_prefix import KeptKeys
from nanovlm.vlm import IMAGE_TOKEN


@dataclass(frozen=True)
class Plan:
    """Which rows begin alike.

    groups: list of lists of int, rows that begin alike, or a row alone. start: the first column run row by row.
    """

    groups: list
    start: int


def plan(prompts, image_tokens, shown):
    """Find the prompts that begin with the same words and pictures, at least up to the end of a picture.

    Args: as in prefill.Rows.
    Returns: Plan, or None where nothing, or too little, is saved.
    """
    cells, begins, place = [], {}, 0
    for row, prompt in enumerate(prompts):
        cells.append([])
        pictures = iter(())
        for token in prompt:
            if token == IMAGE_TOKEN:
                cell = next(pictures, None)
                if cell is None:  # the next picture starts here
                    picture, place = shown[place], place + 1
                    pictures = iter([(picture, number) for number in range(len(image_tokens[picture]))])
                    cell = next(pictures)
                token = cell
            cells[row].append(token)
        begins.setdefault(first_picture(cells[row], row), []).append(row)
    groups, columns = list(begins.values()), max(map(len, prompts))
    start = columns - 1  # the last token of a row is run with it, for its scores
    for rows in groups:
        together = zip(*(cells[row] for row in rows))  # ends with the shortest
        common = len(list(takewhile(lambda alike: len(set(alike)) == 1, together)))
        start = min(start, *(columns - len(cells[row]) + common for row in rows))
    longest = start - min(columns - len(cell) for cell in cells)
    cost = len(groups) * longest + len(prompts) * (columns - start)
    return Plan(groups, start) if cost < 0.9 * len(prompts) * columns else None


def first_picture(cells, row):
    """What rows must share to be one group: all up to the end of the first picture; text alone shares with no row."""
    place = next((place for place, cell in enumerate(cells) if isinstance(cell, tuple)), None)
    if place is None:
        return row
    picture = cells[place][0]
    stop = place
    while stop < len(cells) and cells[stop] == (picture, stop - place):
        stop += 1
    return tuple(cells[:stop])


def run(decoder, cache, plan, embeddings, modality, pads):
    """Fill the cache up to a column.

    Args:
      decoder: decoder.Decoder. cache: empty cache.KeyValueCache of B rows. plan: Plan.
      embeddings: float[B, P, W], left-padded. modality: int[B, P]. pads: list of B int, columns of padding.
    """
    device, groups, start = embeddings.device, plan.groups, plan.start
    first = [min(rows, key=lambda row: pads[row]) for rows in groups]  # the row whose beginning reaches furthest
    columns = torch.arange(start - min(pads[row] for row in first), device=device)  # M
    index = (columns + torch.tensor([[pads[row]] for row in first], device=device)).clamp(max=embeddings.shape[1] - 1)
    chosen = torch.tensor(first, device=device)[:, None]
    kept = KeptKeys()
    decoder(
        embeddings[chosen, index],  # U M W; columns behind `start` are run in vain, and seen by none before them
        columns.expand_as(index),
        causal_rows(*index.shape, device),
        modality[chosen, index],
        cache=kept,
    )
    for buffer, (k, v) in zip(cache.layers, kept.layers):
        for group, rows in enumerate(groups):
            for row in rows:
                length = max(start - pads[row], 0)
                buffer[0, row, :, start - length : start] = k[group, :, :length]
                buffer[1, row, :, start - length : start] = v[group, :, :length]
    cache.advance(start)
