"""Free answers judged by a language model.

Open-VQA asks whether an answer implies the true one (Lynx, arXiv:2307.02469, Sec. 3.1); video question answering with a
score asks for yes or no and a mark (Video-ChatGPT, arXiv:2306.05424). The judge is any function from a list of prompts
to the list of its answers: a model of this project, an endpoint, or answers that were recorded.
"""

import re

IMPLIES = (  # word for word as printed in the paper
    'Given the question "QUESTION", does the answer "PREDICTION" imply the answer "GROUND_TRUTH"? Answer with Yes or No.'
)
WITH_SCORE = (  # our wording of Video-ChatGPT's request
    'Question: "QUESTION"\nCorrect answer: "GROUND_TRUTH"\nPredicted answer: "PREDICTION"\n'
    "Does the predicted answer mean the same as the correct answer? "
    "Answer with yes or no, then with an integer score from 0 (nothing agrees) to 5 (everything agrees)."
)
GRADED = (  # MM-Vet's task (arXiv:2308.02490, Sec. 3.3) with our wording and examples
    "Grade the prediction of a model against the ground truth by a number from 0.0 (wrong) to 1.0 (right) in steps of 0.1. "
    "<AND> in the ground truth joins what must all be said, <OR> joins what is right by itself.\n\n"
    "Question: What are the roots?\nGround truth: -1 <AND> -5\nPrediction: x = 3\nGrade: 0.0\n\n"
    "Question: What are the roots?\nGround truth: -1 <AND> -5\nPrediction: x = -1\nGrade: 0.5\n\n"
    "Question: Which animal is it?\nGround truth: a lion cub <OR> a young lion\nPrediction: A young lion.\nGrade: 1.0\n\n"
    "Question: QUESTION\nGround truth: GROUND_TRUTH\nPrediction: PREDICTION\nGrade:"
)
SCORE_RANGE = (0, 5)  # as in the public script; the paper says 1 to 5


def judge_prompt(question, prediction, truth, form=IMPLIES):
    """What the judge is asked: str. All three are put in at once, so that none is looked for inside another."""
    words = {"QUESTION": question, "PREDICTION": prediction, "GROUND_TRUTH": truth}
    return re.sub("|".join(words), lambda found: words[found[0]], form)


def parse_verdict(text):
    """What the judge said: True, False, or None where the first word is neither yes nor no."""
    first = re.match(r"\W*(\w+)", text.lower())
    return {"yes": True, "no": False}.get(first[1]) if first else None


def parse_score(text):
    """(verdict as in `parse_verdict`, score int or None): yes or no anywhere, and the first whole number in range.

    Reads plain words as well as the dictionaries that GPT judges like to write.
    """
    verdict = re.search(r"\b(yes|no)\b", text.lower())
    low, high = SCORE_RANGE
    numbers = [int(number) for number in re.findall(r"(?<![\d.])\d+(?![\d]|\.\d)", text) if low <= int(number) <= high]
    return (verdict[1] == "yes" if verdict else None), (numbers[0] if numbers else None)


def parse_share(text):
    """The first number from 0 to 1 in the judge's words: float or None."""
    numbers = [float(number) for number in re.findall(r"(?<![\d.])\d+(?:\.\d+)?", text)]
    return next((number for number in numbers if 0 <= number <= 1), None)


def open_vqa_scores(verdicts, classes):
    """Shares of right answers.

    Args:
      verdicts: list of True, False or None (the judge said neither; counts as wrong, as nothing shows it right).
      classes: list of str, the class of each question.
    Returns: {"all": share, CLASS: share, …, "unparsed": int}, classes in order of appearance.
    """
    if not verdicts or len(verdicts) != len(classes):
        raise ValueError(f"{len(verdicts)} verdicts for {len(classes)} questions; at least one each is needed")
    groups = {"all": verdicts}
    for name in dict.fromkeys(classes):
        groups[name] = [verdict for verdict, mine in zip(verdicts, classes) if mine == name]
    scores = {name: sum(verdict is True for verdict in group) / len(group) for name, group in groups.items()}
    return scores | {"unparsed": verdicts.count(None)}
