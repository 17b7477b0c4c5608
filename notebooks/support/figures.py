"""The README's picture, made from the log of a run: answers about held-out pictures turning from wrong to right.

    python notebooks/support/figures.py out/nano        writes notebooks/figures/answers_over_time.png
"""

import io
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from PIL import Image

from nanovlm.recipes.nano_tests import exam_records
from nanovlm.recipes.nano_tests import answers_over_time, exam_moments, exam_questions

PICTURE = Path(__file__).resolve().parent.parent / "figures" / "answers_over_time.png"
MOMENTS = 6  # columns


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
    partial = path.with_suffix(".tmp")
    small.save(partial, "png", optimize=True)
    os.replace(partial, path)


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
