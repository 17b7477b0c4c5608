"""Two runs of one task side by side, question by question: with and without an unrelated image, a description, a shot.

    python -m nanovlm.evaluation mmlu --model M --data D --out A
    python -m nanovlm.evaluation mmlu --model M --data D --out B --unrelated-image cat.jpg
    python -m nanovlm.evaluation compare A B

The same questions make the difference far surer than either share: its interval comes from the questions' own differences.
How much an image that says nothing disturbs text is modality interference (mPLUG-Owl2, arXiv:2311.04257, Sec. 4.3).
"""

import argparse
import sys

import numpy

from nanovlm.evaluation.pairwise import read_answers

DRAWS = 2000  # of the bootstrap


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
    means = change[rng.integers(len(change), size=(DRAWS, len(change)))].mean(1)
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
