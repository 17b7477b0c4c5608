"""What stands at the end of an evaluation: report.json, a table, bars with intervals, and the worst cases as pictures."""

import json
import time
from pathlib import Path

import torch

from nanovlm.data import images
from nanovlm.evaluation.items import Encoded
from nanovlm.evaluation.pictures import sample_sheet
from nanovlm.evaluation.short_answer import Answer, wilson
from nanovlm.evaluation.summaries import by, mean

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
