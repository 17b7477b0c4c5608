"""The indicators of data sets in words, as JSON and as pictures."""

import dataclasses
import json
import os
import resource
import time
from pathlib import Path

HEAD = f"{'indicator':<34}{'value':>10}{'95% interval':>20}{'on':>10}{'seconds':>9}{'tokens':>9}"
SHOWN = 5  # problems named on the screen


def number(value, width=10, digits=3):
    """A number in a column; "-" for what was not measured."""
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def table(indicators):
    """The indicators in words: list of str, a line for each and the numbers beside it below."""
    lines = [HEAD]
    for one in indicators:
        reach = "" if one.interval is None else f"{one.interval[0]:.2f} to {one.interval[1]:.2f}"
        arrow = {"higher": "↑", "lower": "↓"}[one.better]
        lines.append(f"{one.key + ' ' + arrow:<13}{one.name:<21.21}{number(one.value)}{reach:>20}{one.measured:>10}"
                     f"{one.seconds:>9.1f}{one.tokens:>9}")  # fmt: skip
        if one.value is None:
            lines.append(f"    {one.computation}")
    return lines


def notes(indicators):
    """How each indicator was computed, and what stands beside it: list of str."""
    lines = []
    for one in indicators:
        lines.append(f"{one.key}: {one.computation}")
        if one.beside:
            told = (
                f"{name} {number(value, 0) if isinstance(value, float) or value is None else value}"
                for name, value in one.beside.items()
            )
            lines.append("    " + ", ".join(told))
    return lines


def lines(path, indicators, found):
    """The whole report in words: list of str. found: survey.Survey."""
    kinds = ", ".join(f"{rule} {count}" for rule, count in found.defects.most_common())
    told = [
        f"{path}: {found.records} samples, {found.num_pairs} instructions with a response; {found.unreadable} records unreadable, "
        f"{found.defective} samples with defects{f' ({kinds})' if kinds else ''}",
        *(f"    {where}: {words}" for where, words in found.problems[:SHOWN]),
    ]  # fmt: skip
    if len(found.problems) > SHOWN:
        told.append("    … more in report.json")
    return [
        *told,
        "",
        *table(indicators),
        "",
        *notes(indicators),
        "",
        f"peak memory of this process {peak_mib():.0f} MiB",
    ]


def peak_mib():
    """The most memory that this process ever held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def as_json(path, settings, indicators, found):
    """The whole report: dict of JSON values."""
    return {
        "file": str(path), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "settings": dataclasses.asdict(settings),
        "records": found.records, "unreadable": found.unreadable, "defective": found.defective, "pairs": found.num_pairs,
        "tasks": dict(found.tasks.most_common()), "defects": dict(found.defects),
        "problems": [f"{where}: {words}" for where, words in found.problems],
        "problems named": f"the first {len(found.problems)} of {found.unreadable + sum(found.defects.values())} or more",
        "indicators": [dataclasses.asdict(one) for one in indicators], "peak memory, MiB": peak_mib(),
    }  # fmt: skip


def write(folder, path, settings, indicators, found):
    """Write report.json, report.txt and report.png into a folder: list of str, what to print."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    told = lines(path, indicators, found)
    replace(
        folder / "report.json",
        json.dumps(as_json(path, settings, indicators, found), indent=1, ensure_ascii=False) + "\n",
    )
    replace(folder / "report.txt", "\n".join(told) + "\n")
    plot(folder / "report.png", path, settings, indicators, found)
    return [*told, f"written to {folder}: report.json, report.txt, report.png"]


def replace(path, text):
    """Write a text file whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def plot(path, file, settings, indicators, found):
    """Shares of tasks, clusters of instructions of each, and lengths of responses."""
    from matplotlib.figure import Figure  # takes a second to import, which only the end of a run should pay

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    tasks, clusters, lengths = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    counts = dict(found.tasks.most_common())
    total = sum(counts.values())
    tasks.barh(list(counts), [100 * count / total for count in counts.values()], color="tab:blue")
    tasks.set_xlabel("share of instructions (%)")
    tasks.set_title(f"{len(counts)} tasks by rule", fontsize=10)
    diversity = next(one for one in indicators if one.key == "I")
    large = [diversity.beside.get(task, 0) for task in counts]
    clusters.barh(list(counts), large, color="tab:orange")
    clusters.set_yticks([])
    clusters.set_xlabel(f"word clusters of {settings.diversity.smallest}+ personas")
    clusters.set_title("instruction diversity", fontsize=10)
    for axes in (tasks, clusters):
        axes.invert_yaxis()
    longest = max(found.words)
    edges = [0, *(2**power for power in range(longest.bit_length() + 1))]
    bins = [
        sum(count for words, count in found.words.items() if low <= words < high) for low, high in zip(edges, edges[1:])
    ]
    names = [f"{low}" if high == low + 1 else f"{low}–{high - 1}" for low, high in zip(edges, edges[1:])]
    lengths.bar(names, [100 * count / found.num_pairs for count in bins], color="tab:green")
    lengths.tick_params(axis="x", labelrotation=60)
    lengths.set_xlabel("words of a response")
    lengths.set_ylabel("share of responses (%)")
    lengths.set_title("response length", fontsize=10)
    values = "   ".join(f"{one.key} {number(one.value, 0, 2)}" for one in indicators)
    figure.suptitle(f"{Path(file).name}, {found.records} samples, seed {settings.seed}\n{values}", fontsize=10)
    figure.savefig(path, dpi=110)
