"""Two forms of a fast decoding step: by what is written so far, or by shapes and addresses that never change.

`EagerStep` attends to the columns written so far, whose number it must know. `StaticStep` keeps the column on the
device and attends to all columns behind a mask: every shape and address is the same in every step, so that
torch.compile makes one graph of it and CUDA replays it without the host. Neither waits for the device.

R rows, H heads, K key/value heads, D head width, L columns of the cache, V vocabulary
"""

import torch

from nanovlm.cache import KeyValueCache

COLUMNS = 128  # a static cache is a multiple of so many columns, so that few sizes of it serve all prompts


class EagerStep:
    """The next token of each row, by the columns written so far.

    Args: a FastDecoder, then as prefill.bind.
    """

    def __init__(self, fast, cache, pads, padded, media):
        self.fast, self.cache, self.pads, self.media = fast, cache, pads if padded else None, media
        self.layers = [buffer.unbind(0) for buffer in cache.layers]  # keys and values, float[R, K, L, D] each
        self.cos, self.sin = fast.turning(cache.num_columns)
        self.mask = left_padding(pads, cache.num_columns, self.cos.dtype) if padded else None

    @torch.inference_mode()
    def __call__(self, tokens):
        """tokens int64[R], written into the cache -> float32[R, V], scores of what follows."""
        column = self.cache.length
        self.cache.check_room(1, len(tokens))
        if self.pads is None:
            positions, mask = slice(column, column + 1), None
        else:
            positions, mask = column - self.pads, self.mask[..., : column + 1]
        cos, sin = self.fast.for_heads(self.cos[positions], self.sin[positions])
        x = self.fast.embed(tokens, positions)
        scores = self.fast.hidden(x, cos, sin, self.write, mask, self.media)
        self.cache.advance(1)
        return scores

    def write(self, index, kv):
        """Put kv float[2, R, K, D] behind the written columns; all of them, two float[R, K, S, D]."""
        (k, v), column = self.layers[index], self.cache.length
        self.cache.layers[index].select(3, column).copy_(kv)
        return k.narrow(2, 0, column + 1), v.narrow(2, 0, column + 1)


def left_padding(pads, num_columns, dtype):
    """pads int64[R] -> float[R, 1, 1, L], -inf where a column is padding."""
    is_pad = torch.arange(num_columns, device=pads.device) < pads[:, None]
    return torch.zeros(is_pad.shape, dtype=dtype, device=pads.device).masked_fill(is_pad, float("-inf"))[:, None, None]


class StaticStep:
    """The next token of each row, with the same shapes and addresses in every step.

    It owns a cache, into which that of the rows is copied, and serves one set of rows at a time. On CUDA the step is
    captured once as a graph and replayed; its scores stay valid until the next step.

    Args: a FastDecoder, R, L.
    """

    def __init__(self, fast, num_rows, num_columns):
        weight = fast.decoder.embedding.weight
        self.fast = fast
        self.cache = KeyValueCache(fast.config, num_rows, num_columns, weight.dtype, weight.device)
        self.cos, self.sin = fast.turning(num_columns)
        self.tokens, self.pads = weight.new_zeros(2, num_rows, dtype=torch.long)
        self.column = weight.new_zeros(1, dtype=torch.long)
        self.media = self.graph = self.scores = self.user = None

    @torch.no_grad()
    def lend(self, cache, pads, media):
        """Take over a cache, which from now on shares this memory; the step for its rows, as prefill.bind."""
        for index, (own, given) in enumerate(zip(self.cache.layers, cache.layers)):
            own[:, :, :, : cache.length] = given[:, :, :, : cache.length]
            cache.layers[index] = own
        self.pads.copy_(pads)
        self.column.fill_(cache.length)
        if media is not None:  # it may have another size every time
            self.graph = None
        self.media, self.user = media, cache
        return lambda tokens: self.step(tokens, cache)

    @torch.no_grad()
    def step(self, tokens, cache):
        """tokens int64[R] of the rows in `cache` -> float32[R, V]."""
        if cache is not self.user:
            raise RuntimeError("other rows of the same number took this step over; finish one answer before the next")
        cache.check_room(1, len(tokens))
        self.tokens.copy_(tokens)
        if tokens.device.type == "cuda":
            if self.graph is None:
                self.capture()
            self.graph.replay()
        else:
            self.scores = self.compute()
            self.column.add_(1)
        cache.advance(1)
        return self.scores

    def compute(self):
        """One step's scores, float32[R, V]."""
        return self.fast.compute(self.tokens, self.column, self.pads, self.cache.layers, self.cos, self.sin, self.media)

    def capture(self):
        """Record the step as a CUDA graph; running it beforehand writes what the step itself will write again."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.compute()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.scores = self.compute()
            self.column.add_(1)
