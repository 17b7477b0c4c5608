"""Ranking models from comparisons of two: review totals, Elo, Bradley-Terry.

    Elo            E = 1 / (1 + 10^((R_b - R_a) / 400)),  R_a += K (S - E),  S = 1, .5, 0        depends on the order
    Bradley-Terry  P(a beats b) = p_a / (p_a + p_b), fitted to all games at once                 does not

Elo is therefore averaged over shuffles, both are reported, and both carry a bootstrap interval.
"""

import re
from collections import defaultdict

import numpy

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
