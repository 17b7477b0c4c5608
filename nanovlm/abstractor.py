"""mPLUG-Owl2's visual abstractor: 64 learned queries extract from 1025 visual features what the language model reads.

In every layer the queries look at the picture and at one another, then pass a gated feed-forward. Sines and cosines
tell both where a patch lies; at the end the queries are mapped to the language model's width, and one learned token
closes the picture.

mPLUG-Owl2, arXiv:2311.04257, Sec. 3.2, Eq. 1 and 2. Differs from the paper, as the released code does:
- the residual starts from the normalised queries, where the resampler's starts from the latents as they came: the sum
  begins anew at unit size in every layer, so no norm stands at the end;
- norms stand before the attention (queries and picture each their own), before the feed-forward and inside it;
- keys and values are [V ; I], queries first; the paper's [I ; V] would be the same, as no mask tells them apart;
- the feed-forward is gated, and every linear layer has a bias (the paper writes two matrices);
- the position tables are added to what queries and keys are computed from, never to the values: a place says where to
  look, not what is seen there. They are fixed, so they are computed, not stored;
- 65 tokens leave it, the last a learned end of the picture, and 1025 enter: the ViT's class token is kept.

M visual inputs, F frames, N features of a frame (patches, and the class token if kept), K queries, H heads, W width
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.attention import multi_head, sincos, sincos_positions
from nanovlm.names import arguments


def patch_positions(num_features, width, device=None):
    """Fixed places of a frame's N features, float[N, width]: half of the channels tells the column, half the row.

    N is a square number of patches, or one more: the class token in front, which gets zeros. Else a ValueError.
    """
    side = math.isqrt(num_features)
    num_class_rows = num_features - side * side
    if num_class_rows > 1:
        raise ValueError(f"{num_features} features a frame are no square grid of patches (and a class token)")
    rows, columns = sincos_positions(side * side, width, device).chunk(2, dim=1)  # the ViT tells the row first
    return F.pad(torch.cat([columns, rows], dim=1), (0, 0, num_class_rows, 0))


class AbstractorLayer(nn.Module):
    """Queries look at picture and queries, then think: attention and gated feed-forward, each with a residual."""

    def __init__(self, width, num_heads, ffn_width, ffn_norm_eps):
        super().__init__()
        self.num_heads = num_heads
        self.norm_queries = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.norm_ffn = nn.LayerNorm(width)
        self.w1 = nn.Linear(width, ffn_width)
        self.w2 = nn.Linear(ffn_width, width)
        self.w3 = nn.Linear(width, ffn_width)
        self.ffn_norm = nn.LayerNorm(ffn_width, eps=ffn_norm_eps)

    def forward(self, queries, patches, places, backend, maps=None):
        """queries float[M, K, W], patches float[M, N, W], places float[K + N, W] -> float[M, K, W]."""
        num_queries = queries.shape[1]
        queries = self.norm_queries(queries)  # the residual below starts here, not from what came in
        both = torch.cat([queries, self.norm_patches(patches)], dim=1)  # Eq. 1; M K+N W, queries first
        q, k, v = self.q(queries + places[:num_queries]), self.k(both + places), self.v(both)
        queries = queries + self.o(multi_head(q, k, v, self.num_heads, backend, maps=maps))
        if maps is not None:
            weights = maps[-1].roll(-num_queries, dims=-1)  # picture first, as in every bridge
            maps[-1] = F.pad(weights, (0, 0, 0, 1))  # the end token looks at nothing
        x = self.norm_ffn(queries)
        return queries + self.w2(self.ffn_norm(F.silu(self.w1(x)) * self.w3(x)))  # Eq. 2, with a norm inside


class Abstractor(nn.Module):
    """Visual abstractor, a bridge.

    Args:
      vision_width: channels of the ViT and of the queries, which stand among its features; a multiple of 4.
      output_width: channels of the language model.
      num_queries: image tokens per frame, but for the end token. num_layers: depth.
      num_heads: of the attention. ffn_width: hidden channels of the feed-forward.
      ffn_norm_eps: of the norm inside the feed-forward; all other norms have torch's 1e-5, as in the released code.
    """

    def __init__(self, vision_width, output_width, num_queries, num_layers, num_heads, ffn_width, ffn_norm_eps=1e-6):
        super().__init__()
        if vision_width % math.lcm(num_heads, 4):
            raise ValueError(f"width {vision_width} must be a multiple of num_heads {num_heads} and of 4")
        self.arguments = arguments(locals())
        self.output_width = output_width
        self.num_queries = num_queries
        self.backend = "sdpa"
        self.queries = nn.Parameter(torch.randn(num_queries, vision_width))
        self.layers = nn.ModuleList(
            AbstractorLayer(vision_width, num_heads, ffn_width, ffn_norm_eps) for _ in range(num_layers)
        )
        self.project = nn.Linear(vision_width, output_width)
        self.end = nn.Parameter(torch.randn(output_width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def num_image_tokens(self, num_patches, num_frames=1):
        """The queries and the end token, for every frame: without temporal positions a clip is a row of pictures."""
        return (self.num_queries + 1) * num_frames

    def forward(self, patches, num_frames=1, out=None):
        """Extract, from each frame on its own: float[M, F * N, vision_width] -> float[M, F * (K + 1), output_width].

        out: dict; when given, out["latents"] becomes a list over layers of float[M * F, H, K + 1, N + K]: what each
          image token (the end token: nothing) took from the features and, behind them, from the queries.
        """
        patches = patches.unflatten(1, (num_frames, -1)).flatten(0, 1)  # M*F N W
        queries, device = self.queries.expand(len(patches), -1, -1), patches.device
        places = [sincos(*self.queries.shape, device), patch_positions(*patches.shape[1:], device)]
        places = torch.cat(places).to(patches.dtype)  # K+N W
        maps = None if out is None else out.setdefault("latents", [])
        for layer in self.layers:
            queries = layer(queries, patches, places, self.backend, maps)
        tokens = torch.cat([self.project(queries), self.end.expand(len(patches), 1, -1)], dim=1)  # M*F K+1 W_out
        return tokens.unflatten(0, (-1, num_frames)).flatten(1, 2)
