"""From prompts to rows that generate: pictures are encoded once each, prompts run through the decoder once, then a
token at a time.

Prompts of unequal length are padded on the left, so that all of them end in the same column of the cache.

A causal decoder computes the same keys and values for the same beginning, whatever comes behind it. So prompts that
begin alike (many questions about one picture) run their beginning once, and only the rest row by row. Where nothing is
alike, prompts of unequal length are beginnings as a whole. Beginnings stand side by side in a row, a document each, so
that no padding is computed; the cache holds them as rows of their own. As rows end in the same column, their beginnings
do not: the rest starts, for all of them, at the first column where some row parts from its group.

B prompts, P columns of the longest prompt, U different beginnings, R rows (a prompt may have several: its beams or
samples), V vocabulary, W width, K key/value heads, D head width
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nanovlm.attention import Visible, causal, causal_rows, documents, full
from nanovlm.cache import KeyValueCache
from nanovlm.vlm import IMAGE_TOKEN

PARTS = ("images", "prompt", "decoding")
PADDING = -2  # in the rows' history; neither a word nor an image token


@dataclass
class Workspace:
    """What generation keeps from call to call of `sampler.generate` or `sampler.stream`, and the time its parts took.

    fast: fast_decode.FastDecoder of the model; None = the readable step.
    share: prompts that begin alike run their beginning once, others side by side; False: padded rows, each whole.
    pictures: {id of a tensor of pixels: (the tensor itself, float[n, W] its image tokens)}, never forgotten here.
    seconds: wall time in each of PARTS, summed over the calls. What the caller does between two tokens does not count.
    num_images, num_squares: visual inputs encoded, their frames or tiles. num_prompt_tokens, num_new_tokens: tokens.
    """

    fast: object = None
    share: bool = True
    pictures: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    num_images: int = 0
    num_squares: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0

    @contextmanager
    def timed(self, part, device=None):
        """Count the time of a block; device: wait for this one before the clock is read."""
        start = time.perf_counter()
        yield
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[part] += time.perf_counter() - start

    def report(self):
        """The times in words: list of str."""
        decoding = self.seconds["decoding"]
        rate = f", {self.num_new_tokens / decoding:.1f} tokens/s" if decoding else ""
        squares = f" in {self.num_squares} squares" * (self.num_squares != self.num_images)
        prompt, new = f"{self.num_prompt_tokens} tokens", f"{self.num_new_tokens} tokens"
        told = f"{self.num_images} encoded{squares}", prompt, new + rate
        return [f"{part:<9}{self.seconds[part]:8.3f} s  ({words})" for part, words in zip(PARTS, told)]


def check_prompts(model, prompts, visual_inputs, decoding):
    """Raise ValueError for a prompt that the model cannot continue; the message names the prompt by its place."""
    config, token = model.decoder.config, IMAGE_TOKEN if model.media_token is None else model.media_token
    if len(visual_inputs) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but visual inputs for {len(visual_inputs)}; give a list per prompt")
    if max(decoding.eos_ids, default=0) >= config.vocab_size:
        raise ValueError(f"end token {max(decoding.eos_ids)} lies outside the vocabulary of {config.vocab_size}")
    for place, (prompt, inputs) in enumerate(zip(prompts, visual_inputs)):
        if not prompt:
            raise ValueError(f"prompt {place} is empty; it needs at least one token")
        if min(prompt) < IMAGE_TOKEN or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {place} holds ids from {min(prompt)} to {max(prompt)}; known are 0 to "
                             f"{config.vocab_size - 1}, and {IMAGE_TOKEN} for image tokens")
        free = max(config.context_length - len(prompt), 0)
        if decoding.max_new_tokens > free:
            raise ValueError(f"prompt {place} leaves {free} tokens free of the context of {config.context_length}; "
                             f"max_new_tokens is {decoding.max_new_tokens}: shorten the prompt or ask for less")
        needed = [model.num_image_tokens(pixels.shape[-1], len(pixels)) for pixels in inputs]
        needed = sum(needed) if model.media_token is None else len(inputs)
        if prompt.count(token) != needed:
            raise ValueError(f"prompt {place} has {prompt.count(token)} ids {token} for its pictures; its "
                             f"{len(inputs)} visual inputs need {needed}")


def prefill(model, prompts, visual_inputs, max_new_tokens, workspace):
    """Encode the pictures that are new, in one call, then run the prompts through the decoder: Rows.

    Args: as of sampler.generate, where they were checked. max_new_tokens: room to keep.
    """
    weight, inputs = model.decoder.embedding.weight, [pixels for one in visual_inputs for pixels in one]
    known, keys = workspace.pictures, list(dict.fromkeys(map(id, inputs)))
    with workspace.timed("images", weight.device):
        missing = {id(pixels): pixels for pixels in inputs if id(pixels) not in known}
        if missing:
            pixels = torch.cat(list(missing.values())).to(weight.device, weight.dtype)  # F 3 H W
            tokens = model.encode(pixels, torch.tensor([len(pixels) for pixels in missing.values()]))
            known.update((key, (pixels, one)) for (key, pixels), one in zip(missing.items(), tokens))
    with workspace.timed("prompt", weight.device):
        image_tokens, shown = [known[key][1] for key in keys], [keys.index(id(pixels)) for pixels in inputs]
        rows = Rows(model, prompts, image_tokens, shown, max_new_tokens, workspace.fast, workspace.share)
    workspace.num_images += len(missing)
    workspace.num_squares += sum(map(len, missing.values()))
    workspace.num_prompt_tokens += sum(map(len, prompts))
    return rows


class Rows:
    """Rows under generation: their cache, what they hold so far, and the scores of their next token.

    Attributes:
      logits: float32[R, V], scores of the next token.
      num_columns: P, columns of the padded prompts.
      num_new: new tokens per row so far.
    """

    def __init__(self, model, prompts, image_tokens, shown, max_new_tokens, fast=None, share=True):
        """Run the prompts, list of B lists of ids, through the decoder. image_tokens, shown: as in VLM.embed, prompt by
        prompt. max_new_tokens: room to keep. fast, share: as in Workspace."""
        self.model, self.bind = model, bind if fast is None else fast.bind
        self.num_new, self.num_columns = 0, max(map(len, prompts))
        weight = model.decoder.embedding.weight
        pads = [self.num_columns - len(prompt) for prompt in prompts]
        ids = torch.tensor([[PADDING] * pad + prompt for pad, prompt in zip(pads, prompts)], device=weight.device)
        self.pads, self.padded = torch.tensor(pads, device=weight.device), any(pads)  # R
        self.history = F.pad(ids, (0, max_new_tokens), value=PADDING)
        self.cache = KeyValueCache(model.decoder.config, *self.history.shape, weight.dtype, weight.device)
        segments = (ids != PADDING).long() - 1
        embeddings, media = model.place(ids, segments, image_tokens, shown)
        modality, start = (ids == IMAGE_TOKEN).long(), 0
        if media is None and share:
            groups, start = plan_beginnings(prompts, image_tokens, shown)
        if start:
            last = run_beginnings(model.decoder, self.cache, groups, start, embeddings, modality, pads)
        if start < self.num_columns:
            positions = (torch.arange(start, self.num_columns, device=weight.device) - self.pads[:, None]).clamp(min=0)
            visible = causal(segments) if self.padded else causal_rows(*ids.shape, weight.device)
            if start:
                visible = Visible(visible.first[:, start:], visible.stop[:, start:])
            rest = (embeddings[:, start:], positions, visible, modality[:, start:], self.cache)
            last = model.decoder(*rest, media=media)[:, -1]
            self.cache.advance(self.num_columns - start)
        self.logits = model.decoder.logits(last).float()
        self.media = None if media is None else media.step()
        self.next = self.bind(model, self.cache, self.pads, self.padded, self.media)

    def seen(self, decoding):
        """The ids that penalties and n-grams count, padding and image tokens below 0: int64[R, P + num_new], or behind
        a dummy token int64[R, num_new]."""
        start = self.num_columns if decoding.counts_dummy_token else 0
        return self.history[:, start : self.num_columns + self.num_new]

    def score(self, tokens):
        """Append several tokens to every row and score what follows each, for once: int64[R, T] -> float32[R, T, V]."""
        return score(self.model.decoder, self.cache, tokens, self.pads, True, self.media)

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
        """Row r goes on with the history of rows[r], a row of the same prompt, whose own columns stay."""
        moved = [row for row, source in enumerate(rows) if row != source]
        if moved:  # where every beam goes on by itself there is nothing to copy
            moved = torch.tensor([moved, [rows[row] for row in moved]], device=self.history.device)
            self.history[moved[0]] = self.history[moved[1]]
            self.cache.copy_rows(*moved, self.num_columns)


def bind(model, cache, pads, padded, media):
    """How the next token of some rows is computed.

    Args:
      model: vlm.VLM. cache: cache.KeyValueCache that holds the rows so far.
      pads: int64[R], columns of padding in front of each row. padded: bool, whether there is any.
      media: cross_attention.Media that the new tokens see, or None.
    Returns: (tokens int64[R]) -> float32[R, V]: writes the tokens' keys and values, scores what follows.
    """
    media = model.decoder.keep(media)
    return lambda tokens: score(model.decoder, cache, tokens[:, None], pads, padded, media)[:, 0]


def score(decoder, cache, tokens, pads, padded, media):
    """Run words behind the cache and score what follows each: int64[R, T] -> float32[R, T, V]; else as `bind`."""
    num_tokens = tokens.shape[1]
    columns = cache.length + torch.arange(num_tokens, device=tokens.device)
    positions = columns - pads[:, None]  # R T
    visible = full(1, cache.length + 1, tokens.device)  # of one token
    if padded:
        visible = Visible(pads[:, None].expand_as(positions), (columns + 1).expand_as(positions))
    if media is not None and num_tokens > 1:
        edges = (edge.expand_as(positions) for edge in (media.visible.first, media.visible.stop))
        media = replace(media, visible=Visible(*edges))
    hidden = decoder(decoder.embedding(tokens), positions, visible, None, cache, media=media)
    cache.advance(num_tokens)
    return decoder.logits(hidden).float()


def plan_beginnings(prompts, image_tokens, shown):
    """Find the prompts that begin with the same words and pictures, at least up to the end of their first picture.

    Returns: (groups, start): lists of rows that begin alike, and the first column that is run row by row. Where little
      is saved, every row is a group: whole if lengths differ (start = P), else with nothing in front (start = 0).
    """
    pictures = iter([(picture, number) for picture in shown for number in range(len(image_tokens[picture]))])
    cells = [[next(pictures) if token == IMAGE_TOKEN else token for token in prompt] for prompt in prompts]
    groups, columns = {}, max(map(len, prompts))
    for row, (prompt, mine) in enumerate(zip(prompts, cells)):
        key = row  # text alone shares nothing
        if IMAGE_TOKEN in prompt:
            place = prompt.index(IMAGE_TOKEN)
            key = tuple(mine[: place + len(image_tokens[mine[place][0]])])
        groups.setdefault(key, []).append(row)
    start = columns - 1  # the last token of a row is run with it, for its scores
    for rows in groups.values():
        together = zip(*(cells[row] for row in rows))  # ends with the shortest
        common = len(list(takewhile(lambda alike: len(set(alike)) == 1, together)))
        start = min(start, *(columns - len(cells[row]) + common for row in rows))
    if len(groups) * start + len(prompts) * (columns - start) < 0.9 * len(prompts) * columns:
        return list(groups.values()), start
    return [[row] for row in range(len(prompts))], columns if min(map(len, prompts)) < columns else 0


def run_beginnings(decoder, cache, groups, stop, embeddings, modality, pads):
    """Fill an empty cache up to column `stop`, the beginning of each group of rows run once: float[U, W], hidden states
    of the last tokens. embeddings: float[B, P, W], left-padded. modality: int[B, P]. pads: list of B int."""
    device, groups = embeddings.device, [[row for row in rows if pads[row] < stop] for rows in groups]
    groups = [rows for rows in groups if rows]
    first = [min(rows, key=pads.__getitem__) for rows in groups]  # the row whose beginning reaches furthest
    lengths = [stop - pads[row] for row in first]
    shape, visible = (1, sum(lengths)), documents(lengths, device)
    if len(set(lengths)) == 1:  # rows of equal length need no packing
        shape, visible = (len(first), lengths[0]), causal_rows(len(first), lengths[0], device)

    def update(layer_index, k, v):
        """In place of a cache's: write k, v float[1, K, N, D] or float[U, K, N / U, D]; nothing is before them."""
        for kind, new in enumerate((k, v)):
            for rows, beginning in zip(groups, new.transpose(0, 1).flatten(1, 2).split(lengths, dim=1)):
                for row in rows:
                    cache.layers[layer_index][kind, row, :, pads[row] : stop] = beginning[:, : stop - pads[row]]
        return k, v

    pack = lambda parts: torch.cat(parts).unflatten(0, shape)
    positions = pack([torch.arange(length, device=device) for length in lengths])
    embeddings, modality = (pack([x[row, pads[row] : stop] for row in first]) for x in (embeddings, modality))
    hidden = decoder(embeddings, positions, visible, modality, SimpleNamespace(update=update))
    cache.advance(stop)
    return torch.stack([one[-1] for one in hidden.flatten(0, 1).split(lengths)])
