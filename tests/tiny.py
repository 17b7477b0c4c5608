"""Tiny models for the tests of decoding: the recorded LLaMA, and a random vision-language model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.projector import LinearProjector
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

GENERATION = Path(__file__).parent / "golden" / "generation"
RENAMES = {
    "model.embed_tokens": "embedding",
    "model.": "",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn": "attention",
    "mlp": "ffn",
    "_proj": "",
}


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
    sizes = json.loads((GENERATION / "tiny_llama" / "config.json").read_text())
    config = DecoderConfig(
        vocab_size=sizes["vocab_size"],
        width=sizes["hidden_size"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        ffn_width=sizes["intermediate_size"],
        context_length=sizes["max_position_embeddings"],
        layers=(LayerOptions(),) * sizes["num_hidden_layers"],
        rope_base=sizes["rope_parameters"]["rope_theta"],
        norm_eps=sizes["rms_norm_eps"],
    )
    weights = {}
    for name, tensor in load_file(GENERATION / "tiny_llama" / "model.safetensors").items():
        for theirs, ours in RENAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor
    model = vision_language_model(config)
    model.decoder.load_state_dict(weights)
    return model
