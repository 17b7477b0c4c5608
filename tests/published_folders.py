"""Folders as others publish them, small and random, for the tests of loading and converting."""

import json

import pytest
import torch

from nanovlm import recipes
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.decoder import Decoder
from nanovlm.published.language import LLAMA, llama_config
from nanovlm.vit import ViT, ViTConfig
from nanovlm.published.weights import write_checkpoint
from nanovlm.published.weights import to_published
from tests.random_models import randomise

WORDS = ["what is in the picture? a red circle and a blue star, left of a green square.", "user: describe\nbot: yes"] * 9
LLAMA_SIZES = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
                   max_position_embeddings=256, rms_norm_eps=1e-6)
EVA_SIZES = dict(patch_size=14, width=32, num_heads=2, mlp_width=139, qkv_bias="qv")  # mlp: int(32 * 4.3637)


def folder_with(path, config, table, state, **write):
    """A published folder."""
    path.mkdir()
    write_checkpoint(path, table, state, **write)
    (path / "config.json").write_text(json.dumps(config))
    train_tokenizer(WORDS, 320).save(path / "tokenizer.json")
    return path


@pytest.fixture
def language(tmp_path):
    """A folder like Vicuna's, in three shards, and its decoder."""
    decoder = randomise(Decoder(llama_config(LLAMA_SIZES)))
    config = LLAMA_SIZES | {"model_type": "llama", "rope_theta": 10000.0}
    return folder_with(tmp_path / "vicuna", config, LLAMA, decoder.state_dict(), max_shard_bytes=70_000), decoder


@pytest.fixture
def eva(tmp_path):
    """A .pth like EVA's own: one block more than is used, at another resolution, fused, half precision, wrapped."""
    tower = randomise(ViT(ViTConfig(image_size=28, num_layers=3, **EVA_SIZES)))
    state, content = tower.state_dict(), {}
    for name, tensor in state.items():
        if ".attention.q." in name:
            i, kind = name.split(".")[1], name.rsplit(".", 1)[1]
            if kind == "weight":
                parts = [state[f"blocks.{i}.attention.{letter}.weight"] for letter in "qkv"]
                content[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
            else:
                content[f"blocks.{i}.attn.q_bias"] = tensor
                content[f"blocks.{i}.attn.v_bias"] = state[f"blocks.{i}.attention.v.bias"]
        elif ".attention.k." not in name and ".attention.v." not in name:
            for ours, theirs in (("class_token", "cls_token"), ("positions", "pos_embed"), ("post_norm", "norm"),
                                 ("patch_embedding", "patch_embed.proj"), ("attention.o", "attn.proj"), ("norm_", "norm"),
                                 ("fc_", "mlp.fc")):
                name = name.replace(ours, theirs)
            content[name] = tensor
    content["cls_token"] = content["cls_token"].view(1, 1, -1)
    content["pos_embed"] = content["pos_embed"][None]
    content = {name: tensor.half() for name, tensor in content.items()}
    torch.save({"model": content, "epoch": 3}, tmp_path / "eva.pth")
    return tmp_path / "eva.pth", tower


def lynx_file(tmp_path, keep=lambda name: True):
    """A released file of a tiny Lynx, wrapped as the official loader expects, and the model."""
    published = recipes.FAMILIES["lynx"]
    config = published.configs["tiny"]
    model = randomise(published.build(config))
    tensors = to_published(published.layout(config), model.state_dict())
    path = tmp_path / "finetune_lynx.pt"
    torch.save({"model": {f"model.{name}": tensor for name, tensor in tensors.items() if keep(name)}}, path)
    return path, model


def make_folder(path):
    path.mkdir()
    return path
