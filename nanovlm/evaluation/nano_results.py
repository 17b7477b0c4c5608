"""What the nano model has learned: its held-out tests, their results as data, and the table printed at the end.

Five tests that no training stage reads, and one more without looking: easy-VQA's questions over grey pictures show how
far words alone lead.
"""

from tqdm import tqdm

from nanovlm.data.easy_vqa import EasyVQA
from nanovlm.data.scene_questions import QUESTIONS
from nanovlm.data.scene_source import Scenes, majority_baseline
from nanovlm.data.scene_texts import TEXT_TYPES, SceneTexts
from nanovlm.evaluation.short_answer import shares, wilson

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
