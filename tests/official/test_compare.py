"""`python tests/official/compare.py`: files of other sizes agree, spoiled ones are refused with a reason."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import reference as official
from nanovlm import recipes
from compare import build, main
from golden import read
from nanovlm.published.weights import to_published
from nanovlm.recipes import open_flamingo

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("NANOVLM_SHARED", "absent"))
GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {"lynx": "lynx_tiny", "mplug_owl2": "mplug_owl2_tiny", "llava_phi": "llava_phi_tiny", "open_flamingo": "openflamingo_tiny"}
I = official.IMAGE
EVERY = pytest.mark.parametrize("family", FILES)


def compared(capsys, path):
    """Exit code and all that was printed."""
    code = main(path)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def llama(**changes):
    """A small LLaMA's config."""
    return {
        "vocab_size": 53, "hidden_size": 40, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    } | changes  # fmt: skip


def lynx_case(freq, num_layers, num_frames, side, kv_heads=4, prefixed_pads=(0, 4, 7)):
    """Lynx of other sizes: config and inputs, one row per number of pads."""
    rows, length = len(prefixed_pads), 9
    config = {
        "vision": {"image_size": 14 * side, "width": 24, "depth": 3, "heads": 2, "mlp_ratio": 1.7},
        "llm": llama(num_hidden_layers=num_layers, num_key_value_heads=kv_heads),
        "bridge": {"depth": 1, "num_latents": 3, "heads": 8}, "adapter_freq": freq, "num_frames": num_frames,
    }  # fmt: skip
    mask = torch.arange(length) >= torch.tensor(prefixed_pads)[:, None]
    size = config["vision"]["image_size"]
    return config, {
        "pixel_values": torch.randn(rows, 3, size, size), "video": torch.randn(rows, num_frames, 3, size, size),
        "input_ids": torch.randint(0, 53, (rows, length)) * mask, "attention_mask": mask.long(),
    }  # fmt: skip


def labelled(ids):
    """Labels of rows of ids: the first third of a row, pictures and padding (0) are not trained."""
    labels = torch.where((ids == I) | (ids == 0), -100, ids)
    labels[:, : ids.shape[1] // 3] = -100
    return labels


def owl_case(ids, side, kv_heads, num_layers=2, queries=7, mask=None, frames=()):
    """mPLUG-Owl2 of other sizes, with these rows of ids; frames: (number of pictures at one placeholder,)."""
    config = {
        "vision": {
            "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 14 * side, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        },
        "abstractor": {
            "num_learnable_queries": queries, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 28, "encoder_hidden_size": 24, "grid_size": side, "layer_norm_eps": 1e-4,
        },
        "llm": llama(num_hidden_layers=num_layers, num_key_value_heads=kv_heads, rms_norm_eps=1e-4),
    }  # fmt: skip
    pictures = sum(max(row.count(I), 1) for row in ids)
    ids = torch.tensor(ids)
    return config, {
        "pixel_values": torch.randn(pictures, *frames, 3, 14 * side, 14 * side), "input_ids": ids, "labels": labelled(ids),
        "text_ids": torch.randint(0, 53, (3, 5)),
    } | ({"attention_mask": torch.tensor(mask)} if mask else {})  # fmt: skip


def phi_case(ids, share, layer, feature, heads=2, patch=8):
    """LLaVA-Phi of other sizes, with these rows of ids."""
    config = {
        "vision": {
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 3 * patch,
            "patch_size": patch, "mm_vision_select_layer": layer, "mm_vision_select_feature": feature,
        },
        "llm": {
            "vocab_size": 61, "hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": heads,
            "partial_rotary_factor": share, "max_position_embeddings": 32,
        },
    }  # fmt: skip
    pictures = sum(max(row.count(I), 1) for row in ids)
    ids = torch.tensor(ids)
    return config, {
        "pixel_values": torch.randn(pictures, 3, 3 * patch, 3 * patch), "input_ids": ids, "labels": labelled(ids),
    }  # fmt: skip


def flamingo_case(ids, every, num_layers, num_frames, pads=None):
    """OpenFlamingo of other sizes, with these rows of ids; 50 is the media token. pads: how many in front of each row."""
    config = {
        "vision_width": 20, "media_token_id": 50, "cross_attn_every_n_layers": every, "resampler": {"depth": 3, "num_latents": 4},
        "llm": {
            "vocab_size": 51, "hidden_size": 24, "ffn_dim": 44, "num_hidden_layers": num_layers, "num_attention_heads": 3,
            "max_position_embeddings": 40, "word_embed_proj_dim": 24, "do_layer_norm_before": True,
        },
    }  # fmt: skip
    pictures = max(row.count(50) for row in ids)
    ids = torch.tensor(ids)
    inputs = {"vision_features": torch.randn(len(ids), pictures, num_frames, 10, 20), "input_ids": ids}
    if pads:
        inputs["attention_mask"] = (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()
    return config, inputs


def flamingo_on_mpt(ids, every, num_layers, heads, pads, **attention):
    """The same on MPT-1B, or, with an attn_config, on MPT-7B."""
    config, inputs = flamingo_case(ids, every, num_layers, 1, pads)
    config["llm"] = {"vocab_size": 51, "d_model": 24, "n_layers": num_layers, "n_heads": heads, "max_seq_len": 40}
    config["llm"] |= {"model_type": "mpt" if "attn_config" in attention else "mosaic_gpt", "attn_clip_qkv": None} | attention
    return config, inputs | {"labels": labelled(inputs["input_ids"])}


OTHER_SIZES = {
    "lynx, adapters after every third of 5 layers": ("lynx", lambda: lynx_case(3, 5, 2, 3)),
    "lynx, adapters everywhere, grouped queries": ("lynx", lambda: lynx_case(1, 2, 4, 2, kv_heads=2)),
    "lynx, one row, no padding": ("lynx", lambda: lynx_case(2, 5, 2, 1, prefixed_pads=(0,))),
    "lynx, clips of one frame": ("lynx", lambda: lynx_case(2, 2, 1, 2)),
    "mplug_owl2, grouped queries": ("mplug_owl2", lambda: owl_case([[5, I, 6, 7, 8, 9, 3]], 3, 2)),
    "mplug_owl2, unequal rows": ("mplug_owl2", lambda: owl_case([[5, 4, 6, 1, 8, 9], [7, I, 3, 4, I, 9], [I, 1, 2, 3, 4, 5]], 2, 1)),
    "mplug_owl2, a clip at a placeholder": ("mplug_owl2", lambda: owl_case([[5, I, 7, 8, 9]], 2, 4, frames=(3,))),
    "mplug_owl2, padded at either end": (
        "mplug_owl2", lambda: owl_case([[5, I, 6, 7, 0, 0], [0, 0, 0, 4, I, 5]], 2, 4, mask=[[1] * 4 + [0] * 2, [0] * 3 + [1] * 3]),
    ),
    "llava_phi, 0.4 of a head": ("llava_phi", lambda: phi_case([[I, 6, 7, 8, 9, 3]], 0.4, -2, "patch")),
    "llava_phi, last block": ("llava_phi", lambda: phi_case([[5, I, 7, 8, 9], [1, 2, 3, I, 4]], 0.4, -1, "cls_patch", 4)),
    "llava_phi, several pictures": ("llava_phi", lambda: phi_case([[5, I, 7, I, 9], [1, 2, 3, 5, 4]], 1.0, -3, "patch", 4, 14)),
    "open_flamingo, every layer": ("open_flamingo", lambda: flamingo_case([[1, 50, 3, 4, 50, 5, 50], [50, 2, 3, 4, 5, 6, 7]], 1, 3, 2)),
    "open_flamingo, every third, padded": (
        "open_flamingo", lambda: flamingo_case([[0, 0, 3, 50, 6, 5, 50], [4, 2, 3, 4, 5, 6, 7]], 3, 6, 1, pads=(2, 0)),
    ),
    "open_flamingo on MPT-1B, 6 heads, padded": (
        "open_flamingo", lambda: flamingo_on_mpt([[0, 0, 3, 50, 6, 5, 50], [4, 2, 3, 4, 5, 6, 7]], 1, 3, 6, (2, 0), attn_clip_qkv=0.7),
    ),
    "open_flamingo on MPT-7B, 3 heads, padded, clipped": (
        "open_flamingo", lambda: flamingo_on_mpt([[0, 0, 3, 50, 6, 5], [50, 2, 3, 4, 5, 6]], 4, 8, 3, (2, 0), attn_config={"clip_qkv": 0.5}),
    ),
}  # fmt: skip


def make(path, family, config, inputs, weights=None):
    """A golden file with random weights, made without any module of the package; returns its path."""
    published = recipes.FAMILIES[family]
    shapes = {n: t.shape for n, t in to_published(published.layout(config), published.build(config).state_dict()).items()}
    weights = official.random_weights(shapes) if weights is None else weights
    if family == "open_flamingo":  # its head is its embedding, which OPT's files hold twice
        words = [name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight"))]
        weights |= {"lang_encoder.lm_head.weight": weights[words[0]].clone()}
    with torch.no_grad():
        outputs = official.OFFICIAL[family](weights, config, inputs)
    return official.write(path, config, weights, inputs, outputs)


@EVERY
def test_the_golden_files_agree(family, capsys):
    path = GOLDEN / f"{FILES[family]}.safetensors"
    code, printed = compared(capsys, path)
    assert code == 0 and printed.count("agrees") == len(read(path).outputs), printed


@EVERY
def test_the_plain_forward_passes_are_the_official_ones(family):
    """Only so do the files of other sizes say anything."""
    golden = read(GOLDEN / f"{FILES[family]}.safetensors")
    with torch.no_grad():
        found = official.OFFICIAL[family](golden.weights, golden.config, golden.inputs)
    for name, expected in golden.outputs.items():
        if name.endswith("logits") and "attention_mask" in golden.inputs:  # Lynx: pads lie behind the image tokens
            real = golden.inputs["attention_mask"].bool()
            found[name], expected = found[name][:, -real.shape[1] :][real], expected[:, -real.shape[1] :][real]
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", ["mpt1b", "mpt7b"])
def test_the_golden_files_of_openflamingo_on_mpt(size, capsys):
    """Both ports against the official code: ours, and the plain one that makes files of other sizes; names out as in."""
    path = SHARED / "golden" / f"openflamingo_{size}_tiny.safetensors"
    if not path.exists():
        pytest.skip("these files are in the folder that NANOVLM_SHARED names")
    code, printed = compared(capsys, path)
    assert code == 0 and printed.count("agrees") == 3, printed
    golden = read(path)
    with torch.no_grad():
        found = official.OFFICIAL["open_flamingo"](golden.weights, golden.config, golden.inputs)
    for name, expected in golden.outputs.items():
        torch.testing.assert_close(found[name].view_as(expected), expected, atol=1e-5, rtol=0)
    written = to_published(open_flamingo.LAYOUT(golden.config), build(golden).state_dict())
    assert written.keys() == golden.weights.keys() and all(torch.equal(written[n], t) for n, t in golden.weights.items())


@pytest.mark.parametrize("case", OTHER_SIZES)
def test_other_sizes_agree(case, capsys, tmp_path):
    family, inputs = OTHER_SIZES[case]
    config, inputs = inputs()
    path = make(tmp_path / "whole.safetensors", family, config, inputs)
    code, printed = compared(capsys, path)
    assert code == 0, printed
    golden, kept = read(path), ("heads", "eps", "factor", "select", "token", "mlp_ratio", "attn_")
    silent = {
        key: {k: v for k, v in part.items() if any(word in k for word in kept)} if isinstance(part, dict) else part
        for key, part in config.items() if isinstance(part, dict) or any(word in key for word in kept)
    }  # fmt: skip
    assert silent != config  # what it leaves out is read off the weights
    official.write(path, silent, golden.weights, golden.inputs, golden.outputs)
    code, printed = compared(capsys, path)
    assert code == 0, printed


def parts_of(path):
    """Config, weights, inputs and outputs of a golden file, to be spoiled."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    kinds = ("weights/", "in/", "out/")
    return config, *({n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)} for kind in kinds)


def spoiled(tmp_path, family, spoil):
    """The golden file of a family after spoil(config, weights, inputs, outputs), which changes them in place."""
    parts = [copy.copy(part) for part in parts_of(GOLDEN / f"{FILES[family]}.safetensors")]
    spoil(*parts)
    return official.write(tmp_path / "spoiled.safetensors", *parts)


LYNX_Q, OWL, OPT = "LLM.model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.", "lang_encoder.model.decoder."
SPOILT = {  # what happened to the file: its family, what is done to its config, weights, inputs, outputs
    "a weight moved": ("open_flamingo", lambda c, w, i, o: w[f"{OPT}layers.0.decoder_layer.fc1.weight"].add_(1e-3)),
    "a weight of NaN": ("llava_phi", lambda c, w, i, o: w["model.layers.0.mlp.fc1.weight"].mul_(torch.nan)),
    "a weight missing": ("lynx", lambda c, w, i, o: w.pop(LYNX_Q)),
    "a weight too many": ("mplug_owl2", lambda c, w, i, o: w.update({f"{OWL}old": torch.ones(2)})),
    "a weight of another shape": ("lynx", lambda c, w, i, o: w.update({LYNX_Q: w[LYNX_Q][:, :-1]})),
    "an output missing": ("open_flamingo", lambda c, w, i, o: o.pop("visual_tokens")),
    "an output too many": ("llava_phi", lambda c, w, i, o: o.update(extra=torch.ones(1))),
    "an output of another shape": ("mplug_owl2", lambda c, w, i, o: o.update(logits=o["logits"][:, 1:])),
    "an output moved": ("lynx", lambda c, w, i, o: o["logits"].view(-1)[-1].add_(2e-5)),
    "an output of NaN": ("open_flamingo", lambda c, w, i, o: o["logits"].view(-1)[-1].mul_(torch.nan)),
    "an input missing": ("llava_phi", lambda c, w, i, o: i.pop("input_ids")),
    "an input too many": ("open_flamingo", lambda c, w, i, o: i.update(extra=torch.ones(1))),
    "an id too large": ("lynx", lambda c, w, i, o: i["input_ids"].view(-1)[-1].fill_(1000)),
    "no sizes": ("mplug_owl2", lambda c, w, i, o: c["llm"].update(hidden_size="wide")),
    "part of another family": ("lynx", lambda c, w, i, o: w.update({"perceiver.x": torch.ones(1)})),
    "rotary angles": ("lynx", lambda c, w, i, o: w["LLM.model.layers.0.self_attn.rotary_emb.inv_freq"].mul_(2)),
    "mask of another shape": ("lynx", lambda c, w, i, o: i.update(attention_mask=i["attention_mask"][:, 1:])),
    "position table": ("mplug_owl2", lambda c, w, i, o: [x.add_(1e-3) for n, x in w.items() if n.endswith("k_pos_embed")]),
    "too few pictures": ("mplug_owl2", lambda c, w, i, o: i.update(pixel_values=i["pixel_values"][:1])),
    "head and embedding differ": ("open_flamingo", lambda c, w, i, o: w["lang_encoder.lm_head.weight"].mul_(2)),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_spoiled_files_are_refused(what, capsys, tmp_path):
    code, printed = compared(capsys, spoiled(tmp_path, *SPOILT[what]))
    assert code == 1 and "Traceback" not in printed, printed


def test_files_that_are_no_golden_files(capsys, tmp_path):
    bad, whole = tmp_path / "bad.safetensors", (GOLDEN / "lynx_tiny.safetensors").read_bytes()
    assert compared(capsys, bad)[0] == 1
    for content in (whole[:-1], b""):
        bad.write_bytes(content)
        assert compared(capsys, bad)[0] == 1
    config, weights, inputs, outputs = parts_of(GOLDEN / "lynx_tiny.safetensors")
    for told, tensors in ((None, weights), ("{", weights), (config | {"llm": 3}, weights), (config, {}), (config, {"fc.weight": torch.ones(2)})):
        assert compared(capsys, official.write(bad, told, tensors, inputs, outputs))[0] == 1


def test_command_line():
    command = [sys.executable, "tests/official/compare.py", str(GOLDEN / "llava_phi_tiny.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and done.stdout.count("agrees") == 3
