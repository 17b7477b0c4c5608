"""What stands where in the drawn sheets, pixel by pixel; and logs that cannot be read."""

import json
import re
import warnings

import numpy
import pytest
from PIL import Image

from nanovlm.data.records import Record, Turn, Visual
from nanovlm.recipes import nano_tests
from nanovlm.recipes.nano_tests import answers_over_time, exam_moments, exam_questions, pick_samples, sample_sheet
from nanovlm.evaluation.protocols import Answer

MAGENTA, CYAN = (255, 0, 255), (0, 255, 255)
GREEN, RED = (27, 110, 45), (178, 24, 43)  # ink of right and wrong answers
PALE_GREEN, PALE_RED = (217, 240, 211), (253, 224, 220)  # their grounds


def solid(color):
    return Image.new("RGB", (8, 8), color)


def read(path):
    """uint8[height, width, 3]."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return numpy.asarray(image.convert("RGB"))


def box_of(page, color):
    """(left, top, right, bottom) of the pixels of exactly this colour."""
    rows, columns = numpy.nonzero((page == color).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def inked(page, left, top, right, bottom):
    """Whether anything is drawn in a box; the box is white afterwards."""
    box = page[top:bottom, left:right]
    found = bool((box != 255).any())
    box[:] = 255
    return found


def answer(question, truth, prediction):
    return Answer("r", 0, "k", question, truth, prediction)


def near(box, expected):
    return all(abs(one - other) <= 2 for one, other in zip(box, expected))


def test_everything_on_the_sheet_lies_in_its_place(tmp_path):
    long = "is there really such a thing as a question that is far too long for the room it has?"
    samples = [
        ("M" * 10, solid(MAGENTA), answer("right?", "yes", "yes")),
        ("second", solid(CYAN), answer(long, "no", "yes")),
        ("third", solid((255, 255, 0)), answer("where?", "left", "left")),
    ]
    sample_sheet(samples, tmp_path / "samples.png", "seed 7", columns=2)
    page = read(tmp_path / "samples.png").copy()
    assert page.shape == (690, 480, 3)
    assert near(box_of(page, MAGENTA), (10, 74, 230, 294))
    assert near(box_of(page, CYAN), (250, 74, 470, 294))
    assert near(box_of(page, (255, 255, 0)), (10, 394, 230, 614))
    for left, top in ((8, 72), (248, 72), (8, 392)):
        assert inked(page, left, top, left + 224, top + 224)  # the picture and its frame
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


def test_the_sheet_counts_the_right_answers_and_refuses_to_be_empty(tmp_path, monkeypatch):
    written = []
    page = nano_tests._page
    monkeypatch.setattr(nano_tests, "_page", lambda *arguments: written.append(arguments[-1]) or page(*arguments))
    samples = [("a", solid(CYAN), answer("q?", "yes", word)) for word in ("yes", "no", "yes")]
    sample_sheet(samples, tmp_path / "samples.png", "nano, seed 7")
    assert written == ["nano, seed 7: 2 of 3 right"]
    assert read(tmp_path / "samples.png").shape == (370, 960, 3)
    with pytest.raises(ValueError, match="no samples to draw"):
        sample_sheet([], tmp_path / "none.png", "seed 7")
    assert not (tmp_path / "none.png").exists()


def test_any_answer_can_be_drawn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a character that the font lacks would warn, "$\\" would be a broken formula
        strange = answer("$\\frac$ \u6f22?", "$\\alpha", "$\\bad{ \u6f22\u5b57 \x07 \U0001f600")
        sample_sheet([("a", solid(CYAN), strange)], tmp_path / "samples.png", "$\\seed")
        answers_over_time([(solid(CYAN), "$\\q", "x")], [("$\\s", ["$\\a \u6f22"])], tmp_path / "time.png", "$\\t")
    assert inked(read(tmp_path / "samples.png").copy(), 0, 316, 240, 333)


def test_samples_are_the_first_of_each_test_with_changing_questions():
    def record(name, color, questions):
        turns = tuple((Turn("user", (0, f"{name}{n}?")), Turn("assistant", ("x",))) for n in range(questions))
        return Record(name, (Visual(name, (solid(color),)),), turns)

    tests = {
        "one": [record(name, (n, n, n), 3 if n == 2 else 2) for n, name in enumerate("abcd", start=1)],
        "two": [record("e", (5, 5, 5), 1)],
        "unused": [],
    }
    answers = {
        name: [Answer(r.id, n, "", turns[0].text, "x", "y") for r in records for n, turns in enumerate(r.conversations)]
        for name, records in tests.items()
    }
    chosen = pick_samples(tests, answers, {"two": (2, "TWO"), "one": (3, "ONE")})
    assert [(label, image.getpixel((0, 0))[0], one.question) for label, image, one in chosen] == [
        ("TWO", 5, "e0?"), ("ONE", 1, "a0?"), ("ONE", 2, "b1?"), ("ONE", 3, "c0?")
    ]  # fmt: skip
    assert sum(number for number, _ in nano_tests.SAMPLES.values()) == 12  # three full rows of four


def test_answers_over_time_lie_in_their_cells(tmp_path):
    magenta, cyan = solid(MAGENTA), solid(CYAN)
    asked = [(magenta, "one?", "a"), (magenta, "two?", "b"), (cyan, "three?", "c")]
    moments = [("tower\nstep 5", ["x", "b", "x"]), ("align\nstep 1,200", ["a", "b", "C"])]
    answers_over_time(asked, moments, tmp_path / "time.png", "seed 7")
    page = read(tmp_path / "time.png").copy()
    assert page.shape == (316, 640, 3)
    assert near(box_of(page, MAGENTA), (10, 95, 140, 225))  # one picture for two questions
    assert near(box_of(page, CYAN), (10, 239, 76, 305))
    for row, grounds in enumerate((("red", "green"), ("green", "green"), ("red", "green"))):
        for column, ground in enumerate(grounds):
            left, top = 360 + 135 * column, 95 + 72 * row
            cell = page[top + 2 : top + 64, left + 2 : left + 129]
            pale, ink, other = (PALE_GREEN, GREEN, RED) if ground == "green" else (PALE_RED, RED, GREEN)
            assert (cell == pale).all(axis=2).mean() > 0.9
            middle = cell[23:39, 40:90]  # the answer stands there
            assert (middle == ink).all(axis=2).any() and not (cell == other).all(axis=2).any()
            assert inked(page, left - 1, top - 1, left + 132, top + 67)
        assert inked(page, 145, 110 + 72 * row, 350, 145 + 72 * row)  # the question
    for left in (360, 495):
        assert inked(page, left, 50, left + 131, 90)
    assert inked(page, 8, 93, 142, 228) and inked(page, 8, 237, 79, 308)  # pictures and frames
    assert inked(page, 200, 10, 440, 40)  # the title
    assert (page == 255).all()


def test_a_picture_never_grows_beyond_its_column(tmp_path):
    magenta = solid(MAGENTA)
    asked = [(magenta, f"{n}?", "a") for n in range(3)] + [(solid(MAGENTA), "new?", "a")]
    answers_over_time(asked, [("s", ["a"] * 4)], tmp_path / "time.png", "seed 7")
    page = read(tmp_path / "time.png")
    assert page.shape == (388, 505, 3)
    assert near(box_of(page[:300], MAGENTA), (10, 95, 140, 225))
    assert near(box_of(page[300:], MAGENTA), (10, 11, 76, 77))  # an equal picture, but another object: drawn again


def test_what_does_not_fit_together_is_not_drawn(tmp_path):
    asked = [(solid(CYAN), "q?", "a")]
    with pytest.raises(ValueError, match="0 questions and 1 moments"):
        answers_over_time([], [("s", [])], tmp_path / "time.png", "t")
    with pytest.raises(ValueError, match="1 questions and 0 moments"):
        answers_over_time(asked, [], tmp_path / "time.png", "t")
    with pytest.raises(ValueError, match="the moment 's' has 2 answers for 1 questions"):
        answers_over_time(asked, [("r", ["a"]), ("s", ["a", "b"])], tmp_path / "time.png", "t")
    assert not (tmp_path / "time.png").exists()


def test_questions_of_an_exam():
    turns = (Turn("user", ("before",)), Turn("assistant", ("b",)), Turn("user", (0, "one?")), Turn("assistant", ("1",)))
    records = [
        Record("a", (Visual("a", (solid(CYAN),)),), (turns, turns[2:])),
        Record("b", (Visual("b", (solid(MAGENTA),)),), (turns[2:],)),
    ]
    (first, *words), (again, *_), (other, *_) = exam_questions(records)
    assert words == ["one?", "1"] and first is again and first is not other
    assert first.getpixel((0, 0)) == CYAN and other.getpixel((0, 0)) == MAGENTA


def write(path, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def exam_entry(stage, step, *answers):
    return {"stage": stage, "step": step, "exam": [f"exam 1  what?  {answer} ✗" for answer in answers]}


def test_moments_of_a_log(tmp_path):
    first, last = exam_entry("tower", 2, "é", "b c"), exam_entry("align", 1234, "a", "b")
    log = write(tmp_path / "log.jsonl", {"stage": "tower", "step": 1, "loss": 2.0}, first, last)
    assert exam_moments(log) == [("tower\nstep 2", ["é", "b c"]), ("align\nstep 1,234", ["a", "b"])]
    many = write(tmp_path / "many.jsonl", *(exam_entry("s", n, str(n)) for n in range(11)))
    assert [answers for _, answers in exam_moments(many)] == [[str(n)] for n in (0, 2, 4, 6, 8, 10)]
    assert [answers for _, answers in exam_moments(many, 3)] == [["0"], ["5"], ["10"]]
    assert len(exam_moments(many, 11)) == 11 and len(exam_moments(many, 12)) == 11


@pytest.mark.parametrize(
    "line",
    [
        '{"stage": "s", "step": 3, "ex', "7", '{"exam": ["q?  a ✓"]}', '{"stage": "s", "step": 1, "exam": 5}',
        '{"stage": "s", "step": 1, "exam": [5]}', '{"stage": "s", "step": 1, "exam": ["a"]}',
    ],
)  # fmt: skip
def test_a_damaged_log_names_file_and_line(tmp_path, line):
    log = write(tmp_path / "log.jsonl", exam_entry("s", 1, "a"), line)
    with pytest.raises(ValueError, match=re.escape(f"{log}, line 2: no entry of a training log")):
        exam_moments(log)
    without = write(tmp_path / "none.jsonl", {"stage": "s", "step": 1, "loss": 1.0})
    with pytest.raises(ValueError, match=re.escape(f"{without}: holds no exam")):
        exam_moments(without)
