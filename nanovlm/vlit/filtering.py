"""Keep what is good to train on, and say of every other sample why not.

    python -m nanovlm.vlit filter FILE --images FOLDER --annotations instances.json --out FOLDER
    python -m nanovlm.vlit filter FILE --encoder CLIP_FOLDER --matching-percentile 10 --per-task 5000

Sample by sample: defects (linting.py) → exact and near duplicates → responses that rules or the judge's majority find
wrong → matching degree below a percentile. Then over all: at most --per-task of a task, and at most --per-response
whose responses are the same words, both drawn evenly, complex ones spared by --keep-complex. The review (Sec. 4.2.3)
filters by its indicators and prints no threshold: those here are flags. The folder holds kept.jsonl, dropped.jsonl
(every other record with its reasons, unreadable ones as they stood), report.json, and scores.jsonl, with which the same
command goes on after an interruption.
"""

import itertools
import json
import os
import random
import zlib
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy
from tqdm import tqdm

from nanovlm.data import json_files
from nanovlm.vlit import quality, quality_report, tagging
from nanovlm.vlit.complexity import proxy
from nanovlm.vlit.correctness import known, verify
from nanovlm.vlit.duplicates import Index
from nanovlm.vlit.indicators import measure, shown
from nanovlm.vlit.linting import defects
from nanovlm.vlit.matching import BATCH
from nanovlm.vlit.recorded import Recorded
from nanovlm.vlit.samples import Unreadable, picture, read, text_of
from nanovlm.vlit.votes import judge_chat, vote
from nanovlm.vlit.words import tokens

ORDER = ("unreadable", "defect", "duplicate", "wrong", "mismatch", "task cap", "response cap")


def add_flags(parser):
    """The flags of `filter`."""
    quality.add_measure_flags(parser)
    add = parser.add_argument
    add("file", metavar="FILE", help="LLaVA-style .json or .jsonl")
    add("--out", default="out/filtered", metavar="FOLDER")
    add(
        "--near",
        type=float,
        default=0.9,
        help="share of common word triples from which two samples are one (default: 0.9)",
    )
    add("--exact-only", action="store_true", help="near duplicates stay")
    add(
        "--matching-percentile",
        type=float,
        default=10.0,
        metavar="P",
        help="with --encoder: the worst P percent go (default: 10)",
    )
    add("--per-task", type=int, metavar="N", help="samples of a task, at most")
    add("--per-response", type=int, metavar="N", help="samples with the same responses, at most")
    add(
        "--keep-complex",
        type=float,
        metavar="X",
        help="samples whose complexity (proxy, 1 to 10) is X or more pass both caps",
    )
    add("--without-report", action="store_true", help="the indicators are not measured before and after")


def run(wishes):
    """Filter a file: list of str, what to print."""
    path, out = Path(wishes.file), Path(wishes.out)
    root = Path(wishes.images) if wishes.images else path.parent
    for name in ("per_task", "per_response"):
        if vars(wishes)[name] is not None and vars(wishes)[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {vars(wishes)[name]}; it must be 1 or more")
    if not 0 <= wishes.matching_percentile < 100:
        raise ValueError(f"--matching-percentile is {wishes.matching_percentile}; it lies from 0 to below 100")
    settings, helpers = quality.settings_of(wishes), quality.helpers_of(wishes, out)
    scores = score(path, root, wishes, settings, helpers)
    reasons = decide(scores, wishes)
    counts = write(path, out, reasons)
    report = {"file": str(path), "flags": {k: v for k, v in vars(wishes).items() if k != "file"}, **counts}
    told = [
        f"{path}: kept {counts['kept']} of {counts['records']} records",
        *(f"    {number:>8}  {why}" for why, number in counts["dropped"].items()),
    ]
    if not wishes.without_report and counts["kept"]:
        for name, file in (("before", path), ("after", out / "kept.jsonl")):
            indicators, found = measure(file, settings, root, helpers)
            quality_report.write(out / name, file, settings, indicators, found)
            report[name] = {one.key: one.value for one in indicators}
        told += [f"{'indicator':<12}{'before':>10}{'after':>10}"]
        told += [
            f"{key:<12}{quality_report.number(value)}{quality_report.number(report['after'][key])}"
            for key, value in report["before"].items()
        ]
    quality_report.replace(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return [*told, f"written to {out}: kept.jsonl, dropped.jsonl, report.json"]


class Scores:
    """scores.jsonl: what is known about every record, one line each, in the order of the file.

    The first line holds what the scores depend on; scores of other settings are refused.
    Raises: ValueError for such a file.
    """

    def __init__(self, path, settings):
        self.path, self.rows = path, []
        if path.exists():
            whole, _, _ = path.read_bytes().rpartition(b"\n")  # a last line that a kill cut off is removed
            lines = [json.loads(line) for line in whole.split(b"\n")] if whole else []
            if lines and lines[0] != settings:
                names = [name for name in settings if lines[0].get(name) != settings[name]]
                raise ValueError(
                    f"{path} was made with other settings ({', '.join(names) or 'fewer'}); give another --out, or delete it"
                )
            os.truncate(path, len(whole) + bool(whole))
            self.rows = lines[1:]
        if not path.exists() or path.stat().st_size == 0:
            path.write_text(json.dumps(settings) + "\n")
        self.file = open(path, "a", encoding="utf-8")

    def add(self, rows):
        """Write rows down; they are in the file when this returns."""
        self.rows += rows
        self.file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.file.flush()


def score(path, root, wishes, settings, helpers):
    """What each record is worth, read from scores.jsonl as far as it goes: list of dict, in the order of the file."""
    stamp = os.stat(path)
    judge = helpers.judge and Recorded(helpers.judge, helpers.replies)
    made_of = {
        "file": str(path), "bytes": stamp.st_size, "images": str(root), "annotations": wishes.annotations,
        "encoder": wishes.encoder, "judge": judge and judge.name, "votes": wishes.n, "temperature": wishes.temperature,
        "seed": wishes.seed, "near": None if wishes.exact_only else wishes.near, "task_field": wishes.task_field,
    }  # fmt: skip
    index = Index(made_of["near"])
    scores = Scores(Path(wishes.out) / "scores.jsonl", json.loads(json.dumps(made_of)))
    waiting = itertools.islice(tqdm(read(path), desc="score", unit="record", disable=None), len(scores.rows), None)
    while batch := [sample for _, sample in itertools.islice(waiting, BATCH)]:
        scores.add(_rows(batch, root, settings, helpers, judge))
    scores.file.close()
    sound = []  # what is dropped anyway makes nothing else a duplicate
    for number, (row, (_, sample)) in enumerate(
        zip(scores.rows, tqdm(read(path), desc="duplicates", unit="record", disable=None))
    ):
        if "defects" not in row and "unreadable" not in row and not isinstance(sample, Unreadable):
            index.add(sample)
            sound.append(number)
    for later, (first, why) in index.duplicates().items():
        scores.rows[sound[later]] |= {"duplicate": f"{why} of record {sound[first] + 1}"}
    return scores.rows


def _rows(batch, root, settings, helpers, judge):
    """The scores of some samples: list of dict."""
    rows = []
    for sample in batch:
        if isinstance(sample, Unreadable):
            rows.append({"unreadable": str(sample)})
            continue
        task = (
            sample.task
            if settings.task_field and sample.task
            else tagging.tag(sample.pairs[0][0])
            if sample.pairs
            else ""
        )
        said = zlib.crc32(" ".join(word for text in sample.responses for word in tokens(text)).encode())
        row = {
            "task": task,
            "said": said,
            "complexity": max((proxy(ask, len(sample.pairs)) for ask, _ in sample.pairs), default=0.0),
        }
        if broken := [f"{rule}: {words}" for rule, words in defects(sample, root)]:
            row["defects"] = broken
        elif facts := known(sample, helpers.facts or {}):
            row["verdicts"] = [verify(question, answer, facts) for question, answer in sample.pairs]
        rows.append(row)
    sound = [(row, sample) for row, sample in zip(rows, batch) if "defects" not in row and "unreadable" not in row]
    if judge:
        asked = [(row, pair, sample) for row, sample in sound for pair in sample.pairs]
        asked = [
            (row, pair, sample, image)
            for row, pair, sample in asked
            if (image := shown(sample, root, judge)) is not None
        ]
        chats = [
            judge_chat(*pair, image, "" if judge.accepts_images else helpers.describe(sample))
            for _, pair, sample, image in asked
        ]
        for (row, *_), (right, _, _) in zip(
            asked, vote(judge, chats, settings.votes, settings.temperature, settings.seed)
        ):
            row.setdefault("votes", []).append(right)
    if helpers.encoder:
        told = [(row, sample) for row, sample in sound if sample.images and sample.pairs]
        pictures = [[picture(name, root) for name in sample.images] for _, sample in told]
        found = (
            helpers.encoder.match(pictures, [" ".join(text for _, text in sample.pairs) for _, sample in told])
            if told
            else []
        )
        for (row, _), degree in zip(told, found):
            row["matching"] = degree
    return rows


def decide(scores, wishes):
    """Why each record goes.

    Args:
      scores: list of dict of `score`. wishes: the flags.
    Returns: list of lists of str, one per record; empty = kept.
    """
    reasons = []
    degrees = [row["matching"] for row in scores if "matching" in row]
    least = numpy.percentile(degrees, wishes.matching_percentile) if degrees else None
    for row in scores:
        why = [f"unreadable: {row['unreadable']}"] if "unreadable" in row else []
        why += [f"defect: {words}" for words in row.get("defects", ())]
        why += [f"duplicate: {row['duplicate']}"] if "duplicate" in row else []
        why += [f"wrong: round {place}, by {by}" for by, key in (("rule", "verdicts"), ("the judge's majority", "votes"))
                for place, right in enumerate(row.get(key, ()), 1) if right is False]  # fmt: skip
        if "matching" in row and row["matching"] < least:
            why.append(
                f"mismatch: matching degree {row['matching']:.2f} below {least:.2f}, percentile {wishes.matching_percentile:g}"
            )
        reasons.append(why)
    for limit, key, name in ((wishes.per_task, "task", "task cap"), (wishes.per_response, "said", "response cap")):
        if limit is not None:
            _cap(reasons, scores, limit, key, name, wishes)
    return reasons


def _cap(reasons, scores, limit, key, name, wishes):
    """Give all but `limit` of the records left in each group a reason, by lot; those as complex as --keep-complex
    stay."""
    lots = random.Random(f"{wishes.seed}/{name}")
    groups = {}
    for number, (row, why) in enumerate(zip(scores, reasons)):
        if not why:
            spared = wishes.keep_complex is not None and row["complexity"] >= wishes.keep_complex
            groups.setdefault(row[key], []).append((not spared, lots.random(), number))
    for group, members in groups.items():
        told = f"task {group!r}" if key == "task" else "this response"
        for capped, _, number in sorted(members)[limit:]:
            if capped:
                reasons[number].append(f"{name}: {len(members)} samples of {told}, {limit} are kept")


def write(path, out, reasons):
    """Write kept.jsonl and dropped.jsonl, each whole or not at all.

    Returns: {"records", "kept": int, "dropped": {first reason's kind: int}}.
    Raises: ValueError if the file has changed meanwhile; nothing is replaced then.
    """
    counts, files = Counter(), {name: out / f"{name}.jsonl" for name in ("kept", "dropped")}
    partial = {name: file.with_name(file.name + ".tmp") for name, file in files.items()}
    with ExitStack() as stack:
        kept, dropped = (stack.enter_context(open(file, "w", encoding="utf-8")) for file in partial.values())
        number = 0
        for number, element in enumerate(json_files.records(path), 1):
            if number > len(reasons):
                break
            why, record = reasons[number - 1], element.value
            counts[why[0].partition(":")[0] if why else "kept"] += 1
            if not why:
                kept.write(json.dumps(record, ensure_ascii=False) + "\n")
                continue
            told = {"text": text_of(path, element)} if isinstance(record, ValueError) else {"record": record}
            dropped.write(json.dumps({"where": element.where, "reasons": why} | told, ensure_ascii=False) + "\n")
        for file in (kept, dropped):
            file.flush()
            os.fsync(file.fileno())
    if number != len(reasons):
        raise ValueError(
            f"{path} has changed while it was filtered: {len(reasons)} records were scored, now there are others"
        )
    for name, file in files.items():
        os.replace(partial[name], file)
    return {"records": number, "kept": counts["kept"], "dropped": {why: counts[why] for why in ORDER if counts[why]}}
