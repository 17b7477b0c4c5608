"""From prompts to rows that generate: pictures encoded once each, prompts run through the decoder once, then a token
at a time.

Prompts of unequal length are padded on the left, so that all of them end in the same column of the cache.

B prompts, P columns of the longest prompt, R rows (a prompt may have several: its beams or samples), V vocabulary
"""

import torch

from nanovlm import packed_prompts, shared_prompts
from nanovlm.attention import Visible, causal, causal_rows, full
from nanovlm.cache import KeyValueCache
from nanovlm.vlm import IMAGE_TOKEN

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

    def __init__(self, model, prompts, image_tokens, shown, max_new_tokens, fast=None):
        """Run the prompts through the decoder.

        Args:
          prompts: list of B lists of ids. max_new_tokens: room to keep.
          image_tokens, shown: as in VLM.embed, the appearances prompt by prompt.
          fast: fast_decode.FastDecoder for the steps; None = `bind`.
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
        can_save = media is None and model.share_prefix
        plan = shared_prompts.plan(prompts, image_tokens, shown) if can_save else None
        if can_save and plan is None and self.padded:
            last = packed_prompts.run(model.decoder, self.cache, prompts, embeddings, modality)
            self.logits = model.decoder.logits(last).float()
        else:
            start = 0
            visible = causal(segments) if self.padded else causal_rows(*ids.shape, weight.device)
            if plan is not None:
                start = plan.start
                shared_prompts.run(model.decoder, self.cache, plan, embeddings, modality, pads)
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
