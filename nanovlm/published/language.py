"""Published layouts of language models: one table of names each, and what their config.json means.

transformers' layouts of LLaMA (also Vicuna, SmolLM2), Qwen2, Phi-2 and OPT. Config files exist in two dialects:
transformers 4 writes rope_theta and partial_rotary_factor, transformers 5 puts both into rope_parameters. What a
file leaves out takes the default of transformers' class, which is not always the published model's value.
"""

from nanovlm.decoder import DecoderConfig, LayerOptions
from nanovlm.names import nearest
from nanovlm.published.weights import Alias, Computed, Fused, Tied

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
               "relu": "relu", "silu": "silu"}  # transformers' names -> ours

ANGLES = Computed("{rest}rotary_emb.inv_freq", "rotary angles are computed")
HEAD = (
    ("lm_head.{p}", "lm_head.{p}"),
    Tied("lm_head.weight", "embedding.weight"),
)

LLAMA = (
    ("model.embed_tokens.weight", "embedding.weight"),
    ("model.layers.{i}.input_layernorm.weight", "layers.{i}.norm_1.weight"),
    ("model.layers.{i}.self_attn.q_proj.{p}", "layers.{i}.attention.q.{p}"),  # biases: Qwen2
    ("model.layers.{i}.self_attn.k_proj.{p}", "layers.{i}.attention.k.{p}"),
    ("model.layers.{i}.self_attn.v_proj.{p}", "layers.{i}.attention.v.{p}"),
    ("model.layers.{i}.self_attn.o_proj.{p}", "layers.{i}.attention.o.{p}"),
    ("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.norm_2.weight"),
    ("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.ffn.gate.weight"),
    ("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.ffn.up.weight"),
    ("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.ffn.down.weight"),
    ("model.norm.weight", "norm.weight"),
    *HEAD,
    ANGLES,
    Alias("{rest}", "model.{rest}"),  # files saved without the head's class
)
QWEN2 = LLAMA

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
PHI = (
    ("model.layers.{i}.self_attn.q_proj.{p}", "layers.{i}.attention.q.{p}"),
    ("model.layers.{i}.self_attn.k_proj.{p}", "layers.{i}.attention.k.{p}"),
    ("model.layers.{i}.self_attn.v_proj.{p}", "layers.{i}.attention.v.{p}"),
    *PHI_REST,
    Alias("{rest}", "model.{rest}"),
)

OPT = (
    ("model.decoder.embed_tokens.weight", "embedding.weight"),
    ("model.decoder.embed_positions.weight", "positions"),
    ("model.decoder.layers.{i}.self_attn_layer_norm.{p}", "layers.{i}.norm_1.{p}"),
    ("model.decoder.layers.{i}.self_attn.q_proj.{p}", "layers.{i}.attention.q.{p}"),
    ("model.decoder.layers.{i}.self_attn.k_proj.{p}", "layers.{i}.attention.k.{p}"),
    ("model.decoder.layers.{i}.self_attn.v_proj.{p}", "layers.{i}.attention.v.{p}"),
    ("model.decoder.layers.{i}.self_attn.out_proj.{p}", "layers.{i}.attention.o.{p}"),
    ("model.decoder.layers.{i}.final_layer_norm.{p}", "layers.{i}.norm_2.{p}"),
    ("model.decoder.layers.{i}.fc1.{p}", "layers.{i}.ffn.fc_1.{p}"),
    ("model.decoder.layers.{i}.fc2.{p}", "layers.{i}.ffn.fc_2.{p}"),
    ("model.decoder.final_layer_norm.{p}", "norm.{p}"),
    *HEAD,
    Alias("decoder.{rest}", "model.decoder.{rest}"),  # .bin files of OPTModel
    Alias("{rest}", "model.decoder.{rest}"),
)


def phi_fused(num_heads):
    """Phi-2 as transformers 4.36 wrote it (LLaVA-Phi): q, k and v in one matrix, interleaved head by head."""
    thirds = tuple(f"layers.{{i}}.attention.{name}.{{p}}" for name in "qkv")
    return (Fused("model.layers.{i}.self_attn.query_key_value.{p}", thirds, "heads", num_heads), *PHI_REST)


def size(config, key, default=None):
    """A whole number of a config: int, 1 or more.

    Args:
      config: dict. key: str. default: int when the key is absent or null; None = it must be there.
    Raises: ValueError.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = "is missing" if value is None else f"is {value!r}"
        raise ValueError(f"config: {key} {found}, expected a whole number of 1 or more")
    return value


def number(config, key, default):
    """A number of a config: float; default when the key is absent or null. Raises: ValueError."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config: {key} is {value!r}, expected a number above 0")
    return float(value)


def section(config, key):
    """A nested part of a config: dict, empty when absent. Raises: ValueError if it is something else."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"config: {key} is {value!r}, expected an object")
    return value


def activation(config, key, default):
    """Our name of an activation that a config names as transformers does. Raises: ValueError for an unknown one."""
    name = config.get(key) or default
    if name not in ACTIVATIONS:
        raise ValueError(f"config: {key} is {name!r}, which is not known.{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def expect(config, key, value, meaning):
    """Raise ValueError if a config sets `key` to anything but `value`, which alone is built; absent or null is fine."""
    if config.get(key) not in (None, value):
        raise ValueError(f"config: {key} is {config[key]!r}: {meaning}; only {value!r} can be built")


def rope(config, rotary_share=1.0):
    """Rotary settings in either dialect.

    Args:
      config: dict. rotary_share: default share of a head that turns.
    Returns: (float base, float share of the head that turns).
    Raises: ValueError for stretched positions, which are not built.
    """
    settings = config | section(config, "rope_parameters")
    for source in (settings, section(config, "rope_scaling")):
        kind = source.get("rope_type", source.get("type", "default"))
        if kind not in (None, "default"):
            raise ValueError(f"config: rotary positions of type {kind!r}; only 'default' can be built")
    return number(settings, "rope_theta", 10000.0), number(settings, "partial_rotary_factor", rotary_share)


def plain_layers(config, default):
    """Layers that carry nothing extra: tuple of LayerOptions, one per layer of the config."""
    return (LayerOptions(),) * size(config, "num_hidden_layers", default)


def check_head_width(config, width, num_heads):
    """Raise ValueError if a config asks for heads of another width than width / num_heads."""
    if width % num_heads == 0:
        expect(config, "head_dim", width // num_heads, "heads of another width than hidden_size / num_attention_heads")


def llama_config(config):
    """LLaMA, Vicuna, SmolLM2.

    Args:
      config: dict of a config.json, or its text_config.
    Returns: DecoderConfig.
    Raises: ValueError for what is not built.
    """
    width, num_heads = size(config, "hidden_size", 4096), size(config, "num_attention_heads", 32)
    check_head_width(config, width, num_heads)
    expect(config, "hidden_act", "silu", "another activation")
    expect(config, "mlp_bias", False, "biases in the feed-forward")
    return DecoderConfig(
        vocab_size=size(config, "vocab_size", 32000),
        width=width,
        num_heads=num_heads,
        num_kv_heads=size(config, "num_key_value_heads", num_heads),
        ffn_width=size(config, "intermediate_size", 11008),
        context_length=size(config, "max_position_embeddings", 2048),
        layers=plain_layers(config, 32),
        rope_base=rope(config)[0],
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias="qkv" if config.get("attention_bias") else "",
        output_bias=bool(config.get("attention_bias")),
    )


def qwen2_config(config):
    """Qwen2 and Qwen2.5: LLaMA with biases on queries, keys and values. Arguments and errors as `llama_config`."""
    width, num_heads = size(config, "hidden_size", 4096), size(config, "num_attention_heads", 32)
    check_head_width(config, width, num_heads)
    expect(config, "hidden_act", "silu", "another activation")
    expect(config, "use_sliding_window", False, "a sliding window")
    return DecoderConfig(
        vocab_size=size(config, "vocab_size", 151936),
        width=width,
        num_heads=num_heads,
        num_kv_heads=size(config, "num_key_value_heads", num_heads),
        ffn_width=size(config, "intermediate_size", 22016),
        context_length=size(config, "max_position_embeddings", 32768),
        layers=plain_layers(config, 32),
        rope_base=rope(config)[0],
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias="qkv",
    )


def phi_config(config):
    """Phi-2: attention and feed-forward side by side behind one norm. Arguments and errors as `llama_config`."""
    width, num_heads = size(config, "hidden_size", 2048), size(config, "num_attention_heads", 32)
    expect(config, "qk_layernorm", False, "norms on queries and keys")
    base, rotary_share = rope(config, rotary_share=0.5)
    return DecoderConfig(
        vocab_size=size(config, "vocab_size", 51200),
        width=width,
        num_heads=num_heads,
        num_kv_heads=size(config, "num_key_value_heads", num_heads),
        ffn_width=size(config, "intermediate_size", 8192),
        context_length=size(config, "max_position_embeddings", 2048),
        layers=plain_layers(config, 24),
        rope_base=base,
        rotary_width=int(rotary_share * (width // num_heads)),
        norm="layer",
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        parallel=True,
        ffn="plain",
        activation=activation(config, "hidden_act", "gelu_new"),
        qkv_bias="qkv",
        output_bias=True,
        ffn_bias=True,
        tied_head=bool(config.get("tie_word_embeddings", False)),
        head_bias=True,
    )


def opt_config(config):
    """OPT: learned positions, two unused rows in front of them, ReLU. Arguments and errors as `llama_config`."""
    width = size(config, "hidden_size", 768)
    expect(config, "do_layer_norm_before", True, "norms behind the residual (OPT-350m)")
    expect(config, "word_embed_proj_dim", width, "embeddings of another width (OPT-350m)")
    expect(config, "enable_bias", True, "linear layers without biases")
    expect(config, "layer_norm_elementwise_affine", True, "norms without weights")
    num_heads = size(config, "num_attention_heads", 12)
    return DecoderConfig(
        vocab_size=size(config, "vocab_size", 50272),
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        ffn_width=size(config, "ffn_dim", 3072),
        context_length=size(config, "max_position_embeddings", 2048),
        layers=plain_layers(config, 12),
        rotary_width=0,
        position_offset=2,
        norm="layer",
        norm_eps=1e-5,
        ffn="plain",
        activation=activation(config, "activation_function", "relu"),
        qkv_bias="qkv",
        output_bias=True,
        ffn_bias=True,
        tied_head=bool(config.get("tie_word_embeddings", True)),
    )
