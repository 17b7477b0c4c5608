"""Published weights into our folder, separate towers into a model to train, and our folder into the published layout.

    python -m nanovlm.recipes convert --family lynx finetune_lynx.pt --vision eva_vit_g.pth --language vicuna/ OUT
    python -m nanovlm.recipes convert --family lynx --vision eva_vit_g.pth --language vicuna/ OUT   a start to train
    python -m nanovlm.recipes convert --to published out/llava OUT

Towers and language models fill their parts first; SOURCE, which holds what was trained, is laid over them. What no
file holds is an error beside a SOURCE, and initialised from a seed without one. .pt and .bin files are read with
weights_only=True.
"""

import collections
import copy
import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import nanovlm
from nanovlm import recipes
from nanovlm.machine import DTYPES
from nanovlm.modality_adaptive import ModalityAdaptive
from nanovlm.names import nearest
from nanovlm.published.language import LLAMA, OPT, PHI, QWEN2
from nanovlm.published.load import (
    added_tokens, build_on_meta, family_of, has_vision, load_tokenizer, open_trained, read_config, vision_of,
)
from nanovlm.published.vision import BEHIND, BLIP2_REST, CLIP, EVA, eva_original, OTHER_SIDE, SIGLIP
from nanovlm.published.weights import (
    Alias, check_types, Checkpoint, explain, fill, load_model, materialise, new_folder, open_checkpoint, OURS, plan,
    Plan, prefixed, shapes_of, TYPES, WeightsError, write_checkpoint,
)
from nanovlm.recipes import FAMILIES, OF_FAMILY
from nanovlm.recipes.open_flamingo import OPEN_CLIP
from nanovlm.recipes.recipe import with_vocabulary
from nanovlm.vlm import part_of


# Does a published checkpoint fit? Its manifest, names and shapes alone, against the model on the meta device.
#
#     python -m nanovlm.recipes coverage MANIFEST.json
#
# A manifest is a JSON object with `family`, `config` and `tensors` {name: shape}; `computed_or_extra_tensors` may list
# what some files carry beside them. Every tensor is consumed, computed by the model, or unused for a reason.


ASIDE = {("siglip", "pool."): "attention pooling, which serves SigLIP's own loss"}  # (family, our prefix) -> reason


@dataclass
class Coverage:
    """What became of every tensor of a manifest.

    name, family: str. found: Plan. shapes: {published name: shape}. ours: {our name: shape}.
    unused: {published name: reason}, what the towers keep for themselves included. stated: total_params or None.
    """

    name: str
    family: str
    found: Plan
    shapes: dict
    ours: dict
    unused: dict
    stated: object

    def lines(self):
        """The report: list of str."""
        consumed = [name for name in self.found.consumed if name not in self.unused]
        computed = self.found.computed | dict.fromkeys(self.found.twice, "a second copy of a tied tensor")
        zeros = sum(
            names.count(None) * count(self.shapes[name]) // len(names)
            for name, (_, names) in self.found.consumed.items()
        )
        model = count_all(self.ours.values()) + zeros
        note = f" ({zeros:,} of them zeros, which only the file holds)" if zeros else ""
        lines = [f"{self.name}: family {self.family}"]
        for title, names in (("consumed", consumed), ("computed", computed), ("unused", self.unused)):
            numbers = count_all(self.shapes[name] for name in names)
            lines.append(f"  {title:9} {len(names):5,} tensors {numbers:15,} numbers")
            if title != "consumed":
                reasons = collections.Counter((computed if title == "computed" else self.unused).values())
                lines += [f"             {number} x {reason}" for reason, number in reasons.items()]
        file = count_all(shape for name, shape in self.shapes.items() if name not in computed)
        lines += [f"  parameters of the file  {file:15,}", f"  parameters of the model {model:15,}{note}"]
        if self.stated not in (None, file):
            lines.append(f"  note: the manifest states total_params {self.stated}")
        return lines


def count(shape):
    """Numbers in a tensor of this shape."""
    return math.prod(shape)


def count_all(shapes):
    """Numbers in tensors of these shapes."""
    return sum(map(count, shapes))


def find_family(name):
    """The Published of a family. Raises: WeightsError with the nearest known name."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise WeightsError(f"unknown family {name!r}.{nearest(name, FAMILIES)}")
    return FAMILIES[name]


def read_json(path):
    """A JSON object: dict. Raises: WeightsError naming the file."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return content


def read_shapes(content, key, path):
    """{name: tuple} under a key of a manifest; lists of whole numbers, or nothing. Raises: WeightsError."""
    tensors = content.get(key) or {}
    if not isinstance(tensors, dict):
        raise WeightsError(f"{path}: {key} is no object of names and shapes")
    wrong = [name for name, shape in tensors.items()
             if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape)]
    if wrong:
        raise WeightsError(f"{path}: {wrong[0]} has the shape {tensors[wrong[0]]!r}, expected a list of whole numbers")
    return {name: tuple(shape) for name, shape in tensors.items()}


def check(path):
    """Compare a manifest with the model that it describes.

    Args:
      path: str or Path of the JSON file.
    Returns: Coverage, of a manifest that fits.
    Raises: WeightsError naming everything that is left over, missing or mis-shaped, or what is wrong with the file.
    """
    content = read_json(path)
    absent = [key for key in ("family", "config", "tensors") if key not in content]
    if absent:
        raise WeightsError(f"{path} lacks {', '.join(absent)}; it is no manifest")
    published = find_family(content["family"])
    if not isinstance(content["config"], dict):
        raise WeightsError(f"{path}: config is no object")
    shapes = read_shapes(content, "tensors", path) | read_shapes(content, "computed_or_extra_tensors", path)
    model, table = build_on_meta(published, content["config"])
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = plan(table, shapes, ours)
    if not found.fits:
        raise WeightsError(explain(found, str(path)))
    unused = found.unused | {
        name: reason
        for (family, prefix), reason in ASIDE.items()
        for name, (_, names) in found.consumed.items()
        if family == published.family and not hasattr(model, "text") and names[0].startswith(prefix)
    }
    name = content.get("name", Path(path).stem)
    return Coverage(name, published.family, found, shapes, ours, unused, content.get("total_params"))


WRAPPED = (Alias("model.{rest}", "{rest}"), Alias("module.{rest}", "{rest}"))  # saved from inside a wrapper
LANGUAGE_MODELS = {"LLaMA": LLAMA, "Qwen2": QWEN2, "Phi-2": PHI, "OPT": OPT}
WORDS = ("decoder.embedding.weight", "decoder.lm_head.weight", "decoder.lm_head.bias")


@dataclass
class Source:
    """A checkpoint and the tensors of the model that it fills.

    checkpoint: Checkpoint. found: Plan. copies: {our name: names that receive the same values}.
    """

    checkpoint: Checkpoint
    found: Plan
    copies: dict

    def names(self):
        """Our names that it fills: set of str."""
        filled = {part for _, names in self.found.consumed.values() for part in names if part is not None}
        return {name for part in filled for name in self.copies.get(part, (part,))}


def convert(wishes):
    """Run `convert`.

    Args:
      wishes: the values of the command's flags, see __main__.py.
    Returns: list of lines to print.
    Raises: ValueError or OSError, in words for the user; OUT then does not exist.
    """
    *paths, out = map(Path, wishes.paths)
    if wishes.to == "published":
        if len(paths) != 1 or wishes.vision or wishes.language:
            raise ValueError("--to published takes one folder and OUT")
        return export(paths[0], out, wishes)
    if not paths and not (wishes.vision and wishes.language):
        raise ValueError("name a checkpoint before OUT, or both --vision and --language")
    family, config = choose_config(wishes, paths)
    published = find_family(family)
    model, table = build_on_meta(published, config)
    if wishes.image_size:
        vision_of(model).resize(wishes.image_size)
    sources = find_sources(wishes, paths, model, table)
    rest = remaining(model, sources, bool(paths), published)
    dtype = DTYPES[wishes.dtype] if wishes.dtype else widest(sources)
    model = make(published, config, wishes, model, dtype, rest)
    for source in sources:
        fill(targets(model, source.copies), source.found, source.checkpoint)
        copy_tensors(model, source.copies)
    lines = [line for source in sources for line in report(source)] + started(rest, model, wishes.seed)
    with new_folder(out) as folder:
        told, config = write_tokenizer(folder, [wishes.language, *paths], OF_FAMILY.get(family), config)
        write_checkpoint(folder, OURS, model.state_dict(), int(wishes.max_shard_gb * 1e9))
        settings = {"family": family, "config": config, "sources": [source.checkpoint.where for source in sources],
                    "initialised": sorted(rest), "seed": wishes.seed, "version": nanovlm.__version__}
        if family in OF_FAMILY:
            settings["image_size"] = vision_of(model).image_size if has_vision(model) else 0
        (folder / "config.json").write_text(json.dumps(settings, indent=1))
    return [*lines, told, f"written: {out} ({family}, {count_all(shapes_of(model).values()):,} parameters, {dtype})"]


def choose_config(wishes, paths):
    """Family and sizes of the model: (str, dict); --config, then --size, then the source's config.json."""
    beside = next((read_json(path / "config.json") for path in paths if (path / "config.json").exists()), None)
    if beside and ("recipe" in beside or "family" in beside):
        raise ValueError(f"{paths[0]} is in our layout already; --to published writes it back")
    family = wishes.family or (family_of(beside, str(paths[0] / "config.json"), FAMILIES) if beside else None)
    if family is None:
        raise ValueError("no config.json says what this is: give --family NAME")
    published = find_family(family)
    if wishes.config:
        return family, read_json(wishes.config)
    if wishes.size and wishes.size not in published.configs:
        known = ", ".join(published.configs) or "none"
        raise ValueError(f"family {family!r} has no size {wishes.size!r}; there are {known}")
    if beside and not wishes.size and (not wishes.family or is_of(beside, family)):
        return family, beside
    if not published.configs:
        raise ValueError(f"the sizes of {family!r} are unknown without config.json; give --config FILE.json")
    return family, published.configs[wishes.size or "full"]


def is_of(config, family):
    """bool, whether a published config.json describes a model of this family."""
    try:
        return family_of(config, "config.json", FAMILIES) == family
    except ValueError:
        return False


def find_sources(wishes, paths, model, table):
    """Everything that will be read, in order: list of Source. Raises: WeightsError for what has no place."""
    ours, sources = shapes_of(model), []
    if wishes.language:
        names, copies = without_branches(model, ours)
        names = {name: shape for name, shape in names.items() if name.startswith("decoder.")}
        tables = {kind: prefixed(entries, ours="decoder.") for kind, entries in LANGUAGE_MODELS.items()}
        sources.append(best(open_checkpoint(wishes.language, pickled=True), tables, names, copies, WORDS))
    if wishes.vision:
        names = {name: shape for name, shape in ours.items() if name.startswith("vision.")}
        blocks = vision_of(model).config.num_layers
        tables = {"CLIP": (*CLIP, *OTHER_SIDE), "SigLIP": (*SIGLIP, *OTHER_SIDE), "EVA of BLIP-2": (*EVA, *BLIP2_REST),
                  "EVA": eva_original(blocks), "OpenCLIP": OPEN_CLIP}
        tables = {kind: prefixed((*entries, *BEHIND), ours="vision.") for kind, entries in tables.items()}
        sources.append(best(open_checkpoint(wishes.vision, pickled=True), tables, names, {}, ("vision.positions",)))
    for path in paths:
        checkpoint = open_checkpoint(path, pickled=True)
        resizable = ("vision.positions", "positions") if wishes.image_size else ()
        found = plan((*table, *WRAPPED), checkpoint.shapes, ours, resizable)
        sources.append(accepted(Source(checkpoint, found, {})))
    return sources


def best(checkpoint, tables, ours, copies, resizable):
    """The Source of a tower or language model in that of the known layouts which fits it best."""
    plans = [plan((*table, *WRAPPED), checkpoint.shapes, ours, resizable) for table in tables.values()]
    found = min(plans, key=lambda one: len(one.unexpected) + len(one.misshaped) + len(one.missing))
    if not found.consumed:
        raise WeightsError(f"{checkpoint.where} is none of {', '.join(tables)}; its first tensor is "
                           f"{next(iter(checkpoint.shapes), 'absent')}")
    return accepted(Source(checkpoint, found, copies))


def accepted(source):
    """The Source, if all its tensors have a place; it may fill a part of the model. Raises: WeightsError."""
    if source.found.unexpected or source.found.misshaped:
        raise WeightsError(explain(source.found, source.checkpoint.where))
    check_types(source.found, source.checkpoint)
    return source


def without_branches(model, ours):
    """The model's names as a plain language model has them.

    Returns: ({name: shape}, {name: names of the modality-adaptive copies that it fills}).
    """
    names, copies = dict(ours), {}
    for place, module in model.named_modules():
        if isinstance(module, ModalityAdaptive):
            for tensor in module.text.state_dict():
                copies[f"{place}.{tensor}"] = [f"{place}.{branch}.{tensor}" for branch in ("text", "vision")]
                names[f"{place}.{tensor}"] = ours[f"{place}.text.{tensor}"]
    for branches in copies.values():
        for name in branches:
            del names[name]
    return names, copies


def targets(model, copies):
    """{name: Tensor} to fill; a name with copies stands for the first of them."""
    state = model.state_dict()
    return state | {name: state[branches[0]] for name, branches in copies.items()}


@torch.no_grad()
def copy_tensors(model, copies):
    """Give the second of two copies the values of the first (mPLUG-Owl2, Sec. 3.3)."""
    state = model.state_dict()
    for first, second in copies.values():
        state[second].copy_(state[first])


def remaining(model, sources, has_source, published):
    """Tensors that no source holds: {our name: shape}.

    Raises: WeightsError if that is more than may be initialised, listed by part.
    """
    filled = set().union(*(source.names() for source in sources))
    rest = {name: shape for name, shape in shapes_of(model).items() if name not in filled}
    if rest and has_source:
        lines = [f"no file holds {len(rest)} of the model's {len(rest) + len(filled)} tensors:"]
        lines += [f"  {part}: {len(names)} tensors, from {names[0]}" for part, names in by_part(rest).items()]
        lines += [f"  {published.contents or 'the file holds a part of the model'}",
                  "  give a checkpoint of the tower with --vision, of the language model with --language"]
        raise WeightsError("\n".join(lines))
    for part in ("vision.blocks.", "decoder.layers."):
        given = [name for name in filled if name.startswith(part)]
        if not given and any(name.startswith(part) for name in rest):
            raise WeightsError(f"neither --vision nor --language holds {part[:-1]}: tower or language model is missing")
    return rest


def by_part(names):
    """{part: those of the tensors' names}."""
    parts = {}
    for name in names:
        parts.setdefault(part_of(name), []).append(name)
    return parts


def widest(sources):
    """The type of most bits among the tensors to be read: torch.dtype."""
    kinds = {TYPES[source.checkpoint.dtypes[name]] for source in sources for name in source.found.consumed}
    kinds = sorted(kinds, key=lambda dtype: (dtype.itemsize, dtype == torch.float16))
    half = {torch.float16, torch.bfloat16} <= set(kinds) and kinds[-1].itemsize == 2
    return torch.float32 if half or kinds[-1] == torch.float64 else kinds[-1]


@contextmanager
def default_dtype(dtype):
    """Build modules of another type within."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make(published, config, wishes, model, dtype, rest):
    """The model with memory: initialised from the seed if anything remains, else merely allocated."""
    if not rest:
        materialise(model, dtype, "cpu")
        return model
    torch.manual_seed(wishes.seed)
    with default_dtype(dtype):
        model = published.build(config)
    if wishes.image_size:
        vision_of(model).resize(wishes.image_size)
    return model


def report(source):
    """What was read from a source, and what was passed over: list of lines."""
    found, lines = source.found, [f"{source.checkpoint.where}: {len(source.found.consumed)} tensors"]
    skipped = found.computed | found.unused | dict.fromkeys(found.twice, "a second copy of a tied tensor")
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name in skipped if skipped[name] == reason]
        lines.append(f"  passed over: {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {reason}")
    return lines + [f"  {name}: {list(has)} became {list(wanted)}" for name, (has, wanted) in found.resized.items()]


def started(rest, model, seed):
    """What was initialised, by part: list of lines."""
    lines = []
    for part, names in by_part(rest).items():
        numbers = count_all(rest[name] for name in names)
        lines.append(f"initialised from seed {seed}: {part}, {len(names)} tensors, {numbers:,} parameters")
    return lines


def write_tokenizer(folder, places, recipe, config):
    """Write the tokenizer of the first place that has one.

    Returns: (line to print, config with the id that this tokenizer gives the token of a picture, if the model has one).
    """
    for place in places:
        if place is None or not Path(place).is_dir():
            continue
        try:
            tokenizer = load_tokenizer(place, added=added_tokens(recipe))
        except FileNotFoundError:
            continue
        tokenizer.save(folder / "tokenizer.json")
        if recipe is not None and recipe.template.media_token:
            config = config | {"media_token_id": tokenizer.special_id(recipe.template.media_token)}
        return f"tokenizer of {place}: {tokenizer.vocab_size} tokens", config
    return "no tokenizer found: put the model's tokenizer files into OUT before it is asked anything", config


# Write a model in the layout of its paper's weights, with LoRA merged, for other programs to load.


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
        recipe = recipes.recipe_of(folder, config)
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
