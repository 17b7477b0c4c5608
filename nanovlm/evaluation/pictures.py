"""Pictures of what a model answers: a sheet of held-out samples, and answers turning from wrong to right.

Right and wrong differ by colour and by sign. Figures are made without pyplot, so that a notebook's own are left alone;
everything is placed in inches from the top left corner, so that no text meets another.
"""

import json
import textwrap

from nanovlm.data import images
from nanovlm.evaluation.exam import answer_in, readable, said
from nanovlm.evaluation.short_answer import exact_match

INK = {True: "#1b6e2d", False: "#b2182b"}  # right, wrong
GROUND = {True: "#d9f0d3", False: "#fde0dc"}
DPI = 100  # pixels per inch
FONT = "DejaVu Sans"  # comes with matplotlib and has both signs
SAMPLES = {  # test -> (pictures on the sheet, what is written above them)
    "easy_vqa_test": (3, "easy-VQA test"),
    "scenes_new": (4, "new scene"),
    "scenes_unseen_pairs": (2, "unseen pairs"),
    "scenes_reading": (3, "unseen string"),
}


def pick_samples(tests, answers, numbers=SAMPLES):
    """The first pictures of each test with one question each, whatever the answer: right and wrong as they come.

    Args:
      tests: {name: list of Record}. answers: {name: list of Answer}, of the same records in the same order.
      numbers: {name: (how many pictures, label)}; a test that holds fewer gives what it has.
    Returns: list of (label, PIL image, Answer); the n-th picture of a test comes with its n-th question, so that types
      differ.
    """
    chosen = []
    for name, (number, label) in numbers.items():
        left = iter(answers[name])
        for place, record in enumerate(tests[name][:number]):
            mine = [next(left) for _ in record.conversations]
            chosen.append((label, images.load(record.visuals[0].frames[0]), mine[place % len(mine)]))
    return chosen


def sample_sheet(samples, path, title, columns=4):
    """Draw samples.png.

    Args:
      samples: list of (label, PIL image, Answer), at least one.
      path: where the PNG goes; 240 x 320 pixels per sample, and 50 more in height.
      title: str, with the seed of the run; the number of right answers is added.
      columns: samples side by side.
    Raises: ValueError if there are no samples.
    """
    if not samples:
        raise ValueError("no samples to draw; give at least one picture with its answer")
    right = sum(answer.right for _, _, answer in samples)
    rows = -(-len(samples) // columns)
    figure, page = _page(2.4 * columns, 3.2 * rows + 0.5, f"{title}: {right} of {len(samples)} right")
    for place, (label, image, answer) in enumerate(samples):
        left, top = 2.4 * (place % columns), 0.5 + 3.2 * (place // columns)
        _write(page, left + 1.2, top + 0.12, label, "#666666")
        _show(figure, image, left + 0.1, top + 0.24, 2.2)
        lines = [(line, "black") for line in _wrap(answer.question, 32, 2)]
        lines.append((said(answer.prediction, answer.truth), INK[answer.right]))
        if not answer.right:
            lines.append((f"truth: {readable(answer.truth)}", "black"))
        for number, (line, ink) in enumerate(lines):
            _write(page, left + 1.2, top + 2.57 + 0.17 * number, line, ink)
    figure.savefig(path, format="png")


def exam_moments(path, most=6):
    """What the exam's answers were as training went on.

    Args:
      path: log.jsonl; its entries with "exam" are read, one line of `Exam.changes` per question.
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
                    answers = [answer_in(said) for said in entry["exam"]]
                    found.append((f"{entry['stage']}\nstep {entry['step']:,}", answers))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                where = f"{path}, line {number}"
                raise ValueError(f"{where}: no entry of a training log ({error!r}): {line[:60]!r}") from error
    if not found:
        raise ValueError(f"{path}: holds no exam; it is written while a recipe with an exam trains")
    places = dict.fromkeys(round(place * (len(found) - 1) / (most - 1)) for place in range(most))
    return [found[place] for place in places]


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
      path: where the PNG goes.
      title: str, with the seed of the run.
    Raises: ValueError if the answers of a moment are not as many as the questions, or if there is nothing to draw.
    """
    if not asked or not moments:
        raise ValueError(f"{len(asked)} questions and {len(moments)} moments; at least one of each is needed")
    for label, answers in moments:
        if len(answers) != len(asked):
            raise ValueError(f"the moment {label!r} has {len(answers)} answers for {len(asked)} questions")
    figure, page = _page(3.7 + 1.35 * len(moments), 1.0 + 0.72 * len(asked), title)
    for column, (label, answers) in enumerate(moments):
        left = 3.6 + 1.35 * column
        _write(page, left + 0.66, 0.7, label, "black")
        for row, (answer, (_, _, truth)) in enumerate(zip(answers, asked)):
            _cell(page, left, 0.95 + 0.72 * row, answer, truth)
    pictures = [image for image, _, _ in asked]
    for row, (image, question, _) in enumerate(asked):
        top = 0.95 + 0.72 * row
        _write(page, 1.5, top + 0.33, "\n".join(_wrap(question, 27, 2)), "black", horizontalalignment="left")
        if row == 0 or image is not pictures[row - 1]:
            same = sum(1 for other in pictures[row:] if other is image)
            _show(figure, image, 0.1, top, min(0.72 * same - 0.06, 1.3))
    figure.savefig(path, format="png")


def _page(width, height, title):
    """A figure, and axes that cover it in inches, y downwards."""
    from matplotlib.figure import Figure  # takes a second to import, which only the end of a run should pay

    figure = Figure(figsize=(width, height), dpi=DPI)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    page.axis("off")
    _write(page, width / 2, 0.25, title, "black", fontsize=12)
    return figure, page


def _cell(page, left, top, answer, truth):
    """One answer on a coloured ground."""
    from matplotlib.patches import Rectangle

    right = exact_match(answer, truth)
    page.add_patch(Rectangle((left, top), 1.31, 0.66, color=GROUND[right], linewidth=0))
    _write(page, left + 0.66, top + 0.33, "\n".join(_wrap(said(answer, truth), 17, 3)), INK[right])


def _wrap(text, width, lines):
    """Text in so many lines of so many characters: list of str; what has no room is left out, marked "…"."""
    return textwrap.wrap(text, width, max_lines=lines, placeholder=" …")


def _write(page, x, y, text, ink, horizontalalignment="center", fontsize=9):
    """Words as they are: a dollar sign begins no formula, and what the font lacks becomes a dot."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(FONT))
    text = "".join(letter if letter == "\n" or font.get_char_index(ord(letter)) else "·" for letter in text)
    page.text(
        x, y, text, color=ink, fontsize=fontsize, family=FONT, parse_math=False,
        horizontalalignment=horizontalalignment, verticalalignment="center",
    )  # fmt: skip


def _show(figure, image, left, top, side):
    """A picture in a square, its pixels as they are."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
