"""How good a data set of instructions is: the review's eight indicators in one report.

    python -m nanovlm.vlit quality FILE --images FOLDER
    python -m nanovlm.vlit quality FILE --annotations instances.json --encoder CLIP_FOLDER
    python -m nanovlm.vlit quality FILE --generator endpoint --base-url URL --model NAME      with a judge

How each is computed stands in the report and in indicators.py. Other forms than LLaVA's come through
`python -m nanovlm.data convert`. The folder holds report.json, report.txt, report.png, and with a judge replies.jsonl,
with which the same command goes on after an interruption.
"""

import resource
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy
from matplotlib.figure import Figure

from nanovlm import files
from nanovlm.evaluation.items import short_names, write_json
from nanovlm.vlit import annotations
from nanovlm.vlit.clustering import simcse_vectors, tfidf_vectors
from nanovlm.vlit.correctness import facts_of, keys_of, known
from nanovlm.vlit.generators import add_generator_flags, open_generator
from nanovlm.vlit.indicators import FLAGS, Helpers, Settings, count_records, measure
from nanovlm.vlit.matching import load_encoder
from nanovlm.vlit.replies import Recorded
from nanovlm.vlit.self_instruct import sentences
from nanovlm.vlit.words import LEXICON, load_table

EMBEDDINGS = {"tfidf": tfidf_vectors, "simcse": simcse_vectors}
SHOWN = 5  # problems named on the screen
ARROWS = {"higher": "↑", "lower": "↓"}
REVIEW = load_table("table_4.json")  # its own values; its columns R and O/G are legible for two data sets only


def add_measure_flags(parser):
    """The flags that `quality`, `filter` and `compare` share."""
    add = parser.add_argument
    add("--images", metavar="FOLDER", help="where image paths start (default: the folder of FILE)")
    add("--annotations", nargs="+", default=[], metavar="FILE", help="what people noted about the pictures, as for "
        "construct: rules check responses against it")  # fmt: skip
    add("--encoder", metavar="FOLDER", help="a CLIP, or a trained model's with its text tower, for the matching degree")
    add("--embedding", choices=EMBEDDINGS, default="tfidf", help="of responses (default: tfidf)")
    add("--lexicon", metavar="FILE", help="names of things, one a line, instead of the built-in ones")
    add("--task-field", action="store_true", help="take the samples' own `task` where there is one")
    for name, words in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=int, default=vars(Settings)[name], help=words)
    add("--eps", type=float, default=Settings.eps, help="of DBSCAN, 1 - cosine")
    add("--seed", type=int, default=0)
    add_generator_flags(parser)


def settings_of(args, size=None):
    """The Settings that the flags ask for. Raises: ValueError for a number out of range."""
    given = {one.name: vars(args)[one.name] for one in fields(Settings) if one.name in args}
    return Settings(**given | {"size": size, "votes": args.n})


def helpers_of(args, out):
    """What measuring needs beside the data set: Helpers. out: folder where the judge's answers are written down."""
    collection = annotations.read(args.annotations)
    for problem in collection.problems:
        print(f"annotation not read: {problem}")
    pictures, lexicon, judge = collection.pictures.values(), LEXICON, None
    told = {key: sentences(one) for one in pictures for key in keys_of(one)}
    if args.lexicon:
        lines = Path(args.lexicon).read_text(encoding="utf-8").lower().split("\n")
        lexicon = frozenset(filter(None, map(str.strip, lines)))
    out.mkdir(parents=True, exist_ok=True)
    if args.generator != "template":
        judge = Recorded(open_generator(args), out / "replies.jsonl")
    facts = facts_of(pictures) if args.annotations else None
    encoder = load_encoder(args.encoder, args.recipe) if args.encoder else None
    return Helpers(facts, encoder, judge, EMBEDDINGS[args.embedding], lexicon, lambda sample: known(sample, told) or "")


def add_flags(parser):
    """The flags of `quality`."""
    add_measure_flags(parser)
    parser.add_argument("file", metavar="FILE", help="LLaVA-style .json or .jsonl; others through nanovlm.data convert")
    parser.add_argument("--size", type=int, help="samples drawn at random (default: all)")
    parser.add_argument("--out", default="out/quality", metavar="FOLDER")


def run(args):
    """Measure a file: list of str, what to print."""
    path, out = Path(args.file), Path(args.out)
    settings, root = settings_of(args, args.size), Path(args.images or path.parent)
    return write(out, path, settings, *measure(path, settings, root, helpers_of(args, out)))


# The report


def number(value, width=10, digits=3):
    """A number in a column; "-" for what was not measured."""
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def table(indicators):
    """The indicators in words: list of str, a line for each, and for what was not measured why not."""
    lines = [f"{'indicator':<34}{'value':>10}{'95% interval':>20}{'on':>10}{'seconds':>9}{'tokens':>9}"]
    for one in indicators:
        reach = "{:.2f} to {:.2f}".format(*one.interval) if one.interval else ""
        lines.append(f"{one.key + ' ' + ARROWS[one.better]:<13}{one.name:<21.21}{number(one.value)}{reach:>20}"
                     f"{one.measured:>10}{one.seconds:>9.1f}{one.tokens:>9}")  # fmt: skip
        lines += [f"    {one.computation}"] if one.value is None else []
    return lines


def notes(indicators):
    """How each indicator was computed, and what stands beside it: list of str."""
    lines = []
    for one in indicators:
        told = [f"{name} {value if isinstance(value, int) else number(value, 0)}" for name, value in one.beside.items()]
        lines += [f"{one.key}: {one.computation}", *([f"    {', '.join(told)}"] if told else [])]
    return lines


def write(folder, path, settings, indicators, found):
    """Write report.json, report.txt and report.png: list of str, what to print. found: indicators.Survey."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = [f"{where}: {words}" for where, words in found.problems]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report = {
        "file": str(path), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "settings": asdict(settings),
        "records": found.records, "unreadable": found.unreadable, "defective": found.defective,
        "pairs": found.num_pairs, "tasks": dict(found.tasks.most_common()), "defects": dict(found.defects),
        "problems": problems,
        "problems named": f"the first {len(problems)} of {found.unreadable + found.defects.total()} or more",
        "indicators": list(map(asdict, indicators)), "peak memory, MiB": peak,
    }  # fmt: skip
    kinds = ", ".join(f"{rule} {count}" for rule, count in found.defects.most_common())
    told = [
        f"{path}: {found.records} samples, {found.num_pairs} instructions with a response; {found.unreadable} records "
        f"unreadable, {found.defective} samples with defects{f' ({kinds})' if kinds else ''}",
        *(f"    {problem}" for problem in problems[:SHOWN]),
        *(["    … more in report.json"] if len(problems) > SHOWN else []),
        "", *table(indicators), "", *notes(indicators), "", f"peak memory of this process {peak:.0f} MiB",
    ]  # fmt: skip
    figure = plot(indicators, found, settings)
    title = "   ".join(f"{one.key} {number(one.value, 0, 2)}" for one in indicators)
    figure.suptitle(f"{path.name}, {found.records} samples, seed {settings.seed}\n{title}", fontsize=10)
    return save(folder, "report", report, told, figure)


def save(folder, name, report, told, figure):
    """Write a report as .json, .txt and .png: list of str, what to print."""
    write_json(folder / f"{name}.json", report)
    files.replace_text(folder / f"{name}.txt", "\n".join(told) + "\n")
    figure.savefig(folder / f"{name}.png", dpi=110)
    return [*told, f"written to {folder}: {name}.json, {name}.txt, {name}.png"]


def plot(indicators, found, settings):
    """Shares of tasks, clusters of instructions of each, and lengths of responses: Figure."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    tasks, clusters, lengths = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    counts, (large,) = dict(found.tasks.most_common()), [one.beside for one in indicators if one.key == "I"]
    tasks.barh(list(counts), [100 * count / found.num_pairs for count in counts.values()], color="tab:blue")
    tasks.set(xlabel="share of instructions (%)", title=f"{len(counts)} tasks by rule")
    clusters.barh(list(counts), [large.get(task, 0) for task in counts], color="tab:orange")
    clusters.set(yticks=[], xlabel=f"word clusters of {settings.smallest}+ personas", title="instruction diversity")
    for axes in (tasks, clusters):
        axes.invert_yaxis()
    edges = [0, *(2**power for power in range(max(found.words).bit_length() + 1))]
    bins, _ = numpy.histogram(list(found.words), edges, weights=list(found.words.values()))
    names = [f"{low}" if high == low + 1 else f"{low}–{high - 1}" for low, high in zip(edges, edges[1:])]
    lengths.bar(names, 100 * bins / found.num_pairs, color="tab:green")
    lengths.tick_params(axis="x", labelrotation=60)
    lengths.set(xlabel="words of a response", ylabel="share of responses (%)", title="response length")
    return figure


# Several data sets


def add_compare_flags(parser):
    """The flags of `compare`."""
    add_measure_flags(parser)
    parser.add_argument("files", nargs="+", metavar="FILE", help="two or more data sets")
    parser.add_argument("--size", type=int, help="samples of each (default: those of the smallest)")
    parser.add_argument("--out", default="out/compare", metavar="FOLDER")


def compare(args):
    """Data sets side by side, as in Table 4 of the VLIT review, at equal size.

        python -m nanovlm.vlit compare A.json B.json C.json --images FOLDER

    Several indicators grow with the number of samples, so every file is measured on as many as the smallest holds,
    drawn at random (--size: fewer), and response diversity on as many responses. The folder holds compare.json,
    compare.txt and compare.png.
    """
    paths, out = list(map(Path, args.files)), Path(args.out)
    if len(paths) < 2:
        raise ValueError(f"one file, {paths[0]}; give two or more to compare, or use `quality`")
    names, size = short_names([path.with_suffix("") for path in paths]), args.size or min(map(count_records, paths))
    settings, helpers = settings_of(args, size), helpers_of(args, out)
    # a set of long conversations has more responses in as many samples
    settings = replace(settings, responses=min(settings.responses, size))
    roots = [Path(args.images or path.parent) for path in paths]
    found = {name: measure(path, settings, root, helpers)[0] for name, path, root in zip(names, paths, roots)}
    title = f"{size} samples of each, seed {args.seed}"
    told = [f"{len(paths)} data sets, {title}", "", *comparison(found), "", *notes(found[names[0]])]
    report = {"size": size, "settings": asdict(settings), "files": dict(zip(names, args.files)),
              "data sets": {name: list(map(asdict, rows)) for name, rows in found.items()}}  # fmt: skip
    figure = plot_comparison(found)
    figure.suptitle(title, fontsize=10)
    return save(out, "compare", report, told, figure)


def comparison(found):
    """Table 4 of {name: list of Indicator}: list of str, the review's own rows below for orientation."""
    keys = {one.key: one.better for one in next(iter(found.values()))}
    width = max(map(len, (*found, *REVIEW["data sets"]))) + 3

    def row(name, values, digits=2, absent="-"):
        cells = (number(values[key], 12, digits) if key in values else f"{absent:>12}" for key in keys)
        return f"{name:<{width}}" + "".join(cells)

    lines = [f"{'':<{width}}" + "".join(f"{key + ' ' + ARROWS[better]:>12}" for key, better in keys.items())]
    for name, rows in found.items():
        literal = {one.key: one.beside["literal"] for one in rows if "literal" in one.beside}
        lines += [row(name, {one.key: one.value for one in rows}), row("  as printed", literal, absent="")]
    lines.append("the review's Table 4, by its own tools:")
    return lines + [row(name, {key: values[place] for key, values in REVIEW["values"].items()}, 1)
                    for place, name in enumerate(REVIEW["data sets"])]  # fmt: skip


def plot_comparison(found):
    """One small diagram for each indicator that was measured, a bar with its interval for each data set: Figure."""
    shown = [bars for bars in zip(*found.values()) if any(one.value is not None for one in bars)]
    rows = -(-len(shown) // 4)
    figure = Figure(figsize=(12.4, 0.9 + 2.6 * rows), layout="constrained")
    for place, bars in enumerate(shown, start=1):
        axes, values = figure.add_subplot(rows, 4, place), [one.value or 0.0 for one in bars]
        edges = numpy.array([one.interval or (value, value) for one, value in zip(bars, values)])
        axes.bar(list(found), values, yerr=abs(edges.T - values), color=[f"C{n}" for n in range(len(bars))], capsize=3)
        axes.tick_params(axis="x", labelrotation=20, labelsize=8)
        axes.set_title(f"{bars[0].key}: {bars[0].name}", fontsize=9)
        axes.set_ylabel(f"{bars[0].better} is better", fontsize=8)
    return figure
