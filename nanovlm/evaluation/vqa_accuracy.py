"""VQA accuracy: an answer is right as far as the ten people who answered the same question agree with it.

    accuracy = mean over annotators i of min(1, matches among the other nine / 3)        Antol et al., arXiv:1505.00468

Answers are normalised first: punctuation, articles, number words, contractions. The official program does so only when
the ten answers are not all equal, and finds "the others" by comparing records instead of places; both move the result
by tens of points on some sets, so it is a variant here and not the default.
"""

import functools
import json
import re
from pathlib import Path

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {"none": "0"} | {
    word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = ("a", "an", "the")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")  # the official expression means to spare "1." as well, but its look-behind is misspelt
STRIPPED_PERIODS = 32  # its count argument receives re.UNICODE by accident

# Words that people write without their apostrophes. The official table, its slips included ("somebody'd" loses one).
CONTRACTIONS = json.loads(Path(__file__).with_name("contractions.json").read_text())


def tidy(text):
    """Line breaks and tabs become spaces; none stay outside: str."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=65536)  # the same few words come again and again
def normalize(text):
    """The form in which answers are compared: str."""
    text = tidy(text)
    without, number = text, COMMA_IN_NUMBER.search(text)
    for mark in PUNCTUATION:
        if mark in text:
            touches_space = f"{mark} " in text or f" {mark}" in text  # anywhere in the text, for all its occurrences
            without = without.replace(mark, "" if touches_space or number else " ")
    without = PERIOD.sub("", without, count=STRIPPED_PERIODS)
    words = (NUMBERS.get(word, word) for word in without.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction, answers, official=False):
    """How right an answer is: float between 0 and 1.

    Args:
      prediction: str.
      answers: list of str, one per annotator (usually ten, one at least); or, for the official form, the records of the
        file, dicts with "answer" and whatever else stands there.
      official: as the program of visualqa.org computes it; else normalised always, and one annotator left out by place
        (as TextVQA's own code does).
    """
    records = [answer if isinstance(answer, dict) else {"answer": answer} for answer in answers]
    said, words = tidy(prediction), [tidy(record["answer"]) for record in records]
    if not official or len(set(words)) > 1:
        said, words = normalize(said), list(map(normalize, words))
    matches, number = words.count(said), len(words)
    if official:  # equal records count as one annotator: without ids, identical answers never meet
        beside = [record | {"answer": ""} for record, word in zip(records, words) if word == said]
        total = (number - matches) * min(1.0, matches / 3)  # those that differ stand beside every matching one
        return (total + sum(min(1.0, sum(other != mine for other in beside) / 3) for mine in beside)) / number
    if number == 1:
        return float(matches)
    return sum(min(1.0, (matches - (word == said)) / 3) for word in words) / number
