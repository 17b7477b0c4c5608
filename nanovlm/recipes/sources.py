"""From the names in the stages' mixtures to sources: the recipe's own, --data's, --datasets', and what is missing."""

import dataclasses

from nanovlm.data.datasets import command_line_sources
from nanovlm.names import nearest
from nanovlm.recipes.homes import home


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
    lines = [f"{len(missing)} data sets are missing; list them in --datasets FILE.json (see nanovlm/data/datasets.py), train "
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
