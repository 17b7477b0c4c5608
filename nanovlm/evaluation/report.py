"""What stands at the end of an evaluation: report.json, a table, bars with intervals, the worst cases as pictures, and
the file that the benchmark's server or program takes."""

import itertools
import json
import re
import time
from collections import defaultdict

import torch
from matplotlib.figure import Figure

from nanovlm.data import images
from nanovlm.evaluation.captions import caption_scores
from nanovlm.evaluation.items import write_json
from nanovlm.evaluation.protocols import LETTERS
from nanovlm.recipes.nano_tests import Answer, sample_sheet, wilson

WORST = 12  # pictures on the contact sheet
MOST_BARS = 40
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def write(folder, settings, task, predictions, reading, items):
    """Write report.json, report.txt, classes.png, worst.png and the submission file: list of str, what to print.

    settings: dict, how the run was made. reading: items.Reading of the benchmark. items: those Items that were asked.
    """
    scores, rows = (task.summarise(predictions) if predictions else {}), classes(predictions)
    missing = {item.id: [str(path) for path in item.missing] for item in reading.items if item.missing}
    report = settings | {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "torch": torch.__version__,
        "answered": len(predictions), "missing": missing, "problems": reading.problems, "scores": scores,
        "classes": [dict(zip(("class", "answers", "share", "interval"), row)) for row in rows],
        "mean score": mean(predictions),
    }  # fmt: skip
    write_json(folder / "report.json", report)
    name = f"{settings['task']}, {settings['model']}: {len(predictions)} answers, seed {settings['seed']}"
    lines = [name, "", *table(scores, rows)]
    if missing:
        first = ", ".join(list(itertools.chain(*missing.values()))[:3])
        lines.append(f"NOT ASKED: {len(missing)} questions whose media are missing, all in report.json: {first} …")
    if missing and not predictions:
        lines.append("NOTHING WAS MEASURED: give the folder of the pictures or films by --images")
    if reading.problems:
        lines.append(f"NOT READ OR PUT: {len(reading.problems)} records, all in report.json: {reading.problems[0]}")
    (folder / "report.txt").write_text("\n".join(lines) + "\n")
    if rows:
        bars(rows, folder / "classes.png", name)
        worst(predictions, items, folder / "worst.png", f"worst of {settings['task']}")
    for file, text in (task.submission(predictions) if task.submission else {}).items():
        (folder / file).write_text(text, encoding="utf-8")
    return lines


def classes(predictions):
    """Share and 95% interval of every kind: list of (kind, number of answers, share, (low, high)), "all" first.

    Scores between 0 and 1 enter Wilson's interval as parts of right answers, which makes it too wide, never too narrow.
    """
    scored = [one for one in predictions if one["score"] is not None]
    groups = {"all": scored} | {kind: several for kind, several in by(scored, "kind").items() if kind}
    counts = [(kind, len(several), sum(one["score"] for one in several)) for kind, several in groups.items() if several]
    return [(kind, number, right / number, wilson(right, number)) for kind, number, right in counts]


def table(scores, rows):
    """The numbers in words: list of str."""
    shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in scores.items()}
    lines = [f"{name:<40}{'-' if value is None else value:>10}" for name, value in shown.items()]
    if rows:
        lines += ["", f"{'class':<40}{'answers':>10}{'share':>9}   95% interval"]
    return lines + [f"{kind:<40}{n:>10}{share:>9.1%}   {low:.1%} to {high:.1%}" for kind, n, share, (low, high) in rows]


def bars(rows, path, title):
    """A PNG with one bar per class, its interval, and the number of answers."""
    kinds, numbers, shares, intervals = zip(*rows[:MOST_BARS])
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    # max: rounding may put the end of an interval of 0 or 1 a hair inside
    reach = [(max(0.0, share - low), max(0.0, high - share)) for share, (low, high) in zip(shares, intervals)]
    colors = ["#4477aa"] + ["#88aacc"] * (len(kinds) - 1)
    axes.barh(range(len(kinds)), shares, xerr=list(zip(*reach)), color=colors, capsize=2)
    axes.set_yticks(range(len(kinds)), [f"{kind[:40]} ({n})" for kind, n in zip(kinds, numbers)], parse_math=False)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of right answers, with its 95% Wilson interval")
    axes.set_title(title, parse_math=False, fontsize="medium")
    figure.savefig(path, format="png", dpi=100)


def worst(predictions, items, path, title):
    """A sheet with pictures of the lowest scores, as far as there are any."""
    pictures = {item.id: item.media[0] for item in items if item.media and not item.is_clip}
    wrong = [one for one in predictions if one["score"] not in (None, 1) and one["id"] in pictures]
    samples = []
    for one in sorted(wrong, key=lambda one: one["score"])[:WORST]:
        shown, truth = images.load(pictures[one["id"]]), one["answers"][0]
        truth = one["options"][truth] if "options" in one else truth["answer"] if isinstance(truth, dict) else truth
        samples.append((one["id"], shown, Answer(one["id"], 0, one["kind"], one["question"], truth, one["prediction"])))
    if samples:
        sample_sheet(samples, path, title)


# From predictions to the numbers that a benchmark reports: each function takes predictions and gives {name: number}.
#
# A number that needs what is not there (true answers, a judge) is None.


def mean(predictions, score=lambda one: one["score"]):
    """Mean of the scores that are there: float or None."""
    scores = [found for found in map(score, predictions) if found is not None]
    return sum(scores) / len(scores) if scores else None


def by(predictions, key):
    """{value of a field: predictions}, in order of appearance."""
    groups = defaultdict(list)
    for one in predictions:
        groups[one[key]].append(one)
    return groups


def mean_scores(predictions):
    """The mean score, over all and per kind."""
    kinds = {kind: mean(several) for kind, several in by(predictions, "kind").items() if kind}
    return {"all": mean(predictions)} | kinds


def captions(predictions):
    """BLEU, ROUGE-L and CIDEr of the corpus."""
    return caption_scores([one["prediction"] for one in predictions], [one["answers"] for one in predictions])


def yes_no_scores(pairs):
    """Scores of (prediction, truth), with "yes" as the positive class; a ratio without a case is 0.

    A prediction "other" is wrong and neither. Returns: {"accuracy", "precision", "recall", "f1", "yes_ratio"}.
    """
    said, true = ([words[place] for words in pairs].count("yes") for place in (0, 1))
    found = pairs.count(("yes", "yes"))
    precision, recall = found / max(said, 1), found / max(true, 1)
    return {
        "accuracy": sum(prediction == truth for prediction, truth in pairs) / len(pairs),
        "precision": precision, "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if found else 0.0, "yes_ratio": said / len(pairs),
    }  # fmt: skip


def pope(predictions):
    """POPE (arXiv:2305.10355): `yes_no_scores` per split, and the mean of their F1 as LLaVA reports it."""
    splits = {kind: yes_no_scores([(one["said"], one["answers"][0]) for one in several])
              for kind, several in by(predictions, "kind").items()}  # fmt: skip
    flat = {f"{kind} {name}": value for kind, scores in splits.items() for name, value in scores.items()}
    f1 = sum(scores["f1"] for scores in splits.values()) / len(splits)
    return flat | {"mean f1": f1, "unparsed": unread(predictions)}


def mme(predictions):
    """MME (arXiv:2306.13394, Sec. 2): 100 · accuracy + 100 · accuracy+ (pictures whose two answers are both right) of
    every task, over the pictures whose two questions were asked; the two sums if no task is missing."""
    scores = {}
    for task, answers in by(predictions, "kind").items():
        pairs = [[one["score"] for one in several] for several in by(answers, "group").values() if len(several) == 2]
        if pairs:
            scores[f"{task} score"] = 100 * (sum(map(sum, pairs)) / 2 + sum(map(all, pairs))) / len(pairs)
    for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if all(f"{task} score" in scores for task in tasks):
            scores[name] = sum(scores[f"{task} score"] for task in tasks)
    return scores | {"unparsed": unread(predictions)}


def unread(predictions):
    """The share of answers with neither yes nor no in them, or in which the benchmark's own reading finds neither."""
    unsaid = [one["said"] == "other" or not re.search(r"\b(yes|no|not)\b", one["prediction"].lower())
              for one in predictions]
    return sum(unsaid) / len(unsaid)


def lettered(predictions):
    """The mean score, over all and per kind, and the share of answers in which no option could be read."""
    return mean_scores(predictions) | {"unparsed": mean(predictions, lambda one: float(one["said"] is None))}


def circular(predictions):
    """A question is right only if all of its rotations are; beside it the share of rotations."""
    if any(one["score"] is None for one in predictions):
        return {"all": None, "single": None}
    whole = [several for several in by(predictions, "group").values() if len(several) == len(several[0]["options"])]
    right = [{"kind": several[0]["kind"], "score": float(all(one["score"] for one in several))} for several in whole]
    single = lettered(predictions)
    scores = {"all": None, "single": single.pop("all")} | dict.fromkeys(single) | mean_scores(right)
    return scores | {"unparsed": single["unparsed"]}


def science_qa(predictions):
    """Accuracy over all, with a picture, per subject, per grade band, and the share of answers that are not read."""
    scores = lettered(predictions) | {"with picture": mean([one for one in predictions if one["media"]])}
    for band, grades in (("grades 1-6", range(1, 7)), ("grades 7-12", range(7, 13))):
        scores[band] = mean([one for one in predictions if one["group"] in [f"grade{grade}" for grade in grades]])
    return scores


def judged(predictions):
    """Share of answers that the judge found right, per kind, the mean mark, and how many verdicts could not be read."""
    done, scores = [one for one in predictions if "judgement" in one], mean_scores(predictions)
    if done:
        scores |= {"unparsed": sum(one["verdict"] is None for one in done), "judged": len(done)}
    mark = mean(done, lambda one: one["mark"])
    return scores if mark is None else scores | {"mean mark": mark}


def mm_vet(predictions):
    """MM-Vet's total, and the mean grade of every capability and of every combination of them that is asked for."""
    names = dict.fromkeys(name for one in predictions for name in one["kind"].split("+"))
    return judged(predictions) | {
        f"capability {name}": mean([one for one in predictions if name in one["kind"].split("+")]) for name in names
    }


# The files that benchmarks' servers and official programs take: functions from predictions to {file name: text}.
#
# Names of fields and files are those of the benchmarks' own pages, as far as remembered; the public tools decide.


def as_json(make):
    """submission.json, of what `make(predictions)` gives."""
    return lambda predictions: {"submission.json": json.dumps(make(predictions), ensure_ascii=False)}


def records(id_field, answer_field):
    """A list of objects: VQAv2, OK-VQA, TextVQA, GQA, VizWiz, COCO captions."""
    return as_json(lambda found: [{id_field: one["submit"], answer_field: one["prediction"]} for one in found])


def lines(name, line, first=""):
    """Files of a line per prediction: name.format(**prediction) of `line(prediction)`, behind the first."""

    def write(predictions):
        files = defaultdict(lambda: first)
        for one in predictions:
            files[name.format(**one)] += line(one)
        return files

    return write


def cells(*content):
    """A line of cells between tabulators."""
    return "\t".join(" ".join(str(cell).split()) for cell in content) + "\n"


def json_line(**content):
    """An object in a line."""
    return json.dumps(content, ensure_ascii=False) + "\n"


def letter(one):
    """The letter of the chosen option; "" where none could be read."""
    return "" if one["said"] is None else LETTERS[one["said"]]


def mmbench_row(one):
    """The unturned question of an index; MMBench's server takes the same columns as an Excel file."""
    options = [*one["options"], *[""] * (5 - len(one["options"]))]
    return cells(one["submit"], one["question"], *options, letter(one)) if one["id"].endswith("#0") else ""


def mme_row(one):
    """Picture, question, truth and answer, as MME's eval tool takes them."""
    picture = (one["media"] or [one["group"]])[0].rpartition("/")[2]
    return cells(picture, one["question"], one["answers"][0].capitalize(), one["prediction"])


by_id = as_json(lambda predictions: {one["submit"]: one["prediction"] for one in predictions})  # MM-Vet
science_qa_submission = as_json(lambda predictions: {  # places of the chosen options, -1 where none could be read
    "results": {one["submit"]: -1 if one["said"] is None else one["said"] for one in predictions},
    "outputs": {one["submit"]: one["prediction"] for one in predictions},
})  # fmt: skip
letter_lines = lines(  # SEED-Bench's leaderboard
    "submission.jsonl", lambda one: json_line(question_id=one["id"], prediction=letter(one)))  # fmt: skip
pope_submission = lines(  # POPE's evaluate.py, in the order of the questions
    "submission_{kind}.jsonl", lambda one: json_line(question=one["question"], answer=one["prediction"]))  # fmt: skip
mmbench = lines("submission.tsv", mmbench_row, cells("index", "question", *"ABCDE", "prediction"))
mme_submission = lines("submission_{kind}.txt", mme_row)
