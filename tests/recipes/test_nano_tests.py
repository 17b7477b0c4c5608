"""nano's tests: asking and counting what is right, the exam, zero-shot recognition, and the sheet pixel by pixel."""

import dataclasses
import warnings

import numpy
import pytest
import torch
from drawn import box_of, inked, near, read_page
from PIL import Image
from tiny import random_vlm

from nanovlm.data.batching import pixels_of
from nanovlm.data.easy_vqa import COLORS, EasyVQA, SHAPES
from nanovlm.data.images import SIGLIP
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.scene_questions import Scenes
from nanovlm.data.scenes import HELD_OUT
from nanovlm.data.templates import NANO, prompt, write
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.generation.chat import Assistant
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.recipes import nano_tests
from nanovlm.recipes.nano_tests import (
    Answer, ask, exact_match, exam_lines, majority_baseline, pick_samples, sample_sheet, shares, wilson,
)

WORDS = ["user: what color is this? bot: red green blue circle star how many shapes are there? 1 2 yes no"]
TOKENIZER = train_tokenizer(WORDS, 300)
DECODING = Decoding(max_new_tokens=5, eos_ids=(TOKENIZER.eos,))
MAGENTA, CYAN, YELLOW = (255, 0, 255), (0, 255, 255), (255, 255, 0)
GREEN, RED = (27, 110, 45), (178, 24, 43)  # ink of right and wrong answers


def picture(key, color, frames=1):
    return Visual(key, (Image.new("RGB", (8, 8), color),) * frames)


def asked(question, answer, *visuals):
    return Turn("user", (*visuals, question)), Turn("assistant", (answer,))


def records(color=lambda original: original):
    """Several questions a picture, a picture that two records share, a clip, two pictures, none; an earlier turn."""
    shades = [color(shade) for shade in ((220, 30, 40), (30, 40, 230), (9, 200, 60))]
    red, blue, clip = picture("red", shades[0]), picture("blue", shades[1]), picture("clip", shades[2], 2)
    long = "how many shapes are there, and what color is the circle?"
    return [
        Record("a", (red,), (asked(long, "1", 0), asked("what color?", "red", 0)), ("count", "color")),
        Record("b", (blue,), (asked("what color?", "blue", 0), asked("what color?", "blue", 0)), ("color", "color")),
        Record("c", (), (asked("is a star a circle?", "no"),)),
        Record("d", (blue, red), (asked("same?", "no", 1, 0), asked("same?", "no", 0, 1)), ("same", "same")),
        Record("e", (clip,), (asked("what?", "star", 0) + asked("and this?", "star"),), ("turns",)),
        Record("f", (red,), (asked("what color?", "red", 0),), ("color",)),
    ]


@pytest.fixture
def assistant():
    return Assistant(random_vlm(TOKENIZER.vocab_size, context_length=64), TOKENIZER, NANO, 8)


def naive(model, records):
    """One prompt at a time, nothing shared."""
    answers = []
    for record in records:
        for place, conversation in enumerate(record.conversations):
            counts = [model.num_image_tokens(8, len(visual.frames)) for visual in record.visuals]
            row = write(prompt(conversation[:-1], NANO), TOKENIZER, counts)
            inputs = [pixels_of([record.visuals[image[0]]], 8, "crop") for image in row.images]
            (ids,) = generate(model, [row.ids], DECODING, [inputs])
            answers.append((record.id, place, TOKENIZER.decode(ids).strip()))
    return answers


def said(answers):
    return [(answer.record, answer.conversation, answer.prediction) for answer in answers]


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_answers_equal_a_naive_loop(assistant, batch_size):
    answers = ask(assistant, records(), max_new_tokens=5, batch_size=batch_size)
    assert said(answers) == naive(assistant.model, records())
    assert len({answer.prediction for answer in answers}) > 3  # a model that says one thing would prove nothing
    first, last_turn = answers[0], answers[7]
    assert (first.kind, first.question[:8], first.truth) == ("count", "how many", "1")
    assert (last_turn.kind, last_turn.question, last_turn.truth) == ("turns", "and this?", "star")
    assert answers[4].kind == ""
    backwards = ask(assistant, records()[::-1], max_new_tokens=5, batch_size=batch_size)
    assert set(answers) == set(backwards) and answers != backwards


def test_blank_shows_grey_instead_of_every_picture(assistant):
    blank = ask(assistant, records(), blank=True, max_new_tokens=5, batch_size=4)
    assert said(blank) == naive(assistant.model, records(lambda original: (128, 128, 128)))
    assert said(blank) != naive(assistant.model, records())
    assert blank[1].prediction == blank[2].prediction and blank[1].truth != blank[2].truth


@pytest.mark.parametrize("blank, frames", [(False, 1 + 1 + 2), (True, 1 + 2)])
def test_pictures_are_encoded_once(assistant, blank, frames):
    counted, encode = [], assistant.model.encode
    assistant.model.encode = lambda pixels, counts: counted.append(len(pixels)) or encode(pixels, counts)
    ask(assistant, records(), blank, batch_size=3)
    assert sum(counted) == frames


@pytest.mark.parametrize("width, together", [(32, 256), (128, 256), (576, 56)])
def test_a_wide_model_is_asked_fewer_questions_at_a_time(assistant, monkeypatch, width, together):
    sizes = []
    monkeypatch.setattr(nano_tests, "reply", lambda *_, batch_size: sizes.append(batch_size) or ["red"] * 9)
    monkeypatch.setattr(assistant.model.decoder, "config", dataclasses.replace(assistant.model.decoder.config, width=width))
    ask(assistant, records())
    assert sizes == [together]


def test_progress_counts_conversations_chunk_by_chunk_and_records_are_read_as_needed(assistant):
    done, read = [], []

    def lazily():
        for record in records() * 2:
            read.append(record.id)
            yield record

    ask(assistant, lazily(), progress=lambda number: done.append((number, len(read))), batch_size=1)
    assert done == [(8, 5), (8, 10), (2, 12)]


@pytest.mark.parametrize("prediction, truth, same", [
    ("red circle", "red circle", True), (" Red Circle\n", "red circle", True), ("yes", "Yes", True),
    ("red", "red circle", False), ("", "red", False), ("4", "4", True),
    ("A7K", "A7K", True), (" A7K ", "A7K", True), ("a7k", "A7K", False), ("A7k", "A7K", False),
    ("AK7", "A7K", False),
])  # fmt: skip
def test_exact_match(prediction, truth, same):
    assert exact_match(prediction, truth) is same


def answer(kind, truth, prediction, question="q?"):
    return Answer("r", 0, kind, question, truth, prediction)


MADE_UP = [
    answer("color", "red", "Red"), answer("color", "red", "blue"), answer("color", "blue", "blue"),
    answer("", "no", "no"), answer("reading", "AC", "ac"),
]  # fmt: skip


def test_shares_and_wilson_by_hand():
    assert shares(MADE_UP) == {"all": 3 / 5, "color": 2 / 3, "reading": 0.0}
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(1, 1) == pytest.approx((1 / 4.841459, 1.0), abs=1e-6)
    for n in range(1, 500):  # whatever the rounding
        assert 0 <= wilson(0, n)[0] < 1e-12 and 1 - 1e-12 < wilson(n, n)[1] <= 1
    low, high = wilson(9573, 9673)
    assert low < 9573 / 9673 < high < 1 and high - low < 0.005


def test_held_out_tests_hold_what_training_never_shows():
    tests = nano_tests.held_out_tests(num_pictures=3, num_scenes=12)
    assert {name: len(found) for name, found in tests.items()} == {
        "easy_vqa_test": 3, "scenes_new": 12, "scenes_unseen_pairs": 12, "scenes_reading": 12, "text_only": 12,
        "described": 12,
    }  # fmt: skip
    assert list(tests) == list(nano_tests.NAMES)
    looking = {"color", "shape", "count", "existence", "place", "relation", "size"}
    assert {kind for record in tests["scenes_new"] + tests["scenes_unseen_pairs"] for kind in record.kinds} == looking
    assert {kind for record in tests["scenes_reading"] for kind in record.kinds} == {"reading"}
    words = [turn.text for record in tests["scenes_new"] for turns in record.conversations for turn in turns]
    assert not any(" ".join(pair) in text for text in words for pair in HELD_OUT)
    assert all(not record.visuals and len(record.conversations[0]) == 2 for record in tests["text_only"])
    assert all(record.kinds[0].startswith(("described_", "listed_")) for record in tests["described"])
    assert all(record.id.startswith("easy_vqa_test/") for record in tests["easy_vqa_test"])
    assert nano_tests.held_out_tests(1, 1)["scenes_new"][0].id == tests["scenes_new"][0].id
    assert tests["scenes_new"][0].id.startswith("scenes_new/1000/")
    assert (nano_tests.NUM_SCENES, nano_tests.NUM_TRAINING) == (400, 500)  # published numbers rest on these
    asked = nano_tests.held_out_tests(num_scenes=1)["easy_vqa_test"]
    assert len(asked) == 1000 and sum(len(record.conversations) for record in asked) == 9673
    assert len({record.id for record in asked}) == 1000 and asked[0].id == EasyVQA("test").record(0).id


def test_majorities_come_from_training_answers(monkeypatch):
    monkeypatch.setattr(nano_tests, "NUM_TRAINING", 200)
    tests = nano_tests.held_out_tests(num_pictures=20, num_scenes=20)
    found = nano_tests.majorities({name: tests[name] for name in ("easy_vqa_test", "scenes_unseen_pairs")})
    assert list(found) == ["easy_vqa_test", "scenes_unseen_pairs"]
    assert found["scenes_unseen_pairs"]["color"] < 0.3  # within the test itself, the shape gives the colour away
    for name, majority in found.items():
        kinds = [kind for record in tests[name] for kind in record.kinds]
        by_hand = sum(kinds.count(kind) * share for kind, share in majority.items() if kind != "all") / len(kinds)
        assert majority["all"] == pytest.approx(by_hand) and set(majority) == {"all", *kinds}
    assert 0.6 < found["easy_vqa_test"]["all"] < 0.8  # 67.8% on the whole test


def test_answer_tests_asks_everything_and_easy_vqa_also_blank(monkeypatch):
    monkeypatch.setattr(nano_tests, "ask", lambda model, records, blank, progress: progress(1) or (model, records, blank))
    assert nano_tests.answer_tests("model", {"easy_vqa_test": records()[:1], "text_only": records()[2:3]}) == {
        "easy_vqa_test": ("model", records()[:1], False), "text_only": ("model", records()[2:3], False),
        "blank_easy_vqa": ("model", records()[:1], True),
    }  # fmt: skip
    assert list(nano_tests.answer_tests("model", {"text_only": records()[2:3]})) == ["text_only"]


def test_results_and_their_table():
    answers = {"easy_vqa_test": MADE_UP, "text_only": MADE_UP[:2], "blank_easy_vqa": MADE_UP[3:]}
    majority = {"easy_vqa_test": {"all": 0.25, "color": 0.125, "reading": 0.0}, "text_only": {"all": 0.5, "color": 0.5}}
    results = nano_tests.nano_results(answers, majority)
    assert [results[name] for name in answers] == [0.6, 0.5, 0.5] and results["majority"] == majority
    half = wilson(1, 2)
    assert [results[key] for key in ("kinds", "questions", "interval")] == [
        {"easy_vqa_test": {"color": 2 / 3, "reading": 0.0}, "text_only": {"color": 0.5}, "blank_easy_vqa": {"reading": 0.0}},
        {"easy_vqa_test": 5, "text_only": 2, "blank_easy_vqa": 2},
        {"easy_vqa_test": wilson(3, 5), "text_only": half, "blank_easy_vqa": half},
    ]
    table = [
        "held-out test                        questions    right     95% interval   majority",
        "easy-VQA, official test                      5    60.0%     23.1 - 88.2%      25.0%",
        "  color                                           66.7%                       12.5%",
        "  reading                                          0.0%                        0.0%",
        "text only                                    2    50.0%      9.5 - 90.5%      50.0%",
        "easy-VQA over grey pictures                  2    50.0%      9.5 - 90.5%           ",
    ]
    results["kinds"]["easy_vqa_test"] = {"reading": 0.0, "color": 2 / 3}  # whatever came first in the test
    assert nano_tests.results_table(results) == table
    finished = results | {"parameters": 1234567, "seconds": 239.6}
    assert nano_tests.results_table(finished) == [*table, "1,234,567 parameters, 240 seconds"]


def test_the_exam_tells_every_answer_readably_about_the_same_three_pictures():
    assert exam_lines(records()[:2], ["1", "\n blue  circle", "", "blue"]) == [
        "exam 1  how many shapes are there, and what color is the circle?  1 ✓",
        "exam 1  what color?  blue circle ✗", "exam 2  what color?  (nothing) ✗", "exam 2  what color?  blue ✓",
    ]  # fmt: skip
    assert nano_tests.readable(" a\n b\t c ") == "a b c"
    assert nano_tests.readable("\x1b[2J\ufffd$") == "·[2J·$"
    assert nano_tests.readable("") == nano_tests.readable(" \n") == "(nothing)"
    assert nano_tests.readable("x" * 40) == "x" * 40
    assert nano_tests.readable("x" * 41) == "x" * 39 + "…"
    paper, again = nano_tests.exam_records.__wrapped__(), nano_tests.exam_records.__wrapped__()
    assert [record.id for record in paper] == [record.id for record in again]
    assert [record.kinds for record in paper] == [("color", "shape"), ("relation", "count"), ("reading", "color")]
    for record, start in zip(paper, ("easy_vqa_test/", "scenes_new/2005/64/3-4/0.0/", "scenes_new/2005/64/2-4/1.0/")):
        assert record.id.startswith(start)
    assert not {turns[-1].text for record in paper for turns in record.conversations} & {"yes", "no"}
    assert all(len(record.conversations) == 2 and len(record.visuals) == 1 for record in paper)


class Matcher:
    """A contrastive model that finds the captions it was told to, and reads them as they must be written."""

    log_scale = torch.zeros(())

    def __init__(self, chosen):
        self.chosen = chosen

    def embed_texts(self, ids, lengths):
        rows = [row[:length] for row, length in zip(ids.tolist(), lengths.tolist())]
        assert all(row[0] == TOKENIZER.bos and row[-1] == TOKENIZER.eos for row in rows)
        assert all((row[length:] == TOKENIZER.pad).all() for row, length in zip(ids, lengths))
        self.captions = [TOKENIZER.decode(row) for row in rows]
        return torch.eye(len(rows))

    def views(self, pixels):
        """Two views of each picture: one that fits nothing well, and the one that counts."""
        assert pixels.shape == (len(self.chosen), 3, 8, 8)
        self.pixels, names = pixels, [f"{color} {shape}" for color in COLORS for shape in SHAPES]
        counted = torch.eye(24)[[names.index(words) for words in self.chosen]]
        return torch.stack([torch.full_like(counted, 0.5), counted], 1)


def test_zero_shot_by_hand():
    truths = ["red circle", "blue triangle", "teal", "rectangle"]
    pictures = [picture(truth, (90, place, 0)) for place, truth in enumerate(truths)]
    asked = [Record(truth, (one,), ((Turn("assistant", (truth,)),),)) for truth, one in zip(truths, pictures)]
    model = Matcher(["red circle", "red triangle", "teal circle", "brown triangle"])
    assert nano_tests.zero_shot(model, asked, TOKENIZER, 8) == {"color": 2 / 3, "shape": 2 / 3}
    assert model.captions[:4] == ["red circle", "red rectangle", "red triangle", "green circle"]
    assert len(model.captions) == 24
    assert torch.equal(model.pixels, pixels_of(pictures, 8, "crop"))
    nano_tests.zero_shot(model, asked, TOKENIZER, 8, "crop", SIGLIP)
    assert torch.equal(model.pixels, pixels_of(pictures, 8, "crop", SIGLIP))


# what can be scored without looking


def answered(*asked):
    return [Record("r", (), ((Turn("user", (question,)), Turn("assistant", (answer,))),), (kind,))
            for kind, question, answer in asked]


def test_majority_baseline():
    by_question = [("k", "q1", "a")] * 3 + [("k", "q2", "b")] * 3 + [("k", "q2", "a")]
    assert majority_baseline(answered(*by_question)) == {"k": 6 / 7}
    by_type = [("k", f"q{n}", "yes" if n < 6 else "no") for n in range(10)]
    assert majority_baseline(answered(*by_type, ("other", "q", "x"))) == {"k": 0.6, "other": 1.0}
    training = answered(("k", "q1", "b"), ("k", "q1", "b"), ("k", "q2", "a"))
    assert majority_baseline(answered(("k", "q1", "b"), ("k", "q2", "b"), ("k", "q3", "a")), training) == {"k": 2 / 3}
    asked = answered(("k", "q1", "b"), ("k", "q2", "a"), ("k", "q3", "b"), ("k", "q3", "b"))
    assert majority_baseline(asked, training) == {"k": 1.0}


def test_no_blind_model_scores_much_on_new_pictures():
    new, training = ([Scenes(split).record(n) for n in range(600)] for split in ("new", "train"))
    limits = {"color": 0.25, "shape": 0.3, "count": 0.55, "existence": 0.58, "place": 0.25, "relation": 0.45,
              "size": 0.58, "reading": 0.03}
    for shares in (majority_baseline(new, training), majority_baseline(new)):
        assert set(shares) == set(limits)
        assert all(shares[kind] < limit for kind, limit in limits.items()), shares


# the sheet


def solid(color):
    return Image.new("RGB", (8, 8), color)


def test_everything_on_the_sheet_lies_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(nano_tests, "COLUMNS", 2)
    long = "is there really such a thing as a question that is far too long for the room it has?"
    samples = [
        ("M" * 10, solid(MAGENTA), answer("", "yes", "yes", "right?")),
        ("second", solid(CYAN), answer("", "no", "yes", long)),
        ("third", solid(YELLOW), answer("", "left", "left", "where?")),
    ]
    sample_sheet(samples, tmp_path / "samples.png", "seed 7")
    page = read_page(tmp_path / "samples.png")
    assert page.shape == (690, 480, 3)
    for color, left, top in ((MAGENTA, 10, 74), (CYAN, 250, 74), (YELLOW, 10, 394)):
        assert near(box_of(page, color), (left, top, left + 220, top + 220))
        assert inked(page, left - 2, top - 2, left + 222, top + 222)  # the picture and its frame
    columns = numpy.nonzero((page[52:72, 0:240] != 255).any(axis=(0, 2)))[0]
    assert near((columns.min(), columns.max()), (67, 173))  # ten letters of nine points, in the middle
    for left, top in ((0, 52), (240, 52), (0, 372)):
        assert inked(page, left, top, left + 240, top + 20)  # the label
    first_answer = page[316:333, 0:240].copy()  # the second line
    assert inked(page, 0, 299, 240, 316) and inked(page, 0, 316, 240, 333)  # question, answer
    assert inked(page, 0, 619, 240, 636) and inked(page, 0, 636, 240, 653)
    second_answer = page[333:350, 240:480].copy()
    for line in range(4):  # two lines of question, answer, truth
        assert inked(page, 240, 299 + 17 * line, 480, 316 + 17 * line)
    assert inked(page, 0, 10, 480, 40)  # the title
    assert (page == 255).all()
    for cut, ink, other in ((first_answer, GREEN, RED), (second_answer, RED, GREEN)):
        assert (cut == ink).all(axis=2).any() and not (cut == other).all(axis=2).any()


def test_the_sheet_counts_the_right_answers(tmp_path, monkeypatch):
    written, page = [], nano_tests.new_page
    monkeypatch.setattr(nano_tests, "new_page", lambda *arguments: written.append(arguments[-1]) or page(*arguments))
    samples = [("a", solid(CYAN), answer("", "yes", word)) for word in ("yes", "no", "yes")]
    sample_sheet(samples, tmp_path / "samples.png", "nano, seed 7")
    assert written == ["nano, seed 7: 2 of 3 right"]
    assert read_page(tmp_path / "samples.png").shape == (370, 960, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a character that the font lacks would warn, "$\\" would be a broken formula
        strange = answer("", "$\\alpha", "$\\bad{ \u6f22\u5b57 \x07 \U0001f600", "$\\frac$ \u6f22?")
        sample_sheet([("a", solid(CYAN), strange)], tmp_path / "samples.png", "$\\seed")
    assert inked(read_page(tmp_path / "samples.png"), 0, 316, 240, 333)


def test_samples_are_the_first_of_each_test_with_changing_questions(monkeypatch):
    assert sum(number for number, _ in nano_tests.SAMPLES.values()) == 12  # three full rows of four
    monkeypatch.setattr(nano_tests, "SAMPLES", {"two": (2, "TWO"), "one": (3, "ONE")})
    def record(name, color, questions):
        return Record(name, (Visual(name, (solid(color),)),), tuple(asked(f"{name}{n}?", "x", 0) for n in range(questions)))

    tests = {
        "one": [record(name, (n, n, n), 3 if n == 2 else 2) for n, name in enumerate("abcd", start=1)],
        "two": [record("e", (5, 5, 5), 1)],
        "unused": [],
    }
    answers = {
        name: [answer("", "x", "y", turns[0].text) for one in records for turns in one.conversations]
        for name, records in tests.items()
    }
    chosen = pick_samples(tests, answers)
    assert [(label, image.getpixel((0, 0))[0], one.question) for label, image, one in chosen] == [
        ("TWO", 5, "e0?"), ("ONE", 1, "a0?"), ("ONE", 2, "b1?"), ("ONE", 3, "c0?")
    ]  # fmt: skip
