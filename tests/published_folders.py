"""Folders as others publish them, small and random, for the tests of loading and converting."""

import json

import pytest
import torch

import train
from nanovlm import recipes
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.decoder import Decoder
from nanovlm.published import language as language_models, vision as towers
from nanovlm.published.language import LLAMA, llama_config
from nanovlm.vit import ViT, ViTConfig
from nanovlm.published.weights import to_published, write_checkpoint
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


PARTS = {  # family -> tables of its tower and language model, the latter's model_type
    "lynx": ("eva_original", "LLAMA", "llama"), "mplug_owl2": ("CLIP", "LLAMA", "llama"), "llava_phi": ("CLIP", "PHI", "phi"),
    "llava": ("CLIP", "LLAMA", "llama"), "blip2": ("EVA", "OPT", "opt"), "open_flamingo": ("CLIP", "OPT", "opt"),
    "smolvlm": ("SIGLIP", "LLAMA", "llama"),
}  # fmt: skip


def separate(tmp_path, family):
    """Folders of a tiny model's tower, words (language model) and, in the paper's own layout, all of it; and the model."""
    published, (tower, layout, kind) = recipes.FAMILIES[family], PARTS[family]
    config, table = published.configs["tiny"], vars(towers)[tower]
    model = randomise(published.build(config))
    table = table(model.vision.config.num_layers) if callable(table) else table
    write_checkpoint(make_folder(tmp_path / "tower"), table, model.vision.state_dict())
    if tower == "CLIP":
        sizes = {"patch_size": 14, "model_type": "clip_vision_model"} | (config.get("vision_config") or config["vision"])
        (tmp_path / "tower" / "config.json").write_text(json.dumps(sizes))
    words = {name.replace(".text.", "."): tensor for name, tensor in model.decoder.state_dict().items()
             if not any(grafted in name for grafted in (".vision.", ".adapter.", ".cross_attention."))}
    write_checkpoint(make_folder(tmp_path / "words"), vars(language_models)[layout], words)
    sizes = config.get("text_config") or config["llm"]
    (tmp_path / "words" / "config.json").write_text(json.dumps(sizes | {"model_type": kind}))
    train_tokenizer(["Which color? red green USER: ASSISTANT: Question: Answer:"] * 9, 300).save(tmp_path / "words" / "tokenizer.json")
    write_checkpoint(make_folder(tmp_path / "all"), published.layout(config), model.state_dict())
    return model


def tune(name, data, out, *more):
    """Exit code of train.py for a few steps of a recipe's last stage on a file of write_talks."""
    return train.main([name, "--stages", "instruct", "--data", str(data), "--images", str(data.parent), "--smoke",
                       "--device", "cpu", "--threads", "1", "--out", str(out), *map(str, more)])


def write_talks(folder, *pictures, question="what is in the picture?", answer="a red circle"):
    """A LLaVA-style file of eight records about these pictures in turn, which lie beside it or elsewhere: Path."""
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    items = [{"id": f"{n}", "image": str(pictures[n % len(pictures)]), "conversations": talk} for n in range(8)]
    (folder / "my.json").write_text(json.dumps(items))
    return folder / "my.json"
