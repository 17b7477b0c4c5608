"""Published weights into our folder, separate towers into a model to train, and our folder into the published layout.

    python -m nanovlm.recipes convert --family lynx finetune_lynx.pt --vision eva_vit_g.pth --language vicuna/ OUT
    python -m nanovlm.recipes convert --family lynx --vision eva_vit_g.pth --language vicuna/ OUT   a start to train
    python -m nanovlm.recipes convert --to published out/llava OUT

Towers and language models fill their parts first; SOURCE, which holds what was trained, is laid over them. What no
file holds is an error beside a SOURCE, and initialised from a seed without one. .pt and .bin files are read with
weights_only=True.
"""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import nanovlm
from nanovlm.layouts import LLAMA, OPT, PHI, QWEN2
from nanovlm.modality_adaptive import ModalityAdaptive
from nanovlm.recipes import FAMILIES, OF_FAMILY
from nanovlm.recipes.coverage import count_all, find_family, read_json
from nanovlm.recipes.export import export
from nanovlm.recipes.opening import added_tokens, build_on_meta, family_of, has_vision, load_tokenizer, vision_of
from nanovlm.recipes.open_flamingo import OPEN_CLIP
from nanovlm.vision_layouts import BEHIND, BLIP2_REST, CLIP, EVA, OTHER_SIDE, SIGLIP, eva_original
from nanovlm.vlm import part_of
from nanovlm.weight_errors import WeightsError, explain
from nanovlm.weight_files import OURS, TYPES, Checkpoint, new_folder, open_checkpoint, write_checkpoint
from nanovlm.weight_loading import check_types, fill, materialise, shapes_of
from nanovlm.weight_tables import Alias, prefixed
from nanovlm.weights import Plan, plan

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
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
        copy(model, source.copies)
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
def copy(model, copies):
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
        lines += [f"  {part}: {len(names)} tensors, from {names[0]}" for part, names in by_part(model, rest).items()]
        lines += [f"  {published.contents or 'the file holds a part of the model'}",
                  "  give a checkpoint of the tower with --vision, of the language model with --language"]
        raise WeightsError("\n".join(lines))
    for part in ("vision.blocks.", "decoder.layers."):
        given = [name for name in filled if name.startswith(part)]
        if not given and any(name.startswith(part) for name in rest):
            raise WeightsError(f"neither --vision nor --language holds {part[:-1]}: tower or language model is missing")
    return rest


def by_part(model, names):
    """{part: names} of a model's tensors."""
    adaptive = [place for place, module in model.named_modules() if isinstance(module, ModalityAdaptive)]
    branches, parts = tuple(f"{place}.vision." for place in adaptive), {}
    for name in names:
        parts.setdefault(part_of(name, branches), []).append(name)
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
    for part, names in by_part(model, rest).items():
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
