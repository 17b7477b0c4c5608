"""The decoder's next token, fast: the same sums as decoder.py, laid out for one token per row.

One token reads every weight once and computes almost nothing with it, so a step takes as long as reading the weights
takes, plus what Python and torch need to say so. Three things help, and none changes a result beyond rounding:

- weights stand side by side where they meet the same input (q k v; gate up), for one row as [in, out]: it then reads
  them along memory. The modules' own weights become views of that memory, so nothing is stored twice and the readable
  decoder goes on working with them. A few rows meet weights [out, in] from the right, see `product`;
- what is the same for all layers of a step, or for all steps, is made once: rotary tables, masks, positions;
- the queries that share a key head stand in the place of several tokens, so that no key or value is copied.

`FastDecoder.bind` takes the place of prefill.bind, and is chosen by handing the decoder to `generate` in a Workspace. A
step has two forms. The eager one attends to the columns written so far, whose number it must know. `StaticStep` keeps
the column on the device and attends to all columns behind a mask: shapes and addresses are the same in every step, so
that torch.compile makes one graph of it and CUDA replays it without the host. Neither waits for the device.

R rows, W width, H heads, K key/value heads, G = H / K, D head width, L columns of the cache, P positions, V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.attention import rope_tables
from nanovlm.cache import KeyValueCache
from nanovlm.decoder import Decoder, DecoderAttention, DecoderLayer, GatedFeedForward, PlainFeedForward, RMSNorm
from nanovlm.modality_adaptive import ModalityAdaptive

COLUMNS = 128  # a static cache is a multiple of so many columns, so that few sizes of it serve all prompts
FEW_ROWS = range(2, 9)  # what a CPU multiplies faster from the right
WRITTEN_OUT = (Decoder, DecoderLayer, DecoderAttention, GatedFeedForward, PlainFeedForward, ModalityAdaptive, nn.Linear,
               nn.Embedding, nn.ModuleList)  # the modules whose forward a step computes without calling it
CALLED = {"norm", "norm_1", "norm_2", "q_norm", "k_norm", "cross_attention", "adapter"}  # these may be of any type


def text_branch(module):
    """What a new token meets, which is a word: the text copy of a split layer."""
    return module.text if isinstance(module, ModalityAdaptive) else module


def for_reading(weight, one_row):
    """float[out, in] -> float[in, out]; one_row: also in this order of a CPU's memory, which one row reads twice as
    fast, and many rows a tenth slower. A GPU sums along the other order."""
    return weight.t().contiguous() if one_row and weight.device.type == "cpu" else weight.t()


@torch.no_grad()
def pack(linears, one_row):
    """Store the weights of linear layers of one input side by side: (weight float[in, all outs], bias float[all outs]
    or None), of which their own become views."""
    weight, start = for_reading(torch.cat([linear.weight for linear in linears]), one_row), 0
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    for linear in linears:
        stop = start + linear.out_features
        linear.weight.data = weight[:, start:stop].t()
        if bias is not None:
            linear.bias.data = bias[start:stop]
        start = stop
    return weight, bias


def product(x, weight, bias=None, residual=None):
    """residual + x weight + bias: x float[R, in], weight float[in, out] -> float[R, out].

    A CPU's product of a few rows and a wide matrix copies the matrix into blocks first, which takes longer than the
    product; that of the transposed two does not, and takes a third (2 rows) to nine tenths (8 rows) of the time.
    """
    added = bias if residual is None else residual
    if len(x) in FEW_ROWS:
        wide = weight.shape[1] >= weight.shape[0] and not weight.is_contiguous()
        from_right = wide and x.dtype == torch.float32 and x.device.type == "cpu"
        out = (weight.t() @ x.t()).t().contiguous() if from_right else x @ weight
        if added is not None:
            out += added
    else:
        out = x @ weight if added is None else torch.addmm(added, x, weight)  # summed where the product is made
    return out if bias is added or bias is None else out.add_(bias)


def normaliser(norm):
    """(x float[R, W]) -> what the norm's own forward computes; an RMSNorm by fewer and cheaper calls."""
    if type(norm) is not RMSNorm or norm.weight.dtype != torch.float32:
        return norm
    weight, share = norm.weight, 1 / len(norm.weight)  # reading them from the module takes as long as a call
    eps = torch.tensor(norm.eps, dtype=torch.float32, device=weight.device)

    def normalise(x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(eps, length, length, value=share).rsqrt_()).mul_(weight)

    return normalise


class PackedLayer:
    """The modules and weights of a decoder.DecoderLayer, which still owns them; one_row: as for `for_reading`."""

    def __init__(self, layer, one_row):
        attention, ffn = layer.attention, layer.ffn
        self.cross_attention, self.activation = layer.cross_attention, ffn.activation
        self.gated = isinstance(ffn, GatedFeedForward)
        self.norm_1 = normaliser(text_branch(layer.norm_1))
        self.norm_2 = None if layer.norm_2 is None else normaliser(text_branch(layer.norm_2))
        self.clip, self.q_norm, self.k_norm = attention.clip, normaliser(attention.q_norm), normaliser(attention.k_norm)
        self.qkv = pack((attention.q, text_branch(attention.k), text_branch(attention.v)), one_row)
        self.o = pack((attention.o,), one_row)
        self.wide = pack((ffn.gate, ffn.up) if self.gated else (ffn.fc_1,), one_row)
        self.narrow = ffn.output.weight.t(), ffn.output.bias  # reads fast enough as it is
        self.adapter = None if isinstance(layer.adapter, nn.Identity) else layer.adapter


class FastDecoder:
    """A decoder prepared for fast steps; its weights are laid out anew, in place.

    Args:
      decoder: decoder.Decoder.
      static: one graph for all steps, see StaticStep; None = on a GPU, where torch.compile makes it.
      rows: how many rows it will mostly serve; decides the order of the weights in memory, see `for_reading`.
    Raises: ValueError for a module of another type than those written out here, whose own forward would be left out.
    """

    def __init__(self, decoder, static=None, rows=1):
        for name, module in decoder.named_modules():
            if type(module) not in WRITTEN_OUT and not CALLED & {*name.split(".")}:
                raise ValueError(f"fast decoding does not know the {type(module).__name__} at {name or 'the top'}: "
                                 "merge low-rank updates first; with modules of your own, decode without it")
        on_gpu = decoder.embedding.weight.is_cuda
        self.decoder, self.config, self.static = decoder, decoder.config, on_gpu if static is None else static
        self.norm = normaliser(decoder.norm)
        slopes = decoder.embedding.weight.new_tensor(self.config.alibi, dtype=torch.float32)
        self.slopes = slopes.view(self.config.num_kv_heads, -1, 1) if self.config.alibi else None  # K G 1
        self.layers = [PackedLayer(layer, rows == 1) for layer in decoder.layers]
        if decoder.lm_head is None:
            head = for_reading(decoder.embedding.weight.data.contiguous(), rows == 1)
            decoder.embedding.weight.data = head.t()
            self.head = head, None
        else:
            self.head = pack((decoder.lm_head,), rows == 1)
        if on_gpu:
            self.by_mask = torch.compile(self.by_mask, fullgraph=True, dynamic=False)
        self.static_steps = {}  # (rows, columns) -> StaticStep

    def bind(self, model, cache, pads, padded, media):
        """A step for these rows; arguments and result as those of prefill.bind."""
        media = self.decoder.keep(media)
        if self.static:
            size = len(pads), -(-cache.num_columns // COLUMNS) * COLUMNS
            if size not in self.static_steps:
                self.static_steps[size] = StaticStep(self, *size)
            return self.static_steps[size].take(cache, pads, media)
        layers = [buffer.unbind(0) for buffer in cache.layers]  # keys and values, float[R, K, L, D] each
        cos, sin = self.turning(cache.num_columns)
        mask = hide(torch.arange(cache.num_columns, device=pads.device) < pads[:, None], cos.dtype) if padded else None

        def write(index, new):
            cache.layers[index].select(3, cache.length).copy_(new)
            k, v = layers[index]
            return k.narrow(2, 0, cache.length + 1), v.narrow(2, 0, cache.length + 1)

        @torch.inference_mode()
        def step(tokens):
            column = cache.length
            positions = column - pads if padded else slice(column, column + 1)
            seen = mask[..., : column + 1] if padded else None
            seen = self.biased(seen, torch.arange(column, -1, -1, device=pads.device))
            scores = self.scores(tokens, positions, cos, sin, write, seen, media)
            cache.advance(1)
            return scores

        return step

    def scores(self, tokens, positions, cos, sin, write, mask, media):
        """Run the layers for one token per row, int64[R], and score what follows: float32[R, V].

        positions: int64[R], or the slice of the one position of all. cos, sin: of `turning`. media: Media or None.
        write: (layer index, float[2, R, K, D], its new keys and values) -> float[2, R, K, S, D], all to attend to.
        mask: float[R or 1, K or 1, G or 1, S], 0 or -inf, with ALiBi its bias; None = every column.
        """
        config, num_rows = self.config, len(tokens)
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_width
        x = F.embedding(tokens, self.decoder.embedding.weight)
        if self.decoder.positions is not None:
            x = x + self.decoder.positions[config.position_offset :][positions]
        cos, sin = (table[positions][:, None].repeat(1, heads + 2 * kv_heads, 1) for table in (cos, sin))  # R H+2K D
        cos[:, heads + kv_heads :], sin[:, heads + kv_heads :] = 1, 0  # values do not turn
        for index, packed in enumerate(self.layers):
            if packed.cross_attention is not None:
                x = packed.cross_attention(x[:, None], media, self.decoder.backend, index=index)[:, 0]
            normed = packed.norm_1(x)
            qkv = product(normed, *packed.qkv)
            if packed.clip is not None:
                qkv = qkv.clamp(-packed.clip, packed.clip)
            if packed.q_norm is not None:
                q, k, v = qkv.split((heads * width, kv_heads * width, kv_heads * width), dim=-1)
                qkv = torch.cat((packed.q_norm(q), packed.k_norm(k), v), dim=-1)
            qkv = turn(qkv.view(num_rows, -1, width), cos, sin)  # R H+2K D
            k, v = write(index, qkv[:, heads:].view(num_rows, 2, kv_heads, width).transpose(0, 1))
            q = qkv[:, :heads].view(num_rows, kv_heads, -1, width)  # R K G D
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x_seen = product(seen.reshape(num_rows, -1), *packed.o, x)
            if packed.norm_2 is not None:
                normed = packed.norm_2(x_seen)
            wide = product(normed, *packed.wide)
            if packed.gated:
                gate, up = wide.chunk(2, dim=-1)
                wide = packed.activation(gate).mul_(up)
            else:
                wide = packed.activation(wide)
            x = product(wide, *packed.narrow, x_seen)
            if packed.adapter is not None:
                x = packed.adapter(x)
        return product(self.norm(x), *self.head).float()

    def by_mask(self, tokens, column, pads, buffers, cos, sin, media):
        """The step of StaticStep, in which all that changes is a tensor: float32[R, V]. column: int64[1], where the
        tokens are written. pads: int64[R]. buffers: per layer float[2, R, K, L, D], written in place."""
        columns = torch.arange(buffers[0].shape[3], device=tokens.device)
        mask = self.biased(hide((columns > column) | (columns < pads[:, None]), cos.dtype), column - columns)

        def write(index, new):
            return buffers[index].index_copy_(3, column, new[:, :, :, None])

        return self.scores(tokens, column - pads, cos, sin, write, mask, media)

    def biased(self, mask, distance):
        """A mask of `scores` plus ALiBi, where the decoder has it; distance: int[S], places behind the new token."""
        if self.slopes is None:
            return mask
        bias = (-self.slopes * distance)[None].to(self.decoder.embedding.weight.dtype)
        return bias if mask is None else mask + bias

    def turning(self, num_positions):
        """Rotary tables: two float[P, rotary channels]."""
        weight = self.decoder.embedding.weight
        positions = torch.arange(num_positions, device=weight.device)[None]
        tables = rope_tables(positions, self.config.num_rotary, self.config.rope_base)  # 1 1 P D/2
        cos, sin = (table[0, 0].to(weight.dtype) for table in tables)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def turn(x, cos, sin):
    """attention.apply_rope for x float[R, H, D] with tables float[R or 1, H, rotary channels]: the same shape."""
    num_rotary = cos.shape[-1]
    if num_rotary == 0:
        return x
    if num_rotary < x.shape[-1]:
        return torch.cat([turn(x[..., :num_rotary], cos, sin), x[..., num_rotary:]], dim=-1)
    return torch.addcmul(x * cos, x.roll(num_rotary // 2, -1), sin)


def hide(is_hidden, dtype):
    """bool[R, L], True = a column that a row must not see -> float[R, 1, 1, L], -inf there and 0 elsewhere."""
    mask = torch.zeros(is_hidden.shape, dtype=dtype, device=is_hidden.device)
    return mask.masked_fill(is_hidden, float("-inf"))[:, None, None]


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
        self.tables = fast.turning(num_columns)
        self.tokens, self.pads = weight.new_zeros(2, num_rows, dtype=torch.long)
        self.column = weight.new_zeros(1, dtype=torch.long)
        self.media = self.graph = self.scores = self.user = None

    @torch.no_grad()
    def take(self, cache, pads, media):
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
        self.tokens.copy_(tokens)
        if not tokens.is_cuda:
            self.compute()
            self.column.add_(1)
        else:
            if self.graph is None:
                self.capture()
            self.graph.replay()
        cache.advance(1)
        return self.scores

    def compute(self):
        """One step's scores, float32[R, V]."""
        state = self.tokens, self.column, self.pads, self.cache.layers, *self.tables, self.media
        self.scores = self.fast.by_mask(*state)

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
            self.compute()
            self.column.add_(1)
