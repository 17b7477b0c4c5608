"""Prompts of unequal length pass through the decoder in groups of similar length, so that little padding is computed.

B prompts, P columns of the longest prompt, T columns of a group's longest, W width, K key/value heads, D head width
"""

import torch

from nanovlm.attention import causal, causal_rows

COST_OF_A_GROUP = {"cpu": 16}  # tokens computed in the time that one more pass over the weights takes by itself
COST_ELSEWHERE = 128  # a GPU computes many more in that time


def group(lengths, device="cpu"):
    """Split prompts into groups so that the fewest tokens are computed, padding included.

    Args:
      lengths: list of B int, tokens. device: str, its type.
    Returns: list of lists of int, the prompts of each group.
    """
    cost = COST_OF_A_GROUP.get(device, COST_ELSEWHERE)
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    best = [(0, 0)]  # of the shortest prompts: (cost, where their last group begins)
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        best.append(min((best[start][0] + (stop - start) * longest + cost, start) for start in range(stop)))
    groups, stop = [], len(order)
    while stop:
        start = best[stop][1]
        groups.append(sorted(order[start:stop]))
        stop = start
    return groups[::-1]


class SomeRows:
    """In place of a cache: writes the first tokens of some of its rows, into its last columns before `stop`."""

    def __init__(self, cache, rows, stop):
        self.cache, self.rows, self.stop = cache, rows, stop

    def update(self, layer_index, k, v):
        """Write k, v float[b, K, T, D] of the rows and hand them back: there is nothing before them."""
        buffer, start = self.cache.layers[layer_index], self.stop - k.shape[2]
        buffer[0, self.rows, :, start : self.stop] = k
        buffer[1, self.rows, :, start : self.stop] = v
        return k, v


def run(decoder, cache, groups, embeddings, positions, modality, segments):
    """Fill the cache with whole prompts, group by group.

    Args:
      decoder: decoder.Decoder. cache: empty cache.KeyValueCache of B rows. groups: of `group`.
      embeddings: float[B, P, W], left-padded. positions, modality, segments: int[B, P], segments -1 = padding.
    Returns: float[B, W], the hidden states of the last tokens.
    """
    num_rows, num_columns, width = embeddings.shape
    last = embeddings.new_empty(num_rows, width)
    for rows in groups:
        rows = torch.tensor(rows, device=embeddings.device)
        start = int((segments[rows] < 0).all(0).sum())  # columns that are padding in every row of the group
        some = segments[rows, start:]
        visible = causal(some) if bool((some < 0).any()) else causal_rows(*some.shape, some.device)
        hidden = decoder(
            embeddings[rows, start:],
            positions[rows, start:],
            visible,
            modality[rows, start:],
            cache=SomeRows(cache, rows, num_columns),
        )
        last[rows] = hidden[:, -1]
    cache.advance(num_columns)
    return last
