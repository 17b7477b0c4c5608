"""How the nano recipe is judged: a quick look around every stage, the exam while it trains, all tests at the end."""

import dataclasses
import functools
import itertools
import json
import textwrap

import torch
from tqdm import tqdm

from nanovlm.data import images
from nanovlm.data.batching import pixels_of
from nanovlm.data.easy_vqa import COLORS, EasyVQA, SHAPES
from nanovlm.data.images import CLIP
from nanovlm.data.scene_questions import majority_baseline, QUESTIONS, Scenes, SceneTexts, TEXT_TYPES
from nanovlm.evaluation.protocols import exact_match, Examiner, shares, wilson
from nanovlm.training.checkpoint import replace


QUICK_PICTURES = 40  # of each test
SMOKE_PICTURES = 4  # the same in a smoke run
TRY = (
    'python sample.py {folder} --draw "red circle left of blue star" "what is left of the blue star?"',
    "python sample.py {folder}                        (a chat; /image PATH shows it a picture)",
)


def examiner(run):
    """How this run puts questions: short_answer.Examiner."""
    last = run.stages[-1]
    return Examiner(run.tokenizer, run.template_of(last), last.image_fit, preprocessing=run.preprocessing)


@functools.lru_cache(maxsize=2)
def quick_tests(number):
    """The first `number` pictures of every held-out test."""
    return held_out_tests(number, number)


def evaluate(run, stage):
    """Quick held-out shares before and after a stage: {measure: share}."""
    number = SMOKE_PICTURES if run.smoke else QUICK_PICTURES
    if stage.objective == "contrastive":
        captions = EasyVQA("test", kind="captions")
        records = [captions.record(n) for n in range(number * 4)]
        return easy_vqa_zero_shot(run.contrastive, records, run.tokenizer, stage.image_size, stage.image_fit, run.preprocessing)
    tests = quick_tests(number)
    names = ("text_only",) if not {"bridge", "adapters"} & stage.learning_rates.keys() else tests
    return {name: shares(examiner(run).answers(run.model, tests[name]))["all"] for name in names}


@functools.lru_cache(maxsize=1)
def exam_pictures():
    """The pictures of the exam, drawn once."""
    return exam_records()


def exam(run):
    """Three fixed held-out pictures, asked again and again: list of lines, question and answer."""
    asked = Exam(examiner(run), exam_pictures())
    asked.answers = asked.ask(run.model)
    return asked.changes([], asked.answers)


def finish(run):
    """All held-out tests, samples.png, and what goes into results.json."""
    number = SMOKE_PICTURES if run.smoke else None
    tests = held_out_tests(number, number or NUM_SCENES)
    answers = answer_tests(run.model, examiner(run), tests)
    samples = pick_samples(tests, answers)
    replace(run.out / "samples.png", lambda path: sample_sheet(samples, path, f"held-out pictures, seed {run.seed}"))
    return nano_results(answers, majorities(tests))


def report(run, results):
    """The table printed last, and what to try next: list of lines."""
    tries = (line.format(folder=run.out) for line in TRY)
    return [*results_table(results), "", f"curves.png and samples.png are in {run.out}. Now try:", *tries]


# What the nano model has learned: its held-out tests, their results as data, and the table printed at the end.
#
# Five tests that no training stage reads, and one more without looking: easy-VQA's questions over grey pictures show how
# far words alone lead.


NUM_SCENES = 400  # pictures of each scene test
NUM_TRAINING = 500  # training records in which the most frequent answers are counted
SEED = 1000  # of the drawn tests; splits differ from "train" whatever the seed
NAMES = {
    "easy_vqa_test": "easy-VQA, official test",
    "scenes_new": "scenes, new pictures",
    "scenes_unseen_pairs": "scenes, unseen colour-shape pairs",
    "scenes_reading": "scenes, reading unseen strings",
    "text_only": "text only",
}
BLANK = "blank_easy_vqa"
BY_KIND = ("easy_vqa_test", "scenes_new", "scenes_unseen_pairs")  # tests whose question types the table shows


def sources():
    """Where each test comes from: {name: (held-out source, training source of such questions)}."""
    looking = {kind: 1.0 for kind in QUESTIONS if kind != "reading"}
    answered = {kind: 1.0 for kind in TEXT_TYPES if kind != "plain_caption"}  # a caption alone asks nothing
    seen = Scenes("train", seed=SEED, weights=looking)
    return {
        "easy_vqa_test": (EasyVQA("test"), EasyVQA("train")),
        "scenes_new": (Scenes("new", seed=SEED, weights=looking), seen),
        "scenes_unseen_pairs": (Scenes("unseen_pairs", seed=SEED, weights=looking), seen),
        "scenes_reading": (
            Scenes("reading", seed=SEED), Scenes("train", seed=SEED, weights={"reading": 1.0}, string_share=1.0)
        ),
        "text_only": (SceneTexts("new", seed=SEED, weights=answered), SceneTexts("train", seed=SEED, weights=answered)),
    }  # fmt: skip


def held_out_tests(num_pictures=None, num_scenes=NUM_SCENES):
    """The held-out tests.

    Args:
      num_pictures: pictures of easy-VQA's official test split; None = all 1,000.
      num_scenes: pictures of each of the scene tests, and text-only questions.
    Returns: {name: list of Record}, names as in NAMES. Reading is asked in its own test only.
    """
    tests = {}
    for name, (source, _) in sources().items():
        number = num_scenes
        if name == "easy_vqa_test":
            number = len(source) if num_pictures is None else num_pictures
        tests[name] = [source.record(n) for n in range(number)]
    return tests


def majorities(tests, num_records=NUM_TRAINING):
    """What is right without looking, if the most frequent answers of training records are given.

    Args:
      tests: {name: list of Record}, names as in NAMES.
      num_records: records of the training source in which answers are counted.
    Returns: {name: {"all": share, kind: share, …}}, the baseline per question type, see majority_baseline, and their
      mean over the questions. Training records are counted because among unseen pairs alone every star is red.
    """
    known, found = sources(), {}
    for name, records in tests.items():
        training = known[name][1]
        by_kind = majority_baseline(records, [training.record(n) for n in range(num_records)])
        kinds = [kind for record in records for kind in record.kinds]
        found[name] = {"all": sum(by_kind[kind] for kind in kinds) / len(kinds)} | by_kind
    return found


def answer_tests(model, examiner, tests):
    """Let a model take the tests; on a terminal a bar shows the progress.

    Args:
      model: vlm.VLM. examiner: short_answer.Examiner.
      tests: {name: list of Record}.
    Returns: {name: list of Answer}; with easy_vqa_test among the tests also "blank_easy_vqa", the same questions over
      grey pictures.
    """
    todo = [(name, name, False) for name in tests] + [(BLANK, name, True) for name in tests if name == "easy_vqa_test"]
    total = sum(len(record.conversations) for _, test, _ in todo for record in tests[test])
    with tqdm(total=total, desc="evaluating", unit="question", disable=None) as bar:
        return {name: examiner.answers(model, tests[test], blank, bar.update) for name, test, blank in todo}


def nano_results(answers, majority):
    """Results as they are written to results.json.

    Args:
      answers: {name: list of Answer}, of `answer_tests`.
      majority: {name: {"all": share, kind: share, …}}, of `majorities`.
    Returns: dict of a share in [0, 1] per test and for "blank_easy_vqa", and nested by test "kinds" (share per question
      type), "majority" (as given), "interval" (95%, low and high) and "questions" (their number). Parameters and
      seconds are the trainer's to add.
    """
    found = {name: shares(given) for name, given in answers.items()}
    return {name: share["all"] for name, share in found.items()} | {
        "kinds": {name: {kind: share[kind] for kind in share if kind != "all"} for name, share in found.items()},
        "majority": majority,
        "interval": {name: wilson(sum(one.right for one in given), len(given)) for name, given in answers.items()},
        "questions": {name: len(given) for name, given in answers.items()},
    }


def results_table(results):
    """The results as aligned plain text, a row per test and, indented, per question type: list of str.

    Args:
      results: dict, of `nano_results`; "parameters" and "seconds" are shown too where the trainer has added them.
    """
    lines = [f"{'held-out test':<36}{'questions':>10}{'right':>9}{'95% interval':>17}{'majority':>11}"]
    for name, words in (NAMES | {BLANK: "easy-VQA over grey pictures"}).items():
        if name not in results:
            continue
        low, high = results["interval"][name]
        majority = results["majority"].get(name, {})
        lines.append(
            f"{words:<36}{results['questions'][name]:>10,}{results[name]:>9.1%}"
            f"{f'{100 * low:.1f} - {high:.1%}':>17}{_percent(majority, 'all'):>11}"
        )
        for kind, share in sorted(results["kinds"][name].items()) if name in BY_KIND else ():
            lines.append(f"  {kind.replace('_', ' '):<44}{share:>9.1%}{'':>17}{_percent(majority, kind):>11}")
    if "parameters" in results:
        lines.append(f"{results['parameters']:,} parameters, {results['seconds']:.0f} seconds")
    return lines


def _percent(majority, kind):
    return f"{majority[kind]:.1%}" if kind in majority else ""


# The exam: three held-out pictures whose answers are shown again whenever they change while the model trains.
#
#     exam 2  what is left of the blue star?  red circle ✗ → green ring ✓


RIGHT, WRONG = "✓", "✗"
EXAM_SEED = 2005  # of the scenes; chosen by eye for pictures that are easy to judge
LONGEST = 40  # characters of an answer that are shown


def readable(text):
    """An answer as it can be shown: one line of printable characters, not too long. Untrained models say anything."""
    text = "".join(
        character if character.isprintable() and character != "\ufffd" else "·" for character in " ".join(text.split())
    )
    return (text if len(text) <= LONGEST else text[: LONGEST - 1] + "…") or "(nothing)"


def exam_records():
    """Three pictures with two questions each: one of easy-VQA's test, two new scenes, the second with a string.

    Returns: list of Record, always the same.
    """
    words = Scenes("new", seed=EXAM_SEED, min_objects=3, string_share=0.0)
    strings = Scenes("new", seed=EXAM_SEED, min_objects=2, string_share=1.0)
    return [
        _first(EasyVQA("test"), ("color", "shape")),
        _first(words, ("relation", "count")),
        _first(strings, ("reading", "color")),
    ]


def _first(source, kinds):
    """The first record with a question of each kind that yes or no does not answer; these questions alone."""
    for n in itertools.count():
        record = source.record(n)
        chosen = {}
        for kind, conversation in zip(record.kinds, record.conversations):
            if kind in kinds and conversation[-1].text not in ("yes", "no"):
                chosen.setdefault(kind, conversation)
        if len(chosen) == len(kinds):
            return dataclasses.replace(record, conversations=tuple(chosen[kind] for kind in kinds), kinds=tuple(kinds))


class Exam:
    """Asks a model the same few questions again and again.

    `answers`, the last answer to each question, is all of its state: list of str, [] before the first call. Assign a
    saved list to go on from there.
    """

    def __init__(self, examiner, records):
        """
        Args:
          examiner: short_answer.Examiner.
          records: list of Record, as of `exam_records`.
        """
        self.examiner = examiner
        self.records = records
        self.answers = []
        conversations = [(number, turns) for number, record in enumerate(records, 1) for turns in record.conversations]
        self.questions = [(f"exam {number}  {turns[-2].text}", turns[-1].text) for number, turns in conversations]

    def __call__(self, model):
        """Ask all questions; lines for the answers that are not the last ones: list of str."""
        before, self.answers = self.answers, self.ask(model)
        return self.changes(before, self.answers)

    def ask(self, model):
        """The answers of a model, one per question: list of str. Leaves `answers` alone."""
        return [answer.prediction for answer in self.examiner.answers(model, self.records)]

    def changes(self, before, after):
        """Lines for the answers that have changed.

        Args:
          before, after: list of str, one answer per question; before = [] shows all.
        Returns: list of str, "exam NUMBER  QUESTION  OLD ✗ → NEW ✓"; the number is the picture's.
        Raises: ValueError for answers of another exam.
        """
        if len(after) != len(self.questions) or len(before) not in (0, len(after)):
            raise ValueError(f"{len(before)} and {len(after)} answers for an exam of {len(self.questions)} questions")
        lines = []
        for place, (question, truth) in enumerate(self.questions):
            old, new = before[place : place + 1], after[place : place + 1]
            if old != new:
                lines.append(f"{question}  {' → '.join(said(answer, truth) for answer in old + new)}")
        return lines

    def introduction(self):
        """The questions and what would be right: list of str."""
        return [f"{question}  (right: {truth})" for question, truth in self.questions]


def said(prediction, truth):
    """An answer with its sign: "red circle ✗"."""
    return f"{readable(prediction)} {RIGHT if exact_match(prediction, truth) else WRONG}"


def answer_in(line):
    """The last answer that a line of `Exam.changes` tells, as it was made readable: str.

    Raises: ValueError for any other line.
    """
    answer, _, sign = line.rpartition("  ")[2].rpartition(" ")
    if sign not in (RIGHT, WRONG):
        raise ValueError(f"{line!r} is no line of an exam; it would end with an answer and {RIGHT} or {WRONG}")
    return answer.rpartition(" → ")[2]


# Zero-shot recognition: which of several captions does a contrastive model find closest to a picture?
#
# CLIP, arXiv:2103.00020, Sec. 3.1.4. It measures a vision tower before there is a language model to ask.


@torch.no_grad()
def closest_captions(model, pixels, captions, tokenizer):
    """Choose a caption for every picture.

    Args:
      model: contrastive.ContrastiveModel.
      pixels: float32[B, 3, S, S].
      captions: list of str, written for the model as in training: BOS, caption, EOS.
      tokenizer: Tokenizer.
    Returns: list of B str, each one of the captions.
    """
    rows = [[tokenizer.bos, *tokenizer.encode(caption), tokenizer.eos] for caption in captions]
    longest, device = max(map(len, rows)), model.log_scale.device
    ids = torch.tensor([row + [tokenizer.pad] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    similar = model.views(pixels.to(device)) @ model.embed_texts(ids, lengths).T  # B views captions
    similar = similar.amax(dim=1)
    return [captions[place] for place in similar.argmax(dim=1).tolist()]


def easy_vqa_zero_shot(model, records, tokenizer, image_size, image_fit="crop", preprocessing=CLIP):
    """Shares of easy-VQA pictures whose colour and shape are told apart, among its 8 colours x 3 shapes.

    Args:
      model: contrastive.ContrastiveModel, its vision standing at image_size.
      records: list of Record of EasyVQA(kind="captions"); a colour or shape that a caption lacks is not counted.
      tokenizer: Tokenizer. image_size, image_fit, preprocessing: as in images.to_pixels, those of the model.
    Returns: {"color": share, "shape": share}; at chance 1/8 and 1/3.
    """
    captions = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    pixels = pixels_of([record.visuals[0] for record in records], image_size, image_fit, preprocessing)
    found = [caption.split() for caption in closest_captions(model, pixels, captions, tokenizer)]
    truths = [set(record.conversations[0][-1].text.split()) for record in records]
    shares = {}
    for place, (name, words) in enumerate((("color", COLORS), ("shape", SHAPES))):
        known = [(chosen[place], truth) for chosen, truth in zip(found, truths) if truth & set(words)]
        shares[name] = sum(word in truth for word, truth in known) / len(known)
    return shares


# Pictures of what a model answers: a sheet of held-out samples, and answers turning from wrong to right.
#
# Right and wrong differ by colour and by sign. Figures are made without pyplot, so that a notebook's own are left alone;
# everything is placed in inches from the top left corner, so that no text meets another.


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
