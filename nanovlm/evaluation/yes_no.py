"""MME: fourteen tasks of yes/no questions, two about every picture, one of them with "yes".

score of a task = 100 · accuracy + 100 · accuracy+         accuracy+: pictures whose two answers are both right
perception, cognition = sums over their tasks                          Fu et al., arXiv:2306.13394, Sec. 2
"""

import re
from collections import defaultdict


PERCEPTION = {  # task -> questions
    "existence": 60, "count": 60, "position": 60, "color": 60, "posters": 294, "celebrity": 340, "scene": 400,
    "landmark": 400, "artwork": 400, "OCR": 40,
}  # fmt: skip
COGNITION = {"commonsense_reasoning": 140, "numerical_calculation": 40, "text_translation": 40, "code_reasoning": 40}


def parse(text):
    """An answer as the official program reads it: "yes", "no" or "other", by the first four characters."""
    text = text.strip().lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def task_scores(answers):
    """Scores of one task.

    Args:
      answers: list of (picture, prediction, truth); prediction "yes", "no" or "other", truth "yes" or "no".
    Returns: {"accuracy", "accuracy+": float between 0 and 1, "score": float between 0 and 200}.
    Raises: ValueError without answers, or for a picture without exactly two questions.
    """
    if not answers:
        raise ValueError("no answers to score; a task of MME has two questions for every picture")
    pictures = defaultdict(list)
    for picture, prediction, truth in answers:
        pictures[picture].append(prediction == truth)
    for picture, right in pictures.items():
        if len(right) != 2:
            raise ValueError(
                f"picture {picture!r} has {len(right)} answers; MME asks two questions about every picture"
            )
    accuracy = sum(map(sum, pictures.values())) / len(answers)
    both = sum(map(all, pictures.values())) / len(pictures)
    return {"accuracy": accuracy, "accuracy+": both, "score": 100 * accuracy + 100 * both}


def mme_scores(by_task):
    """Scores of all tasks and the two sums.

    Args:
      by_task: {task: list of answers as in `task_scores`}.
    Returns: {"TASK score": float, …, "perception": float, "cognition": float}; a sum only if none of its tasks is missing.
    """
    scores = {task: task_scores(answers)["score"] for task, answers in by_task.items()}
    flat = {f"{task} score": score for task, score in scores.items()}
    for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if all(task in scores for task in tasks):
            flat[name] = sum(scores[task] for task in tasks)
    return flat


def is_possible(score, num_questions):
    """Whether a task can have a score, given to two decimals: bool.

    With N questions it is 100 · right / N + 100 · pairs / (N / 2), so score · N / 100 = right + 2 · pairs is whole.
    """
    whole = score * num_questions / 100
    return 0 <= score <= 200 and abs(whole - round(whole)) <= 0.005 * num_questions / 100 + 1e-9


# POPE: does a model see objects that are not there? Yes/no questions about COCO pictures, half of them with "no".
#
# accuracy, precision, recall, F1 with "yes" as the positive class, and the share of "yes" among the answers
#                                                                                     Li et al., arXiv:2305.10355


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
