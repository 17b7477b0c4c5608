"""OpenFlamingo: the official code's outputs, the official names in every form, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nanovlm.attention import causal_rows
from nanovlm.recipes import open_flamingo
from nanovlm.published.weights import WeightsError, to_ours, to_published
from parity import CLOSE, perturb

GOLDEN = Path(__file__).parents[1] / "golden" / "openflamingo_tiny.safetensors"
LAYER = "lang_encoder.model.decoder.layers"


@pytest.fixture(scope="module")
def golden():
    """(config, {name: tensor}, {official name: weight})"""
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    return config, tensors, weights


@pytest.fixture(scope="module")
def model(golden):
    config, _, weights = golden
    model = open_flamingo.build(config)
    model.load_state_dict(to_ours(open_flamingo.LAYOUT(config), weights, model.state_dict()))
    return model


def test_official_outputs(golden, model):
    config, tensors, _ = golden
    features = tensors["in/vision_features"].flatten(0, 1).flatten(1, 2)  # 2 rows x 2 images, one frame each
    tokens = model.encode_features(features, torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(torch.stack(tokens).unflatten(0, (2, 2)), tensors["out/visual_tokens"], **CLOSE)
    ids = tensors["in/input_ids"]
    assert (ids == config["media_token_id"]).sum(1).tolist() == [2, 2]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    media = model.media(ids, torch.zeros_like(ids), tokens, list(range(4)))
    visible, text = causal_rows(*ids.shape), torch.zeros_like(ids)
    hidden = model.decoder(model.embed(ids), positions, visible, text, media=media)
    torch.testing.assert_close(model.decoder.logits(hidden), tensors["out/logits"], **CLOSE)


def test_where_the_cross_attention_stands(golden, model):
    """Before layers 1 and 3 of 4 for n = 2; the official file says the same."""
    _, _, weights = golden
    stands = [f"{LAYER}.{i}.gated_cross_attn_layer.attn_gate" in weights for i in range(4)]
    assert stands == [layer.cross_attention is not None for layer in model.decoder.layers] == [False, True, False, True]


def second_places(weights):
    """The names under which OpenFlamingo's state_dict lists layers and cross-attention once more."""
    second = {}
    for name, tensor in weights.items():
        start, _, rest = name.partition("decoder.layers.")
        number, _, rest = rest.partition(".")
        kind, _, rest = rest.partition(".")
        place = {"decoder_layer": "old_decoder_blocks", "gated_cross_attn_layer": "gated_cross_attn_layers"}.get(kind)
        if place:
            second[f"lang_encoder.{place}.{number}.{rest}"] = tensor
    return second


def test_every_place_is_read(golden, model):
    config, _, weights = golden
    layout, reference = open_flamingo.LAYOUT(config), model.state_dict()
    second = second_places(weights)
    assert len(second) == 4 * 16 + 2 * 11
    outside = {name: tensor for name, tensor in weights.items() if ".layers." not in name or name.startswith("perceiver.")}
    for spelled in (weights | second, outside | second):
        found = to_ours(layout, spelled, reference)
        assert all(torch.equal(found[name], tensor) for name, tensor in reference.items())
    differing = weights | {name: tensor + 1 for name, tensor in list(second.items())[-1:]}
    with pytest.raises(WeightsError, match="values differ"):
        to_ours(layout, differing, reference)


def test_layout_back_and_forth(golden, model):
    config, _, weights = golden
    exported = to_published(open_flamingo.LAYOUT(config), model.state_dict())
    assert set(weights) - set(exported) == {"lang_encoder.lm_head.weight"}  # tied
    assert all(torch.equal(tensor, weights[name]) for name, tensor in exported.items())


def test_the_tower_in_open_clips_names():
    """CLIP of transformers, spelled as open_clip spells it: its last hidden state without class token and last norm."""
    transformers = pytest.importorskip("transformers")
    config = open_flamingo.CONFIGS["tiny"]
    torch.manual_seed(0)
    theirs = perturb(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config["vision"])))
    model = perturb(open_flamingo.build(config))
    published = to_published(open_flamingo.LAYOUT(config), model.state_dict())
    state = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()}
    tower = {
        "class_embedding": state["embeddings.class_embedding"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "proj": torch.zeros(32, 16),
    }
    for p in ("weight", "bias"):
        tower |= {f"ln_pre.{p}": state[f"pre_layrnorm.{p}"], f"ln_post.{p}": state[f"post_layernorm.{p}"]}
        for i in range(2):
            ours, there = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            tower |= {
                f"{ours}.attn.in_proj_{p}": torch.cat([state[f"{there}.self_attn.{name}_proj.{p}"] for name in "qkv"]),
                f"{ours}.attn.out_proj.{p}": state[f"{there}.self_attn.out_proj.{p}"],
                f"{ours}.ln_1.{p}": state[f"{there}.layer_norm1.{p}"], f"{ours}.ln_2.{p}": state[f"{there}.layer_norm2.{p}"],
                f"{ours}.mlp.c_fc.{p}": state[f"{there}.mlp.fc1.{p}"], f"{ours}.mlp.c_proj.{p}": state[f"{there}.mlp.fc2.{p}"],
            }  # fmt: skip
    published |= {f"vision_encoder.{name}": tensor for name, tensor in tower.items()}
    model.load_state_dict(to_ours(open_flamingo.LAYOUT(config), published, model.state_dict()))
    pixels = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(model.vision(pixels), theirs(pixels).last_hidden_state[:, 1:], **CLOSE)


def test_full_size():
    with torch.device("meta"):
        model = open_flamingo.build(open_flamingo.CONFIGS["full"])
    assert sum(p.numel() for p in model.decoder.parameters()) == 1_315_758_080 - 5 * 2048 + sum(
        p.numel() for p in model.parts()["cross_attention"].values()
    )  # OPT-1.3B has 50272 rows, of which its tokenizer knows 50265; two are added to those
    assert model.bridge.num_image_tokens(256) == 64 and model.num_image_tokens(224) == 0
    assert all(layer.cross_attention is not None for layer in model.decoder.layers)  # Table 8: every layer


def test_mpt_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="'mpt'.*ALiBi"):
        open_flamingo.build({"llm": {"model_type": "mpt"}})


def test_stage_is_that_of_table_8():
    (stage,) = open_flamingo.RECIPE.stages("full", False)
    assert set(stage.learning_rates) == {"bridge", "cross_attention"}  # freeze_lm_embeddings is True
    assert stage.steps * stage.batch_size == 158_000 * 6 and stage.warmup_steps == 1000
