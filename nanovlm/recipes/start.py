"""From a recipe and the wishes of a command line to a run that is ready to train."""

import dataclasses
import json
import os
from pathlib import Path

import torch

from nanovlm import checkpoint, lora, optimizer
from nanovlm.data.datasets import DATA
from nanovlm.data.published_tokenizers import load_tokenizer
from nanovlm.data.tokenizer import Tokenizer
from nanovlm.names import nearest
from nanovlm.parallel import Processes
from nanovlm.progress import say
from nanovlm.recipes.opening import added_tokens
from nanovlm.recipes.sources import find_sources, lost_lines
from nanovlm.run import Run, text_side
from nanovlm.stages import choose
from nanovlm.vit import check_image_size
from nanovlm.weight_files import OURS, open_checkpoint
from nanovlm.weight_loading import fill, fit

DEFAULT_THREADS = 2  # at most; more gain little at this size, and the count decides the last bits of every sum


def choose_size(recipe, size):
    """The size to build: str; None means the recipe's first. Raises ValueError for an unknown one."""
    if size is None:
        return recipe.sizes[0]
    if size not in recipe.sizes:
        raise ValueError(f"recipe {recipe.name!r} has no size {size!r}.{nearest(size, recipe.sizes)}")
    return size


def choose_stages(recipe, wishes):
    """The stages to train.

    Args:
      recipe: Recipe.
      wishes: the values of train.py's flags. With --data, the last stage reads that file alone.
    Returns: tuple of Stage.
    """
    stages = choose(recipe.stages(choose_size(recipe, wishes.size), wishes.smoke), wishes.stages, wishes.without)
    if wishes.data is not None:
        stages = (*stages[:-1], dataclasses.replace(stages[-1], mixture={DATA: 1.0}))
    return choose(stages, settings=wishes.set)


def check_stages(stages, model, contrastive):
    """Raise ValueError if a stage asks for what the models cannot do, before the stages ahead of it cost hours."""
    for stage in stages:
        check_image_size(stage.image_size, model.vision.config.patch_size)
        parts = model.parts()
        context_length = model.decoder.config.context_length
        if stage.objective == "contrastive":
            if contrastive is None:
                raise ValueError(f"stage {stage.name!r} is contrastive, but the recipe has no contrastive model")
            parts, context_length = contrastive.parts(), contrastive.text.context_length
        optimizer.groups(parts, stage)
        for part in ("cross_attention", "lora"):
            if part in stage.learning_rates and not parts[part]:
                raise ValueError(f"stage {stage.name!r} names the part {part!r}, which this model does not have"
                                 f"{'; give it one with --lora RANK' if part == 'lora' else ''}")
        if stage.max_tokens > context_length:
            raise ValueError(f"stage {stage.name!r}: max_tokens is {stage.max_tokens}, "
                             f"but the context is {context_length}")


def identity(wishes, size, stages, threads, lost):
    """What a resumed run must share with the one it continues: dict of JSON values, the core of config.json."""
    kept = {name: vars(wishes)[name] for name in ("recipe", "seed", "smoke", "init", "data", "images", "datasets")}
    settings = {"size": size, "threads": threads, "stage_names": [stage.name for stage in stages],
                "stages": {stage.name: dataclasses.asdict(stage) for stage in stages}}
    if wishes.lora is not None:
        settings["lora"] = wishes.lora
    if lost:
        settings["missing"] = lost
    return json.loads(json.dumps(kept | settings))  # tuples become lists, as they will be when read back


def settle(wishes, size, stages, saved, lost):
    """Fix the settings of the run once and for all, the number of threads among them.

    Args:
      lost: of each stage the data that it trains without, as `find_sources` returns it.
      saved: dict, config.json of the run to continue, or None.
    Returns: dict, the run's identity.
    Raises: CheckpointError naming the first setting that is not what it was.
    """
    threads = wishes.threads or (saved["threads"] if saved else min(DEFAULT_THREADS, len(os.sched_getaffinity(0))))
    settings = identity(wishes, size, stages, threads, lost)
    if saved:
        changed = checkpoint.difference({key: saved[key] for key in saved if key != "image_size"}, settings)
        if changed:
            raise checkpoint.CheckpointError(f"the run to continue has other settings: {changed}; repeat its options, "
                                             "or name another folder with --out")
    return settings


def find_tokenizer(recipe, out, init):
    """The tokenizer of this run: its own from before, that of the model it starts from, or a new one."""
    folder = out if (out / "tokenizer.json").exists() else init
    if folder is None:
        return recipe.tokenizer()
    if recipe.published is None:
        return Tokenizer(Path(folder) / "tokenizer.json")
    return load_tokenizer(folder, added_tokens(recipe))


def build_models(recipe, size, vocab_size, seed):
    """The vision-language model and the contrastive model around its ViT (None if the recipe has none), from a seed."""
    torch.manual_seed(seed)
    model = recipe.build(size, vocab_size)
    return model, None if recipe.contrastive is None else recipe.contrastive(size, model)


def load_weights(folder, model, contrastive):
    """Start from a trained model.

    Args:
      folder: Path of an output folder of train.py or `convert`, with config.json and model.safetensors or its shards;
        text_tower.safetensors is used if it is there.
      model, contrastive: the models to fill; contrastive may be None.
    Raises: FileNotFoundError; WeightsError or CheckpointError naming every tensor that does not fit.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no config.json; --init takes the output folder of a finished run")
    config = json.loads((folder / "config.json").read_text())
    model.vision.resize(config["image_size"])
    if "lora" in config:  # its low-rank updates become part of the weights
        lora.add(model, **config["lora"])
    weights = open_checkpoint(folder)
    fill(model.state_dict(), fit(model, OURS, weights), weights)
    lora.merge(model)
    if contrastive is not None and (folder / "text_tower.safetensors").exists():
        checkpoint.load_file_into(text_side(contrastive), folder / "text_tower.safetensors")


def add_lora(model, stages, wish):
    """Give the decoder low-rank updates: wish = {"rank", "alpha"} of --lora, or None.

    Raises: ValueError if no stage trains them.
    """
    if wish is None:
        return
    if not any("lora" in stage.learning_rates for stage in stages):
        raise ValueError(f"--lora {wish['rank']}: no stage trains the part 'lora'; "
                         f"try --set {stages[-1].name}.learning_rates.lora=1e-3")
    lora.add(model, **wish)


def check_processes(stages, processes):
    """Raise ValueError if a stage has fewer examples than there are processes to share them."""
    for stage in stages:
        if stage.batch_size < processes.size:
            raise ValueError(f"stage {stage.name!r}: {processes.size} processes cannot share a batch_size of "
                             f"{stage.batch_size}; start fewer, or --set {stage.name}.batch_size={processes.size}")


def sharded_models(recipe, size, vocab_size, wishes, stages):
    """The models of `build_models` on the meta device: of many processes only the main one ever holds them whole."""
    with torch.device("meta"):
        model, contrastive = build_models(recipe, size, vocab_size, wishes.seed)
        add_lora(model, stages, wishes.lora)
    return model, contrastive


def make_run(recipe, wishes, out, processes=Processes()):
    """Build everything that a training run needs; only when all of it fits is the folder made, with config.json and
    tokenizer.json in it.

    Args:
      recipe: Recipe.
      wishes: the values of train.py's flags.
      out: Path of the output folder.
      processes: parallel.Processes that train together; all of them call this.
    Returns: Run.
    Raises: ValueError, OSError or CheckpointError, in words for the user.
    """
    stages = choose_stages(recipe, wishes)
    check_processes(stages, processes)
    sources, stages, lost = find_sources(recipe, stages, wishes)
    saved = processes.by_main(lambda: checkpoint.open_folder(out, wishes.resume))
    size = choose_size(recipe, wishes.size)
    settings = settle(wishes, size, stages, saved, lost)
    torch.set_num_threads(settings["threads"])
    tokenizer = find_tokenizer(recipe, out, wishes.init)
    skeleton = sharded_models(recipe, size, tokenizer.vocab_size, wishes, stages) if processes.mode == "fsdp" else None
    if skeleton and not processes.main:
        model, contrastive = skeleton
    else:
        model, contrastive = build_models(recipe, size, tokenizer.vocab_size, wishes.seed)
        if wishes.init is not None and not checkpoint.complete(out):
            load_weights(Path(wishes.init), model, contrastive)
        add_lora(model, stages, wishes.lora)
    check_stages(stages, model, contrastive)
    processes.by_main(lambda: begin_folder(out, saved, settings, tokenizer))
    for line in lost_lines(lost) if processes.main else ():
        say(line)
    device = torch.device(wishes.device)
    for one in (model, contrastive):
        if one is not None and not skeleton:
            one.to(device)
    torch.set_rng_state(processes.by_main(torch.get_rng_state))  # building without memory draws nothing
    return Run(out=out, identity=settings, model=model, contrastive=contrastive, tokenizer=tokenizer,
               template=recipe.template, stages=stages, sources=sources, seed=wishes.seed, device=device,
               smoke=wishes.smoke, save_every=recipe.save_every, exam_every=recipe.exam_every,
               max_minutes=wishes.max_minutes, workers=wishes.workers, max_damaged=wishes.max_damaged,
               evaluate=recipe.evaluate, exam=recipe.exam, finish=recipe.finish, report=recipe.report,
               stage_templates=recipe.stage_templates,
               log=recipe.log, held_out=recipe.published is not None, preprocessing=recipe.preprocessing,
               processes=processes, skeleton=skeleton)


def begin_folder(out, saved, settings, tokenizer):
    """Make the output folder, unless it is there, with config.json and tokenizer.json; `saved`: its settings, or None."""
    out.mkdir(parents=True, exist_ok=True)
    if not saved:
        checkpoint.replace_json(out / "config.json", settings)
    if not (out / "tokenizer.json").exists():
        checkpoint.replace(out / "tokenizer.json", tokenizer.save)
