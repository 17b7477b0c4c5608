"""The README's picture, pixel by pixel; and logs that cannot be read."""

import json
import re
import warnings

import pytest
from drawn import box_of, inked, near, read_page
from PIL import Image

from nanovlm.data.records import Record, Turn, Visual
from support.figures import answer_in, answers_over_time, exam_moments, exam_questions

MAGENTA, CYAN = (255, 0, 255), (0, 255, 255)
GREEN, RED = (27, 110, 45), (178, 24, 43)  # ink of right and wrong answers
PALE_GREEN, PALE_RED = (217, 240, 211), (253, 224, 220)  # their grounds


def solid(color):
    return Image.new("RGB", (8, 8), color)


def test_answers_over_time_lie_in_their_cells(tmp_path):
    magenta, cyan = solid(MAGENTA), solid(CYAN)
    asked = [(magenta, "one?", "a"), (magenta, "two?", "b"), (cyan, "three?", "c")]
    moments = [("tower\nstep 5", ["x", "b", "x"]), ("align\nstep 1,200", ["a", "b", "C"])]
    answers_over_time(asked, moments, tmp_path / "time.png", "seed 7")
    page = read_page(tmp_path / "time.png")
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


def test_what_does_not_fit_together_is_not_drawn(tmp_path):
    asked = [(solid(CYAN), "q?", "a")]
    for questions, moments, message in (
        ([], [("s", [])], "0 questions and 1 moments"), (asked, [], "1 questions and 0 moments"),
        (asked, [("r", ["a"]), ("s", ["a", "b"])], "the moment 's' has 2 answers for 1 questions"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            answers_over_time(questions, moments, tmp_path / "time.png", "t")
    assert not (tmp_path / "time.png").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a character that the font lacks would warn, "$\\" would be a broken formula
        answers_over_time([(solid(CYAN), "$\\q", "x")], [("$\\s", ["$\\a \u6f22"])], tmp_path / "time.png", "$\\t")


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


@pytest.mark.parametrize("line", [
    '{"stage": "s", "step": 3, "ex', "7", '{"exam": ["q?  a ✓"]}', '{"stage": "s", "step": 1, "exam": ["a"]}',
])  # fmt: skip
def test_a_damaged_log_names_file_and_line(tmp_path, line):
    log = write(tmp_path / "log.jsonl", exam_entry("s", 1, "a"), line)
    with pytest.raises(ValueError, match=re.escape(f"{log}, line 2: no entry of a training log")):
        exam_moments(log)
    without = write(tmp_path / "none.jsonl", {"stage": "s", "step": 1, "loss": 1.0})
    with pytest.raises(ValueError, match=re.escape(f"{without}: holds no exam")):
        exam_moments(without)


def test_a_line_of_the_exam_gives_its_answer_back():
    assert [answer_in(f"exam 1  what?  {words}") for words in ("red circle ✓", "(nothing) ✗")] == ["red circle", "(nothing)"]
    for line in ("", "exam 1  what?  red", "constant"):
        with pytest.raises(ValueError, match="is no line of an exam"):
            answer_in(line)
