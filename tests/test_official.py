"""Our modules with the official implementations' weights give the official outputs.

golden/lynx_tiny.safetensors: bytedance/lynx-llm 24680d1; golden/mplug_owl2_tiny.safetensors: X-PLUG/mPLUG-Owl 0f3068f on
transformers 4.31.0. Random weights, float32, `weights/NAME` under the official names, inputs and outputs beside them.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nanovlm.attention import causal_rows
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.resampler import Resampler
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import IGNORE, IMAGE_TOKEN, VLM, Batch

GOLDEN = Path(__file__).parent / "golden"
CLOSE = dict(atol=1e-5, rtol=1e-5)

LLAMA = [
    (r"embed_tokens\.", "embedding."),
    (r"input_layernorm\.", "norm_1."),
    (r"post_attention_layernorm\.", "norm_2."),
    (r"self_attn\.(q|k|v|o)_proj\.", r"attention.\1."),
    (r"mlp\.(gate|up|down)_proj\.", r"ffn.\1."),
    (r"multiway\.0\.", "text."),
    (r"multiway\.1\.", "vision."),
    (r"output_adapter\.adapter_norm_before\.", "adapter.norm."),
    (r"output_adapter\.adapter_(down|up)\.", r"adapter.\1."),
    (r"output_adapter\.scaling", "adapter.scale"),
]
EVA = [
    (r"cls_token", "class_token"),
    (r"pos_embed", "positions"),
    (r"patch_embed\.proj\.", "patch_embedding."),
    (r"norm([12])\.", r"norm_\1."),
    (r"attn\.([qkv])_proj\.", r"attention.\1."),
    (r"attn\.proj\.", "attention.o."),
    (r"mlp\.fc([12])\.", r"fc_\1."),
]
OWL_VIT = [
    (r"embeddings\.cls_token", "class_token"),
    (r"embeddings\.position_embedding", "positions"),
    (r"embeddings\.patch_embed\.", "patch_embedding."),
    (r"embeddings\.pre_layernorm\.", "pre_norm."),
    (r"post_layernorm\.", "post_norm."),
    (r"encoder\.layers\.", "blocks."),
    (r"input_layernorm\.", "norm_1."),
    (r"post_attention_layernorm\.", "norm_2."),
    (r"self_attn\.dense\.", "attention.o."),
    (r"self_attn\.([qkv])\.", r"attention.\1."),
    (r"mlp\.fc([12])\.", r"fc_\1."),
]
RESAMPLER = [
    (r"(\d+)\.0\.norm_media\.", r"\1.norm_patches."),
    (r"(\d+)\.0\.norm_latents\.", r"\1.norm_latents."),
    (r"(\d+)\.0\.to_(q|k|v)\.", r"\1.\2."),
    (r"(\d+)\.0\.to_out\.", r"\1.o."),
    (r"(\d+)\.1\.([013])\.", r"\1.ffn.\2."),
]


class Golden:
    """One golden file: `config`, and tensors by `inputs`, `outputs` and official weight names."""

    def __init__(self, name):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        self.inputs, self.outputs, self.weights = (
            {key.removeprefix(kind): value for key, value in tensors.items() if key.startswith(kind)}
            for kind in ("in/", "out/", "weights/")
        )

    def under(self, prefix):
        """The weights below an official prefix; rotary tables are computed, not loaded."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.weights.items()
            if name.startswith(prefix) and not name.endswith("inv_freq")
        }


def load(module, weights, rules):
    """Rename and load; a name left over on either side raises. Official tables carry leading dimensions of 1."""
    ours = {}
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        ours[name] = tensor
    for name in ("class_token", "positions", "frame_embedding"):
        if name in ours:
            ours[name] = ours[name].squeeze()
    module.load_state_dict(ours)
    return module.eval()


def load_decoder(golden, prefix, sizes, layers):
    config = DecoderConfig(
        sizes["vocab_size"], sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_attention_heads"],
        sizes["intermediate_size"], sizes["max_position_embeddings"], layers, norm_eps=sizes["rms_norm_eps"],
    )  # fmt: skip
    weights = golden.under(f"{prefix}model.") | {"lm_head.weight": golden.weights[f"{prefix}lm_head.weight"]}
    outside = ("vision_model.", "visual_abstractor.")
    return load(Decoder(config), {name: w for name, w in weights.items() if not name.startswith(outside)}, LLAMA)


@pytest.fixture(scope="module")
def lynx():
    """The golden file, and Lynx: EVA's tower, resampler, decoder with adapters after layers 0 and 2."""
    golden = Golden("lynx_tiny")
    sizes, num_latents = golden.config["vision"], golden.config["bridge"]["num_latents"]
    config = ViTConfig(
        sizes["image_size"], 14, sizes["width"], sizes["depth"], sizes["heads"],
        int(sizes["width"] * sizes["mlp_ratio"]), post_norm=False, qkv_bias="qv",
    )  # fmt: skip
    vision = load(ViT(config), golden.under("vision_encoder."), EVA)
    weights = golden.under("bridge.") | {"frame_embedding": golden.weights["absolute_frame_pos_embed"]}
    for name in [name for name in weights if name.endswith("to_kv.weight")]:
        k, v = weights.pop(name).chunk(2)  # keys first, then values
        weights |= {name.replace("to_kv", "to_k"): k, name.replace("to_kv", "to_v"): v}
    width = golden.config["llm"]["hidden_size"]
    bridge = Resampler(
        sizes["width"], width, num_latents, golden.config["bridge"]["depth"], num_heads=8, head_width=64,
        ffn_width=4 * width, max_frames=golden.config["num_frames"],
    )  # fmt: skip
    load(bridge, weights, RESAMPLER)
    layers = (LayerOptions(width // 2), LayerOptions(), LayerOptions(width // 2), LayerOptions())
    return golden, VLM(vision, bridge, load_decoder(golden, "LLM.", golden.config["llm"], layers))


def lynx_batch(golden, pixels, frames):
    """Image tokens first, then the text; pads between them move to the front, real tokens keep official positions."""
    num_latents = golden.config["bridge"]["num_latents"]
    image = torch.full((2, num_latents), IMAGE_TOKEN)
    ids = torch.cat([image, golden.inputs["input_ids"]], dim=1)
    real = torch.cat([torch.ones_like(image), golden.inputs["attention_mask"]], dim=1)
    order = real.argsort(dim=1, stable=True)  # pads first
    rows = torch.arange(2)
    batch = Batch(
        ids.gather(1, order), torch.full_like(ids, IGNORE), real.gather(1, order) - 1, order, pixels, frames, rows, rows
    )
    return batch, order.argsort(dim=1), real.bool()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_lynx(lynx, backend):
    golden, model = lynx
    model.set_backend(backend)
    image, video = golden.inputs["pixel_values"], golden.inputs["video"]
    torch.testing.assert_close(model.vision(image), golden.outputs["vision_features"], **CLOSE)
    for pixels, num_frames, tokens, logits in (
        (image, 1, "visual_tokens", "logits"),
        (video.flatten(0, 1), 3, "video_tokens", "video_logits"),
    ):
        frames = torch.full((2,), num_frames)
        torch.testing.assert_close(torch.stack(model.encode(pixels, frames)), golden.outputs[tokens], **CLOSE)
        batch, columns, real = lynx_batch(golden, pixels, frames)
        found = model(batch)[torch.arange(2)[:, None], columns]
        assert real.sum() == 2 * 14 - 3  # the logits of the three pads mean nothing
        torch.testing.assert_close(found[real], golden.outputs[logits][real], **CLOSE)


@pytest.fixture(scope="module")
def owl():
    """The golden file, and mPLUG-Owl2's decoder: every layer modality-adaptive."""
    golden = Golden("mplug_owl2_tiny")
    sizes = golden.config["llm"]
    layers = (LayerOptions(modality_adaptive=True),) * sizes["num_hidden_layers"]
    return golden, load_decoder(golden, "", sizes, layers)


def test_mplug_owl2_vision(owl):
    golden, _ = owl
    sizes = golden.config["vision"]
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    weights = golden.under("model.vision_model.")
    for name in [name for name in weights if "query_key_value" in name]:
        fused = weights.pop(name).unflatten(0, (heads, 3, width // heads))  # each head's q, k, v stand together
        for i, letter in enumerate("qkv"):
            weights[name.replace("query_key_value", letter)] = fused[:, i].flatten(0, 1)
    config = ViTConfig(
        sizes["image_size"], sizes["patch_size"], width, sizes["num_hidden_layers"], heads, sizes["intermediate_size"],
        pre_norm=True, patch_bias=False, activation=sizes["hidden_act"], norm_eps=sizes["layer_norm_eps"],
    )  # fmt: skip
    vision = load(ViT(config), weights, OWL_VIT)
    torch.testing.assert_close(vision(golden.inputs["pixel_values"]), golden.outputs["vision_features"], **CLOSE)


class Given(torch.nn.Module):
    """Stands for vision and bridge: hands on features that were computed elsewhere."""

    output_width = 48

    def forward(self, features, num_frames=1, out=None):
        return features


def owl_batch(golden):
    """Each -200 becomes the image tokens, whose labels are ignored."""
    features = golden.outputs["visual_tokens"]  # 2 N W
    ids, labels = [], []
    for row, row_labels in zip(golden.inputs["input_ids"].tolist(), golden.inputs["labels"].tolist()):
        at = row.index(-200)
        ids.append(row[:at] + [IMAGE_TOKEN] * features.shape[1] + row[at + 1 :])
        labels.append(row_labels[:at] + [IGNORE] * features.shape[1] + row_labels[at + 1 :])
    return batch_of(torch.tensor(ids), torch.tensor(labels), features, torch.arange(2))


def batch_of(ids, labels, features, pictures):
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, labels, torch.zeros_like(ids), positions, features, torch.ones_like(pictures), pictures, pictures)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_mplug_owl2_language(owl, backend):
    golden, decoder = owl
    model = VLM(Given(), Given(), decoder)
    model.set_backend(backend)
    batch = owl_batch(golden)
    torch.testing.assert_close(model(batch), golden.outputs["logits"], **CLOSE)
    loss, trained = model.loss(batch)
    torch.testing.assert_close(loss / trained, golden.outputs["loss"][0], **CLOSE)
    text = golden.inputs["text_ids"]
    found = model(batch_of(text, text, None, torch.zeros(0, dtype=torch.long)))
    torch.testing.assert_close(found, golden.outputs["text_logits"], **CLOSE)


def test_the_official_outputs_depend_on_adapters_and_image_copies(lynx, owl):
    """Otherwise the agreement above would say nothing about them."""
    (lynx_golden, model), (owl_golden, decoder) = lynx, owl
    batch, columns, real = lynx_batch(lynx_golden, lynx_golden.inputs["pixel_values"], torch.ones(2, dtype=torch.long))
    before = model(batch)
    for index in (0, 2):
        adapter = model.decoder.layers[index].adapter
        model.decoder.layers[index].adapter = torch.nn.Identity()
        assert (model(batch) - before).abs().max() > 0.1
        model.decoder.layers[index].adapter = adapter
    embeddings = decoder.embedding(owl_golden.inputs["text_ids"])
    positions, visible = torch.arange(7).expand(2, 7), causal_rows(2, 7)
    text, vision = (decoder(embeddings, positions, visible, torch.full((2, 7), m)) for m in (0, 1))
    assert (text - vision).abs().max() > 0.1
