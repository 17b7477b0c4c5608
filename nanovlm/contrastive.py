"""How a vision tower is made: pictures and captions in one space, matching pairs close, all others apart.

A text tower reads the caption, the ViT sees the picture, both are projected to one space, and within a batch every
picture must pick its caption and every caption its picture. The papers all start from a ViT trained like that.

CLIP, arXiv:2103.00020, Sec. 2.3 and Fig. 3. `ContrastiveModel` trains the small towers here; differs from the paper:
- the picture's feature is the largest value of each channel over its patches, not a class token's: one patch that
  sees a star is enough, so patches can keep to what they see (a mean over patches makes each of them tell everything);
- a caption may belong to a region: then the one patch at its centre must match it (as RegionCLIP, arXiv:2112.09106,
  matches regions with words), so that every patch tells of what stands there, and of nothing else;
- a picture may have several captions, and a caption several pictures (in small worlds captions repeat): the target is
  spread evenly over all that are right (UniCL, arXiv:2204.03610, Eq. 3).
`CLIP` is the published pair of towers: its picture is the class token behind the last norm.

SigLIP, arXiv:2303.15343, Sec. 3; architecture of big_vision's released models, whose ViT is the tower of many small
vision-language models. Differs from CLIP:
- a sigmoid per pair replaces the softmax over the batch, with a bias that starts the model at "no match";
- the picture's feature is asked for by a learned probe, which weighs the patches; the ViT has no class token;
- the text tower reads in both directions and always its full context, padding too: the last position is the feature;
- the common space has the ViT's width: only captions are projected, with a bias.

B pictures, C captions, T tokens, W width, E width of the joint space
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.attention import causal, full, multi_head
from nanovlm.names import arguments
from nanovlm.vit import ACTIVATIONS, Block


class TextTower(nn.Module):
    """CLIP's text side: a causal transformer whose feature stands at the last token.

    Args:
      vocab_size, width, num_layers, num_heads, mlp_width: sizes. context_length: longest caption, tokens.
      activation: one of vit.ACTIVATIONS. norm_eps, last_norm_eps: of the blocks, of the norm behind them.
    """

    def __init__(self, vocab_size, width, num_layers, num_heads, mlp_width, context_length, activation="gelu",
                 norm_eps=1e-6, last_norm_eps=1e-5):  # fmt: skip
        super().__init__()
        self.arguments = arguments(locals())
        self.context_length = context_length
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_width, activation, norm_eps) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps=last_norm_eps)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def real(self, ids, lengths):
        """Which tokens are no padding, bool[B, T]. Raises: ValueError for captions longer than the context."""
        if ids.shape[1] > self.context_length:
            raise ValueError(f"a caption of {ids.shape[1]} tokens, but the text tower reads {self.context_length}")
        return torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]

    def encode(self, ids, visible):
        """int[B, T] and who sees whom -> float[B, T, W] behind the last block."""
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, visible, "sdpa")
        return x

    def forward(self, ids, lengths):
        """Features float[B, W] of captions int[B, T], right padded, of int[B] tokens each, at least 1."""
        x = self.encode(ids, causal(torch.where(self.real(ids, lengths), 0, -1)))
        last = x[torch.arange(len(x), device=ids.device), lengths - 1]  # the only token that has read it all
        return self.norm(last)


class BidirectionalTextTower(TextTower):
    """SigLIP's text side: every token sees all; pad_id fills a caption up to the context, whose end is the feature."""

    def __init__(self, vocab_size, width, num_layers, num_heads, mlp_width, context_length, pad_id,
                 activation="gelu_tanh", norm_eps=1e-6):  # fmt: skip
        sizes = (vocab_size, width, num_layers, num_heads, mlp_width, context_length)
        super().__init__(*sizes, activation, norm_eps, norm_eps)
        self.pad_id = pad_id

    def forward(self, ids, lengths):
        """As TextTower's; what pads the ids has no effect."""
        ids = torch.where(self.real(ids, lengths), ids, self.pad_id)
        ids = F.pad(ids, (0, self.context_length - ids.shape[1]), value=self.pad_id)  # B context_length
        return self.norm(self.encode(ids, full(self.context_length, self.context_length, ids.device))[:, -1])


def info_nce(logits, right):
    """CLIP's symmetric loss of logits float[B, C] over pictures and captions, nats (CLIP, Fig. 3; UniCL, Eq. 3).

    right: bool[B, C], True where caption j is right for picture i; each has at least one.
    """
    target = right.float()
    to_texts = -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1)
    to_images = -(target / target.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0)
    return (to_texts.mean() + to_images.mean()) / 2


def sigmoid_loss(logits, right):
    """SigLIP's loss, of every pair by itself: summed over captions, averaged over pictures (Sec. 3.2, Algorithm 1)."""
    return -F.logsigmoid(torch.where(right, logits, -logits)).sum(dim=1).mean()


class AttentionPool(nn.Module):
    """SigLIP's image head: a learned probe asks all patches, a feed-forward with a residual follows."""

    def __init__(self, width, num_heads, mlp_width, activation, norm_eps):
        super().__init__()
        self.num_heads = num_heads
        self.backend = "sdpa"
        self.probe = nn.Parameter(torch.randn(width))
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.fc_1 = nn.Linear(width, mlp_width)
        self.fc_2 = nn.Linear(mlp_width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, features):
        """float[B, T, W] of the ViT -> float[B, W]."""
        q, k, v = self.q(self.probe.expand(len(features), 1, -1)), self.k(features), self.v(features)
        x = self.o(multi_head(q, k, v, self.num_heads, self.backend))[:, 0]  # no residual: the probe is no picture
        return x + self.fc_2(self.activation(self.fc_1(self.norm(x))))


class TwoTowers(nn.Module):
    """What all pairs share: a ViT and a text tower; the heirs give `pool`, `project_text`, `log_scale` and `match`."""

    max_scale = math.inf  # of the inverse temperature

    def __init__(self, vision, text):
        super().__init__()
        self.vision = vision
        self.text = text

    def embed_images(self, pixels, looks=None):
        """float[B, 3, H, W] -> float[B, E] of length 1; with looks as in `loss`: one row per look."""
        features = self.vision(pixels)
        return F.normalize(self.pool(features) if looks is None else self.look(features, looks), dim=-1)

    def views(self, pixels):
        """What of a picture a caption may fit: float[B, 3, H, W] -> float[B, V, E] of length 1; here all, V = 1."""
        return self.embed_images(pixels)[:, None]

    def embed_texts(self, ids, lengths):
        """Captions int[C, T], right padded with one id, and their tokens int[C] -> float[C, E] of length 1."""
        return F.normalize(self.project_text(self.text(ids, lengths)), dim=-1)

    def similarity(self, images, texts):
        """How well pictures and captions match: float[B, E], float[C, E] of length 1 -> logits float[B, C]."""
        return self.log_scale.exp().clamp(max=self.max_scale) * images @ texts.T

    def loss(self, pixels, ids, lengths, right=None, looks=None):
        """Loss of a batch of pictures, or regions of pictures, and captions: float[], nats.

        Args:
          pixels: float[B, 3, H, W]. ids: int[C, T], right padded with one id. lengths: int[C].
          right: bool[R, C], True where a caption is right for a look; None = R pairs, equal captions equally right.
          looks: float[R, 3], picture and x, y of a region's centre as shares of its sides, -1 for the whole picture;
            None = every picture as a whole, R = B. Only for a ContrastiveModel whose ViT has no class token.
        """
        if right is None:
            right = (ids[:, None] == ids[None]).all(-1) & (lengths[:, None] == lengths[None])
        return self.match(self.embed_images(pixels, looks), self.embed_texts(ids, lengths), right)

    def parts(self):
        """{"vision": the ViT's, "text_tower": all other parameters}, by name."""
        parts = {"vision": {}, "text_tower": {}}
        for name, parameter in self.named_parameters():
            parts["vision" if name.startswith("vision.") else "text_tower"][name] = parameter
        return parts


class ContrastiveModel(TwoTowers):
    """A ViT and a text tower, of the widths given, in one space of `joint_width` channels."""

    max_scale = 100.0  # CLIP, Sec. 2.5: the temperature never falls below 0.01

    def __init__(self, vision, vision_width, text, text_width, joint_width):
        super().__init__(vision, text)
        self.project_image = nn.Linear(vision_width, joint_width, bias=False)
        self.project_text = nn.Linear(text_width, joint_width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP, Sec. 2.5

    def pool(self, features):
        """float[B, T, vision_width] of the ViT -> float[B, E], one feature per picture."""
        return self.project_image(features).amax(dim=1)

    def views(self, pixels):
        """Every patch, as regions are learned a patch at a time: float[B, 3, H, W] -> float[B, V, E] of length 1."""
        return F.normalize(self.project_image(self.vision(pixels)), dim=-1)

    def look(self, features, looks):
        """float[B, T, vision_width], looks float[R, 3] -> float[R, E]: the patch at the centre, or the whole."""
        side = math.isqrt(features.shape[1])
        picture, (x, y) = looks[:, 0].long(), (looks[:, 1:] * side).long().clamp(min=0).T
        patches = self.project_image(features[picture, y * side + x])  # R E
        return torch.where(looks[:, 1:2] < 0, self.pool(features)[picture], patches)

    def match(self, images, texts, right):
        """The loss from features: float[B, E], float[C, E] of length 1 and bool[B, C] -> float[], nats."""
        return info_nce(self.similarity(images, texts), right)


def check_whole(vision):
    """Raise ValueError unless a ViT's features are those behind all its blocks and its norm, no token dropped."""
    config = vision.config
    if config.feature_layer is not None or config.drop_class_token or not config.post_norm:
        raise ValueError(f"the towers meet behind the ViT's last norm, with no token dropped, unlike {config}")


class CLIP(ContrastiveModel):
    """OpenAI's pair of towers: as above, but the picture's feature is the class token's, behind the ViT's last norm."""

    def __init__(self, vision, vision_width, text, text_width, joint_width):
        check_whole(vision)
        if not vision.config.class_token:
            raise ValueError("CLIP's picture is its class token, but this ViT has none; set class_token=True")
        super().__init__(vision, vision_width, text, text_width, joint_width)

    views = TwoTowers.views  # of a picture as a whole

    def pool(self, features):
        """float[B, T, vision_width] of the ViT -> float[B, E], from the class token's."""
        return self.project_image(features[:, 0])


class SigLIP(TwoTowers):
    """Google's pair of towers, with a BidirectionalTextTower; the common space has the ViT's width."""

    def __init__(self, vision, text, text_width):
        super().__init__(vision, text)
        check_whole(vision)
        sizes = vision.config
        self.pool = AttentionPool(sizes.width, sizes.num_heads, sizes.mlp_width, sizes.activation, sizes.norm_eps)
        self.project_text = nn.Linear(text_width, sizes.width)  # only the captions' side is projected
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))  # SigLIP, Sec. 3.2: or the many wrong pairs dominate the start

    def similarity(self, images, texts):
        """As CLIP's, plus the bias; its sigmoid is the probability of a match."""
        return super().similarity(images, texts) + self.bias

    def match(self, images, texts, right):
        """The loss from features, as ContrastiveModel's."""
        return sigmoid_loss(self.similarity(images, texts), right)
