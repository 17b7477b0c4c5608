"""MME: fourteen tasks of yes/no questions, two about every picture, one of them with "yes".

score of a task = 100 · accuracy + 100 · accuracy+         accuracy+: pictures whose two answers are both right
perception, cognition = sums over their tasks                          Fu et al., arXiv:2306.13394, Sec. 2
"""

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
