"""The source of drawn scenes with captions or questions, and what a blind model scores on such records."""

from collections import Counter

import numpy as np

from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.scene_questions import CAPTIONS, NAME_PROMPT, QUESTIONS, TYPES, all_names, ask
from nanovlm.data.scenes import HELD_OUT, SPLITS, TRAIN_PAIRS, render, sample_scene
from nanovlm.names import nearest

KINDS = ("captions", "questions", "both", "names")
MAX_PICTURES = 100  # drawn before a record gives up finding one about which its types of question can be asked


def check_source(split, splits, weights, known, seed, length):
    """Raise ValueError for a split or type that does not exist, or a number that no source of scenes can have."""
    if split not in splits:
        raise ValueError(f"unknown split {split!r}.{nearest(split, splits)}")
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(f"unknown type {name!r}.{nearest(name, known)}")
        if weight < 0:
            raise ValueError(f"the weight of {name!r} is {weight}; it must be 0 or more")
    if seed < 0 or length < 1:
        raise ValueError(f"seed {seed} and length {length}; the seed must be 0 or more, the length 1 or more")


class Scenes:
    """Source of drawn scenes with captions or questions; endless, `length` is what counts as an epoch."""

    def __init__(self, split="train", kind="questions", seed=0, max_objects=4, min_objects=1, questions_per_picture=6,
                 string_share=0.3, canvas=64, weights=None, length=10_000):
        """
        Args:
          split: "train"; "new" = other pictures of the same distribution; "unseen_pairs" = only held-out pairs;
            "reading" = only held-out strings, one in every picture, and only the reading question.
          kind: "captions" (one), "questions", "both" (the caption first), or "names": all that can be said in few words of
            each thing, conversations of their own with its centre as region; for these, questions_per_picture and
            weights mean nothing.
          seed: int, 0 or more.
          max_objects, min_objects: range of the number of objects.
          questions_per_picture: at most this many, all different.
          string_share: share of pictures with a string, 0 to 1.
          canvas: width and height, pixels. Objects keep their size in pixels.
          weights: {type: weight}, types as in TYPES; one left out is never used. None = all equally often.
          length: records per epoch; record(n) goes on beyond it with new pictures.
        Raises: ValueError for a name that does not exist or a number out of range.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}.{nearest(kind, KINDS)}")
        if split == "reading":
            kind, string_share, weights = "questions", 1.0, {"reading": 1.0}
        weights = dict.fromkeys(TYPES, 1.0) if weights is None else weights
        check_source(split, SPLITS, weights, TYPES, seed, length)
        if questions_per_picture < 1 or not 0 <= string_share <= 1:
            raise ValueError(
                f"questions_per_picture is {questions_per_picture} and must be 1 or more; "
                f"string_share is {string_share} and must lie between 0 and 1"
            )
        self.name, self.split, self.kind, self.seed, self.length = f"scenes_{split}", split, kind, seed, length
        self.max_objects, self.min_objects = max_objects, min_objects
        self.string_share, self.canvas = string_share, canvas
        self.wanted = []  # (how many, {type: weight}) for captions, questions or both
        for number, types, users in (
            (1, CAPTIONS, ("captions", "both")), (questions_per_picture, QUESTIONS, ("questions", "both"))
        ):  # fmt: skip
            if kind in users:
                self.wanted.append((number, {name: weights[name] for name in types if weights.get(name)}))
                if not self.wanted[-1][1]:
                    raise ValueError(f"kind is {kind!r} but none of {', '.join(types)} has a weight above 0")
        # all that the pictures depend on, so that the same ones have the same key whatever is asked about them
        self.key = f"{self.name}/{seed}/{canvas}/{min_objects}-{max_objects}/{string_share}"
        self.pairs = HELD_OUT if split == "unseen_pairs" else TRAIN_PAIRS

    def __len__(self):
        return self.length

    def scene(self, n):
        """The Scene of record n."""
        return self._draw(n)[0]

    def record(self, n):
        """Record n, n >= 0: one picture, each conversation one question about it and its answer."""
        scene, picture, asked = self._draw(n)
        conversations = ((Turn("user", (0, question)), Turn("assistant", (answer,))) for _, question, answer in asked)
        regions = ()
        if self.kind == "names":
            regions = tuple((x / self.canvas, y / self.canvas) for _, x, y in all_names(scene))
        return Record(
            picture.key, (picture,), tuple(conversations), tuple(kind for kind, _, _ in asked), regions=regions
        )

    def _draw(self, n):
        """(Scene, Visual, list of (type, question, answer)) of record n."""
        for attempt in range(MAX_PICTURES):
            rng = np.random.default_rng((self.seed, SPLITS.index(self.split), n, attempt))
            with_string = rng.random() < self.string_share
            scene = sample_scene(rng, self.max_objects, self.split, with_string, self.min_objects, self.canvas)
            picture = Visual(f"{self.key}/{n}.{attempt}", (render(scene, rng),))
            asked = [made for number, weights in self.wanted for made in ask(scene, rng, number, weights, self.pairs)]
            if self.kind == "names":
                asked = [("name", NAME_PROMPT, name) for name, _, _ in all_names(scene)]
            if asked:
                return scene, picture, asked
        raise ValueError(
            f"none of {MAX_PICTURES} pictures of up to {self.max_objects} objects gave a question of the types "
            f"{', '.join(self.wanted[-1][1])}; allow more objects, more strings or more types"
        )


def _answers(records):
    """{kind: {question: Counter of its answers}}."""
    answers = {}
    for record in records:
        for kind, (*_, question, answer) in zip(record.kinds, record.conversations):
            answers.setdefault(kind, {}).setdefault(question.text, Counter())[answer.text] += 1
    return answers


def majority_baseline(records, training=None):
    """What can be scored per question type without looking.

    Args:
      records: iterable of Record with `kinds`.
      training: records from which the most frequent answers are taken; None = the other ones of `records`.
    Returns: {kind: share of right answers}, the better of always giving the type's most frequent answer, and giving the
      answer most frequent for that very question (the type's where it is never asked).
    """
    asked = _answers(records)
    known = asked if training is None else _answers(training)
    shares = {}
    for kind, questions in asked.items():
        if kind not in known:
            raise ValueError(f"the training records hold no question of the type {kind!r}.{nearest(kind, known)}")
        total, favourite = sum(questions.values(), Counter()), sum(known[kind].values(), Counter()).most_common(1)[0][0]
        right = 0
        for question, counts in questions.items():
            seen_before = known[kind].get(question, Counter())
            for answer, count in counts.items():
                # without the one to be answered, or questions asked once would answer themselves
                seen = seen_before - Counter([answer]) if training is None else seen_before
                right += count * (answer == (seen.most_common(1)[0][0] if seen else favourite))
        shares[kind] = max(total[favourite], right) / total.total()
    return shares
