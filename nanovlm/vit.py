"""Vision Transformer: an image becomes a sequence of patch features.

A picture is cut into patches, a convolution embeds each, a learned position is added, and transformer blocks let them
look at one another in both directions. No pooling and no classifier: the bridge wants every patch.

ViT, arXiv:2010.11929; CLIP's variant arXiv:2103.00020. Differs from the paper:
- options for the siblings: a class token, norms before and after the blocks, kinds of GELU, biases of q, k, v;
- a stem of stride-2 convolutions instead of one patch convolution: a small ViT learns several times faster with it
  (Early Convolutions Help Transformers See Better, arXiv:2106.14881);
- the position table is resizable, since training raises the resolution between its stages.

What the siblings hand to the bridge:
- CLIP in LLaVA and LLaVA-Phi (`feature_layer=23`, `drop_class_token`): before the last block, which serves CLIP's own
  loss, patches keep more of their place (LLaVA, arXiv:2304.08485, Sec. 5.2); in mPLUG-Owl2 all blocks and the token;
- EVA-g in Lynx and BLIP-2: 39 blocks, `qkv_bias="qv"`, no `post_norm` in Lynx, one of BLIP-2's own in BLIP-2;
- SigLIP: no class token, as it pools by attention.

F frames (images), N patches, T tokens (N, or N + 1 with a class token), W width
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.attention import full, multi_head, sincos_positions
from nanovlm.names import check_known

ACTIVATIONS = {  # of towers and decoders
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # "gelu_new" of transformers
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP
    "silu": F.silu,
    "relu": F.relu,
}


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and options of a ViT."""

    image_size: int  # pixels, side of the square picture
    patch_size: int  # pixels
    width: int  # channels
    num_layers: int
    num_heads: int
    mlp_width: int  # hidden channels of the feed-forward
    conv_stem: bool = False  # stride-2 convolutions instead of one patch convolution; patch_size is a power of 2
    class_token: bool = True
    pre_norm: bool = False  # a norm before the first block (CLIP)
    post_norm: bool = True  # a norm after the last block; features of an earlier one do not pass it
    qkv_bias: str = "qkv"  # which of the three projections carry a bias; "qv" in EVA
    patch_bias: bool = True
    activation: str = "gelu"
    norm_eps: float = 1e-6
    # features are the plain output of so many blocks (those behind exist in the checkpoint, and are not computed);
    feature_layer: int | None = None  # None = all blocks, then post_norm
    drop_class_token: bool = False  # it takes part in attention, but is no feature (LLaVA)

    def __post_init__(self):
        check_image_size(self.image_size, self.patch_size)
        if self.width % math.lcm(self.num_heads, 4):
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads} and of 4")
        check_known("unknown activation", self.activation, ACTIVATIONS)
        if not set(self.qkv_bias) <= set("qkv"):
            raise ValueError(f"qkv_bias {self.qkv_bias!r} names projections other than q, k, v; write e.g. 'qv'")
        if self.conv_stem and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(f"conv_stem halves the picture: patch_size {self.patch_size} is not 2, 4, 8, 16 ...")
        if self.feature_layer is not None and not 1 <= self.feature_layer <= self.num_layers:
            raise ValueError(f"feature_layer {self.feature_layer}, but there are blocks 1 to {self.num_layers}")
        if self.drop_class_token and not self.class_token:
            raise ValueError("drop_class_token, but there is no class token; set one of the two otherwise")


def check_image_size(image_size, patch_size):
    """Raise ValueError unless the picture divides into whole patches."""
    near = max(image_size // patch_size, 1) * patch_size
    if image_size != near:
        raise ValueError(f"image_size {image_size} is no multiple of patch_size {patch_size}; try {near}")


def resize_positions(table, num_patches):
    """Stretch a table float[T, W] to another square number of patches, bicubic as Lynx's and EVA's loaders do.

    The table is a square grid in row-major order, behind the class token's row, if there is one, which is copied.
    """
    old, new = math.isqrt(len(table)), math.isqrt(num_patches)
    num_class_rows = len(table) - old * old
    if new * new != num_patches or num_class_rows > 1:
        raise ValueError(f"a table of {len(table)} rows for {num_patches} patches: one is no square grid")
    class_rows, grid = table[:num_class_rows], table[num_class_rows:]
    grid = grid.float().T.reshape(1, -1, old, old)  # 1 W rows columns
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([class_rows, grid.flatten(2)[0].T.to(table.dtype)])


class ConvStem(nn.Sequential):
    """Stride-2 convolutions, the width doubling up to the ViT's: patch_size pixels become one position.

    Each is normalised per picture and channel, or the bright background drowns the shapes; before and after the last
    halving one convolution keeps the size, which tells shapes of few pixels, and whole shapes, apart.
    """

    def __init__(self, patch_size, width):
        num_halvings = patch_size.bit_length() - 1
        plan = [(width >> (num_halvings - 1 - i), 2) for i in range(num_halvings)]  # (width, stride)
        plan.insert(-1, (plan[max(num_halvings - 2, 0)][0], 1))
        plan.append((width, 1))
        layers, before = [], 3
        for after, stride in plan:
            convolution = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)
            layers += [convolution, nn.InstanceNorm2d(after, affine=True), nn.GELU()]
            before = after
        super().__init__(*layers, nn.Conv2d(width, width, kernel_size=1))


class SelfAttention(nn.Module):
    """Multi-head attention among all tokens of a sequence."""

    def __init__(self, width, num_heads, bias):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias="q" in bias)
        self.k = nn.Linear(width, width, bias="k" in bias)
        self.v = nn.Linear(width, width, bias="v" in bias)
        self.o = nn.Linear(width, width)

    def forward(self, x, visible, backend):
        """x float[F, T, W] -> the same shape."""
        return self.o(multi_head(self.q(x), self.k(x), self.v(x), self.num_heads, backend, visible))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a feed-forward, each with a residual."""

    def __init__(self, width, num_heads, mlp_width, activation="gelu", norm_eps=1e-6, qkv_bias="qkv"):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = SelfAttention(width, num_heads, qkv_bias)
        self.norm_2 = nn.LayerNorm(width, eps=norm_eps)
        self.fc_1 = nn.Linear(width, mlp_width)
        self.fc_2 = nn.Linear(mlp_width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x, visible, backend):
        """x float[F, T, W] -> the same shape."""
        x = x + self.attention(self.norm_1(x), visible, backend)
        return x + self.fc_2(self.activation(self.fc_1(self.norm_2(x))))


class ViT(nn.Module):
    """Vision Transformer: float[F, 3, H, W] pixels -> float[F, T, width] features."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.backend = "sdpa"
        if config.conv_stem:
            self.patch_embedding = ConvStem(config.patch_size, config.width)
        else:
            size = config.patch_size
            self.patch_embedding = nn.Conv2d(3, config.width, size, size, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.randn(config.width) * 0.02) if config.class_token else None
        table = sincos_positions(self.num_patches(config.image_size), config.width)
        self.positions = nn.Parameter(F.pad(table, (0, 0, int(config.class_token), 0)))  # the class token's place is 0
        self.pre_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        sizes = (config.width, config.num_heads, config.mlp_width, config.activation, config.norm_eps, config.qkv_bias)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.post_norm else nn.Identity()

    def num_patches(self, image_size):
        """Patches of a square picture of `image_size` pixels a side."""
        return (image_size // self.config.patch_size) ** 2

    def num_tokens(self, image_size):
        """Features per picture: its patches, and the class token if there is one that is not dropped."""
        return self.num_patches(image_size) + (self.config.class_token and not self.config.drop_class_token)

    def resize(self, image_size):
        """Read pictures of another size from now on; the position table becomes a new parameter."""
        check_image_size(image_size, self.config.patch_size)
        if image_size != self.image_size:
            table = resize_positions(self.positions.data, self.num_patches(image_size))
            self.positions = nn.Parameter(table, requires_grad=self.positions.requires_grad)
            self.image_size = image_size

    def forward(self, pixels):
        """Normalised pixels float[F, 3, image_size, image_size] -> float[F, T, width], the class token first."""
        if tuple(pixels.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(f"pixels {tuple(pixels.shape)} for a ViT of {self.image_size} x {self.image_size}")
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # F N W
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)  # F 1+N W
        x = self.pre_norm(x + self.positions)
        visible = full(x.shape[1], x.shape[1], x.device)
        for block in self.blocks[: self.config.feature_layer]:  # [:None] = all of them
            x = block(x, visible, self.backend)
        if self.config.drop_class_token:
            x = x[:, 1:]
        return self.post_norm(x) if self.config.feature_layer is None else x
