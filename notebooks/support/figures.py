"""The README's picture, made from the log of a run: answers about held-out pictures turning from wrong to right.

    python notebooks/support/figures.py out/nano        writes notebooks/figures/answers_over_time.png
"""

import io
import json
import sys
import textwrap
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from matplotlib.patches import Rectangle
from PIL import Image

from nanovlm.data import images
from nanovlm.files import replace
from nanovlm.recipes.nano_tests import exact_match, exam_records, INK, new_page, said, show, write

PICTURE = Path(__file__).resolve().parent.parent / "figures" / "answers_over_time.png"
MOMENTS = 6  # columns
GROUND = {True: "#d9f0d3", False: "#fde0dc"}  # right, wrong


def draw(folder, path):
    """Draw the exam of a run.

    Args:
      folder: Path, output folder of train.py.
      path: where the PNG goes.
    Raises: FileNotFoundError for a folder without a run; ValueError for a log without an exam, or with another one than
      that of the code as it is.
    """
    seed = json.loads((folder / "config.json").read_text())["seed"]
    asked = exam_questions(exam_records())
    moments = exam_moments(folder / "log.jsonl", MOMENTS)
    check_questions(folder / "log.jsonl", [question for _, question, _ in asked])
    page = io.BytesIO()
    answers_over_time(asked, moments, page, f"nano while it trains, asked about pictures it never trains on (seed {seed})")
    small = Image.open(page).convert("RGB").quantize(128, dither=Image.Dither.NONE)  # half the size, the same to the eye
    replace(path, lambda temporary: small.save(temporary, "png", optimize=True))


def exam_moments(path, most=MOMENTS):
    """What the exam's answers were as training went on.

    Args:
      path: log.jsonl; its entries with "exam" are read, a line of `nano_tests.exam_lines` per question.
      most: moments at most, 2 or more; the first, the last, and some of those between at even distances.
    Returns: list of (label, answers), label "STAGE\\nstep N".
    Raises: ValueError, naming file and line, for what is no such entry, or if there is none at all.
    """
    found = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if "exam" in entry:
                    answers = [answer_in(told) for told in entry["exam"]]
                    found.append((f"{entry['stage']}\nstep {entry['step']:,}", answers))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                where = f"{path}, line {number}"
                raise ValueError(f"{where}: no entry of a training log ({error!r}): {line[:60]!r}") from error
    if not found:
        raise ValueError(f"{path}: holds no exam; it is written while a recipe with an exam trains")
    places = dict.fromkeys(round(place * (len(found) - 1) / (most - 1)) for place in range(most))
    return [found[place] for place in places]


def answer_in(line):
    """The answer that a line of `nano_tests.exam_lines` tells: str. Raises: ValueError for any other line."""
    answer, _, sign = line.rpartition("  ")[2].rpartition(" ")
    if sign not in ("✓", "✗"):
        raise ValueError(f"{line!r} is no line of an exam; it would end with an answer and ✓ or ✗")
    return answer


def exam_questions(records):
    """Records as `answers_over_time` wants them: list of (PIL image, question, truth), one image object per record."""
    pictures = [images.load(record.visuals[0].frames[0]) for record in records]
    return [
        (picture, *(turn.text for turn in turns[-2:]))
        for picture, record in zip(pictures, records)
        for turns in record.conversations
    ]


def answers_over_time(asked, moments, path, title):
    """Draw held-out questions in rows and moments of training in columns, each cell the answer of that moment.

    Args:
      asked: list of (PIL image, question, truth), see `exam_questions`; an image object that is the one above is not
        drawn again.
      moments: list of (label, answers), one answer per question; see `exam_moments`.
      path: where the PNG goes. title: str, with the seed of the run.
    Raises: ValueError if the answers of a moment are not as many as the questions, or if there is nothing to draw.
    """
    if not asked or not moments:
        raise ValueError(f"{len(asked)} questions and {len(moments)} moments; at least one of each is needed")
    for label, answers in moments:
        if len(answers) != len(asked):
            raise ValueError(f"the moment {label!r} has {len(answers)} answers for {len(asked)} questions")
    figure, page = new_page(3.7 + 1.35 * len(moments), 1.0 + 0.72 * len(asked), title)
    for column, (label, answers) in enumerate(moments):
        left = 3.6 + 1.35 * column
        write(page, left + 0.66, 0.7, label, "black")
        for row, (answer, (_, _, truth)) in enumerate(zip(answers, asked)):
            top, right = 0.95 + 0.72 * row, exact_match(answer, truth)
            page.add_patch(Rectangle((left, top), 1.31, 0.66, color=GROUND[right], linewidth=0))
            write(page, left + 0.66, top + 0.33, wrap(said(answer, truth), 17, 3), INK[right])
    pictures = [image for image, _, _ in asked]
    for row, (image, question, _) in enumerate(asked):
        top = 0.95 + 0.72 * row
        write(page, 1.5, top + 0.33, wrap(question, 27, 2), "black", align="left")
        if row == 0 or image is not pictures[row - 1]:
            same = sum(1 for other in pictures[row:] if other is image)
            show(figure, image, 0.1, top, min(0.72 * same - 0.06, 1.3))
    figure.savefig(path, format="png")


def wrap(text, width, lines):
    """Text in so many lines of so many characters: str; what has no room is left out, marked "…"."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def check_questions(log, questions):
    """Raise ValueError unless every exam in a log asks these questions: answers would stand beside the wrong pictures."""
    for line in log.read_text().splitlines():
        answers = json.loads(line).get("exam", questions)
        if not all(question in answer for answer, question in zip(answers, questions)):
            raise ValueError(f"{log}: its exam asks something else than {questions}; train again with the code as it is")


def main(arguments):
    """Run the command line; returns the exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    PICTURE.parent.mkdir(exist_ok=True)
    try:
        draw(Path(arguments[0]), PICTURE)
    except (ValueError, OSError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 1
    print(f"{PICTURE}, {PICTURE.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
