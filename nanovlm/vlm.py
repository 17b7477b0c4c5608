"""The vision-language model: a ViT, a bridge and a decoder, put together in one masked copy.

Pictures go through the ViT and the bridge and come out as image tokens, embeddings of the decoder's width. The
tokeniser has already written as many image-token ids (-1) into the row as the bridge will produce, so putting them
in place is one copy: the k-th image-token id of the batch receives the k-th image token.

This file names no paper's choices: the recipes build `VLM(vision, bridge, decoder)` from plain modules.

B rows, T tokens, F frames, M visual inputs (an image, or a whole clip), S appearances of visual inputs, W width
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm import shared_prefix
from nanovlm.attention import BACKENDS, causal, causal_rows
from nanovlm.modality_adaptive import ModalityAdaptive
from nanovlm.names import nearest

IMAGE_TOKEN = -1  # outside every vocabulary: no row is ever added to the embedding
IGNORE = -100  # label of a token without loss

PARTS = ("vision", "bridge", "embedding", "language_model", "adapters", "vision_branch", "lm_head")


@dataclass
class Batch:
    """Rows of tokens and the pictures that stand in them."""

    ids: Tensor  # int[B, T], IMAGE_TOKEN where an image token stands
    labels: Tensor  # int[B, T], aligned with ids (the loss shifts), IGNORE = not trained
    segments: Tensor  # int[B, T], number of the packed document, -1 = padding
    positions: Tensor  # int[B, T], of the token within its document
    pixels: Tensor | None  # float[F, 3, H, W], frames of all visual inputs behind one another
    frames: Tensor  # int[M], frames of each visual input
    shown: Tensor  # int[S], which visual input stands at each appearance, in row-major order of the ids
    owner: Tensor  # int[S], row of each appearance

    def to(self, device):
        """The same batch on another device."""
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return Batch(**{name: value if value is None else value.to(device) for name, value in values})


class VLM(nn.Module):
    """Vision, bridge, decoder.

    Args:
      vision: float[F, 3, H, W] -> float[F, T, vision_width]; see vit.ViT.
      bridge: float[M, frames * T, vision_width] -> float[M, num_image_tokens, W], with `num_image_tokens` and
        `output_width`; see projector.MLPProjector, resampler.Resampler.
      decoder: decoder.Decoder of width W.
    """

    def __init__(self, vision, bridge, decoder):
        super().__init__()
        if bridge.output_width != decoder.config.width:
            raise ValueError(
                f"the bridge produces width {bridge.output_width}, the decoder reads {decoder.config.width}"
            )
        self.vision = vision
        self.bridge = bridge
        self.decoder = decoder
        self.share_prefix = True  # False: every row runs its image tokens itself

    def set_backend(self, backend):
        """Choose the attention of every part at once: one of attention.BACKENDS."""
        if backend not in BACKENDS:
            raise ValueError(f"unknown attention backend {backend!r}.{nearest(backend, BACKENDS)}")
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend

    def num_image_tokens(self, image_size, num_frames=1):
        """Image tokens that one visual input of `num_frames` pictures of `image_size` pixels becomes."""
        return self.bridge.num_image_tokens(self.vision.num_tokens(image_size), num_frames)

    def encode(self, pixels, frames, out=None):
        """Pictures to image tokens.

        Args:
          pixels: float[F, 3, H, W], all frames behind one another.
          frames: int[M], frames of each visual input, adding up to F.
          out: dict for the bridge's attention maps.
        Returns: list of M float[num_image_tokens, W].
        """
        counts = frames.tolist()
        if sum(counts) != len(pixels):
            raise ValueError(f"visual inputs of {sum(counts)} frames in all, but pixels hold {len(pixels)}")
        features = self.vision(pixels).split(counts)  # M of [f, T, vision_width]
        tokens = [None] * len(counts)
        for count in sorted(set(counts)):  # one call of the bridge for all visual inputs of equal length
            chosen = [m for m, f in enumerate(counts) if f == count]
            patches = torch.stack([features[m].flatten(0, 1) for m in chosen])  # m fT vision_width
            for m, image_tokens in zip(chosen, self.bridge(patches, count, out)):
                tokens[m] = image_tokens
        return tokens

    def embed(self, ids, image_tokens=(), shown=()):
        """Look the words up and put the image tokens in place.

        Args:
          ids: int[B, T], IMAGE_TOKEN where an image token stands.
          image_tokens: list of float[n, W], one per visual input.
          shown: int[S] or list, which of them stands at each appearance, in row-major order.
        Returns: float[B, T, W].
        Raises: ValueError when the image-token ids are not as many as the image tokens.
        """
        embeddings = self.decoder.embedding(ids.clamp(min=0))
        is_image = ids == IMAGE_TOKEN
        placed = [image_tokens[m] for m in shown]
        check_counts(is_image, placed)
        if not placed:
            return embeddings
        tokens = torch.cat(placed).to(embeddings.dtype)
        return embeddings.masked_scatter(is_image[..., None], tokens)

    def hidden(self, batch, out=None):
        """Hidden states of a batch: float[B, T, W], for `decoder.logits`; out: dict for attention maps."""
        image_tokens = []
        if batch.pixels is not None:
            image_tokens = self.encode(batch.pixels, batch.frames, out)
        is_image = batch.ids == IMAGE_TOKEN
        if self.share_prefix and out is None and shared_prefix.can_share(batch, is_image):
            check_counts(is_image, [image_tokens[m] for m in batch.shown.tolist()])
            tokens = torch.stack(image_tokens).to(self.decoder.embedding.weight.dtype)
            return shared_prefix.hidden(self.decoder, batch, tokens, is_image)
        embeddings = self.embed(batch.ids, image_tokens, batch.shown.tolist())
        return self.decoder(embeddings, batch.positions, visible_rows(batch.segments), is_image.long(), out=out)

    def forward(self, batch, out=None):
        """Scores of the next token everywhere: Batch -> float[B, T, V]."""
        return self.decoder.logits(self.hidden(batch, out))

    def loss(self, batch):
        """Cross-entropy of the labelled tokens, each predicted from all before it.

        Returns: (float[] summed in nats, int number of trained tokens): dividing is left to the caller, who knows
          the trained tokens of the whole update.
        """
        labels = batch.labels[:, 1:]  # token t is predicted at t - 1
        trained = labels != IGNORE
        hidden = self.hidden(batch)[:, :-1][trained]  # only trained positions meet the vocabulary
        loss = F.cross_entropy(self.decoder.logits(hidden).float(), labels[trained], reduction="sum")
        return loss, int(trained.sum())

    @torch.no_grad()
    def copy_vision_branch(self):
        """Start the image copies of norms, keys and values from the text's (mPLUG-Owl2, Sec. 3.3)."""
        for module in self.modules():
            if isinstance(module, ModalityAdaptive):
                module.vision.load_state_dict(module.text.state_dict())

    def parts(self):
        """Partition the parameters by what the papers train together.

        Returns: {part: {name: parameter}} over PARTS; every parameter lies in exactly one part.
        """
        parts = {part: {} for part in PARTS}
        vision_branch = tuple(
            f"{name}.vision." for name, module in self.named_modules() if isinstance(module, ModalityAdaptive)
        )
        for name, parameter in self.named_parameters():
            parts[part_of(name, vision_branch)][name] = parameter
        return parts


def check_counts(is_image, placed):
    """Raise ValueError unless the image-token ids, True in is_image bool[B, T], are as many as the tokens to place."""
    found, needed = int(is_image.sum()), sum(map(len, placed))
    if found != needed:
        raise ValueError(f"{found} image-token ids for {needed} image tokens of {len(placed)} visual inputs")


def visible_rows(segments):
    """Causal intervals; rows of one document each, padded on the right, need no mask for their real tokens."""
    real = segments >= 0
    one_document = (segments <= 0).all() and (real[:, 1:] <= real[:, :-1]).all()
    return causal_rows(*segments.shape, segments.device) if one_document else causal(segments)


def part_of(name, vision_branch):
    """The part that a parameter of the VLM belongs to, by its dotted name; vision_branch: prefixes of image copies."""
    if name.startswith("vision."):
        return "vision"
    if name.startswith("bridge."):
        return "bridge"
    if name.startswith("decoder.embedding."):
        return "embedding"
    if name.startswith("decoder.lm_head."):
        return "lm_head"
    if ".adapter." in name:
        return "adapters"
    if name.startswith(vision_branch):
        return "vision_branch"
    return "language_model"
