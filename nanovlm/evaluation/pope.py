"""POPE: does a model see objects that are not there? Yes/no questions about COCO pictures, half of them with "no".

accuracy, precision, recall, F1 with "yes" as the positive class, and the share of "yes" among the answers
                                                                                    Li et al., arXiv:2305.10355
"""

import re

DENIALS = ("No", "not", "no")
SPLITS = ("random", "popular", "adversarial")


def parse_official(text):
    """An answer as the official program reads it: "yes" or "no".

    Of the first sentence without commas, cut at spaces, one word decides; whatever is no denial is a yes, "No!" too.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in DENIALS for word in words) else "yes"


def parse_strict(text):
    """The first word alone decides: "yes", "no" or "other"."""
    first = re.match(r"\W*(\w+)", text.lower())
    return first[1] if first and first[1] in ("yes", "no") else "other"


PARSERS = {"official": parse_official, "strict": parse_strict}


def yes_no_scores(predictions, truths):
    """Scores of yes/no answers.

    Args:
      predictions: list of "yes", "no" or "other"; "other" is wrong and neither of the two.
      truths: list of "yes" or "no".
    Returns: {"accuracy", "precision", "recall", "f1", "yes_ratio": float between 0 and 1}; a ratio without a case is 0.
    Raises: ValueError without answers, or for unequal numbers.
    """
    if not predictions or len(predictions) != len(truths):
        raise ValueError(f"{len(predictions)} predictions for {len(truths)} questions; at least one each is needed")
    pairs = list(zip(predictions, truths))
    found, said = pairs.count(("yes", "yes")), predictions.count("yes")
    precision = found / said if said else 0.0
    recall = found / truths.count("yes") if "yes" in truths else 0.0
    return {
        "accuracy": sum(prediction == truth for prediction, truth in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if found else 0.0,
        "yes_ratio": said / len(pairs),
    }


def pope_scores(by_split):
    """Scores of each split, and the mean of their F1 as LLaVA reports it.

    Args:
      by_split: {split: (predictions, truths)}, as in `yes_no_scores`.
    Returns: {"SPLIT accuracy": float, …, "mean f1": float}.
    """
    scores = {split: yes_no_scores(*answers) for split, answers in by_split.items()}
    flat = {f"{split} {name}": value for split, all_of_it in scores.items() for name, value in all_of_it.items()}
    return flat | {"mean f1": sum(one["f1"] for one in scores.values()) / len(scores)}
