"""Tables and pictures of ablations, from their CSV files: means, ranges over seeds, and a point for every run."""

import csv
from dataclasses import dataclass
from pathlib import Path



@dataclass(frozen=True)
class Table:
    """A CSV file of ablation_runs.py. rows: list of {"variant", "seed", column: float}. columns: the measured shares."""

    note: str  # command, commit, machine and day
    rows: list
    columns: tuple[str, ...]

    @property
    def seeds(self):
        """All that occur: list of int."""
        return sorted({row["seed"] for row in self.rows})

    def values(self, variant, column):
        """One number per seed: list of float."""
        return [row[column] for row in self.rows if row["variant"] == variant]


def read(path, ablation):
    """The Table in a CSV file. Raises: ValueError, naming file and line, for what is no such file."""
    with open(path, encoding="utf-8", newline="") as file:
        note = file.readline()
        if not note.startswith("# "):
            raise ValueError(f"{path}, line 1: a line that begins with '# ' and tells the command is expected: {note[:60]!r}")
        rows = []
        for number, row in enumerate(csv.DictReader(file), 3):
            try:
                shares = {column: float(row[column]) for column in ablation.columns}
                rows.append({"variant": row["variant"], "seed": int(row["seed"])} | shares)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: no row with {', '.join(ablation.columns)} ({error!r})") from error
    if not rows:
        raise ValueError(f"{path} holds no run")
    return Table(note[2:].strip(), rows, ablation.columns)


def spread(values):
    """Mean and range of shares in words: "43.1% (41.0 - 45.2)"."""
    low, high = (f"{100 * edge:.1f}" for edge in (min(values), max(values)))
    return f"{sum(values) / len(values):.1%} ({low} - {high})"


def variants(table):
    """Names in order of appearance: list of str."""
    return list(dict.fromkeys(row["variant"] for row in table.rows))


def markdown(table):
    """A table for a README, a row per variant: list of str."""
    lines = [f"| | {' | '.join(table.columns)} |", "| --- |" + " ---: |" * len(table.columns)]
    for variant in variants(table):
        cells = [spread(table.values(variant, column)) for column in table.columns]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def draw(table, ablation, path):
    """Save a PNG: a panel per column, a bar per variant up to the mean, a line over the range, a dot per seed."""
    from matplotlib.figure import Figure  # takes a second to import

    names = variants(table)
    width = 1.6 + 2.4 * len(table.columns)
    figure = Figure(figsize=(width, 1.5 + 0.36 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(table.columns), sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, table.columns):
        for place, name in enumerate(names):
            values = table.values(name, column)
            panel.barh(place, sum(values) / len(values), color="#88aacc", height=0.6)
            panel.plot([min(values), max(values)], [place] * 2, color="#223355", linewidth=1.5)
            panel.plot(values, [place] * len(values), "o", color="#223355", markersize=3)
        panel.set(xlim=(0, 1), xticks=(0, 0.5, 1), xlabel="share right")
        panel.set_title(column, fontsize="medium", parse_math=False)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names, parse_math=False)
    panels[0].invert_yaxis()
    seeds = ", ".join(map(str, table.seeds))
    figure.suptitle(f"{ablation.question}\nbars: means; lines: ranges; dots: seeds {seeds}", fontsize="medium", parse_math=False)
    figure.savefig(path, format="png", dpi=100)


def write(path, ablation):
    """Draw the PNG beside a CSV file.

    Returns: list of str, question, what the paper found, the table, and how it came about.
    Raises: ValueError or FileNotFoundError.
    """
    table = read(path, ablation)
    draw(table, ablation, Path(path).with_suffix(".png"))
    seeds = ", ".join(map(str, table.seeds))
    return [ablation.question, f"({ablation.source}: {ablation.found})", "", *markdown(table), "", f"seeds {seeds}; {table.note}"]
