"""BLIP-2's Q-Former: a BERT over 32 learned queries that read the picture in every second layer.

The queries attend to one another, in some layers to the ViT's features, then pass a feed-forward; the last hidden
states, mapped linearly to the language model's width, are the image tokens. BLIP-2 pre-trains it with text at its
side before a language model ever sees it; only the half that the queries pass through is needed here.

BLIP-2, arXiv:2301.12597, Sec. 3.1 and Fig. 2; BERT, arXiv:1810.04805. Differs from the paper, as the
released code does:
- a LayerNorm on the learned queries before the first layer, where BERT has the one behind its embeddings;
- the feed-forward of the queries is their own copy; the text's, used in pre-training alone, is left out;
- no dropout (BERT's is 0.1 in training), as nowhere in this package.
Unlike the resampler and the abstractor it normalises after each residual, BERT's order.

M visual inputs, F frames, N features of a frame, K queries, H heads, W width
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.attention import multi_head
from nanovlm.names import arguments

NORM_EPS = 1e-12  # BERT's


class PostNormAttention(nn.Module):
    """Attention of queries to a source of any width, with its residual, normalised afterwards."""

    def __init__(self, width, source_width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(source_width, width)
        self.v = nn.Linear(source_width, width)
        self.o = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, queries, source, backend, maps=None):
        """queries float[M, K, W], source float[M, N, source_width] -> float[M, K, W]."""
        seen = multi_head(self.q(queries), self.k(source), self.v(source), self.num_heads, backend, maps=maps)
        return self.norm(queries + self.o(seen))


class QFormerLayer(nn.Module):
    """Self-attention of the queries, cross-attention in some layers, feed-forward."""

    def __init__(self, width, vision_width, num_heads, ffn_width, cross_attention):
        super().__init__()
        self.attention = PostNormAttention(width, width, num_heads)
        self.cross_attention = PostNormAttention(width, vision_width, num_heads) if cross_attention else None
        self.fc_1 = nn.Linear(width, ffn_width)
        self.fc_2 = nn.Linear(ffn_width, width)
        self.ffn_norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, queries, patches, backend, maps=None):
        """queries float[M, K, W], patches float[M, N, vision_width] -> float[M, K, W]."""
        queries = self.attention(queries, queries, backend)
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, patches, backend, maps)
        return self.ffn_norm(queries + self.fc_2(F.gelu(self.fc_1(queries))))


class QFormer(nn.Module):
    """Q-Former and the linear map behind it, a bridge.

    Args:
      vision_width, output_width: channels of the ViT and of the language model.
      width: channels of the queries. num_queries: image tokens per frame.
      num_heads: of every attention. ffn_width: hidden channels of the feed-forward.
      cross_attention: tuple of bool, one per layer: does it look at the picture? BLIP-2: layers 0, 2, ... 10 of 12.
    """

    def __init__(self, vision_width, output_width, width, num_queries, num_heads, ffn_width, cross_attention):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} does not divide into {num_heads} heads")
        cross_attention = tuple(cross_attention)
        if not any(cross_attention):
            raise ValueError(f"cross_attention {cross_attention}: no layer looks at the picture; set one True")
        self.arguments = arguments(locals())
        self.output_width = output_width
        self.num_queries = num_queries
        self.backend = "sdpa"
        self.queries = nn.Parameter(torch.randn(num_queries, width) * 0.02)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.layers = nn.ModuleList(
            QFormerLayer(width, vision_width, num_heads, ffn_width, looks) for looks in cross_attention
        )
        self.project = nn.Linear(width, output_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # BERT, App. A.2
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def num_image_tokens(self, num_patches, num_frames=1):
        """The queries, for every frame."""
        return self.num_queries * num_frames

    def forward(self, patches, num_frames=1, out=None):
        """Query each frame on its own: float[M, F * N, vision_width] -> float[M, F * K, output_width].

        out: dict; when given, out["latents"] becomes a list over the layers that look of float[M * F, H, K, N].
        Source: InstructBLIP reads clips so, arXiv:2305.06500, Sec. 3.1.
        """
        maps = None if out is None else out.setdefault("latents", [])
        patches = patches.unflatten(1, (num_frames, -1)).flatten(0, 1)  # M*F N vision_width
        queries = self.norm(self.queries).expand(len(patches), -1, -1)
        for layer in self.layers:
            queries = layer(queries, patches, self.backend, maps)
        return self.project(queries).unflatten(0, (-1, num_frames)).flatten(1, 2)  # M F*K W_out
