"""The vision-language model: a ViT, a bridge and a decoder, put together in one masked copy.

Pictures go through the ViT and the bridge and come out as image tokens, embeddings of the decoder's width. The
tokeniser has already written as many image-token ids (-1) into the row as the bridge will produce, so putting them
in place is one copy: the k-th image-token id of the batch receives the k-th image token. A decoder with
cross-attention gets them beside the row instead, and one media token stands in the row for each.

This file names no paper's choices: the recipes build `VLM(vision, bridge, decoder)` from plain modules.

B rows, T tokens, F frames, M visual inputs (an image, or a whole clip), S appearances of visual inputs, W width
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.attention import BACKENDS, causal, causal_rows
from nanovlm.cross_attention import gather_media
from nanovlm.modality_adaptive import ModalityAdaptive
from nanovlm.names import check_known

IMAGE_TOKEN = -1  # outside every vocabulary: no row is ever added to the embedding
IGNORE = -100  # label of a token without loss

PARTS = {  # part -> names of its parameters; of several that fit, the last
    "vision": r"^vision\.",
    "bridge": r"^bridge\.",
    "embedding": r"^decoder\.embedding\.",
    "language_model": r"^(?!vision\.|bridge\.|decoder\.embedding\.|decoder\.lm_head\.)",
    "adapters": r"^decoder\..*\.adapter\.",
    "cross_attention": r"^decoder\..*\.cross_attention\.",
    "vision_branch": r"^decoder\..*\.vision\.",
    "lora": r"\.lora_[ab]$",
    "lm_head": r"^decoder\.lm_head\.(?!lora_)",
}


class Bridge(Protocol):
    """What a bridge must have, an nn.Module between a ViT and a decoder.

    M visual inputs of F frames each, N features of a frame, W channels that the decoder reads
    """

    output_width: int  # W

    def num_image_tokens(self, num_patches, num_frames):
        """How many image tokens a visual input of F frames of N features becomes: int, known before it is seen."""

    def forward(self, patches, num_frames):
        """float[M, F * N, vision_width], frames behind one another -> float[M, num_image_tokens, W].

        A third argument `out`, if it is asked for, is a dict in which to leave attention maps.
        """


@dataclass
class Batch:
    """Rows of tokens and the pictures that stand in them."""

    ids: Tensor  # int[B, T], IMAGE_TOKEN where an image token stands, or the media token where a picture does
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
      vision: float[F, 3, H, W] -> float[F, T, vision_width]; see vit.ViT. None = what is given are features already.
      bridge: Bridge of the decoder's width, or with cross-attention of that of its media. None = a model of text alone.
      decoder: decoder.Decoder.
      media_token: with cross-attention layers, the id in the vocabulary that stands where a picture is shown.
    Raises: ValueError for parts that do not fit together.
    """

    def __init__(self, vision, bridge, decoder, media_token=None):
        super().__init__()
        config = decoder.config
        width = config.width if config.cross_attention_width is None else config.cross_attention_width
        known = (None,) if config.cross_attention_width is None else range(config.vocab_size)
        if media_token not in known:
            raise ValueError(f"media_token is {media_token}; with the decoder's cross_attention_width "
                             f"{config.cross_attention_width} it must be in {known}")
        if bridge is not None:
            lacks = [name for name in ("output_width", "num_image_tokens") if not hasattr(bridge, name)]
            lacks += ["forward"] * (getattr(type(bridge), "forward", None) in (None, nn.Module.forward))
            if lacks:
                raise ValueError(f"the bridge {type(bridge).__name__} lacks {', '.join(lacks)}; see vlm.Bridge")
            if bridge.output_width != width:
                raise ValueError(f"the bridge's output_width is {bridge.output_width}, the decoder reads {width}")
        self.vision = vision
        self.bridge = bridge
        self.decoder = decoder
        self.media_token = media_token

    def set_backend(self, backend):
        """Choose the attention of every part at once: one of attention.BACKENDS."""
        check_known("unknown attention backend", backend, BACKENDS)
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend

    def num_image_tokens(self, image_size, num_frames=1):
        """Image-token ids in the row for one visual input of `num_frames` pictures of `image_size` pixels: int."""
        if self.vision is None:
            raise ValueError("this model has no vision tower and reads no pictures; ask it without one")
        if self.media_token is not None:
            return 0  # the template writes the media token, and the image tokens stand beside the row
        return self.bridge.num_image_tokens(self.vision.num_tokens(image_size), num_frames)

    def encode(self, pixels, frames, out=None):
        """Pixels float[F, 3, H, W] of all frames, and the frames int[M] of each visual input, to image tokens.

        out: dict for the bridge's attention maps. Returns: list of M float[num_image_tokens, W].
        """
        return self.encode_features(self.vision(pixels), frames, out)

    def encode_features(self, features, frames, out=None):
        """Image tokens from what the ViT makes of the frames: float[F, T, vision_width]; else as `encode`."""
        counts = frames.tolist()
        if sum(counts) != len(features):
            raise ValueError(f"visual inputs of {sum(counts)} frames in all, but pixels hold {len(features)}")
        features = features.split(counts)  # M of [f, T, vision_width]
        tokens = [None] * len(counts)
        for count in sorted(set(counts)):  # one call of the bridge for all visual inputs of equal length
            chosen = [m for m, f in enumerate(counts) if f == count]
            patches = torch.stack([features[m].flatten(0, 1) for m in chosen])  # m fT vision_width
            found = self.bridge(patches, count) if out is None else self.bridge(patches, count, out)
            promised = (self.bridge.num_image_tokens(patches.shape[1] // count, count), self.bridge.output_width)
            if found.shape[1:] != promised:
                made = tuple(found.shape[1:])
                raise ValueError(f"the bridge {type(self.bridge).__name__} makes {made} of a visual input, but its "
                                 f"num_image_tokens and output_width say {promised}")
            for m, image_tokens in zip(chosen, found):
                tokens[m] = image_tokens
        return tokens

    def embed(self, ids, image_tokens=(), shown=()):
        """Look the words up and put the image tokens in place: float[B, T, W].

        Args:
          ids: int[B, T], IMAGE_TOKEN where an image token stands.
          image_tokens: list of float[n, W], one per visual input.
          shown: int[S] or list, which of them stands at each appearance, in row-major order.
        Raises: ValueError when the image-token ids are not as many as the image tokens.
        """
        embeddings, is_image = self.decoder.embedding(ids.clamp(min=0)), ids == IMAGE_TOKEN
        placed = [image_tokens[m] for m in shown]
        check_counts(is_image, placed)
        if not placed:
            return embeddings
        return embeddings.masked_scatter(is_image[..., None], torch.cat(placed).to(embeddings.dtype))

    def media(self, ids, segments, image_tokens, shown, owner=None):
        """What the cross-attention layers read: cross_attention.Media; None where no picture is shown.

        owner None = as the media tokens say. Raises: ValueError where a row has other media tokens than pictures.
        """
        is_media = (ids == self.media_token) & (segments >= 0)
        found = is_media.sum(1)
        needed = found if owner is None else torch.bincount(owner, minlength=len(ids))
        if int(found.sum()) != len(shown) or not torch.equal(found, needed):
            row = int((found != needed).long().argmax())
            raise ValueError(f"row {row} has {found[row]} media tokens (id {self.media_token}) for {needed[row]} "
                             f"visual inputs; in all rows there are {found.sum()} for {len(shown)}")
        dtype = self.decoder.embedding.weight.dtype
        return gather_media([tokens.to(dtype) for tokens in image_tokens], list(shown), is_media, segments)

    def place(self, ids, segments, image_tokens, shown, owner=None):
        """Image tokens into the row (`embed`), or beside it (`media`): (float[B, T, W], Media or None)."""
        if self.media_token is None:
            return self.embed(ids, image_tokens, shown), None
        return self.embed(ids), self.media(ids, segments, image_tokens, shown, owner)

    def hidden(self, batch, out=None, image_tokens=None, modality=None):
        """Run a batch's rows through the decoder: float[B, T, W], for `decoder.logits`.

        Args:
          out: dict that receives the attention maps of bridge and decoder.
          image_tokens: list of M float[num_image_tokens, W], encoded before; None = `encode` the batch's pixels.
          modality: int[B, T], 0 = text, 1 = vision; None = as the ids say.
        """
        if image_tokens is None:
            image_tokens = [] if batch.pixels is None else self.encode(batch.pixels, batch.frames, out)
        embeddings, media = self.place(batch.ids, batch.segments, image_tokens, batch.shown.tolist(), batch.owner)
        modality = (batch.ids == IMAGE_TOKEN).long() if modality is None else modality
        return self.decoder(embeddings, batch.positions, visible_rows(batch.segments), modality, out=out, media=media)

    def forward(self, batch, out=None):
        """Scores of the next token everywhere: Batch -> float[B, T, V]."""
        return self.decoder.logits(self.hidden(batch, out))

    def loss(self, batch):
        """Cross-entropy of the labelled tokens, each predicted from all before: (float[] summed in nats, int tokens).

        Dividing is left to the caller, who knows the trained tokens of the whole update.
        """
        labels = next_tokens(batch.labels)
        trained = labels != IGNORE
        logits = self.decoder.logits(self.hidden(batch)[trained])  # only trained positions meet the vocabulary
        return cross_entropy(logits, labels[trained]), int(trained.sum())

    @torch.no_grad()
    def copy_vision_branch(self):
        """Start the image copies of norms, keys and values from the text's (mPLUG-Owl2, Sec. 3.3)."""
        for module in self.modules():
            if isinstance(module, ModalityAdaptive):
                module.vision.load_state_dict(module.text.state_dict())

    def parts(self):
        """Partition the parameters by what the papers train together: {part of PARTS: {name: parameter}}."""
        parts = {part: {} for part in PARTS}
        for name, parameter in self.named_parameters():
            parts[part_of(name)][name] = parameter
        return parts


def next_tokens(labels):
    """Labels int[B, T] moved to where they are predicted, one place before their token: int[B, T]."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def cross_entropy(logits, labels):
    """Summed over N tokens in nats, in float32 at least: logits float[N, V], labels int[N] -> float[]."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


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


def part_of(name):
    """The part that a parameter of the VLM belongs to, by its dotted name."""
    return [part for part, pattern in PARTS.items() if re.search(pattern, name)][-1]
