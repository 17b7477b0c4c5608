"""Keep what is good to train on, and say of every other sample why not.

    python -m nanovlm.vlit filter FILE --images FOLDER --annotations instances.json --out FOLDER
    python -m nanovlm.vlit filter FILE --encoder CLIP_FOLDER --matching-percentile 10 --per-task 5000

Sample by sample: defects (as `lint` finds them) → exact and near duplicates → responses that rules or the judge's
majority find wrong → matching degree below a percentile. Then over all: at most --per-task of a task, and at most
--per-response whose responses are the same words, both drawn evenly, complex ones spared by --keep-complex. The review
(Sec. 4.2.3) filters by its indicators and prints no threshold: those here are flags. The folder holds kept.jsonl,
dropped.jsonl (every other record with its reasons, unreadable ones as they stood), report.json, and scores.jsonl, with
which the same command goes on after an interruption.
"""

import itertools
import json
import os
import random
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy
from tqdm import tqdm

from nanovlm import files
from nanovlm.data import json_files
from nanovlm.vlit import quality, tagging
from nanovlm.vlit.correctness import known, verify
from nanovlm.vlit.duplicates import Index
from nanovlm.vlit.indicators import judge_pairs, measure, pictures_of, proxy
from nanovlm.vlit.matching import BATCH
from nanovlm.vlit.samples import MISSING, Unreadable, defects, read, text_of
from nanovlm.vlit.words import tokens

ORDER = ("unreadable", "defect", "duplicate", "wrong", "mismatch", "task cap", "response cap")


def add_flags(parser):
    """The flags of `filter`."""
    quality.add_measure_flags(parser)
    add = parser.add_argument
    add("file", metavar="FILE", help="LLaVA-style .json or .jsonl")
    add("--out", default="out/filtered", metavar="FOLDER")
    add("--near", type=float, default=0.9, help="common word triples from which two samples are one (default: 0.9)")
    add("--exact-only", action="store_true", help="near duplicates stay")
    add("--matching-percentile", type=float, default=10.0, metavar="P", help="with --encoder: the worst P percent go "
        "(default: 10)")  # fmt: skip
    add("--per-task", type=int, help="samples of a task, at most")
    add("--per-response", type=int, help="samples with the same responses, at most")
    add("--keep-complex", type=float, metavar="X", help="samples of complexity (1 to 10) X or more pass both caps")
    add("--without-report", action="store_true", help="the indicators are not measured before and after")


def run(args):
    """Filter a file: list of str, what to print."""
    path, out = Path(args.file), Path(args.out)
    root = Path(args.images or path.parent)
    for name in ("per_task", "per_response"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {vars(args)[name]}; it must be 1 or more")
    if not 0 <= args.matching_percentile < 100:
        raise ValueError(f"--matching-percentile is {args.matching_percentile}; it lies from 0 to below 100")
    settings, helpers = quality.settings_of(args), quality.helpers_of(args, out)
    reasons = decide(score(path, root, args, settings, helpers), args)
    if all(reasons) and (missing := [why for why in sum(reasons, []) if MISSING in why]):
        (out / "scores.jsonl").unlink()  # those of the wrong folder
        sys.exit(f"{path}: no record is kept, {len(missing)} pictures are not in {root}; --images FOLDER says "
                 f"where image paths start. The first: {missing[0]}")  # fmt: skip
    counts = write(path, out, reasons)
    report = {"file": str(path), "flags": {k: v for k, v in vars(args).items() if k != "file"}, **counts}
    told = [f"{path}: kept {counts['kept']} of {counts['records']} records"]
    told += [f"    {number:>8}  {why}" for why, number in counts["dropped"].items()]
    if not args.without_report and counts["kept"]:
        for name, file in (("before", path), ("after", out / "kept.jsonl")):
            indicators, found = measure(file, settings, root, helpers)
            quality.write(out / name, file, settings, indicators, found)
            report[name] = {one.key: one.value for one in indicators}
        told.append(f"{'indicator':<12}{'before':>10}{'after':>10}")
        told += [f"{key:<12}{quality.number(value)}{quality.number(report['after'][key])}"
                 for key, value in report["before"].items()]  # fmt: skip
    quality.write_json(out / "report.json", report)
    if not counts["kept"]:
        sys.exit("\n".join([*told, f"no record is kept; the first is {reasons[0][0]}; all in {out / 'dropped.jsonl'}"]))
    return [*told, f"written to {out}: kept.jsonl, dropped.jsonl, report.json"]


def score(path, root, args, settings, helpers):
    """What each record is worth, read from scores.jsonl as far as it goes: list of dict, in the order of the file."""
    names = ("annotations", "encoder", "n", "temperature", "seed", "near", "exact_only", "task_field")
    made_of = {"file": str(path), "bytes": os.stat(path).st_size, "images": str(root),
               "judge": helpers.judge and helpers.judge.name} | {name: vars(args)[name] for name in names}  # fmt: skip
    index = Index(None if args.exact_only else args.near)
    written = files.JsonLines(Path(args.out) / "scores.jsonl", made_of)
    rows, sound = list(written), []
    waiting = itertools.islice(tqdm(read(path), desc="score", unit="record", disable=None), len(rows), None)
    while batch := [sample for _, sample in itertools.islice(waiting, BATCH)]:
        new = score_batch(batch, root, settings, helpers)
        written.add(*new)
        rows += new
    again = tqdm(read(path), desc="duplicates", unit="record", disable=None)
    for number, (row, (_, sample)) in enumerate(zip(rows, again)):
        if "defects" not in row and not isinstance(sample, Unreadable):  # what goes anyway is no original
            index.add(sample)
            sound.append(number)
    for later, (first, why) in index.duplicates().items():
        rows[sound[later]]["duplicate"] = f"{why} of record {sound[first] + 1}"
    return rows


def score_batch(batch, root, settings, helpers):
    """The scores of some samples: list of dict."""
    rows, sound = [], []
    for sample in batch:
        if isinstance(sample, Unreadable):
            rows.append({"unreadable": str(sample)})
            continue
        pairs = sample.pairs
        row = {
            "task": tagging.task_of(sample, pairs[0][0], settings.task_field) if pairs else "",
            "said": zlib.crc32(" ".join(tokens(" ".join(sample.responses))).encode()),
            "complexity": max((proxy(asked, len(pairs)) for asked, _ in pairs), default=0.0),
        }
        rows.append(row)
        if broken := defects(sample, root):
            row["defects"] = [f"{rule}: {words}" for rule, words in broken]
            continue
        sound.append((row, sample))
        if facts := known(sample, helpers.facts or {}):
            row["verdicts"] = [verify(*pair, facts) for pair in pairs]
    if helpers.judge:
        pairs = [(row, (sample, *pair)) for row, sample in sound for pair in sample.pairs]
        votes = judge_pairs([pair for _, pair in pairs], helpers, root, settings)
        for (row, _), vote in zip(pairs, votes):
            row.setdefault("votes", []).extend(vote[:1] if vote else [])
    seen = [(row, sample) for row, sample in sound if sample.images and sample.pairs]
    if helpers.encoder and seen:
        texts = [" ".join(answer for _, answer in sample.pairs) for _, sample in seen]
        degrees = helpers.encoder.match([pictures_of(sample, root) for _, sample in seen], texts)
        for (row, _), degree in zip(seen, degrees):
            row["matching"] = degree
    return rows


def decide(scores, args):
    """Why each record goes: list of lists of str, one per row of scores; empty = kept."""
    reasons, degrees = [], [row["matching"] for row in scores if "matching" in row]
    least = numpy.percentile(degrees, args.matching_percentile) if degrees else None
    for row in scores:
        why = [f"unreadable: {row['unreadable']}"] if "unreadable" in row else []
        why += [f"defect: {words}" for words in row.get("defects", ())]
        why += [f"duplicate: {row['duplicate']}"] if "duplicate" in row else []
        for by, key in (("rule", "verdicts"), ("the judge's majority", "votes")):
            rounds = enumerate(row.get(key, ()), start=1)
            why += [f"wrong: round {place}, by {by}" for place, right in rounds if right is False]
        if "matching" in row and row["matching"] < least:
            percentile = f"percentile {args.matching_percentile:g}"
            why.append(f"mismatch: matching degree {row['matching']:.2f} below {least:.2f}, {percentile}")
        reasons.append(why)
    for limit, key, name in ((args.per_task, "task", "task cap"), (args.per_response, "said", "response cap")):
        if limit is not None:
            _cap(reasons, scores, limit, key, name, args)
    return reasons


def _cap(reasons, scores, limit, key, name, args):
    """Give all but `limit` of the records left in each group a reason, by lot; the --keep-complex ones stay."""
    lots, groups = random.Random(f"{args.seed}/{name}"), {}
    for row, why in zip(scores, reasons):
        if not why:
            spared = args.keep_complex is not None and row["complexity"] >= args.keep_complex
            groups.setdefault(row[key], []).append((not spared, lots.random(), why))
    for group, members in groups.items():
        told = f"task {group!r}" if key == "task" else "this response"
        for capped, _, why in sorted(members, key=lambda member: member[:2])[limit:]:
            if capped:
                why.append(f"{name}: {len(members)} samples of {told}, {limit} are kept")


def write(path, out, reasons):
    """Write kept.jsonl and dropped.jsonl: {"records", "kept": int, "dropped": {first reason's kind: int}}.

    Raises: ValueError if the file has changed meanwhile; nothing is replaced then.
    """

    def lines(kept):
        for element, why in itertools.zip_longest(json_files.records(path), reasons):
            if element is None or why is None:
                raise ValueError(f"{path} has changed while it was filtered: no longer {len(reasons)} records")
            record = element.value
            if why:
                told = {"text": text_of(path, element)} if isinstance(record, ValueError) else {"record": record}
                record = {"where": element.where, "reasons": why} | told
            if kept != bool(why):
                yield json.dumps(record, ensure_ascii=False) + "\n"

    def save(temporary, kept):
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(lines(kept))

    for name, kept in (("kept", True), ("dropped", False)):
        files.replace(out / f"{name}.jsonl", lambda temporary, kept=kept: save(temporary, kept))
    counts = Counter(why[0].partition(":")[0] if why else "kept" for why in reasons)
    dropped = {why: counts[why] for why in ORDER if counts[why]}
    return {"records": len(reasons), "kept": counts["kept"], "dropped": dropped}
