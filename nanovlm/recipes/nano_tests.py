"""How the nano recipe is judged: a quick look around every stage, an exam while it trains, all tests at the end.

Five tests that no training stage reads, and one more without looking: easy-VQA's questions over grey pictures show how
far words alone lead. The exam is three held-out pictures whose answers are printed again whenever they change:

    exam 2  what is left of the blue star?  green ring ✓
"""

import dataclasses
import functools
import itertools
import math
import textwrap
from collections import Counter
from dataclasses import dataclass

import torch
from PIL import Image
from tqdm import tqdm

from nanovlm.data import images
from nanovlm.data.batching import pixels_of
from nanovlm.data.easy_vqa import COLORS, SHAPES, EasyVQA
from nanovlm.data.images import CLIP
from nanovlm.data.records import Visual
from nanovlm.data.scene_questions import QUESTIONS, TEXT_TYPES, Scenes, SceneTexts
from nanovlm.files import replace
from nanovlm.generation.answer import make_prompt, reply
from nanovlm.generation.chat import Assistant
from nanovlm.generation.sampler import Decoding
from nanovlm.training.progress import readable

QUICK_PICTURES = 40  # of each test
SMOKE_PICTURES = 4  # the same in a smoke run
NUM_SCENES = 400  # pictures of each scene test at the end
NUM_TRAINING = 500  # training records in which the most frequent answers are counted
SEED = 1000  # of the drawn tests; splits differ from "train" whatever the seed
EXAM_SEED = 2005  # of the exam's scenes; chosen by eye for pictures that are easy to judge
NAMES = {
    "easy_vqa_test": "easy-VQA, official test",
    "scenes_new": "scenes, new pictures",
    "scenes_unseen_pairs": "scenes, unseen colour-shape pairs",
    "scenes_reading": "scenes, reading unseen strings",
    "text_only": "text only",
    "described": "text only, a described scene",
}
BLANK = "blank_easy_vqa"
BY_KIND = ("easy_vqa_test", "scenes_new", "scenes_unseen_pairs")  # tests whose question types the table shows
TRY = (
    'python sample.py {folder} --draw "red circle left of blue star" "what is left of the blue star?"',
    "python sample.py {folder}                        (a chat; /image PATH shows it a picture)",
)


def measures(stage):
    """Names of what `evaluate` finds around a stage: tuple of str."""
    if stage.objective == "contrastive":
        return "shape", "color"
    return tuple(NAMES) if {"bridge", "adapters"} & stage.learning_rates.keys() else ("described",)


def evaluate(run, stage):
    """Quick held-out shares before and after a stage: {measure: share}."""
    number = SMOKE_PICTURES if run.args.smoke else QUICK_PICTURES
    if stage.objective == "contrastive":
        captions = EasyVQA("test", kind="captions")
        records = [captions.record(n) for n in range(number * 4)]
        shown = stage.image_size, stage.image_fit, run.recipe.preprocessing
        return zero_shot(run.contrastive, records, run.tokenizer, *shown)
    tests = held_out_tests(number, number)
    return {name: shares(ask(assistant(run), tests[name]))["all"] for name in measures(stage)}


def exam(run):
    """The answers to the exam: list of lines."""
    records = exam_records()
    return exam_lines(records, [answer.prediction for answer in ask(assistant(run), records)])


def finish(run, tests=None):
    """Held-out tests, samples.png, and what goes into results.json. tests: as `held_out_tests`; None = nano's, all of them."""
    if tests is None:
        tests = held_out_tests(SMOKE_PICTURES, SMOKE_PICTURES) if run.args.smoke else held_out_tests()
    answers = answer_tests(assistant(run), tests)
    samples = pick_samples(tests, answers)
    title = f"held-out pictures, seed {run.args.seed}"
    replace(run.out / "samples.png", lambda path: sample_sheet(samples, path, title))
    return nano_results(answers, majorities(tests))


def report(run, results):
    """The table printed last, and what to try next: list of lines."""
    tries = (line.format(folder=run.out) for line in TRY)
    return [*results_table(results), "", f"curves.png and samples.png are in {run.out}. Now try:", *tries]


@dataclass(frozen=True)
class Answer:
    """What a model said to one conversation of a record. kind: question type, "" = not stated."""

    record: str  # its id
    conversation: int  # place in the record
    kind: str
    question: str
    truth: str
    prediction: str

    @property
    def right(self):
        """Whether the prediction is the truth by `exact_match`: bool."""
        return exact_match(self.prediction, self.truth)


def exact_match(prediction, truth):
    """Whether two answers are the same: bool. Case counts only in a truth in capitals ("A7K"), a string to be read."""
    prediction, truth = prediction.strip(), truth.strip()
    return prediction == truth if truth.isupper() else prediction.lower() == truth.lower()


def assistant(run):
    """The run's model as its last stage writes and shows, at the picture size at which its vision stands: Assistant."""
    last, size = run.stages[-1], run.model.vision.image_size
    return Assistant(run.model, run.tokenizer, run.template_of(last), size, last.image_fit, run.recipe.preprocessing)


def ask(assistant, records, blank=False, progress=lambda number: None, max_new_tokens=12, batch_size=None):
    """Let a model answer the last question of every conversation, greedily: list of Answer, in their order.

    Args:
      assistant: generation.chat.Assistant.
      records: iterable of Record, read as the answers are made; conversations end with a question and the true answer.
      blank: True shows grey in place of every picture, so that only the questions can help.
      progress: function called with the number of conversations newly answered, as tqdm's `update`.
      batch_size: prompts that run together, None = 256, fewer in a wide model for the memory of their keys and values;
        eight batches are sorted together, and hold their pictures in memory.
    """
    batch_size = batch_size or min(256, 2**15 // assistant.model.decoder.config.width)
    asked = ((record, place) for record in records for place in range(len(record.conversations)))
    answers, grey = [], Image.new("RGB", (assistant.image_size,) * 2, (128, 128, 128))
    while chunk := list(itertools.islice(asked, 8 * batch_size)):
        pixels, prompts = {}, []
        for record, place in chunk:
            visuals = record.visuals
            if blank:
                visuals = [Visual(f"blank/{len(one.frames)}", (grey,) * len(one.frames)) for one in visuals]
            prompts.append(make_prompt(assistant, record.conversations[place][:-1], visuals, max_new_tokens, pixels))
        texts = reply(assistant, prompts, Decoding(max_new_tokens=max_new_tokens), batch_size=batch_size)
        for (record, place), text in zip(chunk, texts):
            kind, turns = record.kinds[place] if record.kinds else "", record.conversations[place]
            answers.append(Answer(record.id, place, kind, turns[-2].text, turns[-1].text, text))
        progress(len(chunk))
    return answers


def shares(answers):
    """Shares of right answers: {"all": share, kind: share, …}; those without a kind count only in "all"."""
    groups = {"all": answers}
    for answer in answers:
        if answer.kind:
            groups.setdefault(answer.kind, []).append(answer)
    return {kind: sum(answer.right for answer in group) / len(group) for kind, group in groups.items()}


def wilson(right, total):
    """95% interval of a share of right answers: (low, high), between 0 and 1.

    Wilson, JASA 22 (1927), 209-212; unlike the normal interval it stays sensible near 0 and 1.
    """
    share, z = right / total, 1.959964  # the normal quantile of a two-sided 95% interval
    middle = share + z**2 / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def sources():
    """Where each test comes from: {name: (held-out source, training source of such questions)}."""
    looking = {kind: 1.0 for kind in QUESTIONS if kind != "reading"}
    answered = {kind: 1.0 for kind in TEXT_TYPES if kind not in ("plain_caption", "repeat")}
    told = dict.fromkeys(("described", "listed", "described_relation"), 1.0)
    texts = lambda weights: tuple(SceneTexts(split, seed=SEED, weights=weights) for split in ("new", "train"))
    seen = Scenes("train", seed=SEED, weights=looking)
    strings = Scenes("train", seed=SEED, weights={"reading": 1.0}, string_share=1.0)
    return {
        "easy_vqa_test": (EasyVQA("test"), EasyVQA("train")),
        "scenes_new": (Scenes("new", seed=SEED, weights=looking), seen),
        "scenes_unseen_pairs": (Scenes("unseen_pairs", seed=SEED, weights=looking), seen),
        "scenes_reading": (Scenes("reading", seed=SEED), strings),
        "text_only": texts(answered),
        "described": texts(told),
    }


@functools.lru_cache(maxsize=2)
def held_out_tests(num_pictures=None, num_scenes=NUM_SCENES):
    """The held-out tests: {name as in NAMES: list of Record}. Reading is asked in its own test only.

    num_pictures: pictures of easy-VQA's official test split; None = all 1,000.
    num_scenes: pictures of each of the scene tests, and text-only questions.
    """
    found = {name: source for name, (source, _) in sources().items()}
    numbers = dict.fromkeys(found, num_scenes)
    numbers["easy_vqa_test"] = len(found["easy_vqa_test"]) if num_pictures is None else num_pictures
    return {name: [source.record(n) for n in range(numbers[name])] for name, source in found.items()}


def _answers(records):
    """{kind: {question: Counter of its answers}}."""
    answers = {}
    for record in records:
        for kind, (*_, question, answer) in zip(record.kinds, record.conversations):
            answers.setdefault(kind, {}).setdefault(question.text, Counter())[answer.text] += 1
    return answers


def majority_baseline(records, training=None):
    """What can be scored per question type without looking.

    Args:
      records: iterable of Record with `kinds`.
      training: records from which the most frequent answers are taken; None = the other ones of `records`.
    Returns: {kind: share of right answers}, the better of always giving the type's most frequent answer, and giving the
      answer most frequent for that very question (the type's where it is never asked).
    """
    asked = _answers(records)
    known = asked if training is None else _answers(training)
    shares = {}
    for kind, questions in asked.items():
        total, favourite = sum(questions.values(), Counter()), sum(known[kind].values(), Counter()).most_common(1)[0][0]
        right = 0
        for question, counts in questions.items():
            seen_before = known[kind].get(question, Counter())
            for answer, count in counts.items():
                # without the one to be answered, or questions asked once would answer themselves
                seen = seen_before - Counter([answer]) if training is None else seen_before
                right += count * (answer == (seen.most_common(1)[0][0] if seen else favourite))
        shares[kind] = max(total[favourite], right) / total.total()
    return shares


def majorities(tests):
    """What is right without looking, if the most frequent answers of training records are given.

    Training records are counted because among unseen pairs alone every star is red.
    Returns: {name: {"all": mean over the questions, kind: share as of `majority_baseline`, …}}.
    """
    known, found = sources(), {}
    for name, records in tests.items():
        training = known[name][1]
        by_kind = majority_baseline(records, [training.record(n) for n in range(NUM_TRAINING)])
        kinds = [kind for record in records for kind in record.kinds]
        found[name] = {"all": sum(by_kind[kind] for kind in kinds) / len(kinds)} | by_kind
    return found


def answer_tests(assistant, tests):
    """Take the tests, easy-VQA's also over grey pictures: {name: list of Answer}."""
    todo = {name: (records, False) for name, records in tests.items()}
    if "easy_vqa_test" in tests:
        todo[BLANK] = tests["easy_vqa_test"], True
    total = sum(len(record.conversations) for records, _ in todo.values() for record in records)
    with tqdm(total=total, desc="evaluating", unit="question", disable=None) as bar:
        return {name: ask(assistant, records, blank, bar.update) for name, (records, blank) in todo.items()}


def nano_results(answers, majority):
    """Results as they are written to results.json, to which the trainer adds parameters and seconds.

    answers: {name: list of Answer}, of `answer_tests`. majority: of `majorities`.
    Returns: {name: share in [0, 1]} for every test, and nested by test "kinds" (share per question type), "majority"
      (as given), "interval" (95%, low and high) and "questions" (their number).
    """
    found = {name: shares(given) for name, given in answers.items()}
    return {name: share["all"] for name, share in found.items()} | {
        "kinds": {name: {kind: share[kind] for kind in share if kind != "all"} for name, share in found.items()},
        "majority": majority,
        "interval": {name: wilson(sum(one.right for one in given), len(given)) for name, given in answers.items()},
        "questions": {name: len(given) for name, given in answers.items()},
    }


def results_table(results):
    """The results of `nano_results` as aligned text, a row per test and, indented, per question type: list of str."""
    lines = [f"{'held-out test':<36}{'questions':>10}{'right':>9}{'95% interval':>17}{'majority':>11}"]
    for name, words in (NAMES | {BLANK: "easy-VQA over grey pictures"}).items():
        if name not in results:
            continue
        majority = {kind: f"{share:.1%}" for kind, share in results["majority"].get(name, {}).items()}
        interval = "{:.1f} - {:.1%}".format(100 * results["interval"][name][0], results["interval"][name][1])
        number, share = results["questions"][name], results[name]
        lines.append(f"{words:<36}{number:>10,}{share:>9.1%}{interval:>17}{majority.get('all', ''):>11}")
        for kind, share in sorted(results["kinds"][name].items()) if name in BY_KIND else ():
            lines.append(f"  {kind.replace('_', ' '):<44}{share:>9.1%}{'':>17}{majority.get(kind, ''):>11}")
    if "parameters" in results:
        lines.append(f"{results['parameters']:,} parameters, {results['seconds']:.0f} seconds")
    return lines


@functools.lru_cache(maxsize=1)
def exam_records():
    """A picture of easy-VQA's test and two new scenes, the second with a string; two questions each: Records."""
    words = Scenes("new", seed=EXAM_SEED, min_objects=3, string_share=0.0)
    strings = Scenes("new", seed=EXAM_SEED, min_objects=2, string_share=1.0)
    asked = (EasyVQA("test"), ("color", "shape")), (words, ("relation", "count")), (strings, ("reading", "color"))
    return tuple(first_record(source, kinds) for source, kinds in asked)


def first_record(source, kinds):
    """The first record with a question of each kind that yes or no does not answer; these questions alone."""
    for record in map(source.record, itertools.count()):
        chosen = {}
        for kind, conversation in zip(record.kinds, record.conversations):
            if kind in kinds and conversation[-1].text not in ("yes", "no"):
                chosen.setdefault(kind, conversation)
        if len(chosen) == len(kinds):
            return dataclasses.replace(record, conversations=tuple(chosen[kind] for kind in kinds), kinds=kinds)


def exam_lines(records, predictions):
    """An answer to every question of an exam: list of str, "exam NUMBER_OF_THE_PICTURE  QUESTION  ANSWER ✓"."""
    asked = [(number, turns) for number, record in enumerate(records, 1) for turns in record.conversations]
    return [
        f"exam {number}  {turns[-2].text}  {said(prediction, turns[-1].text)}"
        for (number, turns), prediction in zip(asked, predictions, strict=True)
    ]


def said(prediction, truth):
    """An answer with its sign: "red circle ✗"."""
    return f"{readable(prediction)} {'✓' if exact_match(prediction, truth) else '✗'}"


@torch.no_grad()
def zero_shot(model, records, tokenizer, image_size, image_fit="crop", preprocessing=CLIP):
    """Which caption "COLOR SHAPE" does a contrastive model find closest to a picture (CLIP, arXiv:2103.00020, 3.1.4)?

    It measures a vision tower before there is a language model to ask.
    Args:
      model: contrastive.ContrastiveModel. image_size, image_fit, preprocessing: as in images.to_pixels.
      records: list of Record of EasyVQA(kind="captions"); a colour or shape that a caption lacks is not counted.
    Returns: {"color": share that is right, "shape": share}; at chance 1/8 and 1/3.
    """
    captions = [(color, shape) for color in COLORS for shape in SHAPES]
    rows = [[tokenizer.bos, *tokenizer.encode(" ".join(words)), tokenizer.eos] for words in captions]
    lengths, device = [len(row) for row in rows], model.log_scale.device
    ids = torch.tensor([row + [tokenizer.pad] * (max(lengths) - len(row)) for row in rows], device=device)
    pixels = pixels_of([record.visuals[0] for record in records], image_size, image_fit, preprocessing).to(device)
    similar = model.views(pixels) @ model.embed_texts(ids, torch.tensor(lengths, device=device)).T  # B views captions
    found = [captions[place] for place in similar.amax(dim=1).argmax(dim=1).tolist()]
    truths = [set(record.conversations[0][-1].text.split()) for record in records]
    shares = {}
    for place, (name, words) in enumerate((("color", COLORS), ("shape", SHAPES))):
        right = [chosen[place] in truth for chosen, truth in zip(found, truths) if truth & set(words)]
        shares[name] = sum(right) / len(right)
    return shares


INK = {True: "#1b6e2d", False: "#b2182b"}  # right, wrong
COLUMNS = 4  # samples side by side
FONT = "DejaVu Sans"  # comes with matplotlib and has both signs
SAMPLES = {  # test -> (pictures on the sheet, what is written above them)
    "easy_vqa_test": (3, "easy-VQA test"),
    "scenes_new": (4, "new scene"),
    "scenes_unseen_pairs": (2, "unseen pairs"),
    "scenes_reading": (3, "unseen string"),
}


def pick_samples(tests, answers):
    """The first pictures of each test, the n-th with its n-th question (types differ): list of (label, image, Answer).

    tests, answers: {name: list of Record or of their Answers}.
    """
    chosen = []
    for name, (number, label) in SAMPLES.items():
        left = iter(answers.get(name, ()))
        for place, record in enumerate(tests.get(name, ())[:number]):
            mine = [next(left) for _ in record.conversations]
            chosen.append((label, images.load(record.visuals[0].frames[0]), mine[place % len(mine)]))
    return chosen


def sample_sheet(samples, path, title):
    """Draw a PNG of pictures with a question and its answer below each; 240 x 320 pixels a sample, 50 more in height.

    samples: list of (label, PIL image, Answer). title: what comes before "N right".
    """
    right = sum(answer.right for _, _, answer in samples)
    height = 3.2 * math.ceil(len(samples) / COLUMNS) + 0.5
    figure, page = new_page(2.4 * COLUMNS, height, f"{title}: {right} of {len(samples)} right")
    for place, (label, image, answer) in enumerate(samples):
        left, top = 2.4 * (place % COLUMNS), 0.5 + 3.2 * (place // COLUMNS)
        write(page, left + 1.2, top + 0.12, label, "#666666")
        show(figure, image, left + 0.1, top + 0.24, 2.2)
        lines = [(line, "black") for line in textwrap.wrap(answer.question, 32, max_lines=2, placeholder=" …")]
        lines.append((said(answer.prediction, answer.truth), INK[answer.right]))
        if not answer.right:
            lines.append((f"truth: {readable(answer.truth)}", "black"))
        for number, (line, ink) in enumerate(lines):
            write(page, left + 1.2, top + 2.57 + 0.17 * number, line, ink)
    figure.savefig(path, format="png")


def new_page(width, height, title):
    """A figure, and axes that cover it in inches, y downwards."""
    from matplotlib.figure import Figure  # takes a second to import, which only the end of a run should pay

    figure = Figure(figsize=(width, height), dpi=100)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    page.axis("off")
    write(page, width / 2, 0.25, title, "black", fontsize=12)
    return figure, page


def write(page, x, y, text, ink, align="center", fontsize=9):
    """Words as they are: a dollar sign begins no formula, and what the font lacks becomes a dot."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(FONT))
    text = "".join(letter if letter == "\n" or font.get_char_index(ord(letter)) else "·" for letter in text)
    page.text(x, y, text, color=ink, fontsize=fontsize, family=FONT, parse_math=False, ha=align, va="center")


def show(figure, image, left, top, side):
    """A picture in a square, its pixels as they are."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height), xticks=[], yticks=[])
    axes.imshow(image, interpolation="nearest")
