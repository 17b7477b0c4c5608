"""Data sets side by side, as in Table 4 of the VLIT review, at equal size.

    python -m nanovlm.vlit compare A.json B.json C.json --images FOLDER

Several indicators grow with the number of samples, so every file is measured on as many as the smallest holds, drawn at
random (--size: fewer), and response diversity on as many responses. The folder holds compare.json, compare.txt and
compare.png.
"""

import dataclasses
import json
from pathlib import Path

from nanovlm.vlit import quality, quality_report
from nanovlm.vlit.indicators import measure
from nanovlm.vlit.review import DATA_SETS, TABLE_4
from nanovlm.vlit.survey import count_records


def add_flags(parser):
    """The flags of `compare`."""
    quality.add_measure_flags(parser)
    parser.add_argument("files", nargs="+", metavar="FILE", help="two or more data sets")
    parser.add_argument(
        "--size", type=int, metavar="N", help="samples of each (default: as many as the smallest holds)"
    )
    parser.add_argument("--out", default="out/compare", metavar="FOLDER")


def run(wishes):
    """Measure and compare: list of str, what to print."""
    paths = [Path(name) for name in wishes.files]
    if len(paths) < 2:
        raise ValueError(f"one file, {paths[0]}; give two or more to compare, or use `quality`")
    out, size = Path(wishes.out), wishes.size or min(map(count_records, paths))
    settings, helpers = quality.settings_of(wishes, size), quality.helpers_of(wishes, out)
    # a set of long conversations has more responses in as many samples
    options = dataclasses.replace(settings.diversity, responses=min(settings.diversity.responses, size))
    settings = dataclasses.replace(settings, diversity=options)
    names = labels(paths)
    found = {}
    for name, path in zip(names, paths):
        root = Path(wishes.images) if wishes.images else path.parent
        found[name], _ = measure(path, settings, root, helpers)
    told = [f"{len(paths)} data sets, {size} samples of each, seed {wishes.seed}", "", *table(found), "",
            *quality_report.notes(found[names[0]])]  # fmt: skip
    report = {"size": size, "settings": dataclasses.asdict(settings), "files": dict(zip(names, wishes.files)),
              "data sets": {name: [dataclasses.asdict(one) for one in rows] for name, rows in found.items()}}  # fmt: skip
    quality_report.replace(out / "compare.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    quality_report.replace(out / "compare.txt", "\n".join(told) + "\n")
    plot(found, out / "compare.png", f"{size} samples of each, seed {wishes.seed}")
    return [*told, f"written to {out}: compare.json, compare.txt, compare.png"]


def labels(paths):
    """A short name for each file, all different: its stem, or as much of its path as tells them apart; list of str."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same file twice among {', '.join(map(str, paths))}")


def table(found):
    """Table 4: list of str, a row for each data set, the review's own rows below for orientation.

    found: {name: list of Indicator}, the same indicators for all.
    """
    keys = [one.key for one in next(iter(found.values()))]
    arrows = {one.key: "↑" if one.better == "higher" else "↓" for one in next(iter(found.values()))}
    width = max(len(name) for name in (*found, *DATA_SETS)) + 3
    lines = [f"{'':<{width}}" + "".join(f"{key + ' ' + arrows[key]:>12}" for key in keys)]
    for name, rows in found.items():
        values = {one.key: one.value for one in rows}
        lines.append(f"{name:<{width}}" + "".join(quality_report.number(values[key], 12, 2) for key in keys))
        literal = {one.key: one.beside["literal"] for one in rows if "literal" in one.beside}
        lines.append(f"{'  as printed':<{width}}" + "".join(
            quality_report.number(literal[key], 12, 2) if key in literal else " " * 12 for key in keys))  # fmt: skip
    lines.append("the review's Table 4, by its own tools:")
    for place, name in enumerate(DATA_SETS):
        lines.append(f"{name:<{width}}" + "".join(
            quality_report.number(TABLE_4[key][place] if key in TABLE_4 else None, 12, 1) for key in keys))  # fmt: skip
    return lines


def plot(found, path, title):
    """One small diagram for each indicator that was measured, a bar with its interval for each data set."""
    from matplotlib.figure import Figure  # takes a second to import, which only the end of a run should pay

    first = next(iter(found.values()))
    shown = [place for place, one in enumerate(first) if any(rows[place].value is not None for rows in found.values())]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.1 * columns, 0.9 + 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    colors = [f"C{place}" for place in range(len(found))]
    for axes, place in zip(grid, shown):
        bars = [rows[place] for rows in found.values()]
        values = [one.value or 0.0 for one in bars]
        reach = [one.interval or (value, value) for one, value in zip(bars, values)]
        error = [[max(0.0, value - low) for value, (low, _) in zip(values, reach)],
                 [max(0.0, high - value) for value, (_, high) in zip(values, reach)]]  # fmt: skip
        axes.bar(range(len(bars)), values, yerr=error, color=colors, capsize=3)
        axes.set_xticks(range(len(bars)), list(found), rotation=20, ha="right", fontsize=8)
        axes.set_title(f"{bars[0].key}: {bars[0].name}", fontsize=9)
        axes.set_ylabel("higher is better" if bars[0].better == "higher" else "lower is better", fontsize=8)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
