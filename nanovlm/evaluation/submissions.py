"""The files that benchmarks' servers and official programs take: functions from predictions to {file name: text}.

Names of fields and files are those of the benchmarks' own pages, as far as remembered; the public tools decide.
"""

import json

from nanovlm.evaluation.choice import LETTERS


def records(id_field, answer_field):
    """A list of objects in submission.json: VQAv2, OK-VQA, TextVQA, GQA, VizWiz, COCO captions."""

    def write(predictions):
        entries = [{id_field: one["submit"], answer_field: one["prediction"]} for one in predictions]
        return {"submission.json": json.dumps(entries, ensure_ascii=False)}

    return write


def by_id(predictions):
    """One object of answers by id: MM-Vet."""
    return {"submission.json": json.dumps({one["submit"]: one["prediction"] for one in predictions}, ensure_ascii=False)}


def letter(said):
    """The letter of a place; "" where none could be read."""
    return "" if said is None else LETTERS[said]


def letter_lines(predictions):
    """A line {question_id, prediction: letter} each: SEED-Bench."""
    lines = [json.dumps({"question_id": one["id"], "prediction": letter(one["said"])}) + "\n" for one in predictions]
    return {"submission.jsonl": "".join(lines)}


def science_qa(predictions):
    """Places of the chosen options by id, -1 where none could be read: ScienceQA."""
    chosen = {one["submit"]: -1 if one["said"] is None else one["said"] for one in predictions}
    return {"submission.json": json.dumps({"results": chosen, "outputs": {one["submit"]: one["prediction"] for one in predictions}})}


def mmbench(predictions):
    """A table with the unturned question of every index: MMBench. Its server takes the same columns as an Excel file."""
    lines = ["index\tquestion\tA\tB\tC\tD\tE\tprediction"]
    for one in predictions:
        if one["id"].endswith("#0"):
            options = [*one["options"], *[""] * (5 - len(one["options"]))]
            cells = [one["submit"], one["question"], *options, letter(one["said"])]
            lines.append("\t".join(" ".join(str(cell).split()) for cell in cells))
    return {"submission.tsv": "\n".join(lines) + "\n"}


def pope(predictions):
    """Lines {question, answer} in the order of the questions, a file per split: POPE's evaluate.py."""
    files = {}
    for one in predictions:
        line = json.dumps({"question": one["question"], "answer": one["prediction"]}, ensure_ascii=False)
        files.setdefault(f"submission_{one['kind']}.jsonl", []).append(line + "\n")
    return {name: "".join(lines) for name, lines in files.items()}


def mme(predictions):
    """A text file per task, picture TAB question TAB truth TAB answer: MME's eval tool."""
    files = {}
    for one in predictions:
        picture = (one["media"] or [one["group"]])[0].rpartition("/")[2]
        cells = (picture, one["question"], one["answers"][0].capitalize(), one["prediction"])
        line = "\t".join(" ".join(cell.split()) for cell in cells) + "\n"
        files.setdefault(f"submission_{one['kind']}.txt", []).append(line)
    return {name: "".join(lines) for name, lines in files.items()}
