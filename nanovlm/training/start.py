"""From a recipe and the wishes of a command line to a run that is ready to train."""

import dataclasses
import json
import os
from pathlib import Path

import torch

from nanovlm import lora
from nanovlm.data.datasets import command_line_sources, DATA
from nanovlm.data.tokenizer import Tokenizer
from nanovlm.machine import facts_of, slow_line, training_precision
from nanovlm.names import nearest
from nanovlm.published.load import added_tokens, architecture, rebuild
from nanovlm.published.tokenizers import load_tokenizer
from nanovlm.published import weights
from nanovlm.recipes.recipe import digest
from nanovlm.training import checkpoint, optimizer
from nanovlm.training.processes import Processes, Run
from nanovlm.training.progress import say
from nanovlm.training.stages import choose, text_side
from nanovlm.vit import check_image_size


MADE_OF = ("architecture", "recipe_sha256")  # keys of config.json
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
    if wishes.precision is not None:
        stages = tuple(dataclasses.replace(stage, precision=wishes.precision) for stage in stages)
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


def settle_precision(stages, device, saved):
    """Put a type in the place of precision="auto".

    Args:
      stages: tuple of Stage. device: str. saved: dict, config.json of the run to continue, or None.
    Returns: tuple of Stage; a run keeps the type that it began with, whatever the machine that goes on is fast in.
    """
    before = saved["stages"] if saved else {}
    chosen = training_precision(facts_of(device))
    stages = tuple(
        dataclasses.replace(stage, precision=before[stage.name]["precision"] if stage.name in before else chosen)
        if stage.precision == "auto" else stage for stage in stages
    )  # fmt: skip
    slow = [line for line in (slow_line(stage.precision, device) for stage in stages) if line]
    if slow:
        say(slow[0])
    return stages


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


def describe(wishes, model, contrastive):
    """What opening the folder will need beside the weights: dict of JSON values, by the names of MADE_OF."""
    file, found = wishes.recipe.endswith(".py"), architecture(model, contrastive)
    return ({"recipe_sha256": digest(wishes.recipe)} if file else {}) | ({"architecture": found} if found else {})


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
        changed = checkpoint.difference({key: saved[key] for key in saved if key not in ("image_size", *MADE_OF)}, settings)
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


def build_models(recipe, size, vocab_size, seed, recorded=None):
    """The vision-language model and the contrastive model around its ViT (None if the recipe has none), from a seed.

    recorded: opening.architecture of the models as they once were, which the recipe may since have changed; or None.
    """
    torch.manual_seed(seed)
    model = recipe.build(size, vocab_size)
    contrastive = None if recipe.contrastive is None else recipe.contrastive(size, model)
    if recorded and recorded != architecture(model, contrastive):
        return rebuild(recorded)
    return model, contrastive


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
    weights.load_weights(model, weights.OURS, weights.open_checkpoint(folder))
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


def sharded_models(recipe, size, vocab_size, wishes, stages, recorded):
    """The models of `build_models` on the meta device: of many processes only the main one ever holds them whole."""
    with torch.device("meta"):
        model, contrastive = build_models(recipe, size, vocab_size, wishes.seed, recorded)
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
    stages = settle_precision(stages, wishes.device, saved)
    size = choose_size(recipe, wishes.size)
    settings = settle(wishes, size, stages, saved, lost)
    torch.set_num_threads(settings["threads"])
    tokenizer = find_tokenizer(recipe, out, wishes.init)
    recorded = (saved or {}).get("architecture")
    skeleton = sharded_models(recipe, size, tokenizer.vocab_size, wishes, stages, recorded) if processes.mode == "fsdp" else None
    if skeleton and not processes.main:
        model, contrastive = skeleton
    else:
        model, contrastive = build_models(recipe, size, tokenizer.vocab_size, wishes.seed, recorded)
        if wishes.init is not None and not checkpoint.complete(out):
            load_weights(Path(wishes.init), model, contrastive)
        add_lora(model, stages, wishes.lora)
    check_stages(stages, model, contrastive)
    made_of, before = describe(wishes, model, contrastive), saved or {}
    if made_of.get("recipe_sha256") != before.get("recipe_sha256", made_of.get("recipe_sha256")) and processes.main:
        say(f"{wishes.recipe} has changed since this run began")
    made_of |= {name: before[name] for name in MADE_OF if name in before}
    processes.by_main(lambda: begin_folder(out, saved, settings | made_of, tokenizer))
    for line in lost_lines(lost) if processes.main else ():
        say(line)
    device = torch.device(wishes.device)
    for one in (model, contrastive):
        if one is not None and not skeleton:
            one.to(device)
    torch.set_rng_state(processes.by_main(torch.get_rng_state))  # building without memory draws nothing
    return Run(recipe, wishes, out, settings, model, contrastive, tokenizer, stages, sources, device, processes, skeleton)


def begin_folder(out, saved, settings, tokenizer):
    """Make the output folder, unless it is there, with config.json and tokenizer.json; `saved`: its settings, or None."""
    out.mkdir(parents=True, exist_ok=True)
    if not saved:
        checkpoint.replace_json(out / "config.json", settings)
    if not (out / "tokenizer.json").exists():
        checkpoint.replace(out / "tokenizer.json", tokenizer.save)


# From the names in the stages' mixtures to sources: the recipe's own, --data's, --datasets', and what is missing.


def find_sources(recipe, stages, wishes):
    """The data sources that the stages name, and the stages without what is missing.

    Args:
      recipe: Recipe. stages: tuple of Stage.
      wishes: the values of train.py's flags; with --allow-missing a stage trains on what is there of its mixture, each
        source in proportion to its weight as before.
    Returns: (dict name -> source, tuple of Stage, {stage: {name of what is missing: its share of the mixture}}); what
      --datasets lists takes precedence over the recipe's own of that name.
    Raises: FileNotFoundError with everything that is missing, at once, each with its examples and page; ValueError for a
      name that is probably a slip, or a stage of which everything is missing.
    """
    sources, missing = command_line_sources(wishes.data, wishes.images, wishes.datasets, wishes.seed, recipe.prompts)
    names = dict.fromkeys(name for stage in stages for name in stage.mixture)
    for name in names:
        if name in sources or name in missing:
            continue
        if name not in recipe.sources:
            missing[name] = ""
            continue
        try:
            sources[name] = recipe.sources[name](wishes.seed)
        except FileNotFoundError as error:
            missing[name] = str(error)
    lost = {stage.name: shares(stage, missing) for stage in stages}
    lost = {stage: found for stage, found in lost.items() if found}
    if not missing or (wishes.allow_missing and not lost):
        return sources, stages, {}
    if not wishes.allow_missing:
        raise complaint(recipe, stages, missing, recipe.sources.keys() | sources.keys())
    empty = [stage.name for stage in stages if len(lost.get(stage.name, {})) == len(stage.mixture)]
    if empty:
        raise ValueError(f"stage {empty[0]!r}: nothing of its mixture is there, see --print for what to fetch")
    return sources, tuple(without(stage, missing) for stage in stages), lost


def shares(stage, missing):
    """What a stage loses: {name: its share of the mixture}."""
    total = sum(stage.mixture.values())
    return {name: weight / total for name, weight in stage.mixture.items() if name in missing}


def without(stage, missing):
    """The stage with a mixture of what is left; weights are relative, so the shares of the others grow alike."""
    return dataclasses.replace(stage, mixture={name: weight for name, weight in stage.mixture.items() if name not in missing})


def complaint(recipe, stages, missing, known):
    """The error that names everything missing: {name: why}; known: names that exist."""
    reading = {name: stage.name for stage in reversed(stages) for name in stage.mixture}
    if len(missing) == 1:
        (name, why), = missing.items()
        if not why and known:
            return ValueError(f"stage {reading[name]!r} reads {name!r}, which neither the recipe nor --datasets provides."
                              f"{nearest(name, known)}")
    lines = [f"{len(missing)} data sets are missing; list them in --datasets FILE.json (see nanovlm/data/README.md), train "
             "on the others with --allow-missing, or leave one out with --set STAGE.mixture.NAME=none:"]
    for stage in dict.fromkeys(reading.get(name) for name in missing):
        lines.append(f" {stage or 'read by no stage'}: (share, examples, page)")
        for name, why in missing.items():
            if reading.get(name) == stage:
                weights = next((one.mixture for one in stages if one.name == stage), {})
                share = f"{weights[name] / sum(weights.values()):6.1%}" if stage else ""
                lines.append(f"  {name:<24}{share} {why or home(name)}")
    return FileNotFoundError("\n".join(lines))


def lost_lines(lost):
    """What is said of missing data at the start of a run: list of str; lost: as `find_sources` returns it."""
    return [f"stage {stage}: {len(found)} data sets are missing, {sum(found.values()):.1%} of its examples; the shares of the "
            f"others grow by {1 / (1 - sum(found.values())):.2f}" for stage, found in lost.items()]


# Where the papers' data sets live. Addresses and sizes are for people; nothing here is fetched.
#
# Examples are as the papers count them: Lynx's in its Table 12 (lynx_mixture.json), others here. Addresses were written
# down from the data sets' own papers and pages and may have moved.


LYNX = {data["name"]: data["size"] for data in json.loads((Path(__file__).parents[1] / "recipes" / "lynx_mixture.json").read_text())["datasets"]}
LLAVA = "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"
HOMES = {  # name in a mixture -> page
    "A-OKVQA": "github.com/allenai/aokvqa",
    "Alpaca GPT4": "github.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM",
    "Baize": "github.com/project-baize/baize-chatbot",
    "BlipCapFilt": "github.com/salesforce/BLIP",
    "CC12M": "github.com/google-research-datasets/conceptual-12m",
    "CC3M": "ai.google.com/research/ConceptualCaptions",
    "COCO": "cocodataset.org",
    "COCO Caption": "cocodataset.org",
    "COYO": "github.com/kakaobrain/coyo-dataset",
    "CUHK-PEDES": "github.com/ShuangLI59/Person-Search-with-Natural-Language-Description",
    "DataComp": "datacomp.ai",
    "Flan V2": "github.com/google-research/FLAN",
    "Flickr30k": "shannon.cs.illinois.edu/DenotationGraph",
    "GQA": "cs.stanford.edu/people/dorarad/gqa",
    "HatefulMemes": "hatefulmemeschallenge.com",
    "IAPR TC-12": "imageclef.org/photodata",
    "ImageNet1K": "image-net.org",
    "InViG": "openivg.github.io",
    "LAION OIG Small": "huggingface.co/datasets/laion/OIG",
    "LAION-en": "laion.ai",
    "LLaVA Caption": LLAVA,
    "LLaVA Dialog": LLAVA,
    "LLaVA Instruction": LLAVA,
    "LLaVA Reasoning": LLAVA,
    "LLaVA-instruct-150K": LLAVA,
    "MSR-VTT-QA": "github.com/xudejing/video-question-answering",
    "MSVD-QA": "github.com/xudejing/video-question-answering",
    "MiniGPT4 IFT": "huggingface.co/datasets/Vision-CAIR/cc_sbu_align",
    "NLVR2": "lil.nlp.cornell.edu/nlvr",
    "NeXT-QA": "github.com/doc-doc/NExT-QA",
    "OCR-VQA": "ocr-vqa.github.io",
    "OCRVQA": "ocr-vqa.github.io",
    "OKVQA": "okvqa.allenai.org",
    "Places365": "places2.csail.mit.edu",
    "RefCOCO": "github.com/lichengunc/refer",
    "SBU": "cs.rice.edu/~vicente/sbucaptions",
    "SNLI-VE": "github.com/necla-ml/SNLI-VE",
    "STVQA": "rrc.cvc.uab.es/?ch=11",
    "ShareGPT": "huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
    "ShareGPT-80K": "huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
    "SlimOrca": "huggingface.co/datasets/Open-Orca/SlimOrca",
    "SthV2": "developer.qualcomm.com/software/ai-datasets/something-something",
    "TDIUC": "kushalkafle.com/projects/tdiuc",
    "TextCaps": "textvqa.org/textcaps",
    "TextVQA": "textvqa.org",
    "Unnatural Instruction": "github.com/orhonovich/unnatural-instructions",
    "VGQA": "homes.cs.washington.edu/~ranjay/visualgenome",
    "VQAv2": "visualqa.org",
    "Visual Genome Caption": "homes.cs.washington.edu/~ranjay/visualgenome",
    "VisualGenome": "homes.cs.washington.edu/~ranjay/visualgenome",
    "Visual7W": "ai.stanford.edu/~yukez/visual7w",
    "Visual7W Multi-choice": "ai.stanford.edu/~yukez/visual7w",
    "VizWiz": "vizwiz.org",
    "WebSRC": "x-lance.github.io/WebSRC",
    "WikiArt": "github.com/cs-chan/ArtGAN",
    "blip2_captions_129m": "COCO, Visual Genome, CC3M, CC12M, SBU and 115M pictures of LAION with CapFilt's captions (BLIP-2, Sec. 3.4)",
    "blip_laion_cc_sbu_558k": "huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
    "llava_instruct_158k": LLAVA,
    "llava_mix_665k": f"{LLAVA}, llava_v1_5_mix665k.json",
    "llava_pretrain_558k": "huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
    "llava_v1_5_mix665k": f"{LLAVA}, llava_v1_5_mix665k.json",
    "vlit_158k": "any of the sets that the review compares, of LLaVA's size; `python -m nanovlm.vlit` makes one",
}
SIZES = {
    "blip2_captions_129m": "129M", "blip_laion_cc_sbu_558k": "558K", "llava_instruct_158k": "158K", "llava_mix_665k": "665K",
    "llava_pretrain_558k": "558K", "llava_v1_5_mix665k": "665K", "vlit_158k": "158K", "ShareGPT": "80K", "ShareGPT-80K": "80K",
    "LLaVA-instruct-150K": "158K",
} | {name: size for name, size in LYNX.items() if size}  # fmt: skip
UNKNOWN = "its paper names no source"


def home(name):
    """Examples and page of a data set: str, for a list of what to fetch."""
    return f"{SIZES.get(name, '?'):>7}  {HOMES.get(name, UNKNOWN)}"
