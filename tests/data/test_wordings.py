"""Questions in other words: every question that training and tests ask is known, and keeps what it asks for."""

import itertools
import re

import numpy
import pytest

from nanovlm.data.easy_vqa import EasyVQA
from nanovlm.data.records import Record, Turn
from nanovlm.data.scene_questions import Scenes
from nanovlm.data.wordings import AROUND, WORDINGS, diversified, reword, reworded

CASES = [
    ("what color is the star?", "color", {"star"}), ("what is the cyan shape?", "shape_of", {"cyan"}),
    ("what shape is present?", "shape", set()), ("how many red crosses are there?", "count", {"red", "crosses"}),
    ("is there an orange star?", "existence", {"an orange star"}), ("does the image contain a triangle?", "existence", {"a triangle"}),
    ("is there not a red shape in the image?", "denial", {"red shape"}), ("is no circle present?", "denial", {"circle"}),
    ("where is the blue ring?", "place", {"blue ring"}), ("what is left of the pink square?", "relation", {"left of", "pink square"}),
    ("is the red star above the blue ring?", "relation_check", {"red star", "above", "blue ring"}),
    ("is the star big or small?", "size", {"star"}), ("read the text.", "reading", set()), ("describe the image.", "caption", set()),
    ("list the objects.", "short_caption", set()),
]


def plain(text):
    """Letters and digits alone, in lower case."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def test_no_wording_is_both_trained_and_held_out():
    trained = [plain(text) for kind in WORDINGS.values() for text in kind["train"]]
    held_out = [plain(text) for kind in WORDINGS.values() for text in kind["held_out"]]
    assert not set(trained) & set(held_out) and {kind for _, kind, _ in CASES} == WORDINGS.keys()
    for kind in WORDINGS.values():
        assert len(set(map(plain, kind["held_out"]))) >= 10 and len(set(map(plain, kind["train"]))) >= 5
        assert max(len(text.split()) for text in kind["held_out"]) >= 8, "some are long"


@pytest.mark.parametrize(("question", "kind", "said"), CASES)
def test_a_question_keeps_what_it_asks_for(question, kind, said):
    for words, number in itertools.product(("train", "held_out"), range(30)):
        text = reword(question, words, numpy.random.default_rng(number))
        assert "{" not in text and all(one in text for one in said), text
    made = {reword(question, "held_out", numpy.random.default_rng(n)) for n in range(200)}
    assert len(made) == len(WORDINGS[kind]["held_out"]) and question not in made


def test_words_stand_around_a_question_in_training_alone():
    trained, held_out = ([reword("what color is the star?", words, numpy.random.default_rng(n)) for n in range(400)]
                         for words in ("train", "held_out"))
    for ways, stands in zip(AROUND, (str.startswith, str.endswith)):
        assert {way for way in ways for text in trained if stands(text, way)} == set(ways)
        assert 0.2 < sum(stands(text, tuple(ways)) for text in trained) / 400 < 0.4
    assert {text.replace("star", "{thing}") for text in held_out} == set(WORDINGS["color"]["held_out"])


@pytest.mark.parametrize("source", [Scenes("new", kind="both"), Scenes("reading"), EasyVQA(), EasyVQA("test")], ids=lambda one: one.name)
def test_every_question_of_the_data_is_known_and_its_answer_stays(source):
    for n in range(60):
        before = source.record(n)
        for words in ("train", "held_out"):
            after = reworded(before, words, (0, n))
            assert [talk[-1] for talk in after.conversations] == [talk[-1] for talk in before.conversations]
            assert (after.visuals, after.kinds) == (before.visuals, before.kinds)
            assert all(talk[0].parts[0] == 0 for talk in after.conversations)


def test_the_same_record_is_asked_in_the_same_words():
    source = diversified(EasyVQA(), 3)
    assert source.record(7) == source.record(7) and len(source) == 4000
    assert source.record(7) != diversified(EasyVQA(), 4).record(7)
    talk = ((Turn("user", ("who is it?",)), Turn("assistant", ("x",))),)
    with pytest.raises(ValueError, match="who is it"):
        reworded(Record("a", (), talk), "train", (0,))
