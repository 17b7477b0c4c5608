"""Prompts of unequal length pass through the decoder side by side in one row, so that no padding is computed.

Each is a document of a packed row, which sees itself alone. The cache holds them as rows of their own, padded on the
left, so that all of them end in one column.

B prompts, P columns of the longest prompt, N tokens of all prompts, W width, K key/value heads, D head width
"""

import torch

from nanovlm.attention import documents


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


def run(decoder, cache, prompts, embeddings, modality):
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
