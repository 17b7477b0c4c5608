"""Tiny models for the tests of decoding: the recorded LLaMA, and a random vision-language model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.projector import LinearProjector
from nanovlm.published.language import LLAMA, llama_config
from nanovlm.published.weights import to_ours
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

GENERATION = Path(__file__).parent / "golden" / "generation"


def vision_language_model(config, image_size=8):
    """A ViT with four patches, a linear bridge, and a decoder; random weights large enough to matter."""
    torch.manual_seed(0)
    vision = ViT(ViTConfig(image_size, image_size // 2, width=12, num_layers=1, num_heads=2, mlp_width=16, class_token=False))
    model = VLM(vision, LinearProjector(12, config.width), Decoder(config))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.5)
    return model.eval()


def random_vlm(vocab_size=23, context_length=40, image_size=8):
    """A small model with everything that could go wrong: grouped queries, adapters, a vision branch."""
    layers = (LayerOptions(adapter_width=4, modality_adaptive=True), LayerOptions(modality_adaptive=True))
    return vision_language_model(DecoderConfig(vocab_size, 16, 4, 2, 24, context_length, layers), image_size)


def recorded_llama():
    """The LLaMA whose `transformers.generate` runs are recorded in golden/generation."""
    folder = GENERATION / "tiny_llama"
    model = vision_language_model(llama_config(json.loads((folder / "config.json").read_text())))
    weights = to_ours(LLAMA, load_file(folder / "model.safetensors"), model.decoder.state_dict())
    model.decoder.load_state_dict(weights)
    return model
