"""What the lessons' ablations share: answers examined, and results as a CSV file, a row per run under a line that says how they came about."""

import csv
import os
import platform
import time
from dataclasses import asdict, fields
from datetime import date

import torch

from nanovlm.vlm import IGNORE

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


@torch.no_grad()
def shares_right(model, batch, records, kinds):
    """{kind of question: share answered right in every token} of records, whose Batch has a row per question."""
    labels, hidden = batch.labels[:, 1:], model.hidden(batch)[:, :-1]
    right = ((model.decoder.logits(hidden).argmax(-1) == labels) | (labels == IGNORE)).all(dim=1)
    asked = [kind for record in records for kind in record.kinds]
    return {kind: right[torch.tensor([one == kind for one in asked])].float().mean().item() for kind in kinds}


def collect(results, path):
    """Run an ablation on one core, printing every result, and write its table; results: iterable of dataclasses."""
    torch.set_num_threads(1)
    found = []
    for result in results:
        found.append(result)
        print(result, flush=True)
    write(found, path, (
        f"python notebooks/ablations/{path.stem}.py, {date.today()}, torch {torch.__version__}, one core ({platform.machine()}), "
        f"{time.process_time():.0f} CPU-seconds, seeds 0 to 2"
    ))  # fmt: skip
