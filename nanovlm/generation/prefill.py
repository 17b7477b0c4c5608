"""From prompts to rows that generate: pictures encoded once each, prompts run through the decoder once, then a token
at a time.

Prompts of unequal length are padded on the left, so that all of them end in the same column of the cache.

B prompts, P columns of the longest prompt, R rows (a prompt may have several: its beams or samples), V vocabulary
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile

import torch

from nanovlm.attention import causal, causal_rows, documents, full, Visible
from nanovlm.cache import KeptKeys, KeyValueCache
from nanovlm.vlm import IMAGE_TOKEN


# What generation keeps from call to call, if asked to: pictures already encoded, and the time its parts took.


PARTS = ("images", "prompt", "decoding")


@dataclass
class Workspace:
    """Hand the same one to several calls of `sampler.generate` or `sampler.stream`.

    fast: fast_decode.FastDecoder of the model; None = the readable step.
    share: prompts that begin alike run their beginning once, others side by side; False: padded rows, each whole.
    pictures: {id of a tensor of pixels: (the tensor itself, float[n, W] its image tokens)}, never forgotten here.
    seconds: wall time in each of PARTS, summed over the calls. What the caller does between two tokens does not count.
    num_images, num_prompt_tokens, num_new_tokens: visual inputs encoded, tokens of the prompts, tokens of the answers.
    """

    fast: object = None
    share: bool = True
    pictures: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    num_images: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    clock: Callable = time.perf_counter

    @contextmanager
    def timed(self, part, device=None):
        """Count the time of a block; device: wait for this one before the clock is read."""
        start = self.clock()
        yield
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[part] += self.clock() - start

    def report(self):
        """The times in words: list of str."""
        images, prompt, decoding = (self.seconds[part] for part in PARTS)
        rate = f", {self.num_new_tokens / decoding:.1f} tokens/s" if decoding else ""
        return [
            f"images   {images:8.3f} s  ({self.num_images} encoded)",
            f"prompt   {prompt:8.3f} s  ({self.num_prompt_tokens} tokens)",
            f"decoding {decoding:8.3f} s  ({self.num_new_tokens} tokens{rate})",
        ]


PADDING = -2  # in the rows' history; neither a word nor an image token


def check_prompts(model, prompts, visual_inputs, decoding):
    """Raise ValueError for a prompt that the model cannot continue; the message names the prompt by its place."""
    config = model.decoder.config
    if len(visual_inputs) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but visual inputs for {len(visual_inputs)}; give one list per prompt")
    for token in decoding.eos_ids:
        if token >= config.vocab_size:
            raise ValueError(f"end token {token} lies outside the vocabulary of {config.vocab_size}; it would never come")
    for place, (prompt, inputs) in enumerate(zip(prompts, visual_inputs)):
        if not prompt:
            raise ValueError(f"prompt {place} is empty; it needs at least one token")
        if min(prompt) < IMAGE_TOKEN or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"prompt {place} holds ids from {min(prompt)} to {max(prompt)}; known are 0 to {config.vocab_size - 1}, "
                f"and {IMAGE_TOKEN} for image tokens"
            )
        free = config.context_length - len(prompt)
        if decoding.max_new_tokens > free:
            raise ValueError(
                f"prompt {place} has {len(prompt)} tokens, which leaves {max(free, 0)} tokens free of the context of "
                f"{config.context_length}; max_new_tokens is {decoding.max_new_tokens}: shorten the prompt or ask for less"
            )
        found = prompt.count(IMAGE_TOKEN)
        needed = sum(model.num_image_tokens(pixels.shape[-1], len(pixels)) for pixels in inputs)
        if found != needed:
            raise ValueError(
                f"prompt {place} has {found} image-token ids, but its {len(inputs)} visual inputs become {needed} image tokens"
            )
        if model.media_token is not None and prompt.count(model.media_token) != len(inputs):
            raise ValueError(
                f"prompt {place} has {prompt.count(model.media_token)} media tokens (id {model.media_token}) for "
                f"{len(inputs)} visual inputs; write one where each picture stands"
            )


def encode(model, visual_inputs, pictures):
    """Encode the pictures that are not known yet, all in one call.

    Args:
      visual_inputs: list of float[f, 3, H, W].
      pictures: {id of the tensor: (the tensor, float[n, W] image tokens)}, which receives the new ones.
    Returns: int, how many were new.
    """
    missing = {id(pixels): pixels for pixels in visual_inputs if id(pixels) not in pictures}
    if not missing:
        return 0
    weight = model.decoder.embedding.weight
    pixels = torch.cat(list(missing.values())).to(weight.device, weight.dtype)  # F 3 H W
    frames = torch.tensor([len(pixels) for pixels in missing.values()])
    tokens = model.encode(pixels, frames)
    pictures.update((key, (pixels, one)) for (key, pixels), one in zip(missing.items(), tokens))
    return len(missing)


def bind(model, cache, pads, padded, media):
    """How the next token of some rows is computed.

    Args:
      model: vlm.VLM. cache: cache.KeyValueCache that holds the rows so far.
      pads: int64[R], columns of padding in front of each row. padded: bool, whether there is any.
      media: cross_attention.Media that the new tokens see, or None.
    Returns: (tokens int64[R]) -> float32[R, V]: writes the tokens' keys and values, scores what follows.
    """

    media = model.decoder.keep(media)

    def step(tokens):
        column = cache.length
        if padded:
            visible = Visible(pads[:, None], torch.full_like(pads, column + 1)[:, None])
        else:
            visible = full(1, column + 1, tokens.device)
        embeddings = model.decoder.embedding(tokens[:, None])  # R 1 W
        return forward(
            model.decoder, cache, embeddings, (column - pads)[:, None], visible, None, media  # a new token is a word
        )

    return step


def forward(decoder, cache, embeddings, positions, visible, modality, media):
    """Run the decoder behind the cache and score what follows the last column: float32[R, V]."""
    hidden = decoder(embeddings, positions, visible, modality, cache=cache, media=media)
    cache.advance(embeddings.shape[1])
    return decoder.logits(hidden[:, -1]).float()  # only the last position is asked for


class Rows:
    """Rows under generation: their cache, what they hold so far, and the scores of their next token.

    Attributes:
      logits: float32[R, V], scores of the next token.
      num_columns: P, columns of the padded prompts.
      num_new: new tokens per row so far.
    """

    def __init__(self, model, prompts, image_tokens, shown, max_new_tokens, fast=None, share=True):
        """Run the prompts through the decoder.

        Args:
          prompts: list of B lists of ids. max_new_tokens: room to keep.
          image_tokens, shown: as in VLM.embed, the appearances prompt by prompt.
          fast: fast_decode.FastDecoder for the steps; None = `bind`. share: as in Workspace.
        """
        self.model, self.bind = model, bind if fast is None else fast.bind
        self.num_new, self.num_columns = 0, max(map(len, prompts))
        weight = model.decoder.embedding.weight
        pads = [self.num_columns - len(prompt) for prompt in prompts]
        ids = torch.tensor([[PADDING] * pad + prompt for pad, prompt in zip(pads, prompts)], device=weight.device)
        self.pads = torch.tensor(pads, device=weight.device)  # R
        self.padded = any(pads)
        self.history = torch.full((len(ids), self.num_columns + max_new_tokens), PADDING, device=weight.device)
        self.history[:, : self.num_columns] = ids
        self.cache = KeyValueCache(model.decoder.config, *self.history.shape, weight.dtype, weight.device)
        segments = (ids != PADDING).long() - 1
        positions = (torch.arange(self.num_columns, device=weight.device) - self.pads[:, None]).clamp(min=0)
        embeddings, media = model.place(ids, segments, image_tokens, shown)
        modality = (ids == IMAGE_TOKEN).long()
        can_save = media is None and share
        plan = plan_shared(prompts, image_tokens, shown) if can_save else None
        if can_save and plan is None and self.padded:
            last = run_packed(model.decoder, self.cache, prompts, embeddings, modality)
            self.logits = model.decoder.logits(last).float()
        else:
            start = 0
            visible = causal(segments) if self.padded else causal_rows(*ids.shape, weight.device)
            if plan is not None:
                start = plan.start
                run_shared(model.decoder, self.cache, plan, embeddings, modality, pads)
                visible = Visible(visible.first[:, start:], visible.stop[:, start:])
            rest = (embeddings[:, start:], positions[:, start:], visible, modality[:, start:])
            self.logits = forward(model.decoder, self.cache, *rest, media)
        self.media = None if media is None else media.step()
        self.next = self.bind(model, self.cache, self.pads, self.padded, self.media)

    @property
    def tokens(self):
        """int64[R, P + num_new], all ids so far; padding and image tokens below 0."""
        return self.history[:, : self.num_columns + self.num_new]

    @property
    def new_tokens(self):
        """int64[R, num_new], the new ids so far."""
        return self.history[:, self.num_columns : self.num_columns + self.num_new]

    def step(self, tokens):
        """Append one token to every row and score the next: tokens int64[R]."""
        self.history[:, self.num_columns + self.num_new] = tokens
        self.num_new += 1
        self.logits = self.next(tokens)

    def select(self, rows):
        """Go on with other rows: list of N int, new row n continues old row rows[n]."""
        self.cache.select_rows(rows)
        rows = torch.tensor(rows, device=self.pads.device)
        self.history, self.pads, self.logits = self.history[rows], self.pads[rows], self.logits[rows]
        self.media = None if self.media is None else self.media.select(rows)
        self.next = self.bind(self.model, self.cache, self.pads, self.padded, self.media)

    def reorder(self, rows):
        """Exchange histories among the rows of one prompt; the prompts' own columns stay where they are.

        Args:
          rows: list of int, row r goes on with the history of rows[r].
        """
        moved = [row for row, source in enumerate(rows) if row != source]
        if moved:  # where every beam goes on by itself there is nothing to copy
            moved = torch.tensor([moved, [rows[row] for row in moved]], device=self.history.device)
            self.history[moved[0]] = self.history[moved[1]]
            self.cache.copy_rows(*moved, self.num_columns)


# Prompts that begin alike pass through the decoder once up to where they part: many questions about one picture.
#
# A causal decoder computes the same keys and values for the same beginning, whatever comes behind it. So the beginnings
# are run once each and copied into the cache of every row that has them; only the rest is run row by row. Rows end in
# the same column, so their beginnings do not; the rest starts, for all of them, at the first column where some row parts
# from its group, and what other rows still have in common from there on is computed again, to the same values.
#
# B rows, P columns, U different beginnings, M columns of the longest beginning, W width, K key/value heads, D head width


@dataclass(frozen=True)
class Plan:
    """Which rows begin alike.

    groups: list of lists of int, rows that begin alike, or a row alone. start: the first column run row by row.
    """

    groups: list
    start: int


def plan_shared(prompts, image_tokens, shown):
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


def run_shared(decoder, cache, plan, embeddings, modality, pads):
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


# Prompts of unequal length pass through the decoder side by side in one row, so that no padding is computed.
#
# Each is a document of a packed row, which sees itself alone. The cache holds them as rows of their own, padded on the
# left, so that all of them end in one column.
#
# B prompts, P columns of the longest prompt, N tokens of all prompts, W width, K key/value heads, D head width


class Unpacked:
    """In place of a cache: writes the prompts of a packed row into the first columns of its rows, padded on the left."""

    def __init__(self, cache, lengths):
        self.cache, self.lengths, self.stop = cache, lengths, max(lengths)

    def update(self, layer_index, k, v):
        """Write k, v float[1, K, N, D] and hand them back: there is nothing before them."""
        buffer = self.cache.layers[layer_index]
        prompts = zip(k[0].split(self.lengths, dim=1), v[0].split(self.lengths, dim=1))
        for row, (k_row, v_row) in enumerate(prompts):
            start = self.stop - k_row.shape[1]
            buffer[0, row, :, start : self.stop] = k_row
            buffer[1, row, :, start : self.stop] = v_row
        return k, v


def run_packed(decoder, cache, prompts, embeddings, modality):
    """Fill the cache with whole prompts.

    Args:
      decoder: decoder.Decoder. cache: empty cache.KeyValueCache of B rows. prompts: list of B lists of ids.
      embeddings: float[B, P, W], left-padded. modality: int[B, P].
    Returns: float[B, W], the hidden states of the last tokens.
    """
    lengths, device = [len(prompt) for prompt in prompts], embeddings.device
    num_columns = embeddings.shape[1]
    pack = lambda rows: torch.cat([row[num_columns - length :] for row, length in zip(rows, lengths)])[None]
    positions = torch.arange(num_columns, device=device)
    positions = torch.cat([positions[:length] for length in lengths])[None]
    visible = documents(lengths, device)
    hidden = decoder(pack(embeddings), positions, visible, pack(modality), cache=Unpacked(cache, lengths))
    cache.advance(num_columns)
    return torch.stack([prompt[-1] for prompt in hidden[0].split(lengths)])
