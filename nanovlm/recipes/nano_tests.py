"""How the nano recipe is judged: a quick look around every stage, the exam while it trains, all tests at the end."""

import functools

from nanovlm.checkpoint import replace
from nanovlm.data.easy_vqa import EasyVQA
from nanovlm.evaluation import nano_results
from nanovlm.evaluation.exam import Exam, exam_records
from nanovlm.evaluation.pictures import pick_samples, sample_sheet
from nanovlm.evaluation.short_answer import Examiner, shares
from nanovlm.evaluation.zero_shot import easy_vqa_zero_shot

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
    return nano_results.held_out_tests(number, number)


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
    tests = nano_results.held_out_tests(number, number or nano_results.NUM_SCENES)
    answers = nano_results.answer_tests(run.model, examiner(run), tests)
    samples = pick_samples(tests, answers)
    replace(run.out / "samples.png", lambda path: sample_sheet(samples, path, f"held-out pictures, seed {run.seed}"))
    return nano_results.nano_results(answers, nano_results.majorities(tests))


def report(run, results):
    """The table printed last, and what to try next: list of lines."""
    tries = (line.format(folder=run.out) for line in TRY)
    return [*nano_results.results_table(results), "", f"curves.png and samples.png are in {run.out}. Now try:", *tries]
