"""Two benchmarks of yes/no questions: MME, and POPE, which asks after objects that are not there.

    MME     score of a task = 100 · accuracy + 100 · accuracy+, pictures whose two answers are both right
            perception, cognition = sums over their tasks                     Fu et al., arXiv:2306.13394, Sec. 2
    POPE    accuracy, precision, recall, F1 with "yes" as the positive class, and the share of "yes" among the answers
                                                                              Li et al., arXiv:2305.10355
"""

import re
from collections import defaultdict

PERCEPTION = {  # task -> questions
    "existence": 60, "count": 60, "position": 60, "color": 60, "posters": 294, "celebrity": 340, "scene": 400,
    "landmark": 400, "artwork": 400, "OCR": 40,
}  # fmt: skip
COGNITION = {"commonsense_reasoning": 140, "numerical_calculation": 40, "text_translation": 40, "code_reasoning": 40}
DENIALS = ("No", "not", "no")


def parse_mme(text):
    """An answer as MME's program reads it: "yes", "no" or "other", by the first four characters."""
    start = text.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def parse_pope(text):
    """An answer as POPE's program reads it: "yes" or "no".

    Of the first sentence without commas, cut at spaces, one word decides; whatever is no denial is a yes, "No!" too.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in DENIALS for word in words) else "yes"


def parse_strict(text):
    """The first word alone decides: "yes", "no" or "other"."""
    first = re.match(r"\W*(\w+)", text.lower())
    return first[1] if first and first[1] in ("yes", "no") else "other"


def mme_scores(by_task):
    """Scores of all tasks, and the two sums if no task is missing: {"TASK score": 0 to 200, …, "perception", …}.

    by_task: {task: list of (picture, prediction, truth)}; prediction "yes", "no" or "other", truth "yes" or "no". A
      picture without two answers is left out.
    """
    scores = {}
    for task, answers in by_task.items():
        pictures = defaultdict(list)
        for picture, prediction, truth in answers:
            pictures[picture].append(prediction == truth)
        pairs = [right for right in pictures.values() if len(right) == 2]
        if pairs:
            accuracy, both = sum(map(sum, pairs)) / (2 * len(pairs)), sum(map(all, pairs)) / len(pairs)
            scores[f"{task} score"] = 100 * accuracy + 100 * both
    for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if all(f"{task} score" in scores for task in tasks):
            scores[name] = sum(scores[f"{task} score"] for task in tasks)
    return scores


def yes_no_scores(pairs):
    """Scores of yes/no answers.

    Args:
      pairs: list of (prediction, truth), at least one; "yes", "no", or a prediction "other", wrong and neither.
    Returns: {"accuracy", "precision", "recall", "f1", "yes_ratio": float between 0 and 1}; a ratio without a case is 0.
    """
    said, true = [prediction for prediction, _ in pairs].count("yes"), [truth for _, truth in pairs].count("yes")
    found = pairs.count(("yes", "yes"))
    precision, recall = found / max(said, 1), found / max(true, 1)
    return {
        "accuracy": sum(prediction == truth for prediction, truth in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if found else 0.0,
        "yes_ratio": said / len(pairs),
    }


def pope_scores(by_split):
    """Scores of each split, {split: pairs as in `yes_no_scores`}, and the mean of their F1 as LLaVA reports it.

    Returns: {"SPLIT accuracy": float, …, "mean f1": float}.
    """
    scores = {split: yes_no_scores(pairs) for split, pairs in by_split.items()}
    flat = {f"{split} {name}": value for split, several in scores.items() for name, value in several.items()}
    return flat | {"mean f1": sum(one["f1"] for one in scores.values()) / len(scores)}
