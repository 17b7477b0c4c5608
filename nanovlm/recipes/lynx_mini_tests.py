"""How lynx_mini is judged: nano's tests of pictures, two in other words too, and what the language model still knows.

No picture has a string, which its image tokens do not tell. The held-out wordings are those that no stage trains
(wordings.json). Knowledge is a hundred short questions that have nothing to do with pictures: before (the adapters add
nothing), after, and after beside a picture that does not matter.
"""

import contextlib
import functools
import json
import re
from pathlib import Path

from nanovlm.adapter import Adapter
from nanovlm.data.easy_vqa import EasyVQA
from nanovlm.data.records import Record, Turn
from nanovlm.data.scene_questions import QUESTIONS, Scenes
from nanovlm.data.wordings import reworded
from nanovlm.recipes import nano_tests

REWORDED = ("easy_vqa_test", "scenes_new")  # the tests that are taken a second time
exam = nano_tests.exam
PICTURES, QUICK = 100, 10  # of each test, at the end and around a stage
KNOWLEDGE = json.loads(Path(__file__).with_name("knowledge.json").read_text())  # [question, right answers, ...]


@functools.cache
def tests(number):
    """The tests, of `number` pictures each: {name as in nano_tests.NAMES: list of Record}."""
    drawn = dict(seed=nano_tests.SEED, weights={kind: 1.0 for kind in QUESTIONS if kind != "reading"}, string_share=0.0)
    scenes = {split: Scenes(split, **drawn) for split in ("new", "unseen_pairs")}
    sources = {"easy_vqa_test": EasyVQA("test")} | {f"scenes_{split}": source for split, source in scenes.items()}
    return {name: [source.record(n) for n in range(number)] for name, source in sources.items()}


def measures(stage):
    """Names of what `evaluate` finds around a stage: tuple of str."""
    return REWORDED


def evaluate(run, stage):
    """Quick held-out shares before and after a stage: {measure: share}."""
    found = tests(nano_tests.SMOKE_PICTURES if run.args.smoke else QUICK)
    return {name: nano_tests.shares(nano_tests.ask(nano_tests.assistant(run), found[name]))["all"] for name in REWORDED}


def ask_in_other_words(assistant, number):
    """Tests of `number` pictures in the held-out wordings: {test: {"all" or kind: share that is right}}."""
    found = {}
    for name in REWORDED:
        records = [reworded(record, "held_out", (nano_tests.SEED, n)) for n, record in enumerate(tests(number)[name])]
        found[name] = nano_tests.shares(nano_tests.ask(assistant, records))
    return found


def knows(assistant, beside=()):
    """The share of KNOWLEDGE that is answered: one of the right answers stands in the reply, word for word.

    beside: list of Record; question n is asked beside the picture of the n-th of them, which has nothing to do with it.
    """
    records = []
    for n, (question, answer, *_) in enumerate(KNOWLEDGE):
        visuals = beside[n % len(beside)].visuals if beside else ()
        turns = Turn("user", (*range(len(visuals)), f"{question} Answer briefly.")), Turn("assistant", (answer,))
        records.append(Record(f"knowledge/{n}", visuals, (turns,)))
    words = lambda text: " ".join(["", *re.findall(r"\w+", text.lower()), ""])
    replies = nano_tests.ask(assistant, records, max_new_tokens=24)
    right = 0
    for reply, (_, *answers) in zip(replies, KNOWLEDGE):
        right += any(words(one) in words(reply.prediction) for one in answers)
    return right / len(replies)


@contextlib.contextmanager
def scaled(model, factor):
    """Within, every adapter adds `factor` times what it has learned to add; 0: the language model as it was."""
    scales = [layer.adapter.scale for layer in model.decoder.layers if isinstance(layer.adapter, Adapter)]
    before = [scale.detach().clone() for scale in scales]
    for scale in scales:
        scale.data *= factor
    try:
        yield
    finally:
        for scale, value in zip(scales, before):
            scale.data.copy_(value)


def finish(run):
    """nano's results, those in held-out wordings, and what the language model knows before and after."""
    number, assistant = nano_tests.SMOKE_PICTURES if run.args.smoke else PICTURES, nano_tests.assistant(run)
    pictures = tests(number)["scenes_new"]
    with scaled(run.model, 0):
        before = knows(assistant)
    knowledge = {"before": before, "after": knows(assistant), "beside a picture": knows(assistant, pictures)}
    reworded_tests = ask_in_other_words(assistant, number)
    return nano_tests.finish(run, tests(number)) | {"held_out_wordings": reworded_tests, "knowledge": knowledge}


def report(run, results):
    """nano's report, a line more for each test in held-out wordings, and one for what is still known."""
    other = results["held_out_wordings"].items()
    lines = [f"{nano_tests.NAMES[name]}, in held-out wordings: {share['all']:.1%}" for name, share in other]
    known = ", ".join(f"{share:.0%} {when}" for when, share in results["knowledge"].items())
    return [*nano_tests.report(run, results), *lines, f"of {len(KNOWLEDGE)} questions of general knowledge: {known}"]
