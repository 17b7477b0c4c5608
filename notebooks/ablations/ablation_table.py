"""What the ablations share: answers examined, and results as CSV, a row per run under a line that says how they came about."""

import csv
import io
import platform
import time
from dataclasses import asdict, fields
from datetime import date

import torch

from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.files import replace_text
from nanovlm.training.language_loss import language_loss
from nanovlm.vlm import IGNORE

BOOLEANS = {"True": True, "False": False}


def write(path, note, names, rows):
    """Write the named values of dictionaries under a note; the file is replaced whole or not at all."""
    text = io.StringIO()
    text.write(f"# {note}\n")
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: round(row[name], 4) if isinstance(row[name], float) else row[name] for name in names})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())


def read(path, kind):
    """(note, list of `kind`, a dataclass of str, int, float and bool) of a written table."""
    with open(path, encoding="utf-8", newline="") as file:
        note = file.readline().removeprefix("# ").strip()
        rows = list(csv.DictReader(file))
    convert = {field.name: BOOLEANS.__getitem__ if field.type is bool else field.type for field in fields(kind)}
    return note, [kind(**{name: convert[name](row[name]) for name in convert}) for row in rows]


def tokenizer_of(records):
    """A tokenizer of 400 tokens, of the words of records."""
    said = [turn.text for record in records for turns in record.conversations for turn in turns]
    return train_tokenizer(["user: \nbot:", *(f" {text}" for text in said)], 400)


def mean_loss(model, batch):
    """Loss in nats per trained token, to be trained on."""
    loss, count = language_loss(model, batch)
    return loss / count


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
        found.append(asdict(result))
        print(result, flush=True)
        note = (f"python notebooks/ablations/{path.stem}.py, {date.today()}, torch {torch.__version__}, one core "
                f"({platform.machine()}), {time.process_time():.0f} CPU-seconds, seeds 0 to {result.seed}")
        write(path, note, [field.name for field in fields(result)], found)
