"""How a vision tower is made: pictures and captions in one space, matching pairs close, all others apart.

A text tower reads the caption, the ViT sees the picture, both are projected to one space, and within a batch every
picture must pick its caption and every caption its picture. The papers all start from a ViT trained like that;
without it, a model that learns from answers alone finds colours early and shapes hardly ever.

CLIP, arXiv:2103.00020, Sec. 2.3 and Fig. 3. Differs from the paper:
- the picture's feature is the mean over its patches, so that every patch learns directly, not a class token's;
- several equal captions in a batch are all right answers (in small worlds captions repeat): the target is spread
  evenly over them (UniCL, arXiv:2204.03610, Eq. 3).

B pairs, T tokens, W width, E width of the joint space
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.attention import causal
from nanovlm.vit import Block

MAX_SCALE = 100.0  # CLIP, Sec. 2.5: the temperature never falls below 0.01


class TextTower(nn.Module):
    """CLIP's text side: a causal transformer whose feature stands at the last token."""

    def __init__(self, vocab_size, width, num_layers, num_heads, mlp_width, context_length):
        super().__init__()
        self.context_length = context_length
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids, lengths):
        """Features of captions.

        Args:
          ids: int[B, T], right padded. lengths: int[B], tokens of each caption, at least 1.
        Returns: float[B, W].
        Raises: ValueError for captions longer than the context.
        """
        num_tokens = ids.shape[1]
        if num_tokens > self.context_length:
            raise ValueError(f"a caption of {num_tokens} tokens, but the text tower reads {self.context_length}")
        index = torch.arange(num_tokens, device=ids.device)
        visible = causal(torch.where(index < lengths[:, None], 0, -1))
        x = self.embedding(ids) + self.positions[:num_tokens]
        for block in self.blocks:
            x = block(x, visible, "sdpa")
        last = x[torch.arange(len(x), device=ids.device), lengths - 1]  # the only token that has read it all
        return self.norm(last)


def info_nce(images, texts, scale, same):
    """Symmetric contrastive loss.

    Args:
      images, texts: float[B, E], each row of length 1. scale: float[], inverse temperature.
      same: bool[B, B], True where caption j is right for picture i.
    Returns: float[], mean over pictures and captions, nats.
    Source: CLIP, Fig. 3; UniCL, Eq. 3 for several right answers.
    """
    logits = scale * images @ texts.T  # B B
    target = same.float()
    to_texts = -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1)
    to_images = -(target / target.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0)
    return (to_texts.mean() + to_images.mean()) / 2


class ContrastiveModel(nn.Module):
    """A ViT and a text tower in one space.

    Args:
      vision: vit.ViT. vision_width: its channels. text: TextTower. text_width: its channels.
      joint_width: channels of the common space.
    """

    def __init__(self, vision, vision_width, text, text_width, joint_width):
        super().__init__()
        self.vision = vision
        self.text = text
        self.project_image = nn.Linear(vision_width, joint_width, bias=False)
        self.project_text = nn.Linear(text_width, joint_width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP, Sec. 2.5

    def embed_images(self, pixels):
        """float[B, 3, H, W] -> float[B, E] of length 1."""
        return F.normalize(self.project_image(self.vision(pixels).mean(dim=1)), dim=-1)

    def embed_texts(self, ids, lengths):
        """int[B, T], int[B] -> float[B, E] of length 1."""
        return F.normalize(self.project_text(self.text(ids, lengths)), dim=-1)

    def loss(self, pixels, ids, lengths):
        """InfoNCE of a batch of pairs; equal captions are equally right.

        Args:
          pixels: float[B, 3, H, W]. ids: int[B, T], right padded with one id. lengths: int[B].
        Returns: float[], nats.
        """
        same = (ids[:, None] == ids[None]).all(-1) & (lengths[:, None] == lengths[None])
        scale = self.log_scale.exp().clamp(max=MAX_SCALE)
        return info_nce(self.embed_images(pixels), self.embed_texts(ids, lengths), scale, same)

    def parts(self):
        """{"vision": the ViT's, "text_tower": all other parameters}, by name."""
        parts = {"vision": {}, "text_tower": {}}
        for name, parameter in self.named_parameters():
            parts["vision" if name.startswith("vision.") else "text_tower"][name] = parameter
        return parts
