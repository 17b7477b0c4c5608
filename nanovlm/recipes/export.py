"""Write a model in the layout of its paper's weights, with LoRA merged, for other programs to load."""

import copy
import json
import shutil

import torch

from nanovlm import recipes
from nanovlm.recipes.coverage import find_family
from nanovlm.recipes.opening import build_on_meta, family_of, has_vision, open_trained, read_config, vision_of
from nanovlm.recipes.recipe import with_vocabulary
from nanovlm.weight_errors import WeightsError
from nanovlm.weight_files import OURS, TYPES, new_folder, open_checkpoint, write_checkpoint
from nanovlm.weight_loading import load_model

BESIDE = (  # what lies beside weights and says how to talk to them
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip
HEADERS = {  # what transformers wants to read in config.json beside the sizes
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "phi": {"model_type": "phi", "architectures": ["PhiForCausalLM"]},
    "opt": {"model_type": "opt", "architectures": ["OPTForCausalLM"]},
    "clip": {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]},
    "siglip": {"model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"]},
    "eva": {"model_type": "blip_2_vision_model", "architectures": ["Blip2VisionModel"]},
    "llava": {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 32000,
        "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "vision_config": {"model_type": "clip_vision_model"}, "text_config": {"model_type": "llama"},
    },
    "blip2": {
        "model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"], "image_token_index": 50265,
        "vision_config": {"model_type": "blip_2_vision_model"}, "qformer_config": {"model_type": "blip_2_qformer"},
        "text_config": {"model_type": "opt"},
    },
}  # fmt: skip


def export(source, out, wishes):
    """Write a folder in the published layout.

    Args:
      source: Path of a folder that train.py or `convert` wrote, or of a published one (.bin becomes safetensors).
      out: Path that does not exist yet. wishes: the command's flags: family, dtype, max_shard_gb.
    Returns: list of lines to print.
    Raises: ValueError or OSError, in words for the user.
    """
    checkpoint = open_checkpoint(source, pickled=True)
    folder = source if source.is_dir() else source.parent
    config = read_config(folder)
    dtype = vars(torch)[wishes.dtype] if wishes.dtype else type_of(checkpoint)
    model, published, sizes = read(folder, config, checkpoint, dtype, wishes.family)
    image_size = vision_of(model).image_size if has_vision(model) else None
    sizes = published_config(published.family, sizes, image_size, dtype)
    with new_folder(out) as temporary:
        names = write_checkpoint(temporary, published.layout(sizes), model.state_dict(), int(wishes.max_shard_gb * 1e9))
        (temporary / "config.json").write_text(json.dumps(sizes, indent=2))
        beside = [name for name in BESIDE if (folder / name).exists()]
        for name in beside:
            shutil.copyfile(folder / name, temporary / name)
    files = f"{len(names)} file{'s' * (len(names) > 1)}"
    return [f"written: {out} ({published.family}, {files}, {dtype}, published layout)",
            f"copied: {', '.join(beside) or 'no tokenizer files'}"]


def type_of(checkpoint):
    """The type of most of a checkpoint's tensors: torch.dtype. Raises: WeightsError if it is no floating-point one."""
    kinds = list(checkpoint.dtypes.values())
    kind = max(TYPES, key=kinds.count)
    if kind not in kinds:
        raise WeightsError(f"{checkpoint.where} holds no weights of type {', '.join(TYPES)}")
    return TYPES[kind]


def read(folder, config, checkpoint, dtype, family):
    """The model of a folder: (nn.Module, recipe.Published, its config)."""
    if "recipe" in config:
        recipe = recipes.find(config["recipe"])
        if recipe.published is None:
            raise ValueError(f"recipe {recipe.name!r} is nobody's published model, so there is no layout to write")
        loaded = open_trained(folder, config, recipe, dtype, "cpu")
        sizes = with_vocabulary(recipe.published.configs[config["size"]], loaded.tokenizer.vocab_size)
        return loaded.model, recipe.published, sizes
    published = find_family(family or family_of(config, str(folder / "config.json"), recipes.FAMILIES))
    ours = "family" in config
    sizes = config["config"] if ours else config
    _, layout = build_on_meta(published, sizes)

    def build():
        model = published.build(sizes)
        if ours and config.get("image_size"):
            vision_of(model).resize(config["image_size"])
        return model

    return load_model(build, OURS if ours else layout, checkpoint, dtype)[0], published, sizes


def published_config(family, sizes, image_size, dtype):
    """config.json of a published folder: the sizes, what transformers wants to know, and the present picture size."""
    config = merged(HEADERS.get(family, {"model_type": family}), sizes)
    for path in (("vision_config",), ("vision",), ("visual_config", "visual_model")):
        part = config
        for key in path:
            part = part.get(key) if isinstance(part, dict) else None
        if isinstance(part, dict) and image_size:
            part["image_size"] = image_size
    return config | {"torch_dtype": str(dtype).removeprefix("torch.")}


def merged(defaults, config):
    """A config with defaults for what it leaves out, nested parts one by one: a new dict."""
    result = copy.deepcopy(config)
    for key, value in defaults.items():
        if isinstance(value, dict):
            result[key] = merged(value, result.get(key) or {})
        else:
            result.setdefault(key, value)
    return result
