"""Train the variants of ablations, each by the ordinary `train.py`, and write what they found as tables.

    OUT/starts/tower-…/0      a tower, then OUT/starts/instructed-…/0 and OUT/starts/raw-…/0 from it: once per seed
    OUT/starts/mam-…/0        the same weights in a model that is built otherwise, see `graft`
    OUT/runs/mam-…/0          one run of one variant; a finished one is never trained again, unless its settings change
    TABLES/queries.csv        a row per variant and seed, rewritten whenever a run of the ablation has finished

A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import re
import shlex
import shutil
import time
import zlib

from safetensors.torch import load_file
from tqdm import tqdm

from nanovlm.training import checkpoint
from ablations import ablation_table
from ablations.ablation_recipe import RECIPE
from support import provenance
from nanovlm.training.start import build_models, choose_stages
from nanovlm.training.stages import Stage
from nanovlm.published.weights import SINGLE

STARTS = {  # name -> (stage, flags of train.py, the start it begins from)
    "tower": ("tower", (), None),
    "instructed": ("language", (), "tower"),
    "raw": (
        "language", ("--set", "language.mixture.texts=none", "--set", "language.mixture.plain_texts=1"), "tower",
    ),
}  # fmt: skip
BUILT = "plain"  # how the starts are built
BEFORE = "text before"
TRAINED = "trained"  # commit, machine and day of a run


class AblationError(RuntimeError):
    """A run has failed; the message names its command."""


@functools.cache
def command_line():
    """The module `train`, whose command line every run goes through."""
    specification = importlib.util.spec_from_file_location("train", provenance.ROOT / "train.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def train(arguments):
    """`python train.py ARGUMENTS`, but in this process: importing torch would take as long as some of the runs.

    Raises: AblationError unless it ends well, with what it printed last.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = command_line().main(arguments)
    except SystemExit as stop:
        code = stop.code
    if code:
        last = "\n".join(said.getvalue().splitlines()[-5:])
        raise AblationError(f"exit code {code} of: {shlex.join(['python', 'train.py', *arguments])}\n{last}")


def named(name, arguments, before=""):
    """The folder of a run: NAME-DIGEST, where the digest tells its stages and the folder that it begins from.

    Equal variants of several ablations share it; one whose settings have changed, a smoke run too, is another.
    """
    wishes = command_line().make_parser().parse([RECIPE.name, *arguments])
    usual = {field.name: field.default for field in dataclasses.fields(Stage)}
    stages = [
        {field: value for field, value in vars(stage).items() if field not in usual or value != usual[field]}
        for stage in choose_stages(RECIPE, wishes)
    ]
    told = json.dumps([before, wishes.size, wishes.lora, stages], sort_keys=True)
    return f"{name}-{zlib.crc32(told.encode()):08x}"


def results_of(folder):
    """results.json of a run that has finished: dict, else None."""
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    return results if TRAINED in results else None


def ensure(folder, arguments, train):
    """The results of a run: dict of results.json, trained now unless it has finished.

    folder: Path. arguments: list of str, flags of train.py but for --out. train: as `train`.
    """
    if results_of(folder) is None:
        resume, began = ["--resume"] if folder.exists() and any(folder.iterdir()) else [], time.process_time()
        train([RECIPE.name, *arguments, "--threads", "1", "--device", "cpu", "--out", str(folder), *resume])
        results = json.loads((folder / "results.json").read_text())
        spent = round(time.process_time() - began, 1)  # of this run; the process may have trained others before
        told = {"cpu_seconds": spent, TRAINED: provenance.stamp()}
        checkpoint.replace_json(folder / "results.json", results | told)
    return results_of(folder)


def start_of(name, seed, out, smoke, train):
    """(folder, results) of a start, trained with what comes before it if it is not there."""
    stage, flags, before = STARTS[name]
    arguments, begun, init = ["--size", BUILT, "--stages", stage, *flags, *["--smoke"] * smoke], "", []
    if before is not None:
        first, _ = start_of(before, seed, out, smoke, train)
        begun, init = first.parent.name, ["--init", str(first)]
    folder = out / "starts" / named(name, arguments, begun) / str(seed)
    return folder, ensure(folder, [*arguments, "--seed", str(seed), *init], train)


def graft(start, size, seed, folder):
    """Write a start's weights into a model that is built otherwise, as a folder for --init.

    Tower and decoder are the start's, image copies of norms, keys and values equal the text's; the bridge is new, from
    the seed.
    Args:
      start, folder: Path. size: of ablation_recipe.py. seed: int.
    """
    if (folder / SINGLE).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((start / "config.json").read_text())
    weights = load_file(start / SINGLE)
    model, _ = build_models(RECIPE, size, len(weights["decoder.embedding.weight"]), seed)
    tensors = {
        name: tensor if name.startswith("bridge.") else weights[re.sub(r"\.(text|vision)\.", ".", name)].clone()
        for name, tensor in model.state_dict().items()
    }
    shutil.copy(start / "tokenizer.json", folder / "tokenizer.json")
    checkpoint.replace_json(folder / "config.json", config | {"size": size})
    checkpoint.replace_tensors(folder / SINGLE, tensors)


def flags_of(variant, smoke=False):
    """The flags of train.py that make a variant: list of str."""
    return ["--size", variant.size, "--stages", "align,instruct", *variant.flags, *["--smoke"] * smoke]


def run_variant(variant, seed, out, smoke, train):
    """The measures of one run: {column: number}."""
    start, before = start_of(variant.start, seed, out, smoke, train)
    begun, init = start.parent.name, start
    if variant.size != BUILT:
        init = out / "starts" / f"{variant.size}-{begun}" / str(seed)
        graft(start, variant.size, seed, init)
    folder = out / "runs" / named(variant.size, flags_of(variant, smoke), begun) / str(seed)
    arguments = [*flags_of(variant, smoke), "--seed", str(seed), "--init", str(init)]
    return ensure(folder, arguments, train) | {BEFORE: before["text"]}


def write_table(path, ablation, rows, command):
    """Write a CSV: a line with the command, and commit, machine and day of its runs, then a row per variant and seed.

    rows: list of {"variant", "seed", measure: number, "trained": str}.
    """
    note = "; ".join([command, *dict.fromkeys(row[TRAINED] for row in rows)])
    ablation_table.write(path, note, ["variant", "seed", *ablation.columns, "parameters", "cpu_seconds"], rows)


def run(ablations, seeds, out, tables, smoke=False, train=train):
    """Train what is missing of some ablations, one run after the other, all seeds of a variant before the next.

    Args:
      ablations: {name: Ablation}. seeds: list of int. out, tables: Path, of the runs and of the CSV files.
      smoke: a few steps of each stage, which proves the machinery. train: function(list of flags), as `train`.
    Yields: name, path of the CSV, whenever an ablation is complete.
    Raises: AblationError.
    """
    total = sum(len(ablation.variants) for ablation in ablations.values()) * len(seeds)
    with tqdm(total=total, unit="run", disable=None) as bar:
        for name, ablation in ablations.items():
            command = f"python notebooks/ablations/ablate.py {name} --seeds {','.join(map(str, seeds))}"
            rows = []
            for variant in ablation.variants:
                for seed in seeds:
                    bar.set_description(f"{name}: {variant.name}, seed {seed}")
                    measures = run_variant(variant, seed, out, smoke, train)
                    rows.append({"variant": variant.name, "seed": seed} | measures)
                    write_table(tables / f"{name}.csv", ablation, rows, command)
                    bar.update()
            yield name, tables / f"{name}.csv"
