"""The language model: a causal decoder whose layers may carry adapters and modality-adaptive parts.

LLaMA's layer (RMSNorm, rotary positions, grouped queries, gated feed-forward), stacked. What the papers add to a
layer is an explicit list of LayerOptions, one per layer, so that "adapters after layers 0, 2, 4" is written down and
not computed. It eats embeddings, not ids: image tokens are just embeddings that come from a bridge.

LLaMA, arXiv:2302.13971, Sec. 2.2. Differs from the paper: grouped queries (arXiv:2305.13245), an optional tied
head, and the options, all of them off in a plain LLaMA.

B batch, T tokens, H heads, K key/value heads, D head width, W width, V vocabulary
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.adapter import Adapter
from nanovlm.attention import apply_rope, attention, attention_weights, rope_tables
from nanovlm.modality_adaptive import ModalityAdaptive, route, split


@dataclass(frozen=True)
class LayerOptions:
    """What one decoder layer carries beyond LLaMA's."""

    adapter_width: int = 0  # hidden channels of Lynx's adapter behind the layer; 0 = none
    modality_adaptive: bool = False  # mPLUG-Owl2: separate norms, keys and values for image tokens


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder."""

    vocab_size: int
    width: int  # channels
    num_heads: int
    num_kv_heads: int  # fewer than num_heads: grouped queries
    ffn_width: int  # hidden channels of the gated feed-forward
    context_length: int  # tokens
    layers: tuple[LayerOptions, ...]  # one entry per layer
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    tied_head: bool = False  # the output head is the embedding table

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} does not divide into {self.num_heads} heads")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads: no multiple")
        if self.width // self.num_heads % 2:
            raise ValueError(f"head width {self.width // self.num_heads} is odd: rotary positions turn pairs")

    @property
    def head_width(self):
        """Channels of one head."""
        return self.width // self.num_heads


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
        self.num_heads = config.num_heads
        kv_width = config.num_kv_heads * config.head_width
        self.num_kv_heads = config.num_kv_heads
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = per_modality(lambda: nn.Linear(config.width, kv_width, bias=False), modality_adaptive)  # Eq. 6
        self.v = per_modality(lambda: nn.Linear(config.width, kv_width, bias=False), modality_adaptive)  # Eq. 7
        self.o = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, context, index):
        """x float[B, T, W], the normalised input of layer `index` -> float[B, T, W]."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # B H T D
        k = split(self.k, context.routing)(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)  # B K T D
        v = split(self.v, context.routing)(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        q, k = apply_rope(q, context.cos, context.sin), apply_rope(k, context.cos, context.sin)
        if context.cache is not None:
            k, v = context.cache.update(index, k, v)  # B K S D
        if context.out is not None:
            context.out.setdefault("attention", []).append(attention_weights(q, k, context.visible))
        seen = attention(q, k, v, context.visible, context.backend)
        return self.o(seen.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: one projection gates the other."""

    def __init__(self, width, ffn_width):
        super().__init__()
        self.gate = nn.Linear(width, ffn_width, bias=False)
        self.up = nn.Linear(width, ffn_width, bias=False)
        self.down = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x):
        """x float[..., W] -> the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and a residual, then the adapter if there is one."""

    def __init__(self, config, options):
        super().__init__()
        adaptive = options.modality_adaptive
        self.norm_1 = per_modality(lambda: nn.RMSNorm(config.width, eps=config.norm_eps), adaptive)  # Eq. 4
        self.attention = DecoderAttention(config, adaptive)
        self.norm_2 = per_modality(lambda: nn.RMSNorm(config.width, eps=config.norm_eps), adaptive)
        self.ffn = FeedForward(config.width, config.ffn_width)
        self.adapter = Adapter(config.width, options.adapter_width) if options.adapter_width else nn.Identity()

    def forward(self, x, context, index):
        """x float[B, T, W], the hidden states -> the same shape."""
        x = x + self.attention(split(self.norm_1, context.routing)(x), context, index)
        x = x + self.ffn(split(self.norm_2, context.routing)(x))
        return self.adapter(x)


@dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares: positions, masks, routing, cache, and where to leave plots."""

    cos: torch.Tensor  # float[B, 1, T, D / 2]
    sin: torch.Tensor
    visible: object  # attention.Visible over the keys
    routing: object  # modality_adaptive.Routing
    cache: object  # cache.KeyValueCache or None
    backend: str
    out: dict | None


class Decoder(nn.Module):
    """LLaMA-shaped decoder with LayerOptions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backend = "sdpa"
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, options) for options in config.layers)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """As GPT-2: words N(0, 0.02^2), and what writes into the residual stream smaller by the root of its depth."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for layer in self.layers:
            for linear in (layer.attention.o, layer.ffn.down):
                linear.weight.mul_((2 * len(self.layers)) ** -0.5)

    def forward(self, embeddings, positions, visible, modality, cache=None, out=None):
        """Run the layers.

        Args:
          embeddings: float[B, T, W]. positions: int[B, T], for the rotary angles.
          visible: attention.Visible, over T keys or, with a cache, over the cache's columns.
          modality: int[B, T], 0 = text, 1 = vision.
          cache: cache.KeyValueCache, which receives the new keys and values and hands back all of them.
          out: dict; when given, out["attention"] becomes a list over layers of float[B, H, T, S].
        Returns: float[B, T, W], normalised hidden states; `logits` turns them into scores.
        """
        cos, sin = rope_tables(positions, self.config.head_width, self.config.rope_base)
        context = Context(cos, sin, visible, route(modality), cache, self.backend, out)
        x = embeddings
        for index, layer in enumerate(self.layers):
            x = layer(x, context, index)
        return self.norm(x)

    def logits(self, hidden):
        """Scores of the next token: float[..., W] -> float[..., V]."""
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, weight)
