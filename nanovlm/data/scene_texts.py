"""Text-only instructions: scenes in words, small facts, and plain captions, for training the language model alone.

No picture belongs to them. The same colour-shape pairs and strings are held out as from the pictures, and a part of
their own: a fixed fifth of all described scenes, sums, spellings and phrases is only in the split "new".
"""

import numpy as np

from nanovlm.data.records import Record, Turn
from nanovlm.data.scene_questions import QUESTIONS, RELATIONS, ask, caption, caption_words, pick_weighted, with_article
from nanovlm.data.scene_source import check_source
from nanovlm.data.scenes import TRAIN_PAIRS, in_held_out_fifth, pick, sample_scene, sample_string

OPPOSITES = (("left", "right"), ("above", "below"), ("big", "small"), ("top", "bottom"), ("yes", "no"),
             ("hot", "cold"), ("light", "dark"), ("up", "down"), ("day", "night"), ("old", "new"))
PHRASE_WORDS = tuple(word for pair in OPPOSITES for word in pair)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPPOSITE_RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
STREAM = 100  # added to the split's number, so that pictures of the same seed draw other random numbers
CAPTION_QUESTIONS = {name: 1.0 for name in QUESTIONS if name != "relation"}  # a caption does not tell all relations


def _related(rng):
    """Two different pairs in a relation: (one, relation, other), the pairs in words."""
    one, other = pick(rng, TRAIN_PAIRS), pick(rng, TRAIN_PAIRS)
    while other == one:
        other = pick(rng, TRAIN_PAIRS)
    return " ".join(one), pick(rng, RELATIONS), " ".join(other)


def _sentence(one, relation, other):
    return f"{with_article(one)} is {relation} {with_article(other)}"


def _described_relation(rng):
    """One sentence and a question about it, which turns it round in half of the cases."""
    one, relation, other = _related(rng)
    sentence = _sentence(one, relation, other)
    if rng.random() < 0.5:
        one, relation, other = other, OPPOSITE_RELATIONS[relation], one
    if rng.random() < 0.5:
        return f"{sentence}. what is {relation} the {other}?", one, sentence
    present = rng.random() < 0.5
    asked = relation if present else OPPOSITE_RELATIONS[relation]
    return f"{sentence}. is the {one} {asked} the {other}?", "yes" if present else "no", sentence


def _opposite(rng):
    pair = pick(rng, OPPOSITES)
    word, opposite = pair if rng.random() < 0.5 else pair[::-1]
    return f"what is the opposite of {word}?", opposite, None


def _addition(rng):
    """Sums up to 18; a sum and its commuted form are held out together."""
    one, other = int(rng.random() * 10), int(rng.random() * 10)
    return f"what is {one} plus {other}?", str(one + other), f"{min(one, other)} plus {max(one, other)}"


def _spelling(rng):
    string = sample_string(rng)
    return f"spell {string}.", " ".join(string), f"spell {string}"


def _next_letter(rng):
    at = int(rng.random() * (len(LETTERS) - 1))
    return f"which letter comes after {LETTERS[at]}?", LETTERS[at + 1], None


def _word_of_phrase(rng):
    words = [pick(rng, PHRASE_WORDS) for _ in range(pick(rng, (2, 3, 4)))]
    phrase, end = " ".join(words), pick(rng, ("first", "last"))
    return f"what is the {end} word of: {phrase}", words[0 if end == "first" else -1], phrase


# Each: rng -> (question, answer, text that decides whether it is held out; None = trained as a whole, never "new").
FACTS = {"described_relation": _described_relation, "opposite": _opposite, "addition": _addition, "spelling": _spelling,
         "next_letter": _next_letter, "word_of_phrase": _word_of_phrase}
DESCRIPTIONS = {  # how a scene is told, and what can then be asked about it
    "described": (caption, CAPTION_QUESTIONS),
    "listed": (caption_words, {name: 1.0 for name in ("color", "shape", "count", "existence", "reading")}),
}
TEXT_TYPES = (*DESCRIPTIONS, *FACTS, "plain_caption")
NOT_HELD_OUT = ("opposite", "next_letter")


class SceneTexts:
    """Source of text-only records of one conversation each; endless, `length` is what counts as an epoch."""

    def __init__(self, split="train", seed=0, max_objects=4, string_share=0.3, weights=None, length=10_000,
                 questions_per_text=1):
        """
        Args:
          split: "train" or "new" (only the held-out part; opposites and letters have none and are absent from it).
          seed: int, 0 or more.
          max_objects: at most this many objects in a described scene.
          string_share: share of described scenes with a text, 0 to 1.
          weights: {type: weight}, types as in TEXT_TYPES; one left out is never used. None = all equally often.
            "described" and "listed" give records of the kinds "described_color", "listed_count", …
          length: records per epoch; record(n) goes on beyond it with new texts.
          questions_per_text: exchanges about a described scene at most, one after the other in one conversation.
        Raises: ValueError for a name that does not exist or a number out of range.
        """
        weights = dict.fromkeys(TEXT_TYPES, 1.0) if weights is None else weights
        check_source(split, ("train", "new"), weights, TEXT_TYPES, seed, length)
        unused = NOT_HELD_OUT if split == "new" else ()
        self.weights = {name: weight for name, weight in weights.items() if weight > 0 and name not in unused}
        if not self.weights:
            raise ValueError(f"no type of the split {split!r} has a weight above 0; known: {', '.join(TEXT_TYPES)}")
        if min(max_objects, questions_per_text) < 1 or not 0 <= string_share <= 1:
            raise ValueError(
                f"max_objects {max_objects} and questions_per_text {questions_per_text} must be 1 or more, "
                f"string_share {string_share} from 0 to 1"
            )
        self.name, self.split, self.seed, self.length = f"scene_texts_{split}", split, seed, length
        self.max_objects, self.string_share, self.questions_per_text = max_objects, string_share, questions_per_text

    def __len__(self):
        return self.length

    def record(self, n):
        """Record n, n >= 0: a question and its answer, or for "plain_caption" an assistant turn alone."""
        rng = np.random.default_rng((self.seed, STREAM + (self.split == "new"), n))
        kind, made = pick_weighted(rng, self.weights), None
        while made is None:
            made = self._make(rng, kind)
        kind, exchanges = made
        spoken = (pair for exchange in exchanges for pair in zip(("user", "assistant"), exchange))
        turns = tuple(Turn(role, (words,)) for role, words in spoken if words)
        return Record(f"{self.name}/{self.seed}/{n}", (), (turns,), (kind,))

    def _make(self, rng, kind):
        """(kind, exchanges of a question or None and its answer); None if there is none or it is of the other split."""
        if kind in FACTS:
            question, answer, key = FACTS[kind](rng)
            made = kind, [(question, answer)]
        else:
            with_string = rng.random() < self.string_share
            scene = sample_scene(rng, self.max_objects, self.split, with_string)
            if kind in DESCRIPTIONS:
                tell, questions = DESCRIPTIONS[kind]
                key = tell(scene)
                asked = ask(scene, rng, self.questions_per_text, questions)
                if not asked:
                    return None
                exchanges = [(question, answer) for _, question, answer in asked]
                exchanges[0] = f"{key}. {exchanges[0][0]}", exchanges[0][1]
                made = f"{kind}_{asked[0][0]}", exchanges
            else:
                key = pick(rng, (caption(scene), caption_words(scene), _sentence(*_related(rng))))
                made = kind, [(None, key)]
        return made if key is None or in_held_out_fifth(key) == (self.split == "new") else None
