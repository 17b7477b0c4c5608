"""What a training run will take, before anything of it exists: `python train.py RECIPE --print`.

Sizes, tokens, operations, memory and hours of every stage, and the files to fetch; no weight is made and no file read.
The operations are counted (rehearsal.py), the memory adds up what they keep (memory.py); the length of a text and the
share of a GPU's peak that a run will reach are guesses, named where they stand.
"""

import torch

from nanovlm import optimizer
from nanovlm.gpus import peak_flops
from nanovlm.memory import GB, stage_memory
from nanovlm.parallel import MODES
from nanovlm.recipes.homes import home
from nanovlm.recipes.recipe import Expected
from nanovlm.recipes.start import add_lora, build_models, check_stages, choose_size, choose_stages
from nanovlm.rehearsal import Cost, example_cost, pair_cost
from nanovlm.run import all_parts

UTILISATION = 0.4  # of a GPU's peak, assumed
CAPACITY = 80 * GB  # bytes of a GPU, assumed


def plan(recipe, wishes):
    """The whole plan.

    Args: recipe: Recipe. wishes: the values of train.py's flags.
    Returns: list of str, lines.
    Raises: ValueError where stages and model do not go together.
    """
    stages = choose_stages(recipe, wishes)
    vocab_size = recipe.tokenizer().vocab_size if recipe.published is None else 0  # 0: as published
    with torch.device("meta"):
        model, contrastive = build_models(recipe, choose_size(recipe, wishes.size), vocab_size, wishes.seed)
        add_lora(model, stages, wishes.lora)
    check_stages(stages, model, contrastive)
    lines = []
    for stage in stages:
        model.vision.resize(stage.image_size)  # its position table counts
        lines += [f"stage {stage.name}"]
        lines += [f"  {name} = {value!r}" for name, value in vars(stage).items() if name != "name"]
        lines += [*optimizer.table(all_parts(model, contrastive), stage), ""]
        lines += [*stage_lines(recipe, stage, model, contrastive, wishes.recompute), ""]
    return lines + file_lines(recipe, stages)


def stage_lines(recipe, stage, model, contrastive, recompute):
    """Tokens, operations, hours and memory of one stage: list of str."""
    expected = recipe.expected.get(stage.name, Expected(min(64, stage.max_tokens // 2), num_gpus=1))
    if stage.objective == "contrastive":
        image_tokens, costs = 0, pair_cost(contrastive, stage, expected.text_tokens)
    else:
        costs = example_cost(model, stage, expected.text_tokens, expected.num_frames, recompute)
        image_tokens = model.num_image_tokens(stage.image_size, expected.num_frames) if expected.num_frames else 0
    examples, tokens = stage.steps * stage.batch_size, image_tokens + expected.text_tokens
    total = examples * sum(costs.values(), Cost()).flops
    shares = ", ".join(f"{part} {cost.flops / 1e9:,.1f}" for part, cost in costs.items() if cost.flops)
    return [
        f"data    {examples:,} examples of {image_tokens} image tokens and about {expected.text_tokens} of text: "
        f"{examples * tokens / 1e9:,.3g} billion tokens",
        f"work    {total / examples / 1e9:,.1f} GFLOP an example ({shares}), {total:.2e} FLOP in all",
        *hours_lines(expected, total),
        *memory_lines(expected, stage, all_parts(model, contrastive), costs),
    ]


def hours_lines(expected, total):
    """Hours by the count of operations, and by the paper: list of str."""
    peak = peak_flops(expected.gpu) * expected.num_gpus
    gpus = f"{expected.num_gpus} {expected.gpu}"
    lines = [f"time    {hours(total / (UTILISATION * peak) / 3600)} on {gpus} at {UTILISATION:.0%} of their peak"]
    if expected.hours is not None:
        share = total / (expected.hours * 3600) / peak
        lines.append(f"        {hours(expected.hours)} on {gpus} by the paper ({expected.source}), {share:.0%} of their peak")
    return lines


def hours(number):
    """Hours in words: str; minutes where there is less than one, days from two on."""
    if number < 1:
        return f"{60 * number:.1f} minutes"
    return f"{number:.1f} hours" if number < 48 else f"{number / 24:.1f} days ({number:.0f} hours)"


def memory_lines(expected, stage, parts, costs):
    """A table, a line per value of --parallel: list of str."""
    unit, size = ("GB", GB) if sum(costs.values(), Cost()).kept > GB / 100 else ("MB", GB / 1000)
    columns = ("weights", "gradients", "optimizer", "other", "an example", "micro-batch in 80 GB")
    lines = [f"memory  {unit} of each GPU{''.join(f'{name:>{len(name) + 3}}' for name in columns)}"]
    for parallel in MODES:
        number = 1 if parallel == "none" else expected.num_gpus
        found = stage_memory(parts, stage, costs, parallel, number)
        other = found.gathered + found.copies + found.working
        values = (found.weights, found.gradients, found.optimizer, other, found.activations)
        cells = [f"{value / size:{len(name) + 3},.2f}" for value, name in zip(values, columns)]
        fitting = min(found.fitting(CAPACITY), max(1, stage.batch_size // number))
        cells.append(f"{fitting or 'none':>23}")
        lines.append(f"        {f'{parallel} x {number}':<14}{''.join(cells)}")
    return lines


def file_lines(recipe, stages):
    """What must be there before training starts: list of str."""
    names = list(dict.fromkeys(name for stage in stages for name in stage.mixture if name not in recipe.sources))
    if not names and not recipe.weights:
        return ["files   none: the recipe makes its own data and starts from nothing"]
    lines = ["files   weights and tokenizer, united in --init FOLDER:", *(f"          {one}" for one in recipe.weights)]
    lines += [f"        data, listed in --datasets FILE.json ({len(names)}; examples, page):"]
    return lines + [f"          {name:<24}{home(name)}" for name in names]
