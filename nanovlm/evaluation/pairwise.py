"""Rank models by comparing their answers two at a time, compare two runs, and sheets for people who give marks.

    python -m nanovlm.evaluation rank OUT_A OUT_B OUT_C --judge FOLDER --out FOLDER
    python -m nanovlm.evaluation compare OUT_A OUT_B

A judge sees both orders of every pair, because judges prefer a place: more wins win, anything else is a tie, as in
VisIT-Bench, arXiv:2308.06595. Two rankings are reported, with bootstrap intervals:

    Elo            E = 1 / (1 + 10^((R_b - R_a) / 400)),  R_a += K (S - E),  S = 1, .5, 0        depends on the order
    Bradley-Terry  P(a beats b) = p_a / (p_a + p_b), fitted to all games at once                 does not

Elo is therefore averaged over shuffles. A game is (model, other model, outcome of the first: 0, 0.5 or 1).
"""

import csv
import itertools
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy

from nanovlm.evaluation.items import short_names, write_json
from nanovlm.evaluation.protocols import PROMPTS, ask_judge, fill
from nanovlm.files import JsonLines

SHUFFLES, DRAWS, PAIRED_DRAWS = 100, 100, 2000
START, K, SCALE = 1000.0, 32.0, 400.0  # points
STEPS, TOLERANCE = 500, 1e-9  # of the fit: at most so many, until the logarithms change by less
BATCH = 16  # questions that a judge answers together


def read_answers(folders):
    """The predictions of several runs, from their folders or predictions.jsonl: {name: {item id: prediction}}.

    A name is the shortest end of its path that tells it from the others.
    Raises: ValueError for fewer than two, or if they have no item in common.
    """
    found = {}
    for path in map(Path, folders):
        path = path / "predictions.jsonl" if path.is_dir() else path
        records = list(JsonLines(path))
        if not records or "settings" not in records[0]:
            raise ValueError(f"{path} is no file of predictions")
        found[path] = {one["id"]: one for one in records[1:]}
    if len(found) < 2:
        raise ValueError(f"{len(found)} set of answers; a ranking needs two at least")
    if not set.intersection(*map(set, found.values())):
        raise ValueError(f"{', '.join(map(str, found))} have no question in common")
    return dict(zip(short_names([path.parent for path in found]), found.values()))


def rank(folders, judge, judgements, out, seed=0):
    """Compare, judge what is not judged yet, rank: list of str, the table.

    folders: of `read_answers`. judge, judgements, out: as of `protocols.ask_judge`; out also gets ranking.json.
    """
    out, answers, asked = Path(out), read_answers(folders), {}
    out.mkdir(parents=True, exist_ok=True)
    for one, other in itertools.permutations(answers, 2):
        for item in answers[one].keys() & answers[other].keys():
            first, second = answers[one][item], answers[other][item]
            words = {"QUESTION": first["question"], "ANSWER_A": first["prediction"], "ANSWER_B": second["prediction"]}
            asked[f"{item}|{one}|{other}"] = fill("\n".join(PROMPTS["which"]), words)
    told = ask_judge(dict(sorted(asked.items())), judge, judgements, out, BATCH)
    games, unread = [], 0
    for item, one, other in sorted((id.rsplit("|", 2) for id in asked), key="|".join):
        if one < other:
            outcomes = [parse_which(told.get("|".join(id), "")) for id in ((item, one, other), (item, other, one))]
            if None in outcomes:
                unread += 1
            else:
                games.append((one, other, both_orders(*outcomes)))
    if not games:
        waiting = len(asked.keys() - told)
        return [f"no pair has two readable judgements; {waiting} prompts wait in {out / 'judge_prompts.jsonl'}"]
    models = ranking(games, seed)
    write_json(out / "ranking.json", {"games": len(games), "unread": unread, "seed": seed, "models": models})
    lines = [f"{'model':<32}{'Bradley-Terry (95%)':>28}{'Elo (95%)':>24}{'wins':>8}{'games':>7}"]
    for model, one in models.items():
        names = "bradley-terry", "elo"
        points = ["{:.0f} ({:.0f}-{:.0f})".format(one[name], *one[f"{name} interval"]) for name in names]
        lines.append(f"{model:<32}{points[0]:>28}{points[1]:>24}{one['wins']:>8.1f}{one['games']:>7}")
    return [*lines, f"{unread} pairs without two readable judgements; seed {seed}"]


def parse_which(text):
    """Outcome for answer A: 1.0, 0.5 or 0.0; None if the first word is none of A, B, tie."""
    first = re.match(r"\W*(?:answer\W+|a (?=tie\b))?(\w+)", text.lower())
    return {"a": 1.0, "b": 0.0, "tie": 0.5}.get(first[1]) if first else None


def both_orders(first, second):
    """Outcome for a model: 1.0, 0.5 or 0.0, from the outcomes for answer A when it was shown first and when second."""
    total = first + 1 - second
    return 1.0 if total > 1 else 0.0 if total < 1 else 0.5


def ranking(games, seed=0):
    """Elo and Bradley-Terry with 95% bootstrap intervals: {model: {"elo", "elo interval", "bradley-terry", …}}."""
    rng = numpy.random.default_rng(seed)

    def intervals(rate):
        return bootstrap(len(games), lambda places: rate([games[place] for place in places]), rng, DRAWS)

    elo, strengths = mean_elo(games, rng, SHUFFLES), bradley_terry(games)
    elo_edges, edges = intervals(lambda drawn: mean_elo(drawn, rng, 5)), intervals(bradley_terry)
    found = {}
    for model in sorted(strengths, key=strengths.get, reverse=True):
        won = [outcome if first == model else 1 - outcome for first, other, outcome in games if model in (first, other)]
        found[model] = {
            "elo": elo[model], "elo interval": elo_edges[model], "bradley-terry": strengths[model],
            "bradley-terry interval": edges[model], "wins": sum(won), "games": len(won),
        }  # fmt: skip
    return found


def elo(games):
    """Ratings after playing the games in their order: {model: float}; a rating starts at 1000."""
    ratings = defaultdict(lambda: START)
    for first, second, outcome in games:
        expected = 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / SCALE))
        ratings[first] += K * (outcome - expected)
        ratings[second] -= K * (outcome - expected)
    return ratings


def mean_elo(games, rng, shuffles):
    """Elo averaged over shuffles of the games: {model: float}. rng: numpy.random.Generator."""
    totals = defaultdict(float)
    for _ in range(shuffles):
        for model, rating in elo([games[place] for place in rng.permutation(len(games))]).items():
            totals[model] += rating / shuffles
    return totals


def bradley_terry(games):
    """Strengths that make the games most likely, in points as Elo's and with the same mean: {model: float}.

    The iteration p_a <- wins_a / Σ_b games_ab / (p_a + p_b), a tie being half a win for both, rises to the maximum
    (Hunter, Annals of Statistics 32 (2004), Sec. 2). One virtual tie against an average opponent keeps a model that
    always wins, or models that never met, at finite points.
    """
    models = list(dict.fromkeys(name for first, second, _ in games for name in (first, second)))
    places = {model: place for place, model in enumerate(models)}
    wins, played = numpy.full(len(models), 0.5), numpy.zeros((len(models), len(models)))
    for first, second, outcome in games:
        a, b = places[first], places[second]
        wins[[a, b]] += outcome, 1 - outcome
        played[[a, b], [b, a]] += 1
    strengths = numpy.ones(len(models))
    for _ in range(STEPS):
        before = strengths
        strengths = wins / ((played / (before[:, None] + before)).sum(1) + 1 / (before + 1))
        if numpy.abs(numpy.log(strengths / before)).max() < TOLERANCE:
            break
    points = SCALE * numpy.log10(strengths)
    return dict(zip(models, (points - points.mean() + START).tolist()))


def bootstrap(number, measure, rng, draws):
    """95% intervals of what is measured on other draws of the same number of items: {name: (low, high)}.

    measure: function (places int[number] of the items drawn) -> {name: float}; a draw may leave names out.
    """
    found = defaultdict(list)
    for _ in range(draws):
        for name, value in measure(rng.integers(number, size=number)).items():
            found[name].append(value)
    return {name: tuple(numpy.percentile(values, (2.5, 97.5)).tolist()) for name, values in found.items()}


# Two runs of one task side by side, question by question: with and without an unrelated image, a description, a shot.
#
# The same questions make the difference far surer than either share: its interval comes from their own differences.
# How much an image that says nothing disturbs text is modality interference (mPLUG-Owl2, arXiv:2311.04257, Sec. 4.3).


def compare(folders, seed=0):
    """Shares of both runs, their difference, and how many questions only one of them has (more) right: list of str."""
    (first, one), (second, other) = read_answers(folders).items()
    kinds = {"all": []}
    for id in one:
        scores = (one[id]["score"], other[id]["score"]) if id in other else (None,)
        if None not in scores:
            for kind in dict.fromkeys(("all", one[id].get("kind") or "all")):
                kinds.setdefault(kind, []).append(scores)
    if not kinds["all"]:
        raise ValueError("the two runs have no question in common that is scored in both")
    rng = numpy.random.default_rng(seed)
    lines = [
        f"first: {first}, second: {second}",
        f"{'class':<32}{'questions':>10}{'first':>9}{'second':>9}{'change':>9}"
        "  95% interval      better by first, second",
    ]
    for kind, scores in kinds.items():
        before, after = numpy.array(sorted(scores), dtype=float).T
        change = after - before
        ((low, high),) = bootstrap(len(change), lambda places: {"": change[places].mean()}, rng, PAIRED_DRAWS).values()
        lines.append(
            f"{kind[:31]:<32}{len(scores):>10}{before.mean():>9.1%}{after.mean():>9.1%}"
            f"{after.mean() - before.mean():>+9.1%}  {low:+.1%} to {high:+.1%}   "
            f"{(change < 0).sum()}, {(change > 0).sum()}"
        )
    return lines


# People's marks from 1 (bad) to 5, by OwlEval's rules (Lynx, arXiv:2307.02469, Sec. 3.1)


def write_sheet(answers, path):
    """A table for one annotator, the mark left empty. answers: of `read_answers`."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("item", "model", "question", "picture", "answer", "mark"))
        for item in next(iter(answers.values())):
            for model, several in answers.items():
                if item in several:
                    one = several[item]
                    rows.writerow((item, model, one["question"], (one["media"] or [""])[0], one["prediction"], ""))


def read_sheets(paths):
    """Filled sheets, one per annotator: ({model: mean mark}, list of str: what breaks the rules, or is no mark)."""
    marks, breaches = defaultdict(list), []
    for path in map(Path, paths):
        sheet = defaultdict(dict)
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                sheet[row["item"]][row["model"]] = row["mark"].strip()
                if row["mark"].strip() in [*"12345"]:
                    marks[row["model"]].append(int(row["mark"]))
        breaches += ties_allowed(path.stem, sheet)
    return {model: sum(several) / len(several) for model, several in marks.items()}, breaches


def ties_allowed(annotator, sheet):
    """What breaks the rules: list of str, one per breach. sheet: {item: {model: mark str}}."""
    breaches, ties = [], 0
    for item, marks in sheet.items():
        for model, mark in marks.items():
            if mark not in [*"12345"]:
                breaches.append(f"{annotator}, {item}: {model} has mark {mark!r}, not 1 to 5")
        tied = [count for count in Counter(marks.values()).values() if count > 1]
        breaches += [f"{annotator}, {item}: {count} models tied, 2 at most" for count in tied if count > 2]
        ties += len(tied)
    return breaches + ([f"{annotator}: {ties} ties, 10 at most"] if ties > 10 else [])
