"""Sizes of a model read off the shapes of its published tensors, to complete a config and to check it.

Every family has a function (shapes, config) -> {dotted key of its config: value}. Counts of heads leave no trace in a
shape, unless a buffer of rotary angles tells them; where the config is silent too, they are the released model's.
"""

import json
import math
import re

from golden import GoldenError


class Shapes:
    """Asks the shapes of published tensors; None where a tensor is absent, which is for the layout to report."""

    def __init__(self, weights):
        self.shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}

    def length(self, name, axis):
        """int, a tensor's length along an axis; None without the tensor or the axis."""
        shape = self.shapes.get(name, ())
        return shape[axis] if -len(shape) <= axis < len(shape) else None

    def numbers(self, pattern):
        """Which numbers stand at `{i}`: sorted list of int. pattern: the beginning of a name."""
        head = re.escape(pattern).replace(r"\{i\}", r"(\d+)")
        return sorted({int(found[1]) for name in self.shapes if (found := re.match(head, name))})

    def count(self, pattern):
        """How many numbers stand at `{i}`: int, or None for none."""
        return len(self.numbers(pattern)) or None

    def image_size(self, positions, patch_embedding):
        """Pixels of a side, from a position table with a class token's row, [..., T, W]; None if it is no such grid."""
        rows, patch = self.length(positions, -2), self.length(patch_embedding, -1)
        if None in (rows, patch) or math.isqrt(rows - 1) ** 2 != rows - 1:
            return None
        return math.isqrt(rows - 1) * patch


def llama_sizes(shapes, prefix, config, norm_keys=""):
    """Sizes of a LLaMA: {key of its config: int or None}; norm_keys: what stands behind k_proj ("multiway.0.")."""
    width = shapes.length(f"{prefix}model.embed_tokens.weight", 1)
    angles = shapes.length(f"{prefix}model.layers.0.self_attn.rotary_emb.inv_freq", 0)
    heads = width // (2 * angles) if width and angles else config.get("num_attention_heads")
    kv_width = shapes.length(f"{prefix}model.layers.0.self_attn.k_proj.{norm_keys}weight", 0)
    kv_heads = kv_width * heads // width if kv_width and width and isinstance(heads, int) else None
    return {
        "vocab_size": shapes.length(f"{prefix}model.embed_tokens.weight", 0),
        "hidden_size": width,
        "intermediate_size": shapes.length(f"{prefix}model.layers.0.mlp.gate_proj.weight", 0),
        "num_hidden_layers": shapes.count(f"{prefix}model.layers.{{i}}."),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def lynx_sizes(shapes, config):
    """Sizes of a Lynx: {dotted key of its config: value or None}."""
    llm = llama_sizes(shapes, "LLM.", config.get("llm") or {})
    chosen = shapes.numbers("LLM.model.layers.{i}.output_adapter.")
    steps = {after - before for before, after in zip(chosen, chosen[1:])}
    frequency = steps.pop() if len(steps) == 1 else None
    if chosen == [0]:  # one adapter alone: any step that leaves the other layers out
        frequency = config.get("adapter_freq") or llm["num_hidden_layers"]
    sizes = {
        "vision.image_size": shapes.image_size("vision_encoder.pos_embed", "vision_encoder.patch_embed.proj.weight"),
        "vision.patch_size": shapes.length("vision_encoder.patch_embed.proj.weight", -1),
        "vision.width": shapes.length("vision_encoder.patch_embed.proj.weight", 0),
        "vision.depth": shapes.count("vision_encoder.blocks.{i}."),
        "bridge.depth": shapes.count("bridge.layers.{i}."),
        "bridge.num_latents": shapes.length("bridge.latents", 0),
        "bridge.ffn_width": shapes.length("bridge.layers.0.1.1.weight", 0),
        "adapter_freq": frequency,
        "adapter_width": shapes.length("LLM.model.layers.0.output_adapter.adapter_down.weight", 0),
        "num_frames": shapes.length("absolute_frame_pos_embed", 1),
    }
    if "mlp_ratio" not in (config.get("vision") or {}):
        sizes["vision.mlp_width"] = shapes.length("vision_encoder.blocks.0.mlp.fc1.weight", 0)
    sizes |= resampler_sizes(shapes, "bridge.", "bridge.", config.get("bridge") or {})
    return sizes | {f"llm.{key}": value for key, value in llm.items()}


def resampler_sizes(shapes, prefix, key, config):
    """Heads of a resampler's attention: 64 channels each, unless the config says otherwise."""
    inner = shapes.length(f"{prefix}layers.0.0.to_q.weight", 0)
    if not inner or {"heads", "head_width"} <= config.keys():
        return {}
    if "heads" in config:
        return {f"{key}head_width": inner // config["heads"]}
    head_width = config.get("head_width", 64)
    return {f"{key}heads": inner // head_width, f"{key}head_width": head_width}


def clip_sizes(shapes, tower, patches, positions, fc_1):
    """Sizes of a CLIP tower: {key of its config: int or None}; tower, patches, positions, fc_1: its names."""
    return {
        "hidden_size": shapes.length(patches, 0),
        "intermediate_size": shapes.length(fc_1, 0),
        "num_hidden_layers": shapes.count(f"{tower}encoder.layers.{{i}}."),
        "image_size": shapes.image_size(positions, patches),
        "patch_size": shapes.length(patches, -1),
    }


def mplug_owl2_sizes(shapes, config):
    """Sizes of an mPLUG-Owl2: {dotted key of its config: value or None}."""
    tower, queries = "model.vision_model.", "model.visual_abstractor."
    mlp = f"{queries}encoder.layers.0.crossattention.output.mlp."
    vision = clip_sizes(
        shapes, tower, f"{tower}embeddings.patch_embed.weight", f"{tower}embeddings.position_embedding",
        f"{tower}encoder.layers.0.mlp.fc1.weight",
    )  # fmt: skip
    abstractor = {
        "num_learnable_queries": shapes.length(f"{queries}query_embeds", 1),
        "hidden_size": shapes.length(f"{queries}query_embeds", 2),
        "num_hidden_layers": shapes.count(f"{queries}encoder.layers.{{i}}."),
        "intermediate_size": shapes.length(f"{mlp}w1.weight", 0),
    }
    llm = llama_sizes(shapes, "", config.get("llm") or {}, "multiway.0.")
    parts = {"vision": vision, "abstractor": abstractor, "llm": llm}
    return {f"{part}.{key}": value for part, sizes in parts.items() for key, value in sizes.items()}


def llava_phi_sizes(shapes, config):
    """Sizes of a LLaVA-Phi: {dotted key of its config: value or None}."""
    tower = "model.vision_tower.vision_model."
    vision = clip_sizes(
        shapes, tower, f"{tower}embeddings.patch_embedding.weight", f"{tower}embeddings.position_embedding.weight",
        f"{tower}encoder.layers.0.mlp.fc1.weight",
    )  # fmt: skip
    llm = {
        "vocab_size": shapes.length("model.embed_tokens.weight", 0),
        "hidden_size": shapes.length("model.embed_tokens.weight", 1),
        "intermediate_size": shapes.length("model.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": shapes.count("model.layers.{i}."),
    }
    return {f"vision.{key}": value for key, value in vision.items()} | {f"llm.{key}": value for key, value in llm.items()}


def open_flamingo_sizes(shapes, config):
    """Sizes of an OpenFlamingo: {dotted key of its config: value or None}."""
    decoder = "lang_encoder.model.decoder."
    chosen = shapes.numbers(f"{decoder}layers.{{i}}.gated_cross_attn_layer.")
    positions = shapes.length(f"{decoder}embed_positions.weight", 0)
    return {
        "vision_width": shapes.length("perceiver.latents", 1),
        "cross_attn_every_n_layers": chosen[0] + 1 if chosen else None,  # layers n - 1, 2n - 1, ...
        "resampler.depth": shapes.count("perceiver.layers.{i}."),
        "resampler.num_latents": shapes.length("perceiver.latents", 0),
        "llm.vocab_size": shapes.length(f"{decoder}embed_tokens.weight", 0),
        "llm.hidden_size": shapes.length(f"{decoder}embed_tokens.weight", 1),
        "llm.ffn_dim": shapes.length(f"{decoder}layers.0.decoder_layer.fc1.weight", 0),
        "llm.num_hidden_layers": shapes.count(f"{decoder}layers.{{i}}."),
        "llm.max_position_embeddings": positions - 2 if positions else None,  # OPT's two unused rows
    }


SIZES = {
    "lynx": lynx_sizes, "mplug_owl2": mplug_owl2_sizes, "llava_phi": llava_phi_sizes, "open_flamingo": open_flamingo_sizes,
}  # fmt: skip


def settle(family, config, weights):
    """The config with what it leaves out read off the shapes.

    Args:
      family: of golden.MARKS. config: dict, in the recipe's own form. weights: {published name: Tensor}.
    Returns: dict.
    Raises: GoldenError with every value that contradicts the shapes.
    """
    config = json.loads(json.dumps(config))
    wrong = []
    for key, value in SIZES[family](Shapes(weights), config).items():
        *path, last = key.split(".")
        part = config
        for name in path:
            part[name] = part.get(name) or {}
            if not isinstance(part[name], dict):
                raise GoldenError(f"config: {name} is {part[name]!r}; an object with sizes was expected")
            part = part[name]
        if value is None:
            continue
        if part.get(last) is None:
            part[last] = value
        elif part[last] != value:
            wrong.append(f"{key} is {part[last]!r}, but the weights say {value}")
    if wrong:
        raise GoldenError("config and weights contradict each other: " + "; ".join(wrong))
    return config
