"""Results of finished runs as files, and the pages' tables, which are made from these files and from the code.

    python notebooks/support/results.py collect nano out/seed0 out/seed1 out/seed2    writes notebooks/results/nano.json
    python notebooks/support/results.py collect NAME my_recipe.py out/seed0           of runs of a recipe file
    python notebooks/support/results.py readme                                        rewrites the tables in all pages

Collect where the runs were trained, before the code changes: machine and commit are written down with the numbers. What
the tables are made of stands in readme_tables.py.
"""

import json
import shlex
import statistics
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import torch
from support.provenance import commit, machine
from support.readme_tables import RESULTS, TESTS, fill

from nanovlm.files import replace_text
from nanovlm.recipes import recipe_of
from nanovlm.training.start import DEFAULT_THREADS, settle_precision

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("n*/**/*.md"))]
FLAGS = ("init", "data", "images", "datasets")  # of train.py, kept in config.json under these names


def collect(folders, recipe_file=None):
    """What several runs of one command with different seeds have in common, and what each has found.

    Args:
      folders: list of Path, output folders of train.py. recipe_file: as in recipes.load.
    Returns: dict, the content of a results file. Shares lie in [0, 1].
    Raises: FileNotFoundError for a run that has not finished; ValueError for a smoke run, for runs that differ in more
      than their seed, or for a seed that comes twice.
    """
    configs = [_config(folder) for folder in folders]
    seeds = [config["seed"] for config in configs]
    for folder, config in zip(folders, configs):
        for key, value in config.items():
            if key != "seed" and value != configs[0][key]:
                raise ValueError(f"{folder} and {folders[0]} differ in {key}; collect runs that differ in their seed alone")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {seeds}: one comes twice")
    runs = [_run(folder, config) for folder, config in sorted(zip(folders, configs), key=lambda pair: pair[1]["seed"])]
    return {
        "command": command(configs[0], recipe_file),
        "commit": commit(),
        "hardware": machine(),
        "threads": configs[0]["threads"],
        "torch": torch.__version__,
        "date": max(run["date"] for run in runs),
        "seeds": sorted(seeds),
        "shares": {name: spread([run["results"][name] for run in runs]) for name in TESTS if name in runs[0]["results"]},
        "runs": runs,
    }


def spread(values):
    """Numbers, one per seed, and their least, mean and greatest."""
    return {"seeds": values, "min": min(values), "mean": statistics.fmean(values), "max": max(values)}


def _config(folder):
    """config.json of a finished run."""
    for name in ("config.json", "results.json", "log.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; give the output folder of a run that has finished")
    config = json.loads((folder / "config.json").read_text())
    if config["smoke"]:
        raise ValueError(f"{folder} is a smoke run, which learns nothing; give runs without --smoke")
    return config


def _run(folder, config):
    """One run: seed, day, results.json, and per stage the measures before and after it with its sentence about them."""
    stages = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "measures" in entry:
            stages.setdefault(entry["stage"], {})[entry["when"]] = entry["measures"]
    for name, stage in stages.items():
        change = {key: f"{stage['before'][key]:.1%} → {share:.1%}" for key, share in stage["after"].items()}
        stage["summary"] = config["stages"][name]["summary"].format(**change)
    day = date.fromtimestamp((folder / "results.json").stat().st_mtime)
    results = json.loads((folder / "results.json").read_text())
    return {"seed": config["seed"], "date": str(day), "results": results, "stages": stages}


def command(config, recipe_file=None):
    """The command line, but for seed and folder, whose settings are those of a config.json: str.

    recipe_file: as in recipes.load.
    """
    recipe = recipe_of("the run", config, recipe_file)
    words = ["python", "train.py", *([] if config["recipe"] == "nano" else [config["recipe"]])]
    if config["size"] != recipe.sizes[0]:
        words += ["--size", config["size"]]
    if config["threads"] != DEFAULT_THREADS:
        words += ["--threads", str(config["threads"])]
    for name in FLAGS:
        if config[name] is not None:
            words += [f"--{name}", config[name]]
    usual_stages = settle_precision(recipe.stages(config["size"], config["smoke"]), "cpu", None)
    stages = json.loads(json.dumps({stage.name: vars(stage) for stage in usual_stages}))
    for name in stages:
        if name not in config["stages"]:
            words += ["--without", name]
    last = config["stage_names"][-1]
    for name, chosen in config["stages"].items():
        usual = stages[name]
        if config["data"] is not None and name == last:
            usual["mixture"] = chosen["mixture"]  # --data has already said it
        if config["data"] is not None and not chosen["summary"]:
            usual["summary"] = ""
        for field, value in chosen.items():
            for setting in _settings(usual[field], value):
                words += ["--set", f"{name}.{field}{setting}"]
    return shlex.join(words)


def _settings(usual, value):
    """What follows `--set stage.field` to turn one JSON value into another: list of str, empty if they are equal."""
    if isinstance(value, dict):
        keys = [key for key in {**usual, **value} if usual.get(key) != value.get(key)]
        return [f".{key}={value.get(key, 'none')}" for key in keys]
    text = ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    return [] if value == usual else [f"={text}"]


def main(arguments):
    """Run the command line; returns the exit code."""
    try:
        if arguments == ["readme"]:
            for page in PAGES:
                replace_text(page, fill(page.read_text(encoding="utf-8")))
        elif len(arguments) > 2 and arguments[0] == "collect":
            files = [one for one in arguments[2:] if one.endswith(".py")]
            folders = [Path(one) for one in arguments[2:] if one not in files]
            text = json.dumps(collect(folders, *files), indent=1, ensure_ascii=False)
            RESULTS.mkdir(exist_ok=True)
            replace_text(RESULTS / f"{arguments[1]}.json", text + "\n")
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except (ValueError, OSError) as error:
        print(f"results.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
