"""Small models and batches for the tests, every parameter random: a dropped bias, norm or scale shows."""

import torch

from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.projector import MLPProjector
from nanovlm.resampler import Resampler
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import Batch, IGNORE, IMAGE_TOKEN, VLM


def randomise(module, spread=0.2):
    """Move every parameter off its start, ones and zeros included; returns the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return module


def small_vit(**options):
    """A ViT for pictures of 12 pixels: 9 patches of 4 pixels, width 12."""
    sizes = dict(image_size=12, patch_size=4, width=12, num_layers=2, num_heads=3, mlp_width=20)
    return randomise(ViT(ViTConfig(**(sizes | options))))


def small_decoder(layers=(LayerOptions(3, modality_adaptive=True), LayerOptions()), **options):
    """A decoder of width 16 over 23 words; grouped queries; an adapter and image copies in the first layer."""
    sizes = dict(vocab_size=23, width=16, num_heads=4, num_kv_heads=2, ffn_width=20, context_length=32)
    return randomise(Decoder(DecoderConfig(**(sizes | options), layers=tuple(layers))))


def small_vlm(bridge="resampler", num_latents=3, **decoder_options):
    """A whole model: `num_latents` image tokens per visual input, or (projector) one per patch and frame."""
    if bridge == "resampler":
        bridge = Resampler(12, 16, num_latents, num_layers=2, num_heads=2, head_width=5, ffn_width=18, max_frames=3)
    else:
        bridge = MLPProjector(12, 16)
    return VLM(small_vit(class_token=False), randomise(bridge), small_decoder(**decoder_options))


def text_batch(ids, labels=None, segments=None, positions=None):
    """A Batch without pictures; what is not given: one unpadded document a row, every token trained."""
    ids = torch.as_tensor(ids)
    none = torch.zeros(0, dtype=torch.long)
    return Batch(
        ids=ids,
        labels=ids.clone() if labels is None else torch.as_tensor(labels),
        segments=torch.zeros_like(ids) if segments is None else torch.as_tensor(segments),
        positions=torch.arange(ids.shape[1]).expand_as(ids) if positions is None else torch.as_tensor(positions),
        pixels=None, frames=none, shown=none, owner=none,
    )  # fmt: skip


def image_batch(ids, frames, shown, owner, labels=None, segments=None, positions=None):
    """The same with random pictures; image tokens are never trained."""
    batch = text_batch(ids, labels, segments, positions)
    batch.labels = torch.where(batch.ids == IMAGE_TOKEN, IGNORE, batch.labels)
    batch.frames, batch.shown, batch.owner = map(torch.tensor, (frames, shown, owner))
    batch.pixels = torch.randn(sum(frames), 3, 12, 12)
    return batch
