"""Asking models and counting what is right: by hand on made-up answers, and a random model against a naive loop."""

import dataclasses

import pytest
import torch
from PIL import Image
from tiny import random_vlm

from nanovlm.data.batching import pixels_of, prompt_row
from nanovlm.data.easy_vqa import EasyVQA
from nanovlm.data.images import CLIP, SIGLIP
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.scenes import HELD_OUT
from nanovlm.data.templates import NANO, end_ids
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.recipes import nano_tests
from nanovlm.evaluation.protocols import Answer, Examiner, answer_questions, exact_match, shares, wilson
from nanovlm.generation import answer as answering, sampler
from nanovlm.generation.sampler import Decoding, generate

WORDS = ["user: what color is this? bot: red green blue circle star how many shapes are there? 1 2 yes no"]
TOKENIZER = train_tokenizer(WORDS, 300)
DECODING = Decoding(max_new_tokens=5, eos_ids=(TOKENIZER.eos,))


def picture(key, color, frames=1):
    return Visual(key, (Image.new("RGB", (8, 8), color),) * frames)


def asked(question, answer, *visuals):
    return Turn("user", (*visuals, question)), Turn("assistant", (answer,))


def records():
    """Several questions a picture, a picture that two records share, a clip, two pictures, none; an earlier turn."""
    red, blue, clip = picture("red", (220, 30, 40)), picture("blue", (30, 40, 230)), picture("clip", (9, 200, 60), 2)
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
def model():
    return random_vlm(TOKENIZER.vocab_size, context_length=64)


def naive(model, records):
    """One prompt at a time, nothing shared."""
    answers = []
    for record in records:
        for place, conversation in enumerate(record.conversations):
            counts = [model.num_image_tokens(8, len(visual.frames)) for visual in record.visuals]
            row = prompt_row(conversation[:-1], NANO, TOKENIZER, counts, 59)
            inputs = [pixels_of([record.visuals[image[0]]], 8, "crop") for image in row.images]
            (ids,) = generate(model, [row.ids], DECODING, [inputs])
            answers.append((record.id, place, TOKENIZER.decode(ids).strip()))
    return answers


def said(answers):
    return [(answer.record, answer.conversation, answer.prediction) for answer in answers]


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_answers_equal_a_naive_loop(model, batch_size):
    answers = answer_questions(model, records(), TOKENIZER, NANO, 8, "crop", DECODING, batch_size)
    assert said(answers) == naive(model, records())
    assert len({answer.prediction for answer in answers}) > 3  # a model that says one thing would prove nothing
    first, last_turn = answers[0], answers[7]
    assert (first.kind, first.question[:8], first.truth) == ("count", "how many", "1")
    assert (last_turn.kind, last_turn.question, last_turn.truth) == ("turns", "and this?", "star")
    assert answers[4].kind == ""


def test_the_order_of_the_records_does_not_matter(model):
    forwards = answer_questions(model, records(), TOKENIZER, NANO, 8, "crop", DECODING, 2)
    backwards = answer_questions(model, records()[::-1], TOKENIZER, NANO, 8, "crop", DECODING, 2)
    assert set(forwards) == set(backwards) and forwards != backwards


def test_blank_shows_grey_instead_of_every_picture(model):
    grey = [
        dataclasses.replace(
            record,
            visuals=tuple(picture(f"grey{len(v.frames)}", (128, 128, 128), len(v.frames)) for v in record.visuals),
        )
        for record in records()
    ]
    blank = answer_questions(model, records(), TOKENIZER, NANO, 8, "crop", DECODING, 4, blank=True)
    assert said(blank) == naive(model, grey)
    assert said(blank) != naive(model, records())
    assert blank[1].prediction == blank[2].prediction and blank[1].truth != blank[2].truth


def test_prompts_run_once_and_sorted_and_pictures_are_encoded_once(model, monkeypatch):
    runs, frames = [], []

    def recorded(model, prompts, decoding, inputs, generators, batch_size):
        runs.append((prompts, {id(pixels): pixels for one in inputs for pixels in one}, batch_size))
        return generate(model, prompts, decoding, inputs, batch_size=batch_size)

    monkeypatch.setattr(sampler, "generate", recorded)
    encode = model.encode
    model.encode = lambda pixels, counts: frames.append(len(pixels)) or encode(pixels, counts)
    answer_questions(model, records(), TOKENIZER, NANO, 8, "crop", DECODING, 3)
    answer_questions(model, records(), TOKENIZER, NANO, 8, "crop", DECODING, 3, blank=True)
    (prompts, pictures, batch_size), (blank_prompts, blank_pictures, _) = runs
    assert [len(prompt) for prompt in prompts] == sorted(len(prompt) for prompt in prompts)
    assert len(prompts) == 7  # of 9: b asks the same twice, f asks what a asks
    assert len(blank_prompts) == 5  # one question over all single pictures, and the two orders of d are one
    assert (len(pictures), len(blank_pictures), batch_size) == (3, 2, 3)
    grey = pixels_of([picture("grey", (128, 128, 128))], 8, "crop")
    assert all(torch.equal(frame, grey[0]) for pixels in blank_pictures.values() for frame in pixels)
    assert sum(frames) == (1 + 1 + 2) + (1 + 2)


def test_progress_counts_conversations_chunk_by_chunk_and_records_are_read_as_needed(model):
    done, read = [], []

    def lazily():
        for record in records() * 2:
            read.append(record.id)
            yield record

    def progress(number):
        done.append((number, len(read)))

    answer_questions(model, lazily(), TOKENIZER, NANO, 8, "crop", DECODING, 1, progress=progress)
    assert done == [(8, 5), (8, 10), (2, 12)]


def test_an_answer_suffix_is_no_part_of_the_answer(model, monkeypatch):
    template = dataclasses.replace(NANO, answer_suffix="!")
    reply = TOKENIZER.encode(" red !")
    monkeypatch.setattr(sampler, "generate", lambda model, prompts, *_, **__: [reply] * len(prompts))
    (answer,) = answer_questions(model, records()[5:], TOKENIZER, template, 8, "crop", DECODING, 1)
    assert answer.prediction == "red" and answer.right


def test_questions_that_cannot_be_asked_are_named(model):
    def ask(record, decoding=DECODING):
        return answer_questions(model, [record], TOKENIZER, NANO, 8, "crop", decoding, 2)

    with pytest.raises(ValueError, match="record 'x', conversation 1 has no question"):
        ask(Record("x", (), (asked("a", "b"), (Turn("assistant", ("only text",)),))))
    with pytest.raises(ValueError, match="'x', conversation 0: the prompt has 7[0-9] tokens and the answer up to 5"):
        ask(Record("x", (), (asked("z" * 70, "b"),)))
    room = 59 - len(prompt_row(asked("", "b")[:1], NANO, TOKENIZER, [], 59).ids)
    assert len(ask(Record("x", (), (asked("z" * room, "b"),)))) == 1  # the context is full to the last token
    for decoding in (Decoding(do_sample=True), Decoding(num_beams=2, num_return_sequences=2)):
        with pytest.raises(ValueError, match="do_sample=False and num_return_sequences=1"):
            ask(records()[0], decoding)
    assert len(ask(records()[0], Decoding(max_new_tokens=5, num_beams=2, eos_ids=(TOKENIZER.eos,)))) == 2


def test_the_examiner_asks_at_the_size_where_the_vision_stands(model):
    examiner = Examiner(TOKENIZER, NANO, max_new_tokens=5)
    assert said(examiner.answers(model, records())) == naive(model, records())
    assert examiner.answers(model, records(), True) == answer_questions(
        model, records(), TOKENIZER, NANO, 8, "crop", DECODING, 256, blank=True
    )
    assert examiner == Examiner(TOKENIZER, NANO, "crop", 5, 256) and Examiner(TOKENIZER, NANO).max_new_tokens == 12
    with pytest.raises(dataclasses.FrozenInstanceError):
        examiner.batch_size = 1
    model.vision.resize(12)
    counted = []
    assert len(examiner.answers(model, records(), progress=counted.append)) == sum(counted) == 9
    short = Examiner(TOKENIZER, NANO, max_new_tokens=1, image_fit="no such fit")
    with pytest.raises(ValueError, match="no such fit"):
        short.answers(model, records())


def test_the_examiner_shows_and_writes_as_the_model_was_trained(model, monkeypatch):
    seen, made = [], answering.pixels_of
    monkeypatch.setattr(answering, "pixels_of", lambda *args: seen.append(args[3]) or made(*args))
    (record,) = records()[5:]
    plain = Examiner(TOKENIZER, NANO, max_new_tokens=5).answers(model, [record])
    assert Examiner(TOKENIZER, NANO, max_new_tokens=5, preprocessing=SIGLIP).answers(model, [record]) != plain
    assert seen == [CLIP, SIGLIP]
    ends = dataclasses.replace(NANO, end_with_eos=False, answer_suffix="x")  # a reply ends where the form's does
    decodings = []
    monkeypatch.setattr(sampler, "generate", lambda *args, **_: decodings.append(args[2]) or [[]] * len(args[1]))
    Examiner(TOKENIZER, ends).answers(model, [record])
    assert decodings[0].eos_ids == end_ids(ends, TOKENIZER) and set(decodings[0].eos_ids) > {TOKENIZER.eos}


@pytest.mark.parametrize(
    "prediction, truth, same",
    [
        ("red circle", "red circle", True), (" Red Circle\n", "red circle", True), ("yes", "Yes", True),
        ("red", "red circle", False), ("", "red", False), ("4", "4", True),
        ("A7K", "A7K", True), (" A7K ", "A7K", True), ("a7k", "A7K", False), ("A7k", "A7K", False),
        ("AK7", "A7K", False),
    ],
)  # fmt: skip
def test_exact_match(prediction, truth, same):
    assert exact_match(prediction, truth) is same


def answer(kind, truth, prediction):
    return Answer("r", 0, kind, "q?", truth, prediction)


MADE_UP = [
    answer("color", "red", "Red"), answer("color", "red", "blue"), answer("color", "blue", "blue"),
    answer("", "no", "no"), answer("reading", "AC", "ac"),
]  # fmt: skip


def test_shares_by_hand():
    assert shares(MADE_UP) == {"all": 3 / 5, "color": 2 / 3, "reading": 0.0}
    with pytest.raises(ValueError, match="no answers"):
        shares([])


def test_wilson_by_hand():
    # Brown, Cai, DasGupta (2001), and the closed forms z^2 / (n + z^2) at 0 and n / (n + z^2) at n
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(1, 1) == pytest.approx((1 / 4.841459, 1.0), abs=1e-6)
    for n in range(1, 500):  # whatever the rounding
        assert 0 <= wilson(0, n)[0] < 1e-12 and 1 - 1e-12 < wilson(n, n)[1] <= 1
    low, high = wilson(9573, 9673)
    assert low < 9573 / 9673 < high < 1 and high - low < 0.005
    for right, total in ((0, 0), (4, 3), (-1, 3)):
        with pytest.raises(ValueError, match=f"{right} right of {total}"):
            wilson(right, total)


def test_held_out_tests_hold_what_training_never_shows():
    tests = nano_tests.held_out_tests(num_pictures=3, num_scenes=12)
    assert {name: len(found) for name, found in tests.items()} == {
        "easy_vqa_test": 3, "scenes_new": 12, "scenes_unseen_pairs": 12, "scenes_reading": 12, "text_only": 12
    }  # fmt: skip
    assert list(tests) == list(nano_tests.NAMES)
    looking = {"color", "shape", "count", "existence", "place", "relation", "size"}
    assert {kind for record in tests["scenes_new"] + tests["scenes_unseen_pairs"] for kind in record.kinds} == looking
    assert {kind for record in tests["scenes_reading"] for kind in record.kinds} == {"reading"}
    words = [turn.text for record in tests["scenes_new"] for turns in record.conversations for turn in turns]
    assert not any(" ".join(pair) in text for text in words for pair in HELD_OUT)
    assert all(not record.visuals and len(record.conversations[0]) == 2 for record in tests["text_only"])
    assert all(record.id.startswith("easy_vqa_test/") for record in tests["easy_vqa_test"])
    assert nano_tests.held_out_tests(1, 1)["scenes_new"][0].id == tests["scenes_new"][0].id
    assert tests["scenes_new"][0].id.startswith("scenes_new/1000/")
    assert (nano_tests.NUM_SCENES, nano_tests.NUM_TRAINING) == (400, 500)  # published numbers rest on these


def test_the_official_test_is_asked_whole():
    asked = nano_tests.held_out_tests(num_scenes=1)["easy_vqa_test"]
    assert len(asked) == 1000 and sum(len(record.conversations) for record in asked) == 9673
    assert len({record.id for record in asked}) == 1000 and asked[0].id == EasyVQA("test").record(0).id


def test_majorities_come_from_training_answers():
    tests = nano_tests.held_out_tests(num_pictures=20, num_scenes=20)
    found = nano_tests.majorities({name: tests[name] for name in ("easy_vqa_test", "scenes_unseen_pairs")}, 200)
    assert list(found) == ["easy_vqa_test", "scenes_unseen_pairs"]
    assert found["scenes_unseen_pairs"]["color"] < 0.3  # within the test itself, the shape gives the colour away
    for name, majority in found.items():
        kinds = [kind for record in tests[name] for kind in record.kinds]
        by_hand = sum(kinds.count(kind) * share for kind, share in majority.items() if kind != "all") / len(kinds)
        assert majority["all"] == pytest.approx(by_hand) and set(majority) == {"all", *kinds}
    assert 0.6 < found["easy_vqa_test"]["all"] < 0.8  # 67.8% on the whole test


class Canned:
    """An examiner whose model says what it was told to."""

    def __init__(self, *predictions):
        self.predictions = predictions
        self.calls = []

    def answers(self, model, records, blank=False, progress=lambda number: None):
        turns = [(record, turns) for record in records for turns in record.conversations]
        self.calls.append((len(turns), blank))
        progress(len(turns))
        words = ["grey"] * len(turns) if blank else model
        return [Answer(one.id, 0, "k", said[-2].text, said[-1].text, word) for (one, said), word in zip(turns, words)]


def test_answer_tests_asks_everything_and_easy_vqa_also_blank():
    two, one = records()[:1], records()[2:3]
    examiner = Canned()
    answers = nano_tests.answer_tests(["1", "blue"], examiner, {"easy_vqa_test": two, "text_only": one})
    assert {name: [one.prediction for one in given] for name, given in answers.items()} == {
        "easy_vqa_test": ["1", "blue"], "text_only": ["1"], "blank_easy_vqa": ["grey", "grey"]
    }  # fmt: skip
    assert examiner.calls == [(2, False), (1, False), (2, True)]
    assert list(nano_tests.answer_tests(["1"], Canned(), {"text_only": one})) == ["text_only"]


def test_results_and_their_table():
    answers = {"easy_vqa_test": MADE_UP, "text_only": MADE_UP[:2], "blank_easy_vqa": MADE_UP[3:]}
    majority = {"easy_vqa_test": {"all": 0.25, "color": 0.125, "reading": 0.0}, "text_only": {"all": 0.5, "color": 0.5}}
    results = nano_tests.nano_results(answers, majority)
    assert [results[name] for name in answers] == [0.6, 0.5, 0.5]
    assert results["kinds"] == {
        "easy_vqa_test": {"color": 2 / 3, "reading": 0.0}, "text_only": {"color": 0.5},
        "blank_easy_vqa": {"reading": 0.0},
    }  # fmt: skip
    assert results["majority"] == majority and results["questions"] == {
        "easy_vqa_test": 5, "text_only": 2, "blank_easy_vqa": 2
    }  # fmt: skip
    assert results["interval"] == {
        "easy_vqa_test": wilson(3, 5), "text_only": wilson(1, 2), "blank_easy_vqa": wilson(1, 2)
    }  # fmt: skip
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


def test_the_exam_tells_what_changed():
    paper = nano_tests.Exam(Canned(), records()[:2])
    assert paper.introduction()[1:3] == ["exam 1  what color?  (right: red)", "exam 2  what color?  (right: blue)"]
    assert paper(["1", "blue", "red", "blue"]) == [
        "exam 1  how many shapes are there, and what color is the circle?  1 ✓",
        "exam 1  what color?  blue ✗", "exam 2  what color?  red ✗", "exam 2  what color?  blue ✓",
    ]  # fmt: skip
    assert paper(["1", "red", "green", "blue"]) == [
        "exam 1  what color?  blue ✗ → red ✓", "exam 2  what color?  red ✗ → green ✗"
    ]  # fmt: skip
    assert paper(["1", "red", "green", "blue"]) == []
    assert paper.answers == ["1", "red", "green", "blue"]
    assert paper.ask(["2", "2", "2", "2"]) == ["2"] * 4 and paper.answers == ["1", "red", "green", "blue"]
    resumed = nano_tests.Exam(Canned(), records()[:2])
    resumed.answers = ["1", "red", "green", "blue"]
    assert resumed(["1", "red", "blue", "blue"]) == ["exam 2  what color?  green ✗ → blue ✓"]
    with pytest.raises(ValueError, match="3 and 4 answers for an exam of 4 questions"):
        paper.changes(["1"] * 3, ["1"] * 4)
    with pytest.raises(ValueError, match="0 and 5 answers"):
        paper.changes([], ["1"] * 5)


def test_answers_are_made_readable():
    assert nano_tests.readable(" a\n b\t c ") == "a b c"
    assert nano_tests.readable("\x1b[2J\ufffd$") == "·[2J·$"
    assert nano_tests.readable("") == nano_tests.readable(" \n") == "(nothing)"
    assert nano_tests.readable("x" * 40) == "x" * 40
    assert nano_tests.readable("x" * 41) == "x" * 39 + "…"


def test_a_line_of_the_exam_gives_its_answer_back():
    paper = nano_tests.Exam(Canned(), records()[:2])
    said = ["1", "\n red  circle", "", "blue"]
    assert [nano_tests.answer_in(line) for line in paper.changes([], said)] == ["1", "red circle", "(nothing)", "blue"]
    assert [nano_tests.answer_in(line) for line in paper.changes(["2"] * 4, said)] == ["1", "red circle", "(nothing)", "blue"]
    for line in ("", "exam 1  what?  red", "constant"):
        with pytest.raises(ValueError, match="is no line of an exam"):
            nano_tests.answer_in(line)


def test_the_exam_is_always_the_same_three_pictures():
    paper, again = nano_tests.exam_records(), nano_tests.exam_records()
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
        self.pixels = pixels
        return torch.stack([torch.stack([torch.full((24,), 0.5), torch.eye(24)[self.number(words)]]) for words in self.chosen])

    def number(self, words):
        colors = "red green blue yellow gray teal black brown".split()
        color, shape = words.split()
        return colors.index(color) * 3 + ["circle", "rectangle", "triangle"].index(shape)


def test_zero_shot_by_hand():
    truths = ["red circle", "blue triangle", "teal", "rectangle"]
    pictures = [picture(truth, (90, place, 0)) for place, truth in enumerate(truths)]
    asked = [Record(truth, (one,), ((Turn("assistant", (truth,)),),)) for truth, one in zip(truths, pictures)]
    model = Matcher(["red circle", "red triangle", "teal circle", "brown triangle"])
    assert nano_tests.easy_vqa_zero_shot(model, asked, TOKENIZER, 8) == {"color": 2 / 3, "shape": 2 / 3}
    assert model.captions[:4] == ["red circle", "red rectangle", "red triangle", "green circle"]
    assert len(model.captions) == 24
    assert torch.equal(model.pixels, pixels_of(pictures, 8, "crop"))
    nano_tests.easy_vqa_zero_shot(model, asked, TOKENIZER, 8, "crop", SIGLIP)
    assert torch.equal(model.pixels, pixels_of(pictures, 8, "crop", SIGLIP))
