"""From a recipe and train.py's flags to a run that is ready to train: stages, data, tokenizer, models, folder."""

import dataclasses
import json
import math
import os
import shutil
import string
from pathlib import Path

import torch

from nanovlm import lora
from nanovlm.architecture import architecture, rebuild
from nanovlm.data.datasets import DATA, command_line_sources
from nanovlm.files import digest
from nanovlm.machine import check_memory, slow_line, training_precision
from nanovlm.names import check_known, nearest
from nanovlm.training import checkpoint, optimizer
from nanovlm.training.processes import Processes, Run
from nanovlm.training.progress import say
from nanovlm.training.stages import all_parts, choose, override, text_side

NOT_ASKED = ("image_size", "architecture", "recipe_sha256", "published")  # keys of config.json that no flag repeats
SAME = ("recipe", "seed", "smoke", "init", "data", "images", "datasets")  # flags that a resumed run must repeat
LORA_RATE = 2e-4
DEFAULT_THREADS = 2  # at most; more gain little at this size, and the count decides the last bits of every sum


def choose_size(recipe, size):
    """The size to build: str; None means the recipe's first. Raises ValueError for an unknown one."""
    size = recipe.sizes[0] if size is None else size
    check_known(f"recipe {recipe.name!r} has no size", size, recipe.sizes)
    return size


def choose_stages(recipe, args):
    """The stages to train: tuple of Stage. With --data, the last one reads that file alone; args: train.py's flags."""
    stages = recipe.stages(choose_size(recipe, args.size), args.smoke)
    alone = [stages[-1].name] if recipe.finished and args.data is not None else None  # the others, it has behind it
    *before, last = choose(stages, args.stages or alone, args.without)
    wishes, parts, highest = args.set, args.tune or ["lora"] * bool(args.lora), max(last.learning_rates.values())
    if args.data is not None:
        last = dataclasses.replace(last, mixture={DATA: 1.0})
    if parts and not any(one.startswith(f"{last.name}.tune=") for one in wishes):
        # LoRA begins with updates of zero, so that its rate is at least LLaVA's
        usual = {"lora": max(highest, LORA_RATE)} | last.learning_rates
        frozen = {f"{last.name}.learning_rates.{part}=none" for part in last.learning_rates.keys() - parts}
        wishes = [one for one in wishes if one not in frozen]  # to freeze what is frozen is no mistake
        last = dataclasses.replace(last, learning_rates={part: usual.get(part, highest) for part in parts})
    same = {} if args.precision is None else {"precision": args.precision}
    same |= {} if args.data is None or args.tests else {"summary": ""}
    return choose([dataclasses.replace(stage, **same) for stage in (*before, last)], settings=wishes)


def count_epochs(recipe, stages, args, sources):
    """The stages, the last with as many steps as --epochs asks for of --data; of a published model one, if not told."""
    last, told = stages[-1], any(one.startswith(f"{stages[-1].name}.steps=") for one in args.set)
    if args.epochs is not None and (args.data is None or told):
        raise ValueError(f"--epochs {args.epochs:g} counts readings of --data; give --data, and no {last.name}.steps")
    if args.data is None or told or args.epochs is None and not recipe.published or args.smoke:
        return stages
    steps = math.ceil((args.epochs or 1) * len(sources[DATA]) / last.batch_size)
    return *stages[:-1], override(last, {"steps": str(steps)})


def check_stages(recipe, stages, model, contrastive):
    """Raise ValueError if a stage asks for what the models cannot do, before the stages ahead of it cost hours."""
    for stage in stages:
        measured = recipe.measures(stage)
        for _, name, _, _ in string.Formatter().parse(stage.summary):
            if name is not None:
                check_known(f"the summary of stage {stage.name!r} names what Recipe.measures does not:", name, measured)
        dataclasses.replace(model.vision.config, image_size=stage.image_size)  # refuses what it cannot cut into patches
        parts, most = model.parts(), model.decoder.config.context_length
        if stage.objective == "contrastive":
            if contrastive is None:
                raise ValueError(f"stage {stage.name!r} is contrastive, but the recipe has no contrastive model")
            parts, most = contrastive.parts(), contrastive.text.context_length
        optimizer.groups(parts, stage)
        for part in ("cross_attention", "lora"):
            if part in stage.learning_rates and not parts[part]:
                raise ValueError(f"stage {stage.name!r} names the part {part!r}, which this model does not have"
                                 f"{'; give it one with --lora RANK' if part == 'lora' else ''}")
        if stage.max_tokens > most:
            raise ValueError(f"stage {stage.name!r}: max_tokens is {stage.max_tokens}, but the context is {most}")


def check_bridge(model):
    """Raise ValueError if the bridge cannot read the tower's features, or makes something else of them than it says."""
    weight = next(model.bridge.parameters(), torch.zeros(0))
    shape = 1, model.vision.num_tokens(model.vision.image_size), model.vision.config.width
    try:
        with torch.no_grad():
            model.encode_features(weight.new_zeros(shape), torch.ones(1, dtype=torch.long))
    except RuntimeError as error:
        kind = type(model.bridge).__name__
        raise ValueError(f"the bridge {kind} cannot read features of shape {shape}: {error}") from error


def settle_precision(stages, device, saved):
    """Put a type in the place of precision="auto"; what a run began with (saved: its config.json, or None) stays."""
    usual, before, settled = training_precision(device), saved["stages"] if saved else {}, []
    for stage in stages:
        chosen = before.get(stage.name, {}).get("precision", usual) if stage.precision == "auto" else stage.precision
        settled.append(dataclasses.replace(stage, precision=chosen))
    for line in {slow_line(stage.precision, device) for stage in settled} - {None}:
        say(line)
    return tuple(settled)


def settle(args, size, stages, saved, lost):
    """The settings of the run, once and for all: dict of JSON values, the core of config.json.

    lost: as `find_sources` returns it. saved: config.json of the run to continue, or None; it must be the same.
    """
    threads = args.threads or (saved["threads"] if saved else min(DEFAULT_THREADS, len(os.sched_getaffinity(0))))
    settings = {name: vars(args)[name] for name in SAME} | {
        "init": args.init and " ".join(args.init),
        "size": size, "threads": threads, "stage_names": [stage.name for stage in stages],
        "stages": {stage.name: dataclasses.asdict(stage) for stage in stages},
        **({"lora": args.lora} if args.lora else {}), **({"missing": lost} if lost else {}),
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be when read back
    if saved:
        begun = {key: value for key, value in saved.items() if key not in NOT_ASKED}
        checkpoint.check_same(begun, settings, "the run to continue has other settings; repeat its options, or name "
                              "another folder with --out")
    return settings


def build_models(recipe, size, vocab_size, seed, recorded=None):
    """The vision-language model and the contrastive model around its ViT (or None), from a seed.

    recorded: `architecture` of the models as they once were, which the recipe may since have changed; or None.
    """
    def build():
        model = recipe.build(size, vocab_size)
        return model, None if recipe.contrastive is None else recipe.contrastive(size, model)

    if recorded:
        with torch.device("meta"):
            changed = recorded != architecture(*build())
    torch.manual_seed(seed)
    return rebuild(recorded) if recorded and changed else build()


def load_weights(folder, model, contrastive):
    """Start from a trained model: an output folder of train.py or `convert`; its text tower is used if it is there.

    Raises: FileNotFoundError; CheckpointError naming every tensor that does not fit.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no config.json; --init takes the output folder of a finished run")
    config, index = json.loads((folder / "config.json").read_text()), folder / "model.safetensors.index.json"
    model.vision.resize(config["image_size"])
    if "lora" in config:  # its low-rank updates become part of the weights
        lora.add(model, **config["lora"])
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]
    checkpoint.load_file_into(model.state_dict(), *(folder / name for name in sorted(shards)))
    lora.merge(model)
    if contrastive is not None and (folder / "text_tower.safetensors").exists():
        checkpoint.load_file_into(text_side(contrastive), folder / "text_tower.safetensors")


def as_after_init(recipe, args):
    """The recipe, of a published model as its own files after --init say: sizes, pictures, tokenizer."""
    if not args.init or not recipe.open_init:
        if len(args.init or ()) > 1:
            raise ValueError(f"--init {' '.join(args.init)}: recipe {recipe.name!r} starts from one folder")
        return recipe
    return recipe.open_init(recipe, args.init, args.size, args.seed)


def add_lora(model, stages, chosen):
    """Give the decoder low-rank updates: chosen = {"rank", "alpha"} or None. ValueError if no stage trains them."""
    if chosen is None:
        return
    if not any("lora" in stage.learning_rates for stage in stages):
        raise ValueError(f"--lora {chosen['rank']}: no stage trains the part 'lora'; "
                         f"try --set {stages[-1].name}.learning_rates.lora=1e-3")
    lora.add(model, **chosen)


def make_run(recipe, args, out, processes=Processes()):
    """Build all that a training run needs: Run; only when all of it fits is its folder made, by all processes together.

    args: the values of train.py's flags. Raises: ValueError, OSError or CheckpointError, in words for the user.
    """
    stages = choose_stages(recipe, args)
    for stage in stages:
        if stage.batch_size < processes.size:
            raise ValueError(f"stage {stage.name!r}: {processes.size} processes cannot share a batch_size of "
                             f"{stage.batch_size}; start fewer, or --set {stage.name}.batch_size={processes.size}")
    sources, stages, lost = find_sources(recipe, stages, args)
    stages = count_epochs(recipe, stages, args, sources)
    if args.data is not None and not args.tests:  # its own held-out records are the judge
        usual = {field.name: field.default for field in dataclasses.fields(recipe)}
        recipe = dataclasses.replace(recipe, **{name: usual[name] for name in ("evaluate", "exam", "finish", "report")})
    saved = processes.by_main(lambda: checkpoint.open_folder(out, args.resume))
    stages, size = settle_precision(stages, args.device, saved), choose_size(recipe, args.size)
    settings, saved = settle(args, size, stages, saved, lost), saved or {}
    torch.set_num_threads(settings["threads"])
    folder = out if (out / "tokenizer.json").exists() else args.init and args.init[0]
    tokenizer = recipe.tokenizer() if folder is None or recipe.load else recipe.load_tokenizer(folder)

    def build(init=None):
        if init and recipe.load:
            torch.manual_seed(args.seed)
            models = recipe.load(), None
        else:
            models = build_models(recipe, size, tokenizer.vocab_size, args.seed, saved.get("architecture"))
            if init:
                load_weights(Path(init[0]), *models)
        add_lora(models[0], stages, args.lora)
        return models

    skeleton, device = None, torch.device(args.device)
    if processes.mode == "fsdp":  # only the main process ever holds the models whole
        with torch.device("meta"):
            model, contrastive = skeleton = build()
    elif recipe.published:
        with torch.device("meta"):
            sketch = build()
        check_stages(recipe, stages, *sketch)
        check_memory(least_memory(all_parts(*sketch), stages), device, "weights, gradients and optimizer")
    if not skeleton or processes.main:
        model, contrastive = build(None if checkpoint.complete(out) else args.init)
    check_stages(recipe, stages, model, contrastive)
    check_bridge(model)
    sha256 = digest(args.recipe) if args.recipe.endswith(".py") else None
    made_of = {"architecture": architecture(model, contrastive), "recipe_sha256": sha256, "published": recipe.source}
    config = settings | {name: value for name, value in made_of.items() if value}
    processes.by_main(lambda: begin_folder(out, saved, config, tokenizer, recipe.files))
    if processes.main:
        changed = saved.get("recipe_sha256", sha256) != sha256
        for line in [f"{args.recipe} has changed since this run began"] * changed + lost_lines(lost):
            say(line)
    torch.set_rng_state(processes.by_main(torch.get_rng_state))  # building without memory draws nothing
    run = Run(recipe, args, out, settings, model, contrastive, tokenizer, stages, sources, device, processes, skeleton)
    if not skeleton:
        run.models().to(device)
    return run


def least_memory(parts, stages):
    """Bytes that the hungriest stage takes before its first record: weights, gradients, AdamW's averages in float32."""
    groups = [optimizer.groups(parts, stage) for stage in stages]
    trained = max(sum(one.numel() for group in found for one in group["params"]) for found in groups)
    return 4 * (sum(one.numel() for held in parts.values() for one in held.values()) + 3 * trained)


def begin_folder(out, saved, settings, tokenizer, files):
    """Make the output folder, unless it is there, with config.json and the tokenizer; `saved`: its settings, if any.

    files: of the model that it starts from; without any, the tokenizer is written.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not saved:
        checkpoint.replace_json(out / "config.json", settings)
    for path in files:
        if not (out / path.name).exists():
            checkpoint.replace(out / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))
    if not files and not (out / "tokenizer.json").exists():
        checkpoint.replace(out / "tokenizer.json", tokenizer.save)


# ---- from the names in the stages' mixtures to sources: the recipe's own, --data's, --datasets', and what is missing


def find_sources(recipe, stages, args):
    """The sources that stages name: (name -> source, stages without what is missing, {stage: {name: share}} of that).

    What --datasets lists comes before the recipe's own. With --allow-missing what is there keeps its proportions.
    Raises: FileNotFoundError with all that is missing, each with its examples and page; ValueError for a probable slip.
    """
    sources, missing = command_line_sources(args.data, args.images, args.datasets, args.seed, recipe.prompts)
    for name in dict.fromkeys(name for stage in stages for name in stage.mixture):
        if name not in sources and name not in missing:
            try:
                if name in recipe.sources:
                    sources[name] = recipe.sources[name](args.seed)
                else:
                    missing[name] = ""
            except FileNotFoundError as error:
                missing[name] = str(error)
    if missing and not args.allow_missing:
        raise complaint(recipe, stages, missing, recipe.sources.keys() | sources.keys())
    left, lost = [], {}
    for stage in stages:
        total = sum(stage.mixture.values())
        gone = {name: weight / total for name, weight in stage.mixture.items() if name in missing}
        if gone.keys() == stage.mixture.keys():
            raise ValueError(f"stage {stage.name!r}: nothing of its mixture is there, see --print for what to fetch")
        if gone:
            lost[stage.name] = gone
        mixture = {name: weight for name, weight in stage.mixture.items() if name not in gone}
        left.append(dataclasses.replace(stage, mixture=mixture))
    return sources, tuple(left), lost


def complaint(recipe, stages, missing, known):
    """The error that names everything missing, {name: why}; known: names that exist."""
    reading = {name: stage for stage in reversed(stages) for name in stage.mixture}
    if [*missing.values()] == [""] and known:
        (name,) = missing
        return ValueError(f"stage {reading[name].name!r} reads {name!r}, which neither the recipe nor --datasets "
                          f"provides.{nearest(name, known)}")
    lines = [f"{len(missing)} data sets are missing (stage, share, examples, page); list them in --datasets FILE.json "
             "(nanovlm/data/datasets.py), train on the others with --allow-missing, or leave one out with "
             "--set STAGE.mixture.NAME=none:"]
    for name, why in missing.items():
        place, stage = "no stage", reading.get(name)
        if stage:
            place = f"{stage.name} {stage.mixture[name] / sum(stage.mixture.values()):.1%}"
        lines.append(f"  {name:<24}{place:<16} {why or recipe.home(name)}")
    return FileNotFoundError("\n".join(lines))


def lost_lines(lost):
    """What is said of missing data at the start of a run: list of str; lost: as `find_sources` returns it."""
    return [f"stage {stage}: {len(found)} data sets are missing, {sum(found.values()):.1%} of its examples; the shares "
            f"of the others grow by {1 / (1 - sum(found.values())):.2f}" for stage, found in lost.items()]
