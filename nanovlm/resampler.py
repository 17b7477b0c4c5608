"""Perceiver resampler: any number of patches, summarised by a fixed number of latents.

A few learned vectors ask the patches questions by cross-attention and become the image tokens. The language model
then pays for 32 tokens instead of 900, whatever the resolution or the number of video frames.

Flamingo, arXiv:2204.14198, Sec. 2.1; Perceiver, arXiv:2103.03206; as used in Lynx, arXiv:2307.02469, Sec. 2.1.
Differs from Flamingo, as Lynx's released code does:
- keys and values come from the patches alone: latents of the language model's width cannot stand among patches of the
  ViT's. With `attend_to_latents`, Flamingo's form, they can, as both have the ViT's width: it keeps that width, since
  its cross-attention reads the latents and no image token enters the text;
- no linear map before it: the latents have the language model's width and look at patches of the ViT's width;
- a clip gets a learned embedding per frame, a still image none.

M visual inputs, N patches over all frames, L latents, W width
"""

import torch
from torch import nn

from nanovlm.attention import multi_head
from nanovlm.names import arguments


class ResamplerLayer(nn.Module):
    """Latents look at the patches, then think: cross-attention and feed-forward, each with a residual."""

    def __init__(self, vision_width, width, num_heads, head_width, ffn_width, attend_to_latents):
        super().__init__()
        inner = num_heads * head_width
        self.num_heads = num_heads
        self.attend_to_latents = attend_to_latents
        self.norm_patches = nn.LayerNorm(vision_width)
        self.norm_latents = nn.LayerNorm(width)
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(vision_width, inner, bias=False)
        self.v = nn.Linear(vision_width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)
        widen, narrow = nn.Linear(width, ffn_width, bias=False), nn.Linear(ffn_width, width, bias=False)
        self.ffn = nn.Sequential(nn.LayerNorm(width), widen, nn.GELU(), narrow)

    def forward(self, latents, patches, backend, maps=None):
        """latents float[M, L, W], patches float[M, N, vision_width] -> float[M, L, W]."""
        patches, queries = self.norm_patches(patches), self.norm_latents(latents)
        if self.attend_to_latents:
            patches = torch.cat([patches, queries], dim=1)  # Flamingo: [media ; latents], so latents see one another
        seen = multi_head(self.q(queries), self.k(patches), self.v(patches), self.num_heads, backend, maps=maps)
        latents = latents + self.o(seen)
        return latents + self.ffn(latents)


class Resampler(nn.Module):
    """Perceiver resampler, a bridge.

    Args:
      vision_width, output_width: channels of the ViT and of the language model.
      num_latents: image tokens per visual input. num_layers: depth.
      num_heads, head_width: of the cross-attention. ffn_width: hidden channels of the feed-forward.
      max_frames: frames of a clip that have an embedding (0 = images only).
      attend_to_latents: Flamingo's form; needs vision_width == output_width.
    """

    def __init__(self, vision_width, output_width, num_latents, num_layers, num_heads, head_width, ffn_width,
                 max_frames=0, attend_to_latents=False):  # fmt: skip
        super().__init__()
        if attend_to_latents and vision_width != output_width:
            raise ValueError(f"attend_to_latents: latents of {output_width} channels among patches of {vision_width}")
        self.arguments = arguments(locals())
        self.output_width = output_width
        self.num_latents = num_latents
        self.max_frames = max_frames
        self.backend = "sdpa"
        self.latents = nn.Parameter(torch.randn(num_latents, output_width))
        sizes = (vision_width, output_width, num_heads, head_width, ffn_width, attend_to_latents)
        self.layers = nn.ModuleList(ResamplerLayer(*sizes) for _ in range(num_layers))
        self.norm = nn.LayerNorm(output_width)
        self.frame_embedding = None
        if max_frames:
            self.frame_embedding = nn.Parameter(torch.empty(max_frames, vision_width))
            nn.init.trunc_normal_(self.frame_embedding, std=0.02)

    def num_image_tokens(self, num_patches, num_frames=1):
        """Always the number of latents."""
        return self.num_latents

    def forward(self, patches, num_frames=1, out=None):
        """Summarise: float[M, num_frames * N, vision_width], frames behind one another -> float[M, L, output_width].

        out: dict; when given, out["latents"] becomes a list over layers of float[M, H, L, N], or with attend_to_latents
          float[M, H, L, N + L].
        Raises: ValueError for a clip of more frames than have an embedding.
        """
        if num_frames > 1:
            if num_frames > self.max_frames:
                raise ValueError(f"a clip of {num_frames} frames, but embeddings for {self.max_frames}")
            patches = patches.unflatten(1, (num_frames, -1)) + self.frame_embedding[:num_frames, None]
            patches = patches.flatten(1, 2)
        maps = None if out is None else out.setdefault("latents", [])
        latents = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents = layer(latents, patches, self.backend, maps)
        return self.norm(latents)
