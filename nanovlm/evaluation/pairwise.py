"""Rank models by comparing their answers two at a time, and sheets for people who give marks.

    python -m nanovlm.evaluation rank OUT_A OUT_B OUT_C --judge FOLDER --out FOLDER

A judge sees both orders of every pair, because judges prefer a place: more wins win, anything else is a tie, as in
VisIT-Bench, arXiv:2308.06595. Elo averaged over shuffles and Bradley-Terry are reported with bootstrap intervals.
"""

import argparse
import csv
import itertools
import json
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy

from nanovlm.evaluation.items import read_records


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


# Ranking models from comparisons of two: review totals, Elo, Bradley-Terry.
#
#     Elo            E = 1 / (1 + 10^((R_b - R_a) / 400)),  R_a += K (S - E),  S = 1, .5, 0        depends on the order
#     Bradley-Terry  P(a beats b) = p_a / (p_a + p_b), fitted to all games at once                 does not
#
# Elo is therefore averaged over shuffles, both are reported, and both carry a bootstrap interval.


START, K, SCALE = 1000.0, 32.0, 400.0  # points
OUTCOMES = (0.0, 0.5, 1.0)  # loss, tie, win of the first


MARK = r"(\d+(?:\.\d+)?)"
FIRST_LINE = re.compile(rf"\s*{MARK}(?:\s*,\s*|\s+){MARK}\s*(?:\n|$)")
LATER = (  # where a reviewer puts the marks who solves the problem first
    re.compile(rf"\(\s*{MARK}\s*,\s*{MARK}\s*\)"),
    re.compile(rf"^\W*(?:Assistant|Answer) 1\W+{MARK}.*\n+\W*(?:Assistant|Answer) 2\W+{MARK}", re.MULTILINE),
    re.compile(rf"^\s*{MARK}[, ]+{MARK}\s*$", re.MULTILINE),
)


def parse_review(text):
    """The two marks of a review: (float, float), or None.

    They stand in the first line, "8 9.5"; failing that, the last pair counts that is written like marks.
    """
    first = FIRST_LINE.match(text)
    found = (
        [first]
        if first
        else sorted((one for form in LATER for one in form.finditer(text)), key=lambda one: one.start())
    )
    return (float(found[-1][1]), float(found[-1][2])) if found else None


def review_totals(marks):
    """Pairwise review.

    Args:
      marks: list of (float, float); None = could not be read.
    Returns: {"totals": (float, float), "win", "lose", "tie": of the first, "unparsed": int}.
    """
    read = [pair for pair in marks if pair is not None]
    return {
        "totals": (sum(first for first, _ in read), sum(second for _, second in read)),
        "win": sum(first > second for first, second in read),
        "lose": sum(first < second for first, second in read),
        "tie": sum(first == second for first, second in read),
        "unparsed": len(marks) - len(read),
    }


def both_orders(one, other):
    """Outcome for the first model of a comparison that was judged in both orders, as VisIT-Bench does.

    Args:
      one, other: outcome for the first model, shown first and shown second.
    Returns: 1.0, 0.5 or 0.0: more wins win, everything else is a tie.
    """
    total = one + other
    return 1.0 if total > 1 else 0.0 if total < 1 else 0.5


def check_games(games):
    """Raise ValueError unless there are games, each (model, other model, outcome of the first)."""
    if not games:
        raise ValueError("no games to rank by")
    for place, (first, second, outcome) in enumerate(games):
        if first == second or outcome not in OUTCOMES:
            raise ValueError(
                f"game {place}: {first!r} against {second!r} with {outcome}; two models and 0, 0.5 or 1 are needed"
            )


def elo(games, k=K):
    """Ratings after playing the games in their order.

    Args:
      games: list of (model, other model, outcome of the first).
    Returns: {model: float}; a rating starts at 1000.
    """
    check_games(games)
    ratings = defaultdict(lambda: START)
    for first, second, outcome in games:
        expected = 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / SCALE))
        ratings[first] += k * (outcome - expected)
        ratings[second] -= k * (outcome - expected)
    return dict(ratings)


def mean_elo(games, rng, shuffles=100, k=K):
    """Elo averaged over shuffles of the games: {model: float}. rng: numpy.random.Generator."""
    check_games(games)
    totals = defaultdict(float)
    for _ in range(shuffles):
        for model, rating in elo([games[place] for place in rng.permutation(len(games))], k).items():
            totals[model] += rating / shuffles
    return dict(totals)


def bradley_terry(games, steps=500, tolerance=1e-9):
    """Strengths that make the games most likely, in points as Elo's and with the same mean.

    The iteration p_a <- wins_a / Σ_b games_ab / (p_a + p_b), a tie being half a win for both, rises to the maximum
    (Hunter, Annals of Statistics 32 (2004), Sec. 2). One virtual tie against an average opponent keeps a model that
    always wins, or models that never met, at finite points.
    Returns: {model: float}.
    """
    check_games(games)
    models = list(dict.fromkeys(name for first, second, _ in games for name in (first, second)))
    places = {model: place for place, model in enumerate(models)}
    wins, played = numpy.full(len(models), 0.5), numpy.zeros((len(models), len(models)))
    for first, second, outcome in games:
        a, b = places[first], places[second]
        wins[a] += outcome
        wins[b] += 1 - outcome
        played[a, b] += 1
        played[b, a] += 1
    strengths = numpy.ones(len(models))
    for _ in range(steps):
        before = strengths
        strengths = wins / ((played / (before[:, None] + before)).sum(1) + 1 / (before + 1))
        if numpy.abs(numpy.log(strengths / before)).max() < tolerance:
            break
    points = SCALE * numpy.log10(strengths)
    return {model: float(point) for model, point in zip(models, points - points.mean() + START)}


def bootstrap(games, rank, rng, draws=200, level=0.95):
    """Intervals of a ranking under other draws of the same number of games.

    Args:
      rank: function games -> {model: float}. rng: numpy.random.Generator.
      draws: how many; level: share of them inside the interval.
    Returns: {model: (low, high)}; a draw without a game of a model says nothing about it.
    """
    check_games(games)
    found = defaultdict(list)
    for _ in range(draws):
        for model, rating in rank([games[place] for place in rng.integers(len(games), size=len(games))]).items():
            found[model].append(rating)
    edge = 100 * (1 - level) / 2
    return {model: tuple(map(float, numpy.percentile(ratings, (edge, 100 - edge)))) for model, ratings in found.items()}


def ties_allowed(sheets, most_tied=2, most_ties=10):
    """What breaks OwlEval's rules for human marks (Lynx, Sec. 3.1): list of str, one per breach.

    Args:
      sheets: {annotator: {item: {model: mark}}}, marks from 1 to 5.
    """
    breaches = []
    for annotator, sheet in sheets.items():
        ties = 0
        for item, marks in sheet.items():
            wrong = {model: mark for model, mark in marks.items() if mark not in (1, 2, 3, 4, 5)}
            breaches += [f"{annotator}, {item}: {model} has mark {mark!r}, not 1 to 5" for model, mark in wrong.items()]
            groups = [list(marks.values()).count(mark) for mark in set(marks.values())]
            breaches += [
                f"{annotator}, {item}: {group} models tied, {most_tied} at most"
                for group in groups
                if group > most_tied
            ]
            ties += sum(group > 1 for group in groups)
        if ties > most_ties:
            breaches.append(f"{annotator}: {ties} ties, {most_ties} at most")
    return breaches


# Two runs of one task side by side, question by question: with and without an unrelated image, a description, a shot.
#
#     python -m nanovlm.evaluation mmlu --model M --data D --out A
#     python -m nanovlm.evaluation mmlu --model M --data D --out B --unrelated-image cat.jpg
#     python -m nanovlm.evaluation compare A B
#
# The same questions make the difference far surer than either share: its interval comes from the questions' own differences.
# How much an image that says nothing disturbs text is modality interference (mPLUG-Owl2, arXiv:2311.04257, Sec. 4.3).


PAIRED_DRAWS = 2000  # of the bootstrap


def differences(one, other):
    """Scores of the questions that both runs have answered and scored.

    Args:
      one, other: {item id: prediction}.
    Returns: {kind: float[n, 2]}, "all" first.
    Raises: ValueError if there is none.
    """
    found = {"all": []}
    for id in one:
        scores = (one[id]["score"], other[id]["score"]) if id in other else (None,)
        if None not in scores:
            found["all"].append(scores)
            if one[id].get("kind"):
                found.setdefault(one[id]["kind"], []).append(scores)
    if not found["all"]:
        raise ValueError("the two runs have no question in common that is scored in both")
    return {kind: numpy.array(sorted(scores), dtype=float) for kind, scores in found.items()}


def interval(scores, rng):
    """95% bootstrap interval of the mean difference, second less first: (low, high). scores: float[n, 2]."""
    change = scores[:, 1] - scores[:, 0]
    means = change[rng.integers(len(change), size=(PAIRED_DRAWS, len(change)))].mean(1)
    return tuple(map(float, numpy.percentile(means, (2.5, 97.5))))


def table(folders, seed=0):
    """Shares of both runs, their difference, and how many questions only one of them has (more) right: list of str."""
    (first, one), (second, other) = read_answers(folders).items()
    rng = numpy.random.default_rng(seed)
    lines = [
        f"first: {first}, second: {second}",
        f"{'class':<32}{'questions':>10}{'first':>9}{'second':>9}{'change':>9}  95% interval      better by first, second",
    ]
    for kind, scores in differences(one, other).items():
        low, high = interval(scores, rng)
        before, after = scores.mean(0)
        better = int((scores[:, 0] > scores[:, 1]).sum()), int((scores[:, 0] < scores[:, 1]).sum())
        lines.append(
            f"{kind[:31]:<32}{len(scores):>10}{before:>9.1%}{after:>9.1%}{after - before:>+9.1%}"
            f"  {low:+.1%} to {high:+.1%}   {better[0]}, {better[1]}"
        )
    return lines


def main(arguments):
    """Run `compare`: exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.evaluation compare", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folders", nargs=2, metavar="OUT", help="folders of two finished runs of one task")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    wishes = parser.parse_args(arguments)
    try:
        print("\n".join(table(wishes.folders, wishes.seed)))
    except (ValueError, OSError, KeyError) as error:
        print(f"python -m nanovlm.evaluation compare: {error}", file=sys.stderr)
        return 2
    return 0
