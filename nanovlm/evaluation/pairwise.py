"""Rank models by comparing their answers two at a time, and sheets for people who give marks.

    python -m nanovlm.evaluation rank OUT_A OUT_B OUT_C --judge FOLDER --out FOLDER

A judge sees both orders of every pair, because judges prefer a place: more wins win, anything else is a tie, as in
VisIT-Bench, arXiv:2308.06595. Elo averaged over shuffles and Bradley-Terry are reported with bootstrap intervals.
"""

import csv
import itertools
import json
import re
from functools import partial
from pathlib import Path

import numpy

from nanovlm.evaluation.items import read_records
from nanovlm.evaluation.rankings import bootstrap, both_orders, bradley_terry, mean_elo, ties_allowed

WHICH = (  # our wording
    "Question: QUESTION\n\nAnswer A: ANSWER_A\n\nAnswer B: ANSWER_B\n\n"
    "Which of the two answers is better? Answer with A, B or tie."
)
SHEET = ("item", "model", "question", "picture", "answer", "mark")
SHUFFLES, DRAWS = 100, 100


def ask_which(question, first, second):
    """What the judge is asked about two answers: str, filled in one pass."""
    words = {"QUESTION": question, "ANSWER_A": first, "ANSWER_B": second}
    return re.sub("|".join(words), lambda found: words[found[0]], WHICH)


def parse_which(text):
    """Outcome for answer A: 1.0, 0.5 or 0.0; None if the first word is none of A, B, tie."""
    first = re.match(r"\W*(?:answer\s+)?(\w+)", text.lower())
    return {"a": 1.0, "b": 0.0, "tie": 0.5}.get(first[1]) if first else None


def read_answers(folders):
    """The predictions of several runs.

    Args:
      folders: paths of what `python -m nanovlm.evaluation TASK` wrote, or of their predictions.jsonl.
    Returns: {name: {item id: prediction}}; a name is the shortest end of its path that tells it from the others.
    Raises: ValueError for fewer than two, or if they have no item in common.
    """
    paths = [Path(folder) / "predictions.jsonl" if Path(folder).is_dir() else Path(folder) for folder in folders]
    found = {}
    for path in paths:
        records = [record for _, record in read_records(path)]
        if not records or not all(isinstance(one, dict) for one in records) or "settings" not in records[0]:
            raise ValueError(f"{path} is no file of predictions")
        found[path] = {one["id"]: one for one in records[1:]}
    if len(found) < 2:
        raise ValueError(f"{len(found)} set of answers; a ranking needs two at least")
    if not set.intersection(*map(set, found.values())):
        raise ValueError(f"{', '.join(map(str, found))} have no question in common")
    depth = 1
    while len({path.parent.parts[-depth:] for path in found}) < len(found):
        depth += 1
    return {"/".join(path.parent.parts[-depth:]): answers for path, answers in found.items()}


def comparisons(answers):
    """Everything a judge is asked: list of (id, model shown first, other model, item id, prompt), both orders."""
    asked = []
    for one, other in itertools.permutations(answers, 2):
        for item in answers[one].keys() & answers[other].keys():
            first, second = answers[one][item], answers[other][item]
            prompt = ask_which(first["question"], first["prediction"], second["prediction"])
            asked.append((f"{item}|{one}|{other}", one, other, item, prompt))
    return sorted(asked)


def games_of(asked, told):
    """Games from judgements.

    Args:
      asked: of `comparisons`. told: {id: the judge's words}.
    Returns: (list of (model, other model, outcome), int pairs without two readable judgements).
    """
    outcomes = {(one, other, item): parse_which(told.get(id, "")) for id, one, other, item, _ in asked}
    games, unread = [], 0
    for (one, other, item), outcome in outcomes.items():
        if one < other:
            back = outcomes[other, one, item]
            if outcome is None or back is None:
                unread += 1
            else:
                games.append((one, other, both_orders(outcome, 1 - back)))
    return games, unread


def ranking(games, seed=0):
    """Elo and Bradley-Terry with 95% bootstrap intervals: {model: {"elo", "elo interval", "bradley-terry", …, "wins"}}."""
    rng = numpy.random.default_rng(seed)
    elo, strengths = mean_elo(games, rng, SHUFFLES), bradley_terry(games)
    elo_edges = bootstrap(games, partial(mean_elo, rng=rng, shuffles=5), rng, DRAWS)
    edges = bootstrap(games, bradley_terry, rng, DRAWS)
    found = {}
    for model in sorted(strengths, key=strengths.get, reverse=True):
        wins = sum(
            outcome if first == model else 1 - outcome for first, second, outcome in games if model in (first, second)
        )
        played = sum(model in (first, second) for first, second, _ in games)
        found[model] = {
            "elo": elo[model], "elo interval": elo_edges[model], "bradley-terry": strengths[model],
            "bradley-terry interval": edges[model], "wins": wins, "games": played,
        }  # fmt: skip
    return found


def rank(folders, judge, judgements, out, batch_size=16, seed=0):
    """Compare, judge what is not judged yet, rank.

    Args:
      folders: of `read_answers`. judge: function prompts -> texts, or None. judgements: path of {"id", "judgement"} lines, or "".
      out: folder for judgements.jsonl, judge_prompts.jsonl and ranking.json.
    Returns: list of str, the table.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    asked, told = comparisons(read_answers(folders)), {}
    for source in (judgements, out / "judgements.jsonl"):
        if source and Path(source).exists():
            told |= {record["id"]: record["judgement"] for _, record in read_records(source)}
    left = [one for one in asked if one[0] not in told]
    for start in range(0, len(left) if judge else 0, batch_size):
        batch = left[start : start + batch_size]
        new = dict(zip((one[0] for one in batch), judge([one[-1] for one in batch])))
        told |= new
        with open(out / "judgements.jsonl", "a") as file:
            file.writelines(json.dumps({"id": id, "judgement": text}) + "\n" for id, text in new.items())
    waiting = [json.dumps({"id": one[0], "prompt": one[-1]}) + "\n" for one in asked if one[0] not in told]
    (out / "judge_prompts.jsonl").write_text("".join(waiting))
    games, unread = games_of(asked, told)
    if not games:
        return [f"no pair has two readable judgements; {len(waiting)} prompts wait in {out / 'judge_prompts.jsonl'}"]
    found = ranking(games, seed)
    (out / "ranking.json").write_text(
        json.dumps({"games": len(games), "unread": unread, "seed": seed, "models": found}, indent=1) + "\n"
    )
    lines = [f"{'model':<32}{'Bradley-Terry (95%)':>28}{'Elo (95%)':>24}{'wins':>8}{'games':>7}"]
    for model, one in found.items():
        cells = [
            f"{one[name]:.0f} ({one[f'{name} interval'][0]:.0f}-{one[f'{name} interval'][1]:.0f})"
            for name in ("bradley-terry", "elo")
        ]
        lines.append(f"{model:<32}{cells[0]:>28}{cells[1]:>24}{one['wins']:>8.1f}{one['games']:>7}")
    return [*lines, f"{unread} pairs without two readable judgements; seed {seed}"]


def write_sheet(answers, path):
    """A table for one annotator, the mark left empty: 1 (bad) to 5, OwlEval's rules (Lynx, arXiv:2307.02469, Sec. 3.1)."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(SHEET)
        for item in next(iter(answers.values())):
            for model, several in answers.items():
                if item in several:
                    one = several[item]
                    rows.writerow((item, model, one["question"], (one["media"] or [""])[0], one["prediction"], ""))


def read_sheets(paths):
    """Filled sheets, one per annotator.

    Returns: ({model: mean mark}, list of str: what breaks OwlEval's rules for ties, or is no mark).
    """
    sheets, marks = {}, {}
    for path in map(Path, paths):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                mark = int(row["mark"]) if row["mark"].strip().isdigit() else row["mark"]
                sheets.setdefault(path.stem, {}).setdefault(row["item"], {})[row["model"]] = mark
                if mark in (1, 2, 3, 4, 5):
                    marks.setdefault(row["model"], []).append(mark)
    return {model: sum(several) / len(several) for model, several in marks.items()}, ties_allowed(sheets)
