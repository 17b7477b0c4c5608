"""What stands at the end of an evaluation: report.json, a table, bars with intervals, and the worst cases as pictures."""

import json
import time
from collections import defaultdict
from pathlib import Path

import torch

from nanovlm.data import images
from nanovlm.evaluation import yes_no as mme_metric, yes_no as pope_metric
from nanovlm.evaluation.captions import caption_scores
from nanovlm.evaluation.items import Encoded
from nanovlm.evaluation.protocols import Answer, LETTERS, wilson
from nanovlm.recipes.nano_tests import sample_sheet


WORST = 12  # pictures on the contact sheet
MOST_BARS = 40


def classes(predictions):
    """Share and 95% interval of every kind.

    Scores between 0 and 1 enter Wilson's interval as parts of right answers, which makes it too wide, never too narrow.
    Returns: list of (kind, number of answers, share, (low, high)), "all" first; [] without scores.
    """
    scored = [one for one in predictions if one["score"] is not None]
    groups = {"all": scored} | {kind: several for kind, several in by(scored, "kind").items() if kind}
    rows = []
    for kind, several in groups.items():
        if several:
            right = sum(one["score"] for one in several)
            rows.append((kind, len(several), right / len(several), wilson(right, len(several))))
    return rows


def table(scores, rows):
    """The numbers in words: list of str."""
    lines = [
        f"{name:<40}{'-' if value is None else format(value, '10.4f') if isinstance(value, float) else value:>10}"
        for name, value in scores.items()
    ]
    if rows:
        lines += ["", f"{'class':<40}{'answers':>10}{'share':>9}   95% interval"]
        lines += [
            f"{kind:<40}{number:>10}{share:>9.1%}   {low:.1%} to {high:.1%}"
            for kind, number, share, (low, high) in rows
        ]
    return lines


def bars(rows, path, title):
    """A PNG with one bar per class, its interval, and the number of answers."""
    from matplotlib.figure import Figure  # takes a second to import, which only the end of a run should pay

    rows = rows[:MOST_BARS]
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    shares = [share for _, _, share, _ in rows]
    # max: rounding may put the end of an interval of 0 or 1 a hair inside
    reach = [[max(0.0, s - low), max(0.0, high - s)] for s, (*_, (low, high)) in zip(shares, rows)]
    reach = list(zip(*reach))
    axes.barh(range(len(rows)), shares, xerr=reach, color=["#4477aa"] + ["#88aacc"] * (len(rows) - 1), capsize=2)
    axes.set_yticks(range(len(rows)), [f"{kind[:40]} ({number})" for kind, number, _, _ in rows], parse_math=False)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of right answers, with its 95% Wilson interval")
    axes.set_title(title, parse_math=False, fontsize="medium")
    figure.savefig(path, format="png", dpi=100)


def worst(predictions, pictures, path, title):
    """A sheet with pictures of the lowest scores; False if none of them has a picture that can be opened.

    pictures: {item id: path, items.Encoded or PIL image}.
    """
    samples = []
    for one in sorted((one for one in predictions if one["score"] is not None), key=lambda one: one["score"]):
        if one["score"] == 1 or len(samples) == WORST:
            break
        if one["id"] in pictures:
            source = pictures[one["id"]]
            shown = source.open() if isinstance(source, Encoded) else images.load(source)
            options, answers = one.get("options"), one["answers"]
            truth = options[answers[0]] if options else _words(answers[0])
            samples.append(
                (one["id"], shown, Answer(one["id"], 0, one["kind"], one["question"], truth, one["prediction"]))
            )
    if samples:
        sample_sheet(samples, path, title)
    return bool(samples)


def _words(answer):
    return answer["answer"] if isinstance(answer, dict) else str(answer)


def write(folder, settings, task, predictions, missing, problems, pictures):
    """Write report.json, report.txt, classes.png, worst.png and the submission file into a folder.

    Args:
      folder: Path. settings: dict, how the run was made. task: tasks.Task. predictions: list of dict.
      missing: {item id: list of paths}. problems: list of str, records that could not be read.
      pictures: as of `worst`.
    Returns: list of str, what to print.
    """
    folder = Path(folder)
    scores, rows = (task.summarise(predictions) if predictions else {}), classes(predictions)
    report = settings | {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "torch": torch.__version__,
        "answered": len(predictions),
        "missing": missing,
        "problems": problems,
        "scores": scores,
        "classes": [{"class": k, "answers": n, "share": s, "interval": list(edges)} for k, n, s, edges in rows],
        "mean score": mean(one["score"] for one in predictions),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    name = f"{settings['task']}, {settings['model']}: {len(predictions)} answers, seed {settings['seed']}"
    lines = [name, "", *table(scores, rows)]
    if missing:
        first = [str(path) for paths in missing.values() for path in paths][:3]
        lines.append(
            f"NOT ASKED: {len(missing)} questions whose media are missing, all in report.json: {', '.join(first)} …"
        )
    if problems:
        lines.append(f"NOT READ OR PUT: {len(problems)} records, all in report.json: {problems[0]}")
    (folder / "report.txt").write_text("\n".join(lines) + "\n")
    if rows:
        bars(rows, folder / "classes.png", name)
        worst(predictions, pictures, folder / "worst.png", f"worst of {settings['task']}")
    for file, text in (task.submission(predictions) if task.submission else {}).items():
        (folder / file).write_text(text, encoding="utf-8")
    return lines


# From predictions to the numbers that a benchmark reports: each function takes predictions and gives {name: number}.
#
# A number that needs what is not there (true answers, a judge) is None.


def mean(scores):
    """Mean of the scores that are there: float or None."""
    scores = [score for score in scores if score is not None]
    return sum(scores) / len(scores) if scores else None


def by(predictions, key):
    """{value of a field: predictions}, in order of appearance."""
    groups = defaultdict(list)
    for one in predictions:
        groups[one[key]].append(one)
    return dict(groups)


def mean_scores(predictions):
    """The mean score, over all and per kind."""
    kinds = {kind: mean(one["score"] for one in several) for kind, several in by(predictions, "kind").items() if kind}
    return {"all": mean(one["score"] for one in predictions)} | kinds


def captions(predictions):
    """BLEU, ROUGE-L and CIDEr of the corpus."""
    found = caption_scores([one["prediction"] for one in predictions], [one["answers"] for one in predictions])
    return {name: value for name, value in found.items() if name != "CIDEr of each"}


def pope(predictions):
    """Accuracy, precision, recall, F1 and the share of yes per split, and the mean F1."""
    splits = by(predictions, "kind")
    return pope_metric.pope_scores(
        {
            split: ([one["said"] for one in several], [one["answers"][0] for one in several])
            for split, several in splits.items()
        }
    )


def mme(predictions):
    """The score of every task and the two sums, as far as both questions of every picture were asked."""
    answers = {}
    for task, several in by(predictions, "kind").items():
        pairs = [pair for pair in by(several, "group").values() if len(pair) == 2]
        answers[task] = [(one["group"], one["said"], one["answers"][0]) for pair in pairs for one in pair]
    return mme_metric.mme_scores({task: several for task, several in answers.items() if several})


def circular(predictions):
    """A question is right only if all of its rotations are; beside it the share of rotations."""
    groups = by(predictions, "group")
    if any(one["score"] is None for one in predictions):
        return {"all": None, "single": None}
    whole = [several for several in groups.values() if len(several) == len(several[0]["options"])]
    right = {
        kind: mean(_all_right(several) for several in whole if several[0]["kind"] == kind)
        for kind in by(predictions, "kind")
    }
    totals = {"all": mean(map(_all_right, whole)), "single": mean(one["score"] for one in predictions)}
    return totals | {kind: share for kind, share in right.items() if kind}


def _all_right(several):
    return float(all(one["score"] for one in several))


def science_qa(predictions):
    """Accuracy over all, with a picture, per subject, per grade band, and the share of answers that could not be read."""
    scores = mean_scores(predictions)
    scores["with picture"] = mean(one["score"] for one in predictions if one["media"])
    for band, grades in (("grades 1-6", range(1, 7)), ("grades 7-12", range(7, 13))):
        names = {f"grade{grade}" for grade in grades}
        scores[band] = mean(one["score"] for one in predictions if one["group"] in names)
    return scores | {"unparsed": mean(float(one["said"] is None) for one in predictions)}


def mm_vet(predictions):
    """MM-Vet's total, and the mean grade of every capability and of every combination of them that is asked for."""
    scores = judged(predictions)
    names = dict.fromkeys(name for one in predictions for name in one["kind"].split("+"))
    return scores | {
        f"capability {name}": mean(one["score"] for one in predictions if name in one["kind"].split("+")) for name in names
    }


def judged(predictions):
    """Share of answers that the judge found right, per kind, the mean mark, and how many verdicts could not be read."""
    done = [one for one in predictions if "judgement" in one]
    scores = mean_scores(predictions)
    if done:
        scores |= {"unparsed": sum(one["verdict"] is None for one in done), "judged": len(done)}
    if any(one.get("mark") is not None for one in done):
        scores["mean mark"] = mean(one["mark"] for one in done)
    return scores


# The files that benchmarks' servers and official programs take: functions from predictions to {file name: text}.
#
# Names of fields and files are those of the benchmarks' own pages, as far as remembered; the public tools decide.


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


def science_qa_submission(predictions):
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


def pope_submission(predictions):
    """Lines {question, answer} in the order of the questions, a file per split: POPE's evaluate.py."""
    files = {}
    for one in predictions:
        line = json.dumps({"question": one["question"], "answer": one["prediction"]}, ensure_ascii=False)
        files.setdefault(f"submission_{one['kind']}.jsonl", []).append(line + "\n")
    return {name: "".join(lines) for name, lines in files.items()}


def mme_submission(predictions):
    """A text file per task, picture TAB question TAB truth TAB answer: MME's eval tool."""
    files = {}
    for one in predictions:
        picture = (one["media"] or [one["group"]])[0].rpartition("/")[2]
        cells = (picture, one["question"], one["answers"][0].capitalize(), one["prediction"])
        line = "\t".join(" ".join(cell.split()) for cell in cells) + "\n"
        files.setdefault(f"submission_{one['kind']}.txt", []).append(line)
    return {name: "".join(lines) for name, lines in files.items()}
