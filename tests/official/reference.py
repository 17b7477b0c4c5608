"""The official forward passes once more, as plainly as can be written, to make golden files of other sizes.

Functions over {published name: tensor}, from the papers' code alone: nothing here knows nanovlm's modules. They
reproduce the files in tests/golden/ (test_compare.py holds that), so what they make at other sizes can be trusted.
"""

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

IMAGE = -200


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def layer_norm(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), eps)


def rms_norm(weight, x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def attend(q, k, v, num_heads, allowed=None, turn=lambda x: x, slopes=None):
    """One head after the other; allowed: bool[B, T, S]; turn: what happens to queries and keys of a head [B, T, D]; slopes:
    of each head's scores along the keys (ALiBi)."""
    width, seen = q.shape[-1] // num_heads, []
    for head in range(num_heads):
        kv = head * k.shape[-1] // q.shape[-1]  # grouped queries
        mine, theirs = slice(head * width, (head + 1) * width), slice(kv * width, (kv + 1) * width)
        scores = turn(q[..., mine]) @ turn(k[..., theirs]).transpose(1, 2) / width**0.5
        if slopes is not None:
            scores = scores + slopes[head] * torch.arange(1 - k.shape[1], 1)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        seen.append(scores.softmax(-1).nan_to_num(0.0) @ v[..., theirs])
    return torch.cat(seen, dim=-1)


def rotary(positions, width, base=10000.0):
    """Turn the first `width` channels of [B, T, D] by positions int[B, T]."""
    angles = positions[..., None] * base ** (-torch.arange(0, width, 2) / width)

    def turn(x):
        a, b = x[..., : width // 2], x[..., width // 2 : width]
        turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
        return torch.cat([*turned, x[..., width:]], dim=-1)

    return turn


def causal(real):
    """bool[B, T] -> bool[B, T, T]: keys up to oneself that are real."""
    return torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril() & real[:, None]


def patches(w, name, pixels, class_token, positions):
    x = F.conv2d(pixels, w[f"{name}.weight"], w.get(f"{name}.bias"), stride=w[f"{name}.weight"].shape[-1])
    x = x.flatten(2).transpose(1, 2)
    return torch.cat([class_token.reshape(1, 1, -1).expand(len(x), 1, -1), x], dim=1) + positions.reshape(1, -1, x.shape[-1])


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def mlp(w, first, second, x, activation):
    return linear(w, second, activation(linear(w, first, x)))


def qkv(w, base, x, num_heads):
    """Queries, keys and values, from three layers or from one in which they lie head by head."""
    if f"{base}.query_key_value.weight" not in w:
        return [linear(w, f"{base}.{name}_proj", x) for name in "qkv"]
    return [part.flatten(-2) for part in linear(w, f"{base}.query_key_value", x).unflatten(-1, (num_heads, 3, -1)).unbind(-2)]


def tower(w, base, x, num_layers, num_heads, names, activation, eps):
    """Pre-norm blocks; names: of norm, attention, its output, second norm, and the two layers of the feed-forward."""
    for i in range(num_layers):
        norm_1, attention, output, norm_2, fc_1, fc_2 = (f"{base}{i}.{name}" for name in names)
        x = x + linear(w, output, attend(*qkv(w, attention, layer_norm(w, norm_1, x, eps), num_heads), num_heads))
        x = x + mlp(w, fc_1, fc_2, layer_norm(w, norm_2, x, eps), activation)
    return x


def loss_of(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())[None]


def eva(w, pixels, config):
    x = patches(w, "vision_encoder.patch_embed.proj", pixels, w["vision_encoder.cls_token"], w["vision_encoder.pos_embed"])
    names = ("norm1", "attn", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return tower(w, "vision_encoder.blocks.", x, config["depth"], config["heads"], names, F.gelu, 1e-6)


def resampler(w, name, x, depth, with_latents):
    z = w[f"{name}.latents"].expand(len(x), -1, -1)
    for i in range(depth):
        layer = f"{name}.layers.{i}."
        media, latents = layer_norm(w, f"{layer}0.norm_media", x, 1e-5), layer_norm(w, f"{layer}0.norm_latents", z, 1e-5)
        keys = torch.cat([media, latents], dim=1) if with_latents else media
        k, v = linear(w, f"{layer}0.to_kv", keys).chunk(2, dim=-1)
        z = z + linear(w, f"{layer}0.to_out", attend(linear(w, f"{layer}0.to_q", latents), k, v, 8))
        z = z + mlp(w, f"{layer}1.1", f"{layer}1.3", layer_norm(w, f"{layer}1.0", z, 1e-5), F.gelu)
    return layer_norm(w, f"{name}.norm", z, 1e-5)


def llama(w, prefix, x, config, real, modality=None):
    """LLaMA with Lynx's adapters where there are any, or mPLUG-Owl2's two branches by modality int[B, T]."""
    eps, heads = config["rms_norm_eps"], config["num_attention_heads"]
    turn = rotary(torch.arange(x.shape[1]).expand(len(x), -1), x.shape[-1] // heads)

    def norm(name, x):
        if modality is None:
            return rms_norm(w[f"{name}.weight"], x, eps)
        weights = torch.stack([w[f"{name}.multiway.{m}.weight"] for m in (0, 1)])
        return rms_norm(weights[modality], x, eps)

    def project(name, x):
        if modality is None:
            return linear(w, name, x)
        text, image = (linear(w, f"{name}.multiway.{m}", x) for m in (0, 1))
        return torch.where(modality[..., None] == 1, image, text)

    for i in range(config["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{i}."
        h = norm(f"{layer}input_layernorm", x)
        q, k, v = linear(w, f"{layer}self_attn.q_proj", h), *(project(f"{layer}self_attn.{n}_proj", h) for n in "kv")
        x = x + linear(w, f"{layer}self_attn.o_proj", attend(q, k, v, heads, causal(real), turn))
        h = norm(f"{layer}post_attention_layernorm", x)
        gated = F.silu(linear(w, f"{layer}mlp.gate_proj", h)) * linear(w, f"{layer}mlp.up_proj", h)
        x = x + linear(w, f"{layer}mlp.down_proj", gated)
        adapter = f"{layer}output_adapter."
        if f"{adapter}scaling" in w:
            h = layer_norm(w, f"{adapter}adapter_norm_before", x, 1e-5)
            x = x + w[f"{adapter}scaling"] * mlp(w, f"{adapter}adapter_down", f"{adapter}adapter_up", h, F.silu)
    return linear(w, f"{prefix}lm_head", rms_norm(w[f"{prefix}model.norm.weight"], x, eps))


def lynx(w, config, inputs):
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    words = w["LLM.model.embed_tokens.weight"][inputs["input_ids"]]
    out = {"vision_features": eva(w, inputs["pixel_values"], config["vision"])}
    clip = eva(w, inputs["video"].flatten(0, 1), config["vision"]).unflatten(0, inputs["video"].shape[:2])
    clip = (clip + w["absolute_frame_pos_embed"][:, : clip.shape[1]]).flatten(1, 2)
    for features, name, logits in (
        (out["vision_features"], "visual_tokens", "logits"), (clip, "video_tokens", "video_logits"),
    ):  # fmt: skip
        out[name] = resampler(w, "bridge", features, config["bridge"]["depth"], False)
        real = torch.cat([torch.ones(out[name].shape[:2], dtype=torch.bool), mask], dim=1)
        out[logits] = llama(w, "LLM.", torch.cat([out[name], words], dim=1), config["llm"], real)
    return out


def owl_vision(w, pixels, config):
    base, eps = "model.vision_model.", config["layer_norm_eps"]
    x = patches(
        w, f"{base}embeddings.patch_embed", pixels, w[f"{base}embeddings.cls_token"], w[f"{base}embeddings.position_embedding"]
    )
    x = layer_norm(w, f"{base}embeddings.pre_layernorm", x, eps)
    names = ("input_layernorm", "self_attn", "self_attn.dense", "post_attention_layernorm", "mlp.fc1", "mlp.fc2")
    sizes = config["num_hidden_layers"], config["num_attention_heads"]
    x = tower(w, f"{base}encoder.layers.", x, *sizes, names, quick_gelu, eps)
    return layer_norm(w, f"{base}post_layernorm", x, eps)


def waves(places, width):
    angles = places[:, None] / 10000 ** (torch.arange(width // 2) / (width / 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def abstractor(w, x, config):
    base, width = "model.visual_abstractor.", x.shape[-1]
    q = w[f"{base}query_embeds"].expand(len(x), -1, -1)
    side = round((x.shape[1] - 1) ** 0.5)
    grid = torch.arange(side * side)
    places = torch.cat([waves(grid % side, width // 2), waves(grid // side, width // 2)], dim=1)  # column, then row
    places = torch.cat([waves(torch.arange(q.shape[1]), width), torch.zeros(1, width), places])
    for i in range(config["num_hidden_layers"]):
        layer = f"{base}encoder.layers.{i}.crossattention."
        q, images = layer_norm(w, f"{layer}norm1", q, 1e-5), layer_norm(w, f"{layer}normk", x, 1e-5)
        both = torch.cat([q, images], dim=1)
        queries = linear(w, f"{layer}attention.query", q + places[: q.shape[1]])
        keys, values = linear(w, f"{layer}attention.key", both + places), linear(w, f"{layer}attention.value", both)
        q = q + linear(w, f"{layer}output.out_proj", attend(queries, keys, values, config["num_attention_heads"]))
        h, gated = layer_norm(w, f"{layer}output.norm2", q, 1e-5), f"{layer}output.mlp."
        h = F.silu(linear(w, f"{gated}w1", h)) * linear(w, f"{gated}w3", h)
        q = q + linear(w, f"{gated}w2", layer_norm(w, f"{gated}ffn_ln", h, config["layer_norm_eps"]))
    return torch.cat([linear(w, f"{base}visual_fc", q), w[f"{base}vit_eos"].expand(len(x), -1, -1)], dim=1)


def splice(w, inputs, tokens):
    """Embeddings, labels, modality, and what may be attended to; a row without a picture skips one.

    A mask grows in front by what its row gains, as in the official code, so that behind padding on the left it hides
    the wrong places.
    """
    words, pictures, rows, ids = w["model.embed_tokens.weight"], iter(tokens), [], inputs["input_ids"]
    masks = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    for row, row_labels, mask in zip(ids, inputs["labels"], masks):
        parts = []
        for token, label in zip(row, row_labels):
            picture = next(pictures) if token == IMAGE else words[token][None]
            parts.append((picture, torch.full((len(picture),), -100 if token == IMAGE else int(label)), token == IMAGE))
        if IMAGE not in row:
            next(pictures)
        kinds = torch.cat([torch.full((len(x),), int(image)) for x, _, image in parts])
        mask = F.pad(mask, (len(kinds) - len(row), 0), value=True)
        rows.append((torch.cat([x for x, _, _ in parts]), torch.cat([y for _, y, _ in parts]), kinds, mask))
    length = max(len(x) for x, *_ in rows)
    return tuple(torch.stack(column) for column in zip(*(
        (F.pad(x, (0, 0, 0, length - len(x))), F.pad(y, (0, length - len(y)), value=-100),
         F.pad(kinds, (0, length - len(x))), F.pad(mask, (0, length - len(x)), value=False))
        for x, y, kinds, mask in rows
    )))  # fmt: skip


def mplug_owl2(w, config, inputs):
    pixels = inputs["pixel_values"]
    out = {"vision_features": owl_vision(w, pixels.flatten(0, -4), config["vision"])}
    out["visual_tokens"] = abstractor(w, out["vision_features"], config["abstractor"])
    if pixels.ndim == 5:  # several pictures at one placeholder: their tokens behind one another
        out["visual_tokens"] = out["visual_tokens"].unflatten(0, pixels.shape[:2]).flatten(1, 2)
    x, labels, kinds, real = splice(w, inputs, out["visual_tokens"])
    out["logits"] = llama(w, "", x, config["llm"], real, kinds)
    out["loss"] = loss_of(out["logits"], labels)
    text = inputs["text_ids"]
    words = w["model.embed_tokens.weight"][text]
    out["text_logits"] = llama(w, "", words, config["llm"], torch.ones_like(text, dtype=torch.bool), text * 0)
    return out


def clip(w, base, pixels, config, num_layers):
    x = patches(
        w, f"{base}embeddings.patch_embedding", pixels, w[f"{base}embeddings.class_embedding"],
        w[f"{base}embeddings.position_embedding.weight"],
    )  # fmt: skip
    x = layer_norm(w, f"{base}pre_layrnorm", x, 1e-5)
    names = ("layer_norm1", "self_attn", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2")
    return tower(w, f"{base}encoder.layers.", x, num_layers, config["num_attention_heads"], names, quick_gelu, 1e-5)


def phi(w, x, config, real):
    heads = config["num_attention_heads"]
    width = int(config["partial_rotary_factor"] * (x.shape[-1] // heads))
    turn = rotary(torch.arange(x.shape[1]).expand(len(x), -1), width)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = layer_norm(w, f"{layer}input_layernorm", x, 1e-5)
        seen = attend(*qkv(w, f"{layer}self_attn", h, heads), heads, causal(real), turn)
        x = x + linear(w, f"{layer}self_attn.dense", seen)
        x = x + mlp(w, f"{layer}mlp.fc1", f"{layer}mlp.fc2", h, lambda h: F.gelu(h, approximate="tanh"))
    return linear(w, "lm_head", layer_norm(w, "model.final_layernorm", x, 1e-5))


def llava_phi(w, config, inputs):
    vision = config["vision"]
    num_layers = vision["num_hidden_layers"] + 1 + vision["mm_vision_select_layer"]
    x = clip(w, "model.vision_tower.vision_model.", inputs["pixel_values"], vision, num_layers)
    x = x[:, 1:] if vision["mm_vision_select_feature"] == "patch" else x
    out = {"visual_tokens": mlp(w, "model.mm_projector.0", "model.mm_projector.2", x, F.gelu)}
    x, labels, _, real = splice(w, inputs, out["visual_tokens"])
    out["logits"] = phi(w, x, config["llm"], real)
    out["loss"] = loss_of(out["logits"], labels)
    return out


def look(w, gated, x, flat, allowed):
    """A layer's cross-attention, where it has one."""
    if f"{gated}attn_gate" not in w:
        return x
    q = linear(w, f"{gated}attn.to_q", layer_norm(w, f"{gated}attn.norm", x, 1e-5))
    k, v = linear(w, f"{gated}attn.to_kv", flat).chunk(2, dim=-1)
    x = x + w[f"{gated}attn_gate"].tanh() * linear(w, f"{gated}attn.to_out", attend(q, k, v, 8, allowed))
    h = mlp(w, f"{gated}ff.1", f"{gated}ff.3", layer_norm(w, f"{gated}ff.0", x, 1e-5), F.gelu)
    return x + w[f"{gated}ff_gate"].tanh() * h


def opt_layer(w, layer, x, config, real):
    h = layer_norm(w, f"{layer}self_attn_layer_norm", x, 1e-5)
    heads = config["num_attention_heads"]
    seen = attend(*qkv(w, f"{layer}self_attn", h, heads), heads, causal(real))
    x = x + linear(w, f"{layer}self_attn.out_proj", seen)
    return x + mlp(w, f"{layer}fc1", f"{layer}fc2", layer_norm(w, f"{layer}final_layer_norm", x, 1e-5), F.relu)


def mpt_layer(w, layer, x, config, real):
    old, heads = config["model_type"] == "mosaic_gpt", config["n_heads"]
    clip = config["attn_clip_qkv"] if old else config["attn_config"]["clip_qkv"]
    norm, up, down = ("ln_", "mlp.mlp_up", "mlp.mlp_down") if old else ("norm_", "ffn.up_proj", "ffn.down_proj")
    parts = linear(w, f"{layer}attn.Wqkv", layer_norm(w, f"{layer}{norm}1", x, 1e-5))
    q, k, v = (parts if clip is None else parts.clamp(-clip, clip)).chunk(3, dim=-1)
    if f"{layer}attn.q_ln.weight" in w:
        q, k = layer_norm(w, f"{layer}attn.q_ln", q, 1e-5), layer_norm(w, f"{layer}attn.k_ln", k, 1e-5)
    whole = heads if old else 2 ** math.ceil(math.log2(heads))
    slopes = 2 ** (-8 * torch.arange(1, whole + 1) / whole)
    slopes = slopes if whole == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]
    x = x + linear(w, f"{layer}attn.out_proj", attend(q, k, v, heads, causal(real), slopes=slopes))
    return x + mlp(w, f"{layer}{up}", f"{layer}{down}", layer_norm(w, f"{layer}{norm}2", x, 1e-5), F.gelu)


def open_flamingo(w, config, inputs):
    ids, features = inputs["input_ids"], inputs["vision_features"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    media = resampler(w, "perceiver", features.flatten(2, 3).flatten(0, 1), config["resampler"]["depth"], True)
    media = media.unflatten(0, features.shape[:2])
    flat = media.flatten(1, 2)
    number = torch.arange(1, media.shape[1] + 1).repeat_interleave(media.shape[2])
    time = (ids == config["media_token_id"]).cumsum(1)
    allowed, llm = time[..., None] == number, config["llm"]
    if llm.get("model_type", "opt") == "opt":
        base = "lang_encoder.model.decoder."
        places = (real.long().cumsum(1) * real - 1) + 2
        words, last = f"{base}embed_tokens", f"{base}final_layer_norm"
        x = w[f"{words}.weight"][ids] + w[f"{base}embed_positions.weight"][places]
        layers, run, number = f"{base}layers.", opt_layer, llm["num_hidden_layers"]
    else:
        base = "lang_encoder.transformer."
        words, last = f"{base}wte", f"{base}ln_f" if llm["model_type"] == "mosaic_gpt" else f"{base}norm_f"
        x, layers, run, number = w[f"{words}.weight"][ids], f"{base}blocks.", mpt_layer, llm["n_layers"]
    for i in range(number):
        x = look(w, f"{layers}{i}.gated_cross_attn_layer.", x, flat, allowed)
        x = run(w, f"{layers}{i}.decoder_layer.", x, llm, real)
    out = {"visual_tokens": media, "logits": F.linear(layer_norm(w, last, x, 1e-5), w[f"{words}.weight"])}
    return out | ({"loss": loss_of(out["logits"], inputs["labels"])} if "labels" in inputs else {})


OFFICIAL = {"lynx": lynx, "mplug_owl2": mplug_owl2, "llava_phi": llava_phi, "open_flamingo": open_flamingo}


def random_weights(shapes):
    """Weights in which everything counts: norms around 1, gates and biases well off 0."""
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape)
        if len(shape) < 2:
            weights[name] = 0.3 * value + name.endswith(("weight", "scaling"))  # a norm's, or Lynx's scale
        elif name.endswith("weight") and "embed_" not in name and "wte" not in name:
            weights[name] = value / value[0].numel() ** 0.5
        else:  # tables, tokens, latents
            weights[name] = 0.5 * value
    return weights


def write(path, config, weights, inputs, outputs):
    """A golden file."""
    tensors = {f"weights/{n}": t for n, t in weights.items()} | {f"in/{n}": t for n, t in inputs.items()}
    tensors |= {f"out/{n}": t for n, t in outputs.items()}
    metadata = {} if config is None else {"config": config if isinstance(config, str) else json.dumps(config)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path
