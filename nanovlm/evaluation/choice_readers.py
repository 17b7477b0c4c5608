"""Multiple-choice benchmarks' files as they are published, read into items; see readers.py.

An item's `answers` holds the place of the right option.
"""

import csv
import io
from pathlib import Path

from nanovlm.evaluation.items import Encoded, Item, Reading, find, numbered, picture, read_json, read_records, read_text

csv.field_size_limit(1 << 30)  # a picture in base64 is one field


def seed_bench(data, pictures, split):
    """SEED-Bench: `questions` with choice_a … choice_d, and the names of their types."""
    content = read_json(find(data, "SEED-Bench*.json", "*.json", split=split))
    kinds = {number: name for name, number in content.get("question_type", {}).items()}

    def make(one, place):
        options = tuple(str(one[f"choice_{letter}"]) for letter in "abcd")
        is_clip = one.get("data_type", "image") != "image"
        names = (str(one["data_id"]), f"{one['data_id']}.jpg", f"{one['data_id']}.mp4", f"{one['data_id']}.webm")
        kind = kinds.get(one["question_type_id"], str(one["question_type_id"]))
        return Item(
            str(one["question_id"]),
            one["question"],
            ("ABCD".index(one["answer"]),),
            kind,
            media=(picture(pictures, *names),),
            is_clip=is_clip,
            options=options,
        )

    return Reading().collect(numbered(content["questions"], "question"), make)


def mmbench(data, pictures, split):
    """MMBench: a table with tabulators; the picture stands in it, or is named by the index of the question that has it."""
    path = find(data, "*.tsv", split=split)
    rows = list(csv.DictReader(io.StringIO(read_text(path)), delimiter="\t"))
    encoded = {row["index"]: row["image"] for row in rows if len(row.get("image") or "") > 64}

    def make(row, place):
        options = tuple(row[letter] for letter in "ABCDE" if (row.get(letter) or "").strip() not in ("", "nan"))
        image = row.get("image") or ""
        media = (Encoded(encoded.get(image, image)),) if image else ()
        hint = (row.get("hint") or "").strip()
        return Item(
            row["index"],
            row["question"],
            ("ABCDE".index(row["answer"]),) if row.get("answer") else (),
            row.get("category", ""),
            media=media,
            options=options,
            extra={"hint": "" if hint == "nan" or not hint else hint + "\n"},
            submit=int(row["index"]),
        )

    return Reading().collect([(f"{path}, row {n}", row) for n, row in enumerate(rows, 2)], make)


def science_qa(data, pictures, split):
    """ScienceQA: problems.json by id, pid_splits.json; half of the questions have no picture."""
    problems = read_json(find(data, "problems.json"))
    ids = read_json(find(data, "pid_splits.json"))[split or "test"] if Path(data).is_dir() else list(problems)

    def make(id, place):
        one = problems[id]
        path = (
            (picture(pictures, f"{split or 'test'}/{id}/{one['image']}", f"{id}/{one['image']}"),)
            if one.get("image")
            else ()
        )
        hint = (one.get("hint") or "").strip()
        return Item(
            id,
            one["question"],
            (one["answer"],),
            one.get("subject", ""),
            one.get("grade", ""),
            path,
            options=tuple(one["choices"]),
            extra={"hint": f"Context: {hint}\n" if hint else ""},
            submit=id,
        )

    return Reading().collect([(f"problem {id}", id) for id in ids], make)


def q_bench(data, pictures, split):
    """Q-Bench (LLVisionQA): a list of {img_path, question, candidates, correct_ans, concern | type}."""

    def make(one, place):
        truth = one.get("correct_ans")
        return Item(
            str(place),
            one["question"],
            (one["candidates"].index(truth),) if truth is not None else (),
            str(one.get("concern", one.get("type", ""))),
            media=(picture(pictures, one["img_path"]),),
            options=tuple(one["candidates"]),
        )

    return Reading().collect(read_records(find(data, f"*{split or 'dev'}*.json", "*.json")), make)


def mmlu(data, pictures, split):
    """MMLU: tables without head, question, A, B, C, D, letter; one file per subject."""
    folder, reading = Path(data), Reading()
    for path in (
        [folder]
        if folder.is_file()
        else sorted((folder / (split or "test")).glob("*.csv")) or sorted(folder.glob("*.csv"))
    ):
        subject = path.stem.removesuffix(f"_{split or 'test'}")

        def make(row, place, subject=subject):
            question, *options, letter = row
            return Item(
                f"{subject}/{place}", question, ("ABCD".index(letter.strip()),), subject, options=tuple(options[-4:])
            )

        rows = csv.reader(io.StringIO(read_text(path)))
        reading.collect([(f"{path}, row {n}", row) for n, row in enumerate(rows, 1)], make)
    return reading


def arc(data, pictures, split):
    """ARC: JSON lines, {id, question: {stem, choices: [{text, label}]}, answerKey}; labels are letters or digits."""

    def make(one, place):
        options = one["question"]["choices"]
        labels = [option["label"] for option in options]
        return Item(
            one["id"],
            one["question"]["stem"],
            (labels.index(one["answerKey"]),),
            options=tuple(option["text"] for option in options),
        )

    name = (split or "test").capitalize()
    return Reading().collect(read_records(find(data, f"*{name}*.jsonl", "*.jsonl")), make)
