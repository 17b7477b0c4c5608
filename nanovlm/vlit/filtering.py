"""Keep what is good to train on, and say of every other sample why not.

    python -m nanovlm.vlit filter FILE --images FOLDER --annotations instances.json --out FOLDER
    python -m nanovlm.vlit filter FILE --encoder CLIP_FOLDER --matching-percentile 10 --per-task 5000

Sample by sample: defects (as `lint` finds them) → responses that rules or the judge's majority find wrong → exact and
near duplicates of what is left → matching degree below a percentile. Then over all: at most --per-task of a task, and
at most --per-response whose responses are the same words, both drawn evenly, complex ones spared by --keep-complex. The
review (Sec. 4.2.3) filters by its indicators and prints no threshold: those here are flags. The folder holds
kept.jsonl, dropped.jsonl (every other record with its reasons, unreadable ones as they stood), report.json, and
scores.jsonl, with which the same command goes on after an interruption.
"""

import hashlib
import itertools
import json
import os
import random
import sys
import zlib
from array import array
from collections import Counter
from pathlib import Path

import numpy

from nanovlm import files
from nanovlm.data import json_files
from nanovlm.evaluation.items import write_json
from nanovlm.vlit import quality, tagging
from nanovlm.vlit.correctness import known, verify
from nanovlm.vlit.indicators import judge_pairs, majority, measure, pictures_of, proxy
from nanovlm.vlit.matching import BATCH
from nanovlm.vlit.samples import MISSING, Unreadable, defects, read, text_of
from nanovlm.vlit.words import tokens

ORDER = ("unreadable", "defect", "duplicate", "wrong", "mismatch", "task cap", "response cap")
HASHES, BAND = 32, 4  # hash functions; rows of a band: pairs above a Jaccard of (4/32)^(1/4) = 0.6 mostly meet in one
PRIME = (1 << 31) - 1
_rng = numpy.random.default_rng(0)
FACTORS, OFFSETS = (_rng.integers(1, PRIME, HASHES, dtype=numpy.uint64) for _ in range(2))


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
    if not 0 < args.near <= 1:
        raise ValueError(f"--near is {args.near}, the share of common word triples; it lies between 0 and 1")
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
    write_json(out / "report.json", report)
    if not counts["kept"]:
        sys.exit("\n".join([*told, f"no record is kept; the first is {reasons[0][0]}; all in {out / 'dropped.jsonl'}"]))
    return [*told, f"written to {out}: kept.jsonl, dropped.jsonl, report.json"]


def score(path, root, args, settings, helpers):
    """What each record is worth, read from scores.jsonl as far as it goes: list of dict, in the order of the file."""
    names = ("annotations", "encoder", "n", "temperature", "seed", "near", "exact_only", "task_field")
    made_of = {"file": str(path), "bytes": os.stat(path).st_size, "images": str(root),
               "judge": helpers.judge and helpers.judge.name} | {name: vars(args)[name] for name in names}  # fmt: skip
    written = files.JsonLines(Path(args.out) / "scores.jsonl", made_of)
    rows = list(written)
    waiting = itertools.islice(read(path, "score"), len(rows), None)
    while batch := [sample for _, sample in itertools.islice(waiting, BATCH)]:
        new = score_batch(batch, root, settings, helpers)
        written.add(*new)
        rows += new
    sound = [number for number, row in enumerate(rows) if not row["reasons"]]  # what goes anyway is no original
    samples = (sample for row, (_, sample) in zip(rows, read(path, "duplicates")) if not row["reasons"])
    for later, (first, why) in duplicates(samples, None if args.exact_only else args.near).items():
        rows[sound[later]]["reasons"].append(f"duplicate: {why} of record {sound[first] + 1}")
    return rows


def score_batch(batch, root, settings, helpers):
    """The scores of some samples: list of dict. reasons: why it goes, as far as the sample alone decides."""
    rows, sound = [], []
    for sample in batch:
        broken = [f"{rule}: {words}" for rule, words in defects(sample, root)]
        row = {"reasons": broken if isinstance(sample, Unreadable) else [f"defect: {words}" for words in broken]}
        rows.append(row)
        if broken:
            continue
        pairs, facts = sample.pairs, known(sample, helpers.facts or {})
        sound.append((row, sample))
        row |= {
            "task": tagging.task_of(sample, pairs[0][0], settings.task_field) if pairs else "",
            "said": zlib.crc32(" ".join(tokens(" ".join(sample.responses))).encode()),
            "complexity": max((proxy(asked, len(pairs)) for asked, _ in pairs), default=0.0),
        }
        for place, pair in enumerate(pairs if facts else (), start=1):
            if verify(*pair, facts) is False:
                row["reasons"].append(f"wrong: round {place}, by rule")
    if helpers.judge:
        asked = [(sample, *pair) for _, sample in sound for pair in sample.pairs]
        votes = iter(judge_pairs(asked, helpers, root, settings))
        for row, sample in sound:
            for place, vote in enumerate(itertools.islice(votes, len(sample.pairs)), start=1):
                if majority(vote or []) is False:
                    row["reasons"].append(f"wrong: round {place}, by the judge's majority")
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
        why = list(row["reasons"])
        if "matching" in row and row["matching"] < least:
            percentile = f"percentile {args.matching_percentile:g}"
            why.append(f"mismatch: matching degree {row['matching']:.2f} below {least:.2f}, {percentile}")
        reasons.append(why)
    for limit, key, name in ((args.per_task, "task", "task cap"), (args.per_response, "said", "response cap")):
        lots, groups = random.Random(f"{args.seed}/{name}"), {}
        for row, why in zip(scores, reasons) if limit is not None else ():
            if not why:
                spared = args.keep_complex is not None and row["complexity"] >= args.keep_complex
                groups.setdefault(row[key], []).append((not spared, lots.random(), why))
        for group, members in groups.items():
            told = f"task {group!r}" if key == "task" else "this response"
            for capped, _, why in sorted(members, key=lambda member: member[:2])[limit:]:
                if capped:
                    why.append(f"{name}: {len(members)} samples of {told}, {limit} are kept")
    return reasons


def write(path, out, reasons):
    """Write kept.jsonl and dropped.jsonl: {"records", "kept": int, "dropped": {first reason's kind: int}}.

    Raises: ValueError if the file has changed meanwhile; nothing is replaced then.
    """

    def save(kept_path, dropped_path):
        with open(kept_path, "w", encoding="utf-8") as kept, open(dropped_path, "w", encoding="utf-8") as dropped:
            for element, why in itertools.zip_longest(json_files.records(path), reasons):
                if element is None or why is None:
                    raise ValueError(f"{path} has changed while it was filtered: no longer {len(reasons)} records")
                record = element.value
                if why:
                    told = {"text": text_of(path, element)} if isinstance(record, ValueError) else {"record": record}
                    record = {"where": element.where, "reasons": why} | told
                (dropped if why else kept).write(json.dumps(record, ensure_ascii=False) + "\n")

    kept, dropped = (out / f"{name}.jsonl" for name in ("kept", "dropped"))
    files.replace(kept, lambda one: files.replace(dropped, lambda other: save(one, other)))
    counts = Counter(why[0].partition(":")[0] if why else "kept" for why in reasons)
    dropped = {why: counts[why] for why in ORDER if counts[why]}
    return {"records": len(reasons), "kept": counts["kept"], "dropped": dropped}


# Samples that say the same, exactly or nearly, in a million of them
#
# Near: the share of common word triples (Jaccard) of two texts, estimated by MinHash: of many hash functions, how often
# both texts have the same least hash (Broder, SEQUENCES 1997). Only texts that agree in a whole band of hashes are
# compared (banding: Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, Sec. 3.4). Memory: 136 bytes a sample.


def digest(text):
    """int of 64 bits."""
    return int.from_bytes(hashlib.blake2s(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def signature(words):
    """MinHash of the word triples of a text: uint32[HASHES]. words: list of str."""
    triples = {" ".join(words[place : place + 3]) for place in range(max(1, len(words) - 2))}
    hashes = numpy.array([digest(triple) % PRIME for triple in triples], dtype=numpy.uint64)
    return ((hashes[:, None] * FACTORS + OFFSETS) % PRIME).min(0).astype(numpy.uint32)


def duplicates(samples, near):
    """Which of some samples repeat an earlier one: {its number: (the earliest's, "exact duplicate" or "near …")}.

    near: least estimated Jaccard of two of the same pictures that count as one; None = exact ones only.
    """
    exact, pictures, signatures = array("Q"), array("Q"), array("I")
    for sample in samples:
        shown, said = "|".join(sample.images), [(role, tokens(text)) for role, text in sample.turns]
        exact.append(digest(f"{shown} {said}"))
        if near is not None:
            pictures.append(digest(shown))
            signatures.frombytes(signature(sum((words for _, words in said), [])).tobytes())
    exact, pictures, table = map(numpy.asarray, (exact, pictures, signatures))
    found = {later: (first, "exact duplicate") for first, later in _groups(exact)}
    table = table.reshape(-1, HASHES)
    for band in range(0, HASHES if near else 0, BAND):
        keys = pictures.copy()
        for column in table[:, band : band + BAND].T:
            keys = keys * numpy.uint64(0x9E3779B97F4A7C15) + column  # wraps around, as hashes may
        for first, later in _groups(keys):
            same = pictures[first] == pictures[later] and (table[first] == table[later]).mean() >= near
            if later not in found and same:
                found[later] = (found.get(first, (first,))[0], "near duplicate")
    return found


def _groups(keys):
    """(first, later) of every member but the first of each group of equal keys, as int."""
    _, places, group = numpy.unique(keys, return_index=True, return_inverse=True)
    return ((first, later) for later, first in enumerate(places[group].tolist()) if first < later)
