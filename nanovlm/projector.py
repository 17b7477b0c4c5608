"""The simplest bridge: every patch becomes one image token, by a linear map or a small MLP.

LLaVA (arXiv:2304.08485) uses one linear layer, LLaVA-1.5 and LLaVA-Phi (arXiv:2401.02330, Sec. 3.1) two with a GELU
between. Nothing is summarised: as many image tokens as patches, in the same order.

M visual inputs, N patches over all frames, D width
"""

import math

import torch
from torch import nn

from nanovlm.attention import sincos_positions
from nanovlm.names import arguments
from nanovlm.vit import resize_positions

GRID = 8  # side of the grid on which places are told, whatever the resolution


class LinearProjector(nn.Module):
    """One linear layer from the ViT's width to the language model's (LLaVA)."""

    def __init__(self, vision_width, output_width):
        super().__init__()
        self.arguments = arguments(locals())
        self.output_width = output_width
        self.linear = nn.Linear(vision_width, output_width)

    def num_image_tokens(self, num_patches, num_frames=1):
        """Image tokens that a visual input of `num_frames` frames of `num_patches` patches becomes."""
        return num_patches * num_frames

    def forward(self, patches, num_frames=1, out=None):
        """float[M, N, vision_width] -> float[M, N, output_width]."""
        return self.linear(patches)


class MLPProjector(LinearProjector):
    """Linear, GELU, linear (LLaVA-1.5, LLaVA-Phi)."""

    def __init__(self, vision_width, output_width):
        super().__init__(vision_width, output_width)
        self.gelu = nn.GELU()
        self.linear_2 = nn.Linear(output_width, output_width)

    def forward(self, patches, num_frames=1, out=None):
        """float[M, N, vision_width] -> float[M, N, output_width]."""
        return self.linear_2(self.gelu(self.linear(patches)))


class PixelShuffleProjector(nn.Module):
    """MLP over squares of neighbouring patches: `merge` x `merge` of them become one image token.

    The patches of a square are laid behind one another, so nothing is averaged away; the first linear layer mixes
    them. The ViT has no class token.

    plain: one linear map without bias in place of the MLP (Idefics3, arXiv:2408.12637, Sec. 2.2; SmolVLM).
    positions: tell every image token where it stands, by sines and cosines with a learned strength per channel, the
      same at every resolution: a small tower trained on captions forgets places.
    """

    def __init__(self, vision_width, output_width, merge, positions=False, plain=False):
        super().__init__()
        self.arguments = arguments(locals())
        self.output_width = output_width
        self.merge = merge
        inputs = vision_width * merge**2
        self.mlp = nn.Linear(inputs, output_width, bias=False) if plain else MLPProjector(inputs, output_width)
        self.position_scale = nn.Parameter(torch.full((output_width,), 0.3)) if positions else None

    def num_image_tokens(self, num_patches, num_frames=1):
        """One token per square of patches. Raises: ValueError unless they form a grid of such squares."""
        side = math.isqrt(num_patches)
        if side * side != num_patches or side % self.merge:
            raise ValueError(f"{num_patches} patches are no square grid of {self.merge} x {self.merge} squares")
        return num_frames * num_patches // self.merge**2

    def squares(self, patches, num_frames=1):
        """What becomes one image token: float[M, num_frames * N / merge^2, merge^2 * vision_width]."""
        merge, side = self.merge, math.isqrt(patches.shape[1] // num_frames)
        x = patches.unflatten(1, (num_frames, side // merge, merge, side // merge, merge))  # M f r m c m D
        return x.transpose(3, 4).flatten(1, 3).flatten(2)

    def forward(self, patches, num_frames=1, out=None):
        """float[M, num_frames * N, vision_width] -> float[M, num_frames * N / merge^2, output_width]."""
        tokens = self.mlp(self.squares(patches, num_frames))
        if self.position_scale is None:
            return tokens
        number = tokens.shape[1] // num_frames
        places = resize_positions(sincos_positions(GRID**2, self.output_width, tokens.device), number)
        return tokens + (self.position_scale * places).repeat(num_frames, 1).to(tokens.dtype)


class WordProjector(PixelShuffleProjector):
    """Every square of patches says a few words, and they are the image tokens: the language model reads them as text.

    Of each square an MLP scores `vocabulary` words, `said` times over. An image token is the mean of the words'
    embeddings by the softmax of the scores, so it lies among words. ALIGN (AlignVLM, arXiv:2502.01341, Sec. 3) takes the
    mean of all words of the language model; here they are few, and the recipe that names them fills in `words`, their
    embeddings.
    """

    def __init__(self, vision_width, output_width, merge, said, vocabulary, hidden_width=256):
        nn.Module.__init__(self)
        self.arguments = arguments(locals())
        self.output_width, self.merge, self.said = output_width, merge, said
        self.scores = nn.Sequential(nn.Linear(vision_width * merge**2, hidden_width), nn.GELU(),
                                    nn.Linear(hidden_width, said * vocabulary))
        self.words = nn.Parameter(0.02 * torch.randn(vocabulary, output_width))

    def num_image_tokens(self, num_patches, num_frames=1):
        """`said` tokens per square of patches. Raises: as PixelShuffleProjector's."""
        return super().num_image_tokens(num_patches, num_frames) * self.said

    def say(self, squares):
        """Scores of the words: float[..., merge^2 * vision_width] -> float[..., said, vocabulary]."""
        return self.scores(squares).unflatten(-1, (self.said, -1))

    def forward(self, patches, num_frames=1, out=None):
        """float[M, num_frames * N, vision_width] -> float[M, num_frames * N / merge^2 * said, output_width]."""
        return (self.say(self.squares(patches, num_frames)).softmax(-1) @ self.words).flatten(1, 2)
