"""The pages' tables, made from the results of runs, from the recipe and from the code, so that none of them can be wrong.

In README.md and the other pages, what stands between `<!-- BLOCK:NAMES -->` and `<!-- end -->` is made here; BLOCKS lists the kinds of block.
To make all of them anew: python notebooks/support/results.py readme
"""

import ast
import functools
import json
import re
import statistics
import textwrap
from pathlib import Path

import torch

from nanovlm.recipes.nano_tests import BLANK, BY_KIND, NAMES, results_table
from nanovlm.names import nearest
from nanovlm.recipes import RECIPES, find
from nanovlm.recipes import table as models

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "notebooks" / "results"
TESTS = NAMES | {BLANK: "easy-VQA over grey pictures"}
OBJECTIVES = {"contrastive": "pictures against captions", "language": "the next token"}
def printed_block(names):
    """What train.py prints of the first run: a sentence per stage, and the results without the question types."""
    run = read(names[0])["runs"][0]
    table = [line for line in results_table(run["results"]) if not line.startswith(" ")]
    return ["```text", *[stage["summary"] for stage in run["stages"].values()], "", *table, "```"]


def results_block(names):
    """One row per test, one column per seed."""
    found = read(names[0])
    first = found["runs"][0]["results"]
    seeds = [f"seed {seed}" for seed in found["seeds"]]
    rows = [
        [TESTS[name], f"{first['questions'][name]:,}", *map(percent, share["seeds"]), percent(share["mean"]),
         percent(first["majority"].get(name, {}).get("all"))]
        for name, share in found["shares"].items()
    ]  # fmt: skip
    return [*table(["held-out test", "questions", *seeds, "mean", "majority"], rows), "", note(found)]


def kinds_block(names):
    """Per question type: the mean over the seeds, and in brackets what the most frequent answer gets."""
    found = read(names[0])
    tests = [name for name in BY_KIND if name in found["shares"]]
    shares = [run["results"]["kinds"] for run in found["runs"]]
    majority = found["runs"][0]["results"]["majority"]
    rows = []
    for kind in dict.fromkeys(kind for name in tests for kind in sorted(shares[0][name])):
        cells = []
        for name in tests:
            known = kind in shares[0][name]
            mean = statistics.fmean(share[name][kind] for share in shares) if known else None
            cells.append(f"{percent(mean)} ({percent(majority[name][kind])})" if known else "")
        rows.append([kind.replace("_", " "), *cells])
    return table(["question", *[TESTS[name] for name in tests]], rows)


def compare_block(names):
    """One row per test, one column per results file: the mean, and in brackets the range over the seeds."""
    found = {name: read(name) for name in names}
    rows = []
    for test, words in TESTS.items():
        if not all(test in one["shares"] for one in found.values()):
            continue
        shares = [one["shares"][test] for one in found.values()]
        cells = [f"{percent(share['mean'])} ({100 * share['min']:.1f} – {100 * share['max']:.1f})" for share in shares]
        rows.append([words, *cells])
    notes = [f"- {heading(name)}: {note(one)}" for name, one in found.items()]
    return [*table(["held-out test", *map(heading, names)], rows), "", *notes]


def recipe_block(names):
    """A recipe's stages, and the sizes of the model's parts."""
    recipe, rows = find(names[0]), []
    for stage in recipe.stages(recipe.sizes[0], False):
        sees = {"vision", "bridge"} & stage.learning_rates.keys()
        trained = ", ".join(part.replace("_", " ") for part in stage.learning_rates)
        steps = f"{stage.steps:,} × {stage.batch_size}"
        rows.append([stage.name, OBJECTIVES[stage.objective], stage.image_size if sees else "", steps, trained])
    with torch.device("meta"):  # sizes only, no weights
        parts = recipe.build(recipe.sizes[0], 0 if recipe.published else recipe.tokenizer().vocab_size).parts()
    sizes = {part.replace("_", " "): sum(p.numel() for p in parameters.values()) for part, parameters in parts.items()}
    listed = ", ".join(f"{part} {size:,}" for part, size in sizes.items() if size)
    return [*table(["stage", "learns", "pixels", "steps × examples", "what trains"], rows), "",
            f"{sum(sizes.values()):,} parameters: {listed}."]


@functools.cache
def counted_models():
    """The tables of all recipes' models: list of (title, headings, rows)."""
    return models.tables(models.rows())


def models_block(names):
    """One of the tables of recipes/table.py, by the first word that is only in its title."""
    chosen = [(headings, rows) for title, headings, rows in counted_models() if names[0] in title.lower()]
    if len(chosen) != 1:
        raise ValueError(f"{len(chosen)} tables of the models have {names[0]!r} in their title; one is needed")
    return table(*chosen[0])


def adds_block(names):
    """Per recipe the files of its model that not every model has, and the recipe's own, each with its lines."""
    used = {}
    with torch.device("meta"):
        for name in RECIPES:
            model = find(name).build("tiny", 512)
            used[name] = {type(module).__module__ for module in model.modules() if type(module).__module__.startswith("nanovlm.")}
    shared = set.intersection(*used.values())
    lines = lambda module: len((ROOT / f"{module.replace('.', '/')}.py").read_text().splitlines())
    link = lambda module: f"[{module.rpartition('.')[2]}.py](../{module.partition('.')[2].replace('.', '/')}.py) {lines(module)}"
    rows = []
    for name, modules in used.items():
        own, recipe = sorted(modules - shared), f"nanovlm.recipes.{name}"
        rows.append([name, ", ".join(map(link, own)), link(recipe), sum(map(lines, [*own, recipe]))])
    listed = ", ".join(map(link, sorted(shared)))
    return [*table(["model", "its own parts, lines", "its recipe, lines", "together"], rows), "", f"All of them share {listed}."]


def source_block(names):
    """A function or class of the code as it stands: "PATH NAME", or "PATH CLASS.NAME"."""
    path, name = names[0].split()
    text = (ROOT / "nanovlm" / path).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        node = next(one for one in node.body if getattr(one, "name", None) == part)
    code = textwrap.dedent("\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]))
    return ["```python", *code.splitlines(), "```"]


BLOCKS = {
    "printed": printed_block, "results": results_block, "kinds": kinds_block, "compare": compare_block,
    "recipe": recipe_block, "models": models_block, "adds": adds_block, "source": source_block,
}  # fmt: skip


def fill(text):
    """A page with all its blocks made anew: str to str.

    Raises: ValueError for an unknown kind of block; FileNotFoundError for results that have not been collected.
    """
    def block(match):
        kind, names = match[1], [name.strip() for name in (match[2] or "").split(",")]
        if kind not in BLOCKS:
            raise ValueError(f"unknown block {kind!r}.{nearest(kind, BLOCKS)}")
        return "\n".join([match[0].partition("\n")[0], *BLOCKS[kind](names), "<!-- end -->"])

    return re.sub(r"<!-- (\w+)(?::([\w, ./]+))? -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def read(name):
    """The content of a results file."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such results; make them with: python notebooks/support/results.py collect {name} FOLDER …")
    return json.loads(path.read_text())


def note(found):
    """How results came about, in one line."""
    seeds = ", ".join(map(str, found["seeds"]))
    results = [run["results"] for run in found["runs"]]
    cost = " to ".join(dict.fromkeys(f"{extreme(one['seconds'] for one in results):.0f}" for extreme in (min, max))) + " s"
    if all("cpu_seconds" in one for one in results):
        cost += f" ({max(one['cpu_seconds'] for one in results):.0f} CPU-seconds at most)"
    threads = f"{found['threads']} thread" + "s" * (found["threads"] > 1)
    return (f"`{found['command']} --seed N`, N = {seeds}; {results[0]['parameters']:,} parameters; {cost} on "
            f"{threads} of {found['hardware']}; torch {found['torch']}, commit {found['commit']}, {found['date']}.")


def heading(name):
    """A results file's name as words."""
    return name.replace("_", " ")


def percent(share):
    """A share as people read it; nothing for None."""
    return "" if share is None else f"{share:.1%}"


def table(head, rows):
    """A Markdown table, numbers to the right: list of str."""
    numbers = [any(re.match(r"\**\d", str(cell)) for cell in column) for column in zip(*rows)]
    rules = ["---:" if number else "---" for number in numbers]
    return ["| " + " | ".join(map(str, cells)).rstrip() + " |" for cells in (head, rules, *rows)]
