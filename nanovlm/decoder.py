"""The language model: a causal decoder whose layers may carry adapters, modality-adaptive parts and cross-attention.

LLaMA's layer (RMSNorm, rotary positions, grouped queries, gated feed-forward), stacked; SmolLM2, Qwen2, Phi-2, OPT and
MPT are other values of DecoderConfig. What the papers add to a layer is a list of LayerOptions, one per layer.
It eats embeddings, not ids: image tokens are just embeddings that come from a bridge.

LLaMA, arXiv:2302.13971, Sec. 2.2. Differs from the paper: grouped queries (arXiv:2305.13245), an optional tied
head, and the options, all of them off in a plain LLaMA. The others differ from LLaMA in
  SmolLM2  rope_base, tied_head, three query heads to a key head
  Qwen2    qkv_bias="qkv", arXiv:2407.10671, Sec. 2.2.1
  Phi-2    norm="layer", parallel, rotary_width=32 of 80 channels, ffn="plain" with "gelu_tanh", a bias everywhere
  OPT      norm="layer", position_offset=2 and rotary_width=0, ffn="plain" with "relu", biases, arXiv:2205.01068
  MPT      norm="layer_no_bias", alibi and rotary_width=0, ffn="plain" with "gelu"; MPT-1B also qk_norm

B batch, T tokens, H heads, K key/value heads, D head width, W width, V vocabulary
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.adapter import Adapter
from nanovlm.attention import apply_rope, attention, attention_weights, rope_tables
from nanovlm.cross_attention import GatedCrossAttention
from nanovlm.modality_adaptive import ModalityAdaptive, route, split
from nanovlm.names import check_known
from nanovlm.vit import ACTIVATIONS


class RMSNorm(nn.RMSNorm):
    """RMSNorm in float32 at least, as LLaMA's: cast back before the weight, not behind it."""

    def forward(self, x):
        """x float[..., W] -> the same shape."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(exact, self.normalized_shape, eps=self.eps).to(x.dtype) * self.weight


NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm, "layer_no_bias": partial(nn.LayerNorm, bias=False)}


@dataclass(frozen=True)
class LayerOptions:
    """What one decoder layer carries beyond LLaMA's."""

    adapter_width: int = 0  # hidden channels of Lynx's adapter behind the layer; 0 = none
    modality_adaptive: bool = False  # mPLUG-Owl2: separate norms, keys and values for image tokens
    cross_attention: bool = False  # Flamingo's gated cross-attention in front of the layer


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and kind of a decoder; the defaults are LLaMA's."""

    vocab_size: int
    width: int  # channels
    num_heads: int
    num_kv_heads: int  # fewer than num_heads: grouped queries
    ffn_width: int  # hidden channels of the feed-forward
    context_length: int  # tokens
    layers: tuple[LayerOptions, ...]  # one entry per layer
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    tied_head: bool = False  # the output head is the embedding table
    norm: str = "rms"  # "rms", "layer": LayerNorm with bias, or "layer_no_bias"
    ffn: str = "gated"  # "gated" (gate, up, down), or "plain" (fc_1, fc_2)
    activation: str = "silu"  # of the feed-forward: "silu", "gelu", "gelu_tanh" or "relu"
    qkv_bias: str = ""  # "qkv" = queries, keys and values have a bias, "" = none has
    qkv_clip: float | None = None  # queries, keys and values are cut to +- this
    qk_norm: bool = False  # a norm of the queries and one of the keys, each over all heads at once
    output_bias: bool = False  # on the attention's output projection
    ffn_bias: bool = False
    head_bias: bool = False  # on the output head; an untied one only
    parallel: bool = False  # Phi: attention and feed-forward read one norm, and both are added at once
    rotary_width: int | None = None  # leading channels of a head that turn; None = all, 0 = no rotary positions
    position_offset: int | None = None  # not None: learned positions, this many rows in front of position 0's
    alibi: tuple[float, ...] = ()  # a slope per head, see attention.alibi_slopes; () = no bias by distance
    cross_attention_width: int | None = None  # channels of the media that the cross-attention layers read

    def __post_init__(self):
        kinds = dict(norm=NORMS, ffn=("gated", "plain"), activation=ACTIVATIONS, qkv_bias=("", "qkv"))
        for field, known in kinds.items():
            check_known(f"unknown {field}", getattr(self, field), known)
        if self.width % self.num_heads or self.num_heads % self.num_kv_heads:
            heads = f"num_heads {self.num_heads}, and that one of num_kv_heads {self.num_kv_heads}"
            raise ValueError(f"width {self.width} must be a multiple of {heads}")
        if self.num_rotary % 2 or not 0 <= self.num_rotary <= self.head_width:
            raise ValueError(f"{self.num_rotary} of a head's {self.head_width} channels turn; expected an even number")
        if len(self.alibi) not in (0, self.num_heads):
            raise ValueError(f"alibi has {len(self.alibi)} slopes for {self.num_heads} heads; give one each, or none")
        if self.head_bias and self.tied_head:
            raise ValueError("head_bias with tied_head: an embedding table has no bias; leave one of them out")
        if any(options.cross_attention for options in self.layers) != (self.cross_attention_width is not None):
            raise ValueError(f"cross_attention_width {self.cross_attention_width} and layers' cross_attention differ")

    @property
    def head_width(self):
        """Channels of one head."""
        return self.width // self.num_heads

    @property
    def num_rotary(self):
        """Channels of a head that turn by the token's position."""
        return self.head_width if self.rotary_width is None else self.rotary_width


def per_modality(make, modality_adaptive):
    """One layer, or a text and an image copy of it that start out equal (mPLUG-Owl2, Sec. 3.3)."""
    module = make()
    if not modality_adaptive:
        return module
    copy = make()
    copy.load_state_dict(module.state_dict())
    return ModalityAdaptive(module, copy)


class DecoderAttention(nn.Module):
    """Causal self-attention with rotary positions, grouped queries and a key/value cache."""

    def __init__(self, config, modality_adaptive):
        super().__init__()
        self.head_width, self.clip = config.head_width, config.qkv_clip
        kv_width, bias = config.num_kv_heads * config.head_width, config.qkv_bias == "qkv"
        self.q = nn.Linear(config.width, config.width, bias)
        self.k = per_modality(lambda: nn.Linear(config.width, kv_width, bias), modality_adaptive)  # Eq. 6
        self.v = per_modality(lambda: nn.Linear(config.width, kv_width, bias), modality_adaptive)  # Eq. 7
        self.o = nn.Linear(config.width, config.width, config.output_bias)
        make_norm = partial(NORMS[config.norm], eps=config.norm_eps)
        self.q_norm = make_norm(config.width) if config.qk_norm else None
        self.k_norm = make_norm(kv_width) if config.qk_norm else None

    def heads(self, x, norm=None):
        """Queries, keys or values float[B, T, heads * D], just projected -> float[B, heads, T, D]."""
        x = x if self.clip is None else x.clamp(-self.clip, self.clip)
        x = x if norm is None else norm(x).to(x.dtype)
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def keys_and_values(self, x, context, index):
        """x float[B, T, W], normalised, of layer `index` -> two float[B, K, S, D], those of the cache included."""
        k = self.heads(split(self.k, context.routing)(x), self.k_norm)  # B K T D
        v = self.heads(split(self.v, context.routing)(x))
        k = apply_rope(k, context.cos, context.sin)
        return (k, v) if context.cache is None else context.cache.update(index, k, v)  # B K S D

    def forward(self, x, context, index):
        """x float[B, T, W], the normalised input of layer `index` -> float[B, T, W]."""
        q = self.heads(self.q(x), self.q_norm)  # B H T D
        q = apply_rope(q, context.cos, context.sin)
        k, v = self.keys_and_values(x, context, index)
        if context.out is not None:
            context.out.setdefault("attention", []).append(attention_weights(q, k, context.visible))
        seen = attention(q, k, v, context.visible, context.backend)
        return self.o(seen.transpose(1, 2).flatten(-2))


class GatedFeedForward(nn.Module):
    """W_down (f(W_gate x) * (W_up x)): SwiGLU with f = SiLU (Shazeer, arXiv:2002.05202, Eq. 6)."""

    def __init__(self, width, ffn_width, activation="silu", bias=False):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(width, ffn_width, bias)
        self.up = nn.Linear(width, ffn_width, bias)
        self.down = nn.Linear(ffn_width, width, bias)

    output = property(lambda self: self.down)  # the projection that writes into the residual stream

    def forward(self, x):
        """x float[..., W] -> the same shape."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


class PlainFeedForward(nn.Module):
    """W_2 f(W_1 x + b_1) + b_2 (Attention Is All You Need, arXiv:1706.03762, Eq. 2), as in Phi-2 and OPT."""

    def __init__(self, width, ffn_width, activation, bias):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc_1 = nn.Linear(width, ffn_width, bias)
        self.fc_2 = nn.Linear(ffn_width, width, bias)

    output = property(lambda self: self.fc_2)

    def forward(self, x):
        """x float[..., W] -> the same shape."""
        return self.fc_2(self.activation(self.fc_1(x)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and a residual; cross-attention before them, an adapter behind."""

    def __init__(self, config, options):
        super().__init__()
        make_norm = lambda: NORMS[config.norm](config.width, eps=config.norm_eps)
        make_ffn = GatedFeedForward if config.ffn == "gated" else PlainFeedForward
        adaptive = options.modality_adaptive
        media_width = config.cross_attention_width
        self.cross_attention = GatedCrossAttention(config.width, media_width) if options.cross_attention else None
        self.norm_1 = per_modality(make_norm, adaptive)  # Eq. 4
        self.attention = DecoderAttention(config, adaptive)
        self.norm_2 = None if config.parallel else per_modality(make_norm, adaptive)
        self.ffn = make_ffn(config.width, config.ffn_width, config.activation, config.ffn_bias)
        self.adapter = Adapter(config.width, options.adapter_width) if options.adapter_width else nn.Identity()

    def forward(self, x, context, index):
        """x float[B, T, W], the hidden states -> the same shape."""
        if self.cross_attention is not None:
            x = self.cross_attention(x, context.media, context.backend, context.out, index)
        normed = split(self.norm_1, context.routing)(x)
        seen = self.attention(normed, context, index)
        if self.norm_2 is None:  # Phi: the feed-forward does not wait for the attention
            x = x + seen + self.ffn(normed)
        else:
            x = x + seen
            x = x + self.ffn(split(self.norm_2, context.routing)(x))
        return self.adapter(x)


@dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares: positions, masks, routing, cache, and where to leave plots."""

    cos: torch.Tensor  # float[B, 1, T, half of the channels that turn]
    sin: torch.Tensor
    visible: object  # attention.Visible over the keys
    routing: object  # modality_adaptive.Routing
    cache: object  # cache.KeyValueCache or None
    media: object  # cross_attention.Media or None
    backend: str
    out: dict | None


class Decoder(nn.Module):
    """A decoder: embeddings float[B, T, W] -> hidden states -> scores of the next token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backend = "sdpa"
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, options) for options in config.layers)
        self.norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.lm_head = None if config.tied_head else nn.Linear(config.width, config.vocab_size, config.head_bias)
        nn.init.normal_(self.embedding.weight, std=0.02)  # as GPT-2
        self.positions = None
        if config.position_offset is not None:
            self.positions = nn.Parameter(torch.empty(config.context_length + config.position_offset, config.width))
            nn.init.normal_(self.positions, std=0.02)
        with torch.no_grad():  # what writes into the residual stream is smaller by the root of its depth
            for layer in self.layers:
                for linear in (layer.attention.o, layer.ffn.output):
                    linear.weight.mul_((2 * len(self.layers)) ** -0.5)

    def forward(self, embeddings, positions, visible, modality, cache=None, out=None, media=None, only_fill=False):
        """Run the layers: float[B, T, W], normalised hidden states, which `logits` turns into scores.

        Args:
          embeddings: float[B, T, W]. positions: int[B, T], for rotary angles or the learned table.
          visible: attention.Visible, over T keys or, with a cache, over the cache's columns.
          modality: int[B, T], 0 = text, 1 = vision; None = all text.
          cache: cache.KeyValueCache, which receives the new keys and values and hands back all of them.
          out: dict; when given, out["attention"] becomes a list over layers of float[B, H, T, S], and, with media,
            out["cross_attention"] one over the layers that have it.
          media: cross_attention.Media, what the cross-attention layers read; None = no picture.
          only_fill: the last layer ends with its keys and values in the cache, and None is returned.
        """
        if self.config.alibi:
            visible = replace(visible, slopes=torch.tensor(self.config.alibi, device=embeddings.device))
        cos, sin = rope_tables(positions, self.config.num_rotary, self.config.rope_base)
        adaptive = any(options.modality_adaptive for options in self.config.layers)
        routing = route(modality if adaptive else None)  # looking at the modality may wait for a GPU
        context = Context(cos, sin, visible, routing, cache, media, self.backend, out)
        x = embeddings
        if self.positions is not None:
            x = x + F.embedding(positions + self.config.position_offset, self.positions)
        for index, layer in enumerate(self.layers):
            if only_fill and layer is self.layers[-1]:
                layer.attention.keys_and_values(split(layer.norm_1, routing)(x), context, index)
                return None
            x = layer(x, context, index)
        return self.norm(x)

    def keep(self, media):
        """The same cross_attention.Media (or None) with every layer's keys and values, made once for many calls."""
        if media is None:
            return None
        modules = [layer.cross_attention for layer in self.layers]
        return replace(media, kept=tuple(module and module.keys_and_values(media.tokens) for module in modules))

    def logits(self, hidden):
        """Scores of the next token: float[..., W] -> float[..., V]."""
        return F.linear(hidden, self.embedding.weight) if self.lm_head is None else self.lm_head(hidden)
