"""Flamingo's cross-attention: OpenFlamingo's own numbers, whom each token sees, gates, and what must not matter."""

import dataclasses

import pytest
import torch

from nanovlm.attention import causal
from nanovlm.cross_attention import GatedCrossAttention, gather_media, latest_picture
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.projector import LinearProjector
from nanovlm.resampler import Resampler
from nanovlm.sampler import Decoding, generate
from nanovlm.vlm import IGNORE, IMAGE_TOKEN, VLM, Batch
from random_models import image_batch, randomise, small_vit, text_batch
from test_official import CLOSE, RESAMPLER, Golden, load

PLAIN, CROSS = LayerOptions(), LayerOptions(cross_attention=True)
MEDIA = 20  # the media token of the small model
OPT = [
    (r"^layers\.(\d+)\.decoder_layer\.", r"layers.\1."),
    (r"^embed_tokens\.", "embedding."),
    (r"^embed_positions\.weight", "positions"),
    (r"^final_layer_norm\.", "norm."),
    (r"self_attn_layer_norm\.", "norm_1."),
    (r"final_layer_norm\.", "norm_2."),
    (r"self_attn\.([qkv])_proj\.", r"attention.\1."),
    (r"self_attn\.out_proj\.", "attention.o."),
    (r"(\d\.)fc([12])\.", r"\1ffn.fc_\2."),
    (r"gated_cross_attn_layer\.", "cross_attention."),
    (r"attn_gate", "attention_gate"),
    (r"ff_gate", "ffn_gate"),
    (r"cross_attention\.attn\.(to_)?", "cross_attention."),
    (r"cross_attention\.out\.", "cross_attention.o."),
    (r"cross_attention\.ff\.", "cross_attention.ffn."),
]


def halves(weights):
    """Keys and values stand in one matrix, keys first."""
    for name in [name for name in weights if "to_kv" in name]:
        for letter, half in zip("kv", weights.pop(name).chunk(2)):
            weights[name.replace("to_kv", f"to_{letter}")] = half
    return weights


@pytest.fixture(scope="module")
def flamingo():
    """The golden file, and OpenFlamingo on OPT: cross-attention before layers 1 and 3."""
    golden = Golden("openflamingo_tiny")
    sizes, width = golden.config["llm"], golden.config["vision_width"]
    layers = (PLAIN, CROSS, PLAIN, CROSS)
    decoder = Decoder(DecoderConfig(
        sizes["vocab_size"], sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_attention_heads"],
        sizes["ffn_dim"], sizes["max_position_embeddings"], layers, norm="layer", norm_eps=1e-5, ffn="plain",
        activation="relu", qkv_bias="qkv", output_bias=True, ffn_bias=True, tied_head=True, rotary_width=0,
        position_offset=2, cross_attention_width=width,
    ))  # fmt: skip
    load(decoder, halves(golden.under("lang_encoder.model.decoder.")), OPT)
    resampler = Resampler(
        width, width, golden.config["resampler"]["num_latents"], golden.config["resampler"]["depth"], 8, 64, 4 * width,
        attend_to_latents=True,
    )  # fmt: skip
    load(resampler, halves(golden.under("perceiver.")), RESAMPLER)
    return golden, VLM(None, resampler, decoder, golden.config["media_token_id"])


def flamingo_logits(golden, model, ids=None, segments=None, positions=None):
    """The batch as VLM.forward would run it, from features instead of pixels: (image tokens, logits)."""
    batch = text_batch(golden.inputs["input_ids"] if ids is None else ids, segments=segments, positions=positions)
    features = golden.inputs["vision_features"].flatten(0, 2)  # 4 pictures of one frame
    image_tokens = model.encode_features(features, torch.ones(4, dtype=torch.long))
    owner = torch.tensor([0, 0, 1, 1])
    media = model.media(batch.ids, batch.segments, image_tokens, [0, 1, 2, 3], owner)
    embeddings, modality = model.embed(batch.ids), torch.zeros_like(batch.ids)
    hidden = model.decoder(embeddings, batch.positions, causal(batch.segments), modality, media=media)
    return image_tokens, model.decoder.logits(hidden)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_openflamingo(flamingo, backend):
    golden, model = flamingo
    model.set_backend(backend)
    image_tokens, logits = flamingo_logits(golden, model)
    torch.testing.assert_close(torch.stack(image_tokens), golden.outputs["visual_tokens"].flatten(0, 1), **CLOSE)
    torch.testing.assert_close(logits, golden.outputs["logits"], **CLOSE)
