"""Files that transformers writes open here with equal outputs, and files written here open there, bit for bit."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from nanovlm import recipes
from nanovlm.attention import causal_rows
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.published.language import llama_config, mpt_config, opt_config, phi_config, qwen2_config
from nanovlm.published.vision import clip_pair, siglip_pair
from nanovlm.published.weights import OURS, write_checkpoint
from nanovlm.recipes.__main__ import main
from nanovlm.published.vision import clip_config, eva_config, siglip_config
from nanovlm.vit import ViTConfig
from tests.parity import CLOSE, perturb

transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
LANGUAGE = dict(SIZES, vocab_size=300, max_position_embeddings=64)
VISION = dict(SIZES, image_size=28, patch_size=14)
OPT = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=300, word_embed_proj_dim=32,
           max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=2)  # fmt: skip


def make(name, **values):
    """A transformers model of random weights: its config and model class by their common name."""
    kind = "ForCausalLM" if name in ("Llama", "Qwen2", "Phi", "OPT", "Mpt") else "Model"
    config = getattr(transformers, f"{name}Config")(**values)
    return perturb(getattr(transformers, name + kind)(config))


def saved(model, folder, **options):
    """What save_pretrained writes, with a tokenizer beside it."""
    model.save_pretrained(folder, **options)
    train_tokenizer(["a picture of a red circle"], 290).save(folder / "tokenizer.json")
    return folder


def logits_of(decoder, ids):
    """Scores of a bare decoder: int[B, T] -> float[B, T, V]."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    hidden = decoder(decoder.embedding(ids), positions, causal_rows(*ids.shape, ids.device), torch.zeros_like(ids))
    return decoder.logits(hidden)


def round_trip(folder, out):
    """Ours, then back: the files' tensors, and what they became. Both directions through the command line."""
    assert main(["convert", str(folder), str(out / "ours")]) == 0
    assert main(["convert", "--to", "published", str(out / "ours"), str(out / "theirs")]) == 0
    before, after = ({n: t for path in sorted(place.glob("*.safetensors")) for n, t in load_file(path).items()}
                     for place in (folder, out / "theirs"))  # fmt: skip
    return before, after


LANGUAGE_MODELS = {
    "llama": ("Llama", LANGUAGE | dict(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
    "smollm2": ("Llama", LANGUAGE | dict(tie_word_embeddings=True)),
    "biased": ("Llama", LANGUAGE | dict(attention_bias=True)),
    "qwen2": ("Qwen2", LANGUAGE | dict(num_key_value_heads=2)),
    "phi": ("Phi", LANGUAGE | dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25})),
    "phi_default": ("Phi", LANGUAGE),
    "opt": ("OPT", OPT),
    "mpt": ("Mpt", dict(vocab_size=300, d_model=36, n_layers=3, n_heads=6, max_seq_len=64, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_in_every_dialect_and_out(tmp_path, name):
    kind, values = LANGUAGE_MODELS[name]
    model = make(kind, **values)
    folder = saved(model, tmp_path / "published", max_shard_size="60KB")
    ids = torch.randint(3, 290, (2, 7))
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(logits_of(recipes.load(folder).model.decoder, ids), expected, **CLOSE)
        before, after = round_trip(folder, tmp_path)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        back = type(model).from_pretrained(tmp_path / "theirs")
        assert torch.equal(back(ids).logits, expected)
        config = json.loads((folder / "config.json").read_text())
        if "rope_parameters" in config:  # the older dialect spells them out
            flat = {key: value for key, value in config.pop("rope_parameters").items() if key != "rope_type"}
            (folder / "config.json").write_text(json.dumps(config | flat))
            torch.testing.assert_close(logits_of(recipes.load(folder).model.decoder, ids), expected, **CLOSE)
        if name in ("smollm2", "opt"):  # saved without the head; names begin with "layers." or "decoder."
            bare = saved(model.model, tmp_path / "bare")
            assert not any(key.startswith("model.") for key in load_file(bare / "model.safetensors"))
            torch.testing.assert_close(logits_of(recipes.load(bare).model.decoder, ids), expected, **CLOSE)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
@pytest.mark.parametrize(("name", "values"), [("CLIPVision", VISION), ("SiglipVision", VISION), ("Blip2Vision", VISION)])
def test_towers_in_and_out(tmp_path, name, values, prefix):
    model = make(name, **values)
    if name == "Blip2Vision":
        with torch.no_grad():
            for layer in model.encoder.layers:
                layer.self_attn.qkv.bias[32:64] = 0  # as published: the keys have no bias
    folder = saved(model, tmp_path / "published")
    tensors = {prefix + key.removeprefix("vision_model."): value for key, value in load_file(folder / "model.safetensors").items()}
    write_checkpoint(folder, OURS, tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": config["model_type"] or "blip_2_vision_model"}))
    pixels = torch.randn(2, 3, 28, 28)
    loaded = recipes.load(folder)
    tower = loaded.model if name != "SiglipVision" else loaded.model.vision
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        found = tower(pixels)
        if name == "CLIPVision":  # whose last state is not normed, but its class token is
            found, expected = found[:, 0], model(pixels).pooler_output
        torch.testing.assert_close(found, expected, **CLOSE)
    before, after = round_trip(folder, tmp_path)
    after = {name if prefix else name.removeprefix("vision_model."): tensor for name, tensor in after.items()}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if name != "Blip2Vision":  # transformers itself reads that tower only inside BLIP-2
        with torch.no_grad():
            back = type(model).from_pretrained(tmp_path / "theirs")
            assert torch.equal(back(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_pairs_of_towers_in_and_out(tmp_path, name):
    text = dict(SIZES, vocab_size=300, max_position_embeddings=16)
    text |= dict(eos_token_id=299) if name == "CLIP" else dict(projection_size=32)
    model = make(name, text_config=text, vision_config=VISION, **(dict(projection_dim=24) if name == "CLIP" else {}))
    folder = saved(model, tmp_path / "published")
    pixels, ids = torch.randn(2, 3, 28, 28), torch.randint(3, 290, (3, 16))
    ids[:, -1] = 299
    towers = recipes.load(folder).model
    with torch.no_grad():
        found = towers.similarity(towers.embed_images(pixels), towers.embed_texts(ids, torch.full((3,), 16)))
        torch.testing.assert_close(found, model(input_ids=ids, pixel_values=pixels).logits_per_image, **CLOSE)
    before, after = round_trip(folder, tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


LLM = {"vocab_size": "vocab_size", "width": "hidden_size", "num_heads": "num_attention_heads", "ffn_width": "intermediate_size",
       "context_length": "max_position_embeddings", "tied_head": "tie_word_embeddings"}  # fmt: skip
MPT = {"vocab_size": "vocab_size", "width": "d_model", "num_heads": "n_heads", "context_length": "max_seq_len",
       "norm_eps": "layer_norm_epsilon"}  # fmt: skip
GATED = LLM | {"num_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps"}
TOWER = {"width": "hidden_size", "num_layers": "num_hidden_layers", "patch_size": "patch_size", "image_size": "image_size",
         "num_heads": "num_attention_heads", "mlp_width": "intermediate_size", "norm_eps": "layer_norm_eps"}  # fmt: skip


@pytest.mark.parametrize(("read", "name", "names"), [
    (llama_config, "Llama", GATED), (qwen2_config, "Qwen2", GATED), (phi_config, "Phi", LLM | {"norm_eps": "layer_norm_eps"}),
    (opt_config, "OPT", LLM | {"ffn_width": "ffn_dim"}), (mpt_config, "Mpt", MPT), (clip_config, "CLIPVision", TOWER | {"activation": "hidden_act"}),
    (siglip_config, "SiglipVision", TOWER), (eva_config, "Blip2Vision", TOWER | {"activation": "hidden_act"}),
])  # fmt: skip
def test_what_a_config_leaves_out_is_the_class_default(read, name, names):
    ours, theirs = read({}), getattr(transformers, f"{name}Config")()
    for field, key in names.items():
        assert getattr(ours, field) == pytest.approx(getattr(theirs, key)) if isinstance(getattr(ours, field), float) else \
            getattr(ours, field) == getattr(theirs, key), (field, key)
    if not isinstance(ours, ViTConfig):
        assert len(ours.layers) == theirs.num_hidden_layers
    if read is mpt_config:
        assert ours.ffn_width == 4 * theirs.d_model and len(ours.alibi) == theirs.n_heads


def test_both_dialects_of_mpt():
    """MPT-1B ("mosaic_gpt") names its attention's settings beside the others; heads that are no power of two."""
    sizes = dict(d_model=48, n_heads=6, n_layers=2)
    new = mpt_config(sizes | {"model_type": "mpt", "expansion_ratio": 3, "attn_config": {"qk_ln": True, "clip_qkv": 6, "alibi_bias_max": 4}})
    old = mpt_config(sizes | {"model_type": "mosaic_gpt", "mlp_ratio": 3, "attn_clip_qkv": 6, "alibi_bias_max": 4})
    assert (old.qkv_clip, old.qk_norm, old.ffn_width, old.width, old.norm) == (6, True, 144, 48, "layer_no_bias")
    assert dataclasses.replace(new, alibi=()) == dataclasses.replace(old, alibi=())
    assert old.alibi == pytest.approx([2 ** (-4 * h / 6) for h in range(1, 7)])
    assert new.alibi == pytest.approx([2 ** (-h / 2) for h in (2, 4, 6, 8, 1, 3)])
    assert not mpt_config(sizes | {"model_type": "mosaic_gpt", "attn_qk_ln": False}).qk_norm and mpt_config(sizes).qkv_clip is None
    with torch.device("meta"):
        clip, siglip = clip_pair({"text_config": {}, "vision_config": {}}), siglip_pair({"text_config": {}, "vision_config": {}})
        theirs = transformers.CLIPModel(transformers.CLIPConfig()), transformers.SiglipModel(transformers.SiglipConfig())
    for one, other in zip((clip, siglip), theirs):
        assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize(("read", "config", "words"), [
    (llama_config, {"hidden_size": "wide"}, "hidden_size is 'wide'"),
    (llama_config, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    (llama_config, {"hidden_act": "gelu"}, "hidden_act"),
    (llama_config, {"head_dim": 64}, "head_dim"),
    (llama_config, {"mlp_bias": True}, "mlp_bias"),
    (llama_config, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    (llama_config, {"rope_parameters": {"rope_type": "llama3"}}, "llama3"),
    (llama_config, {"rms_norm_eps": -1}, "rms_norm_eps"),
    (qwen2_config, {"use_sliding_window": True}, "sliding"),
    (phi_config, {"qk_layernorm": True}, "qk_layernorm"),
    (phi_config, {"hidden_act": "gelu_newer"}, "gelu_new"),
    (opt_config, {"do_layer_norm_before": False}, "do_layer_norm_before"),
    (opt_config, {"word_embed_proj_dim": 512}, "word_embed_proj_dim"),
    (mpt_config, {"attn_config": {"alibi": False}}, "alibi"),
    (mpt_config, {"model_type": "mosaic_gpt", "alibi": False}, "alibi"),
    (mpt_config, {"attn_config": {"softmax_scale": 0.1}}, "softmax_scale"),
    (mpt_config, {"attn_config": {"clip_qkv": "much"}}, "clip_qkv"),
    (mpt_config, {"no_bias": False}, "no_bias"),
    (mpt_config, {"logit_scale": 0.5}, "logit_scale"),
    (eva_config, {"qkv_bias": False}, "qkv_bias"),
    (clip_config, {"vision_config": {"patch_size": 13}}, "patch_size"),
])  # fmt: skip
def test_configs_that_are_not_built_say_why(read, config, words):
    with pytest.raises(ValueError, match=words):
        read(config)
