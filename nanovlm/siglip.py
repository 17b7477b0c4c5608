"""SigLIP: a pair of towers that judges every picture and caption by themselves, match or no match.

A sigmoid per pair replaces the softmax over the batch, so no pair needs to know the others. Its ViT is the tower of
many small vision-language models; the text side and the heads here give image-text similarity.

SigLIP, arXiv:2303.15343, Sec. 3; architecture of big_vision's released models. Differs from CLIP (contrastive.py):
- a bias beside the temperature: nearly all pairs of a batch are wrong, and it starts the model at saying so;
- the picture's feature is asked for by a learned probe, which weighs the patches; the ViT has no class token;
- the text tower reads in both directions and always its full context, padding too: the last position is the feature;
- the common space has the ViT's width: only captions are projected, with a bias.
As in contrastive.py, several equal captions in a batch are all right answers.

B pairs, T tokens, H heads, D head width, W width, E width of the joint space
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.attention import attention, full
from nanovlm.contrastive import TextTower, TwoTowers, check_whole, same_captions
from nanovlm.vit import ACTIVATIONS


class BidirectionalTextTower(TextTower):
    """SigLIP's text side: every token sees every token, padding included, and the last position is the feature.

    Args:
      pad_id: fills a caption up to the context length, as in training; 1 in SigLIP.
      others: see TextTower.
    """

    def __init__(
        self, vocab_size, width, num_layers, num_heads, mlp_width, context_length, pad_id,
        activation="gelu_tanh", norm_eps=1e-6,
    ):  # fmt: skip
        super().__init__(
            vocab_size, width, num_layers, num_heads, mlp_width, context_length, activation, norm_eps, norm_eps
        )
        self.pad_id = pad_id

    def forward(self, ids, lengths):
        """Features of captions: the arguments, result and errors of TextTower's; what pads the ids has no effect."""
        self.check_length(ids.shape[1])
        index = torch.arange(ids.shape[1], device=ids.device)
        ids = torch.where(index < lengths[:, None], ids, self.pad_id)
        ids = F.pad(ids, (0, self.context_length - ids.shape[1]), value=self.pad_id)  # B context_length
        x = self.encode(ids, full(self.context_length, self.context_length, ids.device))
        return self.norm(x[:, -1])


def sigmoid_loss(logits, same):
    """Every pair of a batch is judged by itself: match or not.

    Args:
      logits: float[B, B], `SigLIP.similarity` of pictures and captions. same: bool[B, B], as in `info_nce`.
    Returns: float[], summed over captions and averaged over pictures, nats.
    Source: SigLIP, arXiv:2303.15343, Sec. 3.2 and Algorithm 1.
    """
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum(dim=1).mean()


class AttentionPool(nn.Module):
    """SigLIP's image head: a learned probe asks all patches, a feed-forward with a residual follows.

    Args:
      width, num_heads, mlp_width, activation, norm_eps: as the ViT's.
    """

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
        probe = self.probe.expand(len(features), 1, -1)
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # B H 1|T D
            for linear, x in ((self.q, probe), (self.k, features), (self.v, features))
        )
        seen = attention(q, k, v, full(1, k.shape[2], q.device), self.backend)
        x = self.o(seen.transpose(1, 2).flatten(-2))[:, 0]  # no residual here: the probe itself is no picture
        return x + self.fc_2(self.activation(self.fc_1(self.norm(x))))


class SigLIP(TwoTowers):
    """Google's pair of towers; the common space has the ViT's width.

    Args:
      vision: vit.ViT with post_norm. text: BidirectionalTextTower. text_width: its channels.
    Source: SigLIP, arXiv:2303.15343, Sec. 3.
    """

    def __init__(self, vision, text, text_width):
        super().__init__(vision, text)
        check_whole(vision)
        sizes = vision.config
        self.pool = AttentionPool(sizes.width, sizes.num_heads, sizes.mlp_width, sizes.activation, sizes.norm_eps)
        self.project_text = nn.Linear(text_width, sizes.width)  # only the captions' side is projected
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))  # SigLIP, Sec. 3.2: or the many wrong pairs dominate the start

    def image_features(self, pixels):
        """float[B, 3, H, W] -> float[B, E] of any length."""
        return self.pool(self.vision(pixels))

    def text_features(self, ids, lengths):
        """int[B, T], int[B] -> float[B, E] of any length."""
        return self.project_text(self.text(ids, lengths))

    def similarity(self, images, texts):
        """As CLIP's, plus the bias; its sigmoid is the probability of a match."""
        return super().similarity(images, texts) + self.bias

    def loss(self, pixels, ids, lengths, right=None):
        """Sigmoid loss of a batch of pictures and captions; arguments and result as ContrastiveModel's."""
        right = same_captions(ids, lengths) if right is None else right
        return self.match(self.embed_images(pixels), self.embed_texts(ids, lengths), right)

    def match(self, images, texts, right):
        """The loss from features, as ContrastiveModel's."""
        return sigmoid_loss(self.similarity(images, texts), right)
