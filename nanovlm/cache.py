"""Key/value cache: what the decoder already computed about the tokens behind it.

Memory for all columns is taken once; a forward pass writes behind the last written column and attends to all before.
All rows share one cursor: prompts of unequal length are padded on the left, so that their ends stand in one column.

B rows, T tokens, H key/value heads, L columns, D head width
"""

import torch


class KeyValueCache:
    """Preallocated keys and values of every layer of a decoder, for B rows of L columns (prompt and new tokens).

    `length` is the cursor: the number of written columns, the same in every row and layer.
    """

    def __init__(self, config, num_rows, num_columns, dtype=torch.float32, device=None):
        shape = (2, num_rows, config.num_kv_heads, num_columns, config.head_width)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in config.layers]  # each 2 B H L D
        self.num_columns = num_columns
        self.length = 0

    def update(self, layer_index, k, v):
        """Write one layer's k, v float[B, H, T, D] behind the cursor, which stays; see `advance`.

        Returns: (k, v) float[B, H, length + T, D], all columns written so far; views, valid until the next update.
        """
        buffer, stop = self.layers[layer_index], self.length + k.shape[2]
        if stop > self.num_columns:
            raise ValueError(f"no room for {k.shape[2]}: {self.num_columns} columns, {self.length} written")
        buffer[0, :, :, self.length : stop] = k
        buffer[1, :, :, self.length : stop] = v
        return buffer[0, :, :, :stop], buffer[1, :, :, :stop]

    def advance(self, num_tokens):
        """Move the cursor behind the tokens of one finished forward pass, after all layers have written."""
        self.length += num_tokens

    def select_rows(self, rows):
        """Go on with other rows, list of int: row r continues old row rows[r]. Only those that move are copied."""
        buffer = self.layers[0]
        if len(rows) > buffer.shape[1]:
            rows = torch.tensor(rows, device=buffer.device)
            for index, old in enumerate(self.layers):
                self.layers[index] = new = old.new_zeros(old.shape[0], len(rows), *old.shape[2:])
                new[:, :, :, : self.length] = old[:, :, :, : self.length].index_select(1, rows)
            return
        moved = [row for row, source in enumerate(rows) if row != source]
        if moved:
            self.copy_rows(*torch.tensor([moved, [rows[row] for row in moved]], device=buffer.device))
        self.layers = [buffer[:, : len(rows)] for buffer in self.layers]

    def copy_rows(self, rows, sources, first_column=0):
        """Row rows[n] goes on with what row sources[n] holds now, as beams do after a step; both int64[N].

        first_column: columns before it stay: beams of one prompt share its keys and values.
        """
        for buffer in self.layers:
            written = buffer[:, :, :, first_column : self.length]
            written[:, rows] = written[:, sources]


class KeptKeys:
    """In place of a cache: remembers every layer's keys and values, with their gradient."""

    def __init__(self):
        self.layers = []

    def update(self, layer_index, k, v):
        """Keep k, v float[M, K, N, D] of the next layer and hand them back."""
        self.layers.append((k, v))
        return k, v
