"""The exam: three held-out pictures whose answers are shown again whenever they change while the model trains.

    exam 2  what is left of the blue star?  red circle ✗ → green ring ✓
"""

import dataclasses
import itertools

from nanovlm.data.easy_vqa import EasyVQA
from nanovlm.data.scene_source import Scenes
from nanovlm.evaluation.short_answer import exact_match

RIGHT, WRONG = "✓", "✗"
SEED = 2005  # of the scenes; chosen by eye for pictures that are easy to judge
LONGEST = 40  # characters of an answer that are shown


def readable(text):
    """An answer as it can be shown: one line of printable characters, not too long. Untrained models say anything."""
    text = "".join(
        character if character.isprintable() and character != "\ufffd" else "·" for character in " ".join(text.split())
    )
    return (text if len(text) <= LONGEST else text[: LONGEST - 1] + "…") or "(nothing)"


def exam_records():
    """Three pictures with two questions each: one of easy-VQA's test, two new scenes, the second with a string.

    Returns: list of Record, always the same.
    """
    words = Scenes("new", seed=SEED, min_objects=3, string_share=0.0)
    strings = Scenes("new", seed=SEED, min_objects=2, string_share=1.0)
    return [
        _first(EasyVQA("test"), ("color", "shape")),
        _first(words, ("relation", "count")),
        _first(strings, ("reading", "color")),
    ]


def _first(source, kinds):
    """The first record with a question of each kind that yes or no does not answer; these questions alone."""
    for n in itertools.count():
        record = source.record(n)
        chosen = {}
        for kind, conversation in zip(record.kinds, record.conversations):
            if kind in kinds and conversation[-1].text not in ("yes", "no"):
                chosen.setdefault(kind, conversation)
        if len(chosen) == len(kinds):
            return dataclasses.replace(record, conversations=tuple(chosen[kind] for kind in kinds), kinds=tuple(kinds))


class Exam:
    """Asks a model the same few questions again and again.

    `answers`, the last answer to each question, is all of its state: list of str, [] before the first call. Assign a
    saved list to go on from there.
    """

    def __init__(self, examiner, records):
        """
        Args:
          examiner: short_answer.Examiner.
          records: list of Record, as of `exam_records`.
        """
        self.examiner = examiner
        self.records = records
        self.answers = []
        conversations = [(number, turns) for number, record in enumerate(records, 1) for turns in record.conversations]
        self.questions = [(f"exam {number}  {turns[-2].text}", turns[-1].text) for number, turns in conversations]

    def __call__(self, model):
        """Ask all questions; lines for the answers that are not the last ones: list of str."""
        before, self.answers = self.answers, self.ask(model)
        return self.changes(before, self.answers)

    def ask(self, model):
        """The answers of a model, one per question: list of str. Leaves `answers` alone."""
        return [answer.prediction for answer in self.examiner.answers(model, self.records)]

    def changes(self, before, after):
        """Lines for the answers that have changed.

        Args:
          before, after: list of str, one answer per question; before = [] shows all.
        Returns: list of str, "exam NUMBER  QUESTION  OLD ✗ → NEW ✓"; the number is the picture's.
        Raises: ValueError for answers of another exam.
        """
        if len(after) != len(self.questions) or len(before) not in (0, len(after)):
            raise ValueError(f"{len(before)} and {len(after)} answers for an exam of {len(self.questions)} questions")
        lines = []
        for place, (question, truth) in enumerate(self.questions):
            old, new = before[place : place + 1], after[place : place + 1]
            if old != new:
                lines.append(f"{question}  {' → '.join(said(answer, truth) for answer in old + new)}")
        return lines

    def introduction(self):
        """The questions and what would be right: list of str."""
        return [f"{question}  (right: {truth})" for question, truth in self.questions]


def said(prediction, truth):
    """An answer with its sign: "red circle ✗"."""
    return f"{readable(prediction)} {RIGHT if exact_match(prediction, truth) else WRONG}"


def answer_in(line):
    """The last answer that a line of `Exam.changes` tells, as it was made readable: str.

    Raises: ValueError for any other line.
    """
    answer, _, sign = line.rpartition("  ")[2].rpartition(" ")
    if sign not in (RIGHT, WRONG):
        raise ValueError(f"{line!r} is no line of an exam; it would end with an answer and {RIGHT} or {WRONG}")
    return answer.rpartition(" → ")[2]
