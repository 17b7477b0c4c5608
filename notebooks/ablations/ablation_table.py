"""Results of an ablation as a CSV file: a line that says how they came about, then a row per run, a dataclass each."""

import csv
import os
from dataclasses import asdict, fields

BOOLEANS = {"True": True, "False": False}


def write(results, path, note):
    """Write a list of equal dataclasses under a note; the file is replaced whole or not at all."""
    partial = path.with_suffix(".tmp")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        file.write(f"# {note}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(results[0])], lineterminator="\n")
        writer.writeheader()
        for result in results:
            writer.writerow({name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(result).items()})
    os.replace(partial, path)


def read(path, kind):
    """(note, list of `kind`, a dataclass of str, int, float and bool) of a written table."""
    with open(path, encoding="utf-8", newline="") as file:
        note = file.readline().removeprefix("# ").strip()
        rows = list(csv.DictReader(file))
    convert = {field.name: BOOLEANS.__getitem__ if field.type is bool else field.type for field in fields(kind)}
    return note, [kind(**{name: convert[name](row[name]) for name in convert}) for row in rows]
