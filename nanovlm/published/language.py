"""Published layouts of language models: one table of names each, and what their config.json means.

transformers' layouts of LLaMA (also Vicuna, SmolLM2), Qwen2, Phi-2, OPT and MPT. Config files exist in two dialects:
transformers 4 writes rope_theta and partial_rotary_factor, transformers 5 puts both into rope_parameters. What a
file leaves out takes the default of transformers' class, which is not always the published model's value.
"""

import json

from nanovlm.attention import alibi_slopes
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.names import check_known
from nanovlm.published.weights import Alias, Entry, Published, Unread, prefixed

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
               "relu": "relu", "silu": "silu"}  # transformers' names -> ours

ANGLES = Unread("{rest}rotary_emb.inv_freq", "rotary angles are computed")
HEAD = (
    ("lm_head.{p}", "lm_head.{p}"),
    ("lm_head.weight", "embedding.weight"),  # tied
)
QKV = tuple((f"layers.{{i}}.self_attn.{part}_proj.{{p}}", f"layers.{{i}}.attention.{part}.{{p}}") for part in "qkv")
LLAMA_BODY = (
    ("embed_tokens.weight", "embedding.weight"),
    ("layers.{i}.input_layernorm.weight", "layers.{i}.norm_1.weight"),
    *QKV,  # biases: Qwen2
    ("layers.{i}.self_attn.o_proj.{p}", "layers.{i}.attention.o.{p}"),
    ("layers.{i}.post_attention_layernorm.weight", "layers.{i}.norm_2.weight"),
    ("layers.{i}.mlp.gate_proj.weight", "layers.{i}.ffn.gate.weight"),
    ("layers.{i}.mlp.up_proj.weight", "layers.{i}.ffn.up.weight"),
    ("layers.{i}.mlp.down_proj.weight", "layers.{i}.ffn.down.weight"),
    ("norm.weight", "norm.weight"),
)
LLAMA = (
    *prefixed(LLAMA_BODY, "model."),
    *HEAD,
    ANGLES,
    Alias("{rest}", "model.{rest}"),  # files saved without the head's class
)

PHI_REST = (
    ("model.embed_tokens.weight", "embedding.weight"),
    ("model.layers.{i}.input_layernorm.{p}", "layers.{i}.norm_1.{p}"),  # one norm feeds attention and feed-forward
    ("model.layers.{i}.self_attn.dense.{p}", "layers.{i}.attention.o.{p}"),
    ("model.layers.{i}.mlp.fc1.{p}", "layers.{i}.ffn.fc_1.{p}"),
    ("model.layers.{i}.mlp.fc2.{p}", "layers.{i}.ffn.fc_2.{p}"),
    ("model.final_layernorm.{p}", "norm.{p}"),
    *HEAD,
    ANGLES,
)
PHI = (*prefixed(QKV, "model."), *PHI_REST, Alias("{rest}", "model.{rest}"))

OPT_LAYER = (
    ("self_attn_layer_norm.{p}", "norm_1.{p}"),
    *((f"self_attn.{part}_proj.{{p}}", f"attention.{part}.{{p}}") for part in "qkv"),
    ("self_attn.out_proj.{p}", "attention.o.{p}"),
    ("final_layer_norm.{p}", "norm_2.{p}"),
    ("fc1.{p}", "ffn.fc_1.{p}"),
    ("fc2.{p}", "ffn.fc_2.{p}"),
)
OPT_REST = (
    ("model.decoder.embed_tokens.weight", "embedding.weight"),
    ("model.decoder.embed_positions.weight", "positions"),
    ("model.decoder.final_layer_norm.{p}", "norm.{p}"),
    *HEAD,
)
OPT = (
    *OPT_REST,
    *prefixed(OPT_LAYER, "model.decoder.layers.{i}.", "layers.{i}."),
    Alias("decoder.{rest}", "model.decoder.{rest}"),  # .bin files of OPTModel
    Alias("{rest}", "model.decoder.{rest}"),
)

MPT_KINDS = {  # model_type -> norms, feed-forward and last norm; MPT-1B came before MPT-7B, with names of its own
    "mpt": ("norm_{j}", "ffn.up_proj", "ffn.down_proj", "norm_f"),
    "mosaic_gpt": ("ln_{j}", "mlp.mlp_up", "mlp.mlp_down", "ln_f"),
}


def mpt_tables(config):
    """The names of an MPT's layer, and of the rest: two tables, which read both kinds and write that of the config."""
    kinds = sorted(MPT_KINDS.items(), key=lambda kind: kind[0] != config.get("model_type", "mpt"))
    layer, rest = [
        Entry("attn.Wqkv.weight", tuple(f"attention.{part}.weight" for part in "qkv")),  # all q, then all k, then all v
        *((f"attn.{part}_ln.weight", f"attention.{part}_norm.weight") for part in "qk"),
        ("attn.out_proj.weight", "attention.o.weight"),
    ], [("transformer.wte.weight", "embedding.weight"), *HEAD]
    for _, (norm, up, down, last_norm) in kinds:
        layer += [(f"{norm}.weight", "norm_{j}.weight"), (f"{up}.weight", "ffn.fc_1.weight"),
                  (f"{down}.weight", "ffn.fc_2.weight")]
        rest.append((f"transformer.{last_norm}.weight", "norm.weight"))
    return tuple(layer), tuple(rest)


def mpt_layout(config):
    """The table of an MPT by itself."""
    layer, rest = mpt_tables(config)
    return (*rest, *prefixed(layer, "transformer.blocks.{i}.", "layers.{i}."), Alias("{rest}", "transformer.{rest}"))


def phi_fused(num_heads):
    """Phi-2 as transformers 4.36 wrote it (LLaVA-Phi): q, k and v in one matrix, interleaved head by head."""
    thirds = tuple(f"layers.{{i}}.attention.{name}.{{p}}" for name in "qkv")
    return (Entry("model.layers.{i}.self_attn.query_key_value.{p}", thirds, num_heads), *PHI_REST)


KEYS = {"vocab_size": "vocab_size", "context_length": "max_position_embeddings", "width": "hidden_size",
        "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "ffn_width": "intermediate_size",
        "mlp_width": "intermediate_size", "image_size": "image_size", "patch_size": "patch_size"}  # ours -> a config's


def read_json(path):
    """A JSON object: dict. Raises: ValueError or OSError naming the file."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); restore the file, or train or download again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object; restore the file, or train or download again")
    return content


def complete(config, defaults):
    """A config with what it leaves out: dict; nested parts are completed one by one, other keys are kept."""
    filled = dict(config)
    for key, default in defaults.items():
        if isinstance(default, dict):
            filled[key] = complete(filled.get(key) or {}, default)
        elif filled.get(key) is None:
            filled[key] = default
    return filled


def number(config, key, default):
    """A number above 0, whole if the default is, which counts where the key is absent or null. Raises: ValueError."""
    value = default if config.get(key) is None else config[key]
    kind = int if isinstance(default, int) else (int, float)
    if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config: {key} is {value!r}, expected a number above 0 like {default}")
    return value


def sizes(config, keys=KEYS, **defaults):
    """Sizes of a config under our names: {ours: int}; defaults: {ours: int}, which are wanted."""
    return {ours: number(config, keys[ours], default) for ours, default in defaults.items()}


def text_section(config):
    """The text_config of a vision-language model; transformers 5 keeps tie_word_embeddings outside of it."""
    tied = {"tie_word_embeddings": True} if config.get("tie_word_embeddings") else {}
    return config["text_config"] | tied


def with_vocabulary(config, vocab_size):
    """A config whose language model has at least `vocab_size` rows; published tables are often longer than that."""
    for part in ("llm", "text_config"):
        if part in config:
            return config | {part: with_vocabulary(config[part], vocab_size)}
    return config | {"vocab_size": max(config["vocab_size"], vocab_size)}


def activation(config, key, default):
    """Our name of an activation that a config names as transformers does. Raises: ValueError for an unknown one."""
    name = config.get(key) or default
    check_known(f"config: {key} is", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def expect(config, **values):
    """Raise ValueError if a config sets one of these keys to another value than is built; absent or null is fine."""
    for key, value in values.items():
        if config.get(key) not in (None, value):
            raise ValueError(f"config: {key} is {config[key]!r}; only {value!r} can be built")


def rope(config, rotary_share=1.0):
    """Rotary settings in either dialect: (float base, float share of a head that turns); raises for stretched ones."""
    settings = config | (config.get("rope_parameters") or {})
    for source in (settings, config.get("rope_scaling") or {}):
        kind = source.get("rope_type", source.get("type", "default"))
        if kind not in (None, "default"):
            raise ValueError(f"config: rotary positions of type {kind!r}; only 'default' can be built")
    return number(settings, "rope_theta", 10000.0), number(settings, "partial_rotary_factor", rotary_share)


def decoder_config(config, known, tied_head=False, **options):
    """A DecoderConfig of what `sizes` found and of plain layers; tied_head: where the config does not say."""
    layers = (LayerOptions(),) * known.pop("num_layers")
    num_kv_heads = number(config, "num_key_value_heads", known["num_heads"])
    tied_head = bool(config.get("tie_word_embeddings", tied_head))
    return DecoderConfig(**known, num_kv_heads=num_kv_heads, layers=layers, tied_head=tied_head, **options)


def llama_config(config):
    """LLaMA, Vicuna, SmolLM2: DecoderConfig of a config.json. Raises: ValueError for what is not built."""
    expect(config, mlp_bias=False)
    biased = bool(config.get("attention_bias"))
    return gated_config(config, 32000, 11008, 2048, qkv_bias="qkv" if biased else "", output_bias=biased)


def qwen2_config(config):
    """Qwen2 and Qwen2.5: LLaMA with biases on queries, keys and values; as `llama_config`."""
    expect(config, use_sliding_window=False)
    return gated_config(config, 151936, 22016, 32768, qkv_bias="qkv")


def gated_config(config, vocab_size, ffn_width, context_length, **options):
    """What LLaMA and Qwen2 have in common: their classes' sizes where a config is silent; options: their biases."""
    known = sizes(config, vocab_size=vocab_size, width=4096, num_heads=32, ffn_width=ffn_width, num_layers=32,
                  context_length=context_length)
    expect(config, hidden_act="silu", head_dim=known["width"] // known["num_heads"])
    eps = number(config, "rms_norm_eps", 1e-6)
    return decoder_config(config, known, rope_base=rope(config)[0], norm_eps=eps, **options)


BIASED = {"norm": "layer", "ffn": "plain", "qkv_bias": "qkv", "output_bias": True, "ffn_bias": True}


def phi_config(config):
    """Phi-2: attention and feed-forward side by side behind one norm; as `llama_config`."""
    expect(config, qk_layernorm=False)
    known = sizes(config, vocab_size=51200, width=2048, num_heads=32, ffn_width=8192, context_length=2048,
                  num_layers=24)
    base, share = rope(config, rotary_share=0.5)
    return decoder_config(
        config, known, rope_base=base, rotary_width=int(share * (known["width"] // known["num_heads"])), parallel=True,
        norm_eps=number(config, "layer_norm_eps", 1e-5), activation=activation(config, "hidden_act", "gelu_new"),
        head_bias=True, **BIASED,
    )


def opt_config(config):
    """OPT: learned positions, two unused rows in front of them, ReLU; as `llama_config`."""
    known = sizes(config, KEYS | {"ffn_width": "ffn_dim"}, vocab_size=50272, width=768, num_heads=12, ffn_width=3072,
                  context_length=2048, num_layers=12)
    expect(config, do_layer_norm_before=True, word_embed_proj_dim=known["width"], enable_bias=True,
           layer_norm_elementwise_affine=True)  # OPT-350m has neither of the first two
    return decoder_config(
        config, known, tied_head=True, rotary_width=0, position_offset=2, norm_eps=1e-5,
        activation=activation(config, "activation_function", "relu"), **BIASED,
    )


MPT_KEYS = {"vocab_size": "vocab_size", "width": "d_model", "num_heads": "n_heads", "num_layers": "n_layers",
            "context_length": "max_seq_len"}


def mpt_config(config):
    """MPT-7B, and MPT-1B ("mosaic_gpt": norms on q and k unless it says no); as `llama_config`."""
    old, told = config.get("model_type") == "mosaic_gpt", config.get("attn_config") or {}
    if old:  # keys of the attention stand beside the others, some with "attn_"
        told = {key.removeprefix("attn_"): value for key, value in config.items()}
    expect(told, alibi=True, prefix_lm=False, softmax_scale=None)
    expect(config, logit_scale=None, embedding_fraction=1.0, no_bias=True)
    known = sizes(config, MPT_KEYS, vocab_size=50368, width=2048, num_heads=16, num_layers=24, context_length=2048)
    known["ffn_width"] = known["width"] * number(config, "mlp_ratio" if old else "expansion_ratio", 4)
    slopes = alibi_slopes(known["num_heads"], number(told, "alibi_bias_max", 8), interleaved=not old)
    return decoder_config(
        config, known, tied_head=True, norm="layer_no_bias", norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        ffn="plain", activation="gelu", rotary_width=0, alibi=slopes,
        qk_norm=bool(told.get("qk_ln", old)), qkv_clip=number(told, "clip_qkv", 1.0) if told.get("clip_qkv") else None,
    )


LANGUAGE_MODELS = {family: Published(family, lambda config, read=read: Decoder(read(config)), layout)
                   for family, read, layout in (
    ("llama", llama_config, lambda config: LLAMA),  # Vicuna and SmolLM2 too
    ("qwen2", qwen2_config, lambda config: LLAMA),
    ("phi", phi_config, lambda config: PHI),
    ("opt", opt_config, lambda config: OPT),
    ("mpt", mpt_config, mpt_layout),
)}  # fmt: skip


def decoder_of(model):
    """The language model of a model: Decoder, None of towers alone."""
    return model if isinstance(model, Decoder) else getattr(model, "decoder", None)
