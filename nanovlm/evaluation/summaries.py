"""From predictions to the numbers that a benchmark reports: each function takes predictions and gives {name: number}.

A number that needs what is not there (true answers, a judge) is None.
"""

from collections import defaultdict

from nanovlm.evaluation import mme as mme_metric
from nanovlm.evaluation import pope as pope_metric
from nanovlm.evaluation.captions import caption_scores


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
