"""Is one recipe better than another? Both train from one start with the same seeds, and every measure is compared.

    python train.py my_recipe.py --against nano       three seeds, a hundred steps of each one's last stage

They begin with a trained model's tensors (--init; nano's, which come along) where both have the same ones, and a part
in which they differ begins anew in both. With d the differences of a measure over n seeds, s their deviation and t
Student's quantiles of n - 1 degrees of freedom, the interval is mean(d) +- t(97.5%) s / sqrt(n), and the smallest
effect that four experiments of five would have found is (t(97.5%) + t(80%)) s / sqrt(n).
"""

import json
import math
import statistics
from argparse import Namespace
from pathlib import Path

from safetensors.torch import load_file

from nanovlm.recipes import find, folder_of
from nanovlm.training import checkpoint
from nanovlm.training.start import build_models, choose_size

SEEDS = (0, 1, 2)
STEPS = 100  # of the last stage: about a minute of nano on two cores
T_975, T_80 = 4.303, 1.061  # Student's t of two degrees of freedom


def shares(results):
    """The shares in a results.json, those by kind of question under "TEST KIND": {name: float}."""
    found = {name: value for name, value in results.items() if isinstance(value, float) and 0 <= value <= 1}
    kinds = results.get("kinds", {}).items()
    return found | {f"{test} {kind}": share for test, by_kind in kinds for kind, share in by_kind.items()}


def write_starts(recipes, sizes, seed, init, out):
    """Write for each recipe a folder for --init: (list of Path, sorted list of the tensors that begin anew in both)."""
    config = json.loads((init / "config.json").read_text())
    known = load_file(init / "model.safetensors")
    models = []
    for recipe, size in zip(recipes, sizes):
        model, _ = build_models(recipe, size, len(known["decoder.embedding.weight"]), seed)
        model.vision.resize(config["image_size"])
        models.append(model.state_dict())
    same = {name for name, tensor in known.items()
            if all(name in one and one[name].shape == tensor.shape for one in models)}
    folders = []
    for name, tensors in zip("ab", models):
        folder = out / f"start_{name}_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.replace_tensors(folder / "model.safetensors", tensors | {name: known[name].float() for name in same})
        checkpoint.replace_json(folder / "config.json", {"image_size": config["image_size"]})
        (folder / "tokenizer.json").write_bytes((init / "tokenizer.json").read_bytes())
        folders.append(folder)
    return folders, sorted(set().union(*models) - same)


def compare(args, train):
    """Train both recipes with every seed, and print the differences: the exit code. Raises: ValueError, OSError.

    args: the values of train.py's flags, of which each run takes all but stages, start, seed and folder; a setting
      counts for the recipe whose last stage it names. train: function(argparse.Namespace of one run) -> exit code.
    """
    names, recipes = (args.recipe, args.against), (find(args.recipe), find(args.against))
    init = Path(args.init[0]) if args.init else folder_of("nano")
    if not (init / "model.safetensors").exists():
        raise FileNotFoundError(f"{init} holds no model.safetensors; --init takes the output folder of a finished run")
    sizes = [choose_size(one, args.size) for one in recipes]
    last = [one.stages(size, args.smoke)[-1].name for one, size in zip(recipes, sizes)]
    lost = [one for one in args.set if one.partition(".")[0] not in last]
    if lost:
        raise ValueError(f"--set {lost[0]} names no last stage of the two; trained: {', '.join(dict.fromkeys(last))}")
    out, found = args.out or Path("out") / f"{recipes[0].name}_against_{recipes[1].name}", []
    for seed in SEEDS:
        folders, anew = write_starts(recipes, sizes, seed, init, out)
        if anew and seed == SEEDS[0]:
            print(f"{len(anew)} tensors begin anew in both: {', '.join(anew[:4])}{' …' if len(anew) > 4 else ''}")
        runs = [out / f"{side}_{seed}" for side in "ab"]
        for name, stage, folder, run in zip(names, last, folders, runs):
            settings = [f"{stage}.steps={STEPS}"] * (not args.smoke)  # the last counts
            settings += [one for one in args.set if one.startswith(f"{stage}.")]
            own = dict(recipe=name, stages=[stage], init=[str(folder)], seed=seed, out=run, resume=run.exists())
            if code := train(Namespace(**vars(args) | own | {"set": settings})):
                return code
        found.append([shares(json.loads((run / "results.json").read_text())) for run in runs])
    print("\n".join(table(found, names)))
    return 0


def table(found, names):
    """The comparison as lines. found: for every seed the shares of both. names: of the recipes."""
    ours, theirs = (name[-16:] for name in names)
    lines = ["", f"{'measure':<44}{ours:>18}{theirs:>18}{'difference':>12}{'95% interval':>20}{'could see':>11}"]
    for measure in found[0][0]:
        pairs = [(ours[measure], theirs[measure]) for ours, theirs in found if measure in ours and measure in theirs]
        if len(pairs) < len(found):
            continue
        gains = [ours - theirs for ours, theirs in pairs]
        mean, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
        ours, theirs = map(statistics.mean, zip(*pairs))
        interval = f"{100 * (mean - T_975 * error):+.1f} to {100 * (mean + T_975 * error):+.1f}"
        lines.append(f"{measure:<44}{ours:>18.1%}{theirs:>18.1%}{100 * mean:>+12.1f}{interval:>20}"
                     f"{100 * (T_975 + T_80) * error:>11.1f}")
    seeds = ", ".join(map(str, SEEDS))
    return [*lines, "", f"percentage points over seeds {seeds}; an interval that holds 0 shows no difference"]
