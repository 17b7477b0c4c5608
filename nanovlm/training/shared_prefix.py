"""Several questions about one picture: its image tokens pass through the decoder once.

Where the image stands in front of the text, as in Lynx, a causal decoder computes for it the same keys and values
whatever is asked behind it. So they are computed once per picture and lent to every row that shows it; with six
short questions per picture this halves the decoder's work. It is exact: `VLM.hidden` gives the same.

B rows, T tokens, M visual inputs, N image tokens of each, K key/value heads, D head width, W width
"""

import torch

from nanovlm.attention import Visible, causal_rows
from nanovlm.cache import KeptKeys
from nanovlm.modality_adaptive import TEXT, VISION
from nanovlm.vlm import check_counts, IMAGE_TOKEN


class LentKeys:
    """In place of a cache: before every row's own keys and values stand those of its picture.

    Args:
      layers: per layer (k, v) float[M, K, N, D]. picture: int[B], the picture of each row.
    """

    def __init__(self, layers, picture):
        self.layers = layers
        self.picture = picture

    def update(self, layer_index, k, v):
        """k, v float[B, K, T, D] -> float[B, K, N + T, D]."""
        image_k, image_v = (self.lend(x) for x in self.layers[layer_index])
        return torch.cat([image_k, k], dim=2), torch.cat([image_v, v], dim=2)

    def lend(self, kept):
        """float[M, K, N, D], one a picture -> float[B, K, N, D], one a row."""
        lent = kept.index_select(0, self.picture)
        if lent.requires_grad:
            lent.register_hook(torch.Tensor.contiguous)  # adding up rows of a slice costs index_select many times the time
        return lent


def can_share(batch, is_image):
    """Whether pictures stand in front of their rows, one a row, equally long, at equal positions, and some row repeats one.

    Args:
      batch: vlm.Batch. is_image: bool[B, T], ids == IMAGE_TOKEN.
    """
    if len(batch.frames) in (0, len(batch.shown)):
        return False
    num_image_tokens = is_image.sum(1)
    longest = int(num_image_tokens.max())
    in_front = bool((num_image_tokens == is_image[:, :longest].sum(1)).all())
    all_or_none = bool(((num_image_tokens == 0) | (num_image_tokens == longest)).all())
    one_each = len(batch.owner) == int((num_image_tokens > 0).sum())
    real = batch.segments >= 0
    one_document = bool((batch.segments <= 0).all() and (real[:, 1:] <= real[:, :-1]).all())
    positions = batch.positions[num_image_tokens > 0, :longest]
    same_positions = bool((positions == positions[:1]).all())
    return in_front and all_or_none and one_each and one_document and same_positions


def two_lengths(lengths):
    """Split rows into short and long ones so that the fewest columns are computed, padding included.

    Args:
      lengths: int[B], tokens of each row.
    Returns: list of one or two int[b], the rows of each group.
    """
    lengths, order = lengths.sort()
    num_short = torch.arange(len(lengths), device=lengths.device)
    longest_short = torch.cat([lengths[:1], lengths[:-1]])
    columns = num_short * longest_short + (len(lengths) - num_short) * lengths[-1]
    best = int(columns.argmin())
    return [order] if best == 0 else [order[:best], order[best:]]


def wanted_states(model, batch, wanted, lean=True):
    """The states of `VLM.hidden` at wanted positions, with rows that share their pictures where they can.

    Args:
      model: vlm.VLM. batch: vlm.Batch. wanted: bool[B, T], none of them padding.
      lean: as in `hidden`.
    Returns: float[N, W], row by row.
    """
    is_image = batch.ids == IMAGE_TOKEN
    if model.media_token is not None or not can_share(batch, is_image):
        return model.hidden(batch)[wanted]
    image_tokens = model.encode(batch.pixels, batch.frames)
    check_counts(is_image, [image_tokens[m] for m in batch.shown.tolist()])
    tokens = torch.stack(image_tokens).to(model.decoder.embedding.weight.dtype)
    return hidden(model.decoder, batch, tokens, is_image, wanted, lean)


def hidden(decoder, batch, image_tokens, is_image, wanted, lean=True):
    """Hidden states of rows that share their pictures.

    Args:
      decoder: decoder.Decoder. batch: vlm.Batch for which `can_share` holds.
      image_tokens: float[M, N, W]. is_image: bool[B, T].
      wanted: bool[B, T], positions whose states are returned, none of them padding.
      lean: bool; where no image token is wanted, the last layer computes no more of them than their keys and values.
    Returns: float[N, W], as the decoder would give for the whole rows, row by row.
    """
    num_image_tokens, device = image_tokens.shape[1], batch.ids.device
    only_text = lean and not bool((wanted & is_image).any())

    # The pictures, once each, at the positions that they have in any row that shows them.
    row_of = torch.zeros(len(image_tokens), dtype=torch.long, device=device).index_copy(0, batch.shown, batch.owner)
    kept = KeptKeys()
    image_hidden = decoder(
        image_tokens,
        batch.positions[row_of, :num_image_tokens],
        causal_rows(len(image_tokens), num_image_tokens, device),
        torch.full(image_tokens.shape[:2], VISION, device=device),
        cache=kept,
        only_fill=only_text,
    )
    states, places = [], []

    # The text: short rows and long rows apart. A row without a picture is lent some picture and does not see it.
    skip = is_image.sum(1)  # B
    length = (batch.segments >= 0).sum(1) - skip
    picture = torch.zeros_like(skip).index_copy(0, batch.owner, batch.shown)
    for rows in two_lengths(length):
        index = torch.arange(int(length[rows].max()), device=device)
        real = index < length[rows, None]  # b T'
        column = (index + skip[rows, None]).clamp(max=batch.ids.shape[1] - 1)
        first = torch.where(skip[rows] > 0, 0, num_image_tokens)[:, None].expand_as(column)
        ids = batch.ids[rows].gather(1, column)
        text_hidden = decoder(
            decoder.embedding(ids.clamp(min=0)),
            batch.positions[rows].gather(1, column),
            Visible(first, torch.where(real, num_image_tokens + index + 1, first)),
            torch.full_like(ids, TEXT),
            cache=LentKeys(kept.layers, picture[rows]),
        )
        chosen = real & wanted[rows].gather(1, column)
        states.append(text_hidden[chosen])
        places.append((rows[:, None] * batch.ids.shape[1] + column)[chosen])
    if not only_text:
        place = batch.owner[:, None] * batch.ids.shape[1] + torch.arange(num_image_tokens, device=device)
        chosen = wanted.flatten()[place]
        states.append(image_hidden[batch.shown][chosen])
        places.append(place[chosen])
    states, places = torch.cat(states), torch.cat(places)
    return states[places.argsort()]
