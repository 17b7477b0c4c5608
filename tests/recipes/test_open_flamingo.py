"""OpenFlamingo: its tower under open_clip's names, its sizes, and what is refused; official outputs: tests/official."""

import pytest
import torch

from nanovlm.published.weights import to_ours, to_published
from nanovlm.recipes import open_flamingo
from parity import CLOSE, perturb


def test_where_the_cross_attention_stands():
    """Before layers 1 and 3 of 4 for n = 2."""
    layers = open_flamingo.build(open_flamingo.CONFIGS["tiny"]).decoder.layers
    assert [layer.cross_attention is not None for layer in layers] == [False, True, False, True]


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
