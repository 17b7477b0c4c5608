"""The report of a data set: every indicator by hand on a small file, its cost, its memory, and what goes wrong."""

import json
import math
import random
import tracemalloc
from collections import Counter

import numpy
import pytest
import torch
from PIL import Image
from vlit_data import Says, item, notes, vlit, write_lines

from nanovlm.data import json_files
from nanovlm.evaluation.protocols import whole_number
from nanovlm.vlit import indicators
from nanovlm.vlit.clustering import SentenceEncoder, simcse_loss, simcse_vectors, train_encoder, word_ids
from nanovlm.vlit.indicators import Helpers, Reservoir, Settings, Survey, chosen, elements, mean_of, measure, proxy
from nanovlm.vlit.replies import Recorded
from nanovlm.vlit.samples import Unreadable
from nanovlm.vlit.tagging import OTHER, TASKS, assign, balance, covering, propose, tag

INDICATORS = ["MD", "C", "T", "I", "R", "O/G", "IC", "B"]  # the review's eight, in the order of its Table 4
ITEMS = [
    item("0", "<image>\nWhat color is the dog?", "Brown.", image="a.png"),
    item("1", "<image>\nHow many dogs are there?", "Two.", "Why are they wet?", "They may have swum.", image="a.png"),
    item("2", "<image>\nDescribe the image in detail.", "Two brown dogs stand on the grass.", image="b.png"),
    item("3", "Is there a cat?", "Brown.", image="none.png"),  # no picture of that name
]


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8), (120, 80, 20)).save(tmp_path / f"{name}.png")
    write_lines(tmp_path / "data.jsonl", [*ITEMS, '{"id": 9, "conv'])
    write_lines(tmp_path / "notes.jsonl", notes(*"ab"))
    return tmp_path


def measured(*arguments):
    """{key: Indicator} of a file."""
    return {one.key: one for one in measure(*arguments)[0]}


def test_every_indicator_of_a_small_file(folder, capsys):
    out = folder / "out"
    vlit("quality", folder / "data.jsonl", "--annotations", folder / "notes.jsonl", "--out", out)
    report = json.loads((out / "report.json").read_text())
    assert [report[name] for name in ("records", "unreadable", "defective", "pairs")] == [4, 1, 1, 5]
    assert report["defects"] == {"image": 1}
    assert any("data.jsonl, line 5: unreadable" in line for line in report["problems"])
    found = {one["key"]: one for one in report["indicators"]}
    assert [key for key in found if key != "grounding"] == INDICATORS
    names = "instance attribute", "instance counting", "complex reasoning", "detailed description", "existence"
    assert report["tasks"] == dict.fromkeys(names, 1)
    assert {key: one["value"] for key, one in found.items() if key != "IC"} == {
        "MD": None, "grounding": 100, "C": 100, "T": 5, "B": 0, "I": 0,
        "R": pytest.approx(math.log(4)), "O/G": pytest.approx((1 + 1 + 0 + 0 + 1) / 5),  # "Brown." stands twice
    }  # fmt: skip
    assert found["C"]["measured"] == found["grounding"]["measured"] == 1  # the count alone
    beside = {key: one["beside"] for key, one in found.items()}
    assert beside["C"]["coverage"] == 0.2 and beside["I"]["literal"] == 1  # five tasks of one instruction each
    assert (beside["R"]["literal"], beside["R"]["noise"]) == (None, 1)
    text = (out / "report.txt").read_text()
    assert text in capsys.readouterr().out
    for words in ("eps 0.3", "min_samples 1", "literal", "not measured", "seconds", "tokens", "proxy", "peak memory"):
        assert words in text
    assert Image.open(out / "report.png").width > 800


def reply(chat, n):
    """Says yes to everything, gives the mark 7, names two tasks."""
    text = chat.messages[-1][1]
    answers = {"Is the answer right": "Yes", "Rate how": "Mark: 7", "many": "It is counting.", "": "?"}
    answers = {"Name the kinds": "1. Counting\n2. counting \n- asking why"} | answers
    return next(answer for words, answer in answers.items() if words in text)


def test_a_judge_votes_marks_and_names_tasks(folder):
    says, settings = Says(reply), Settings(votes=3)

    def run():
        judge = Recorded(says, folder / "replies.jsonl")
        return measured(folder / "data.jsonl", settings, folder, Helpers(judge=judge))

    found = run()
    assert (found["C"].value, found["C"].measured, found["C"].beside["agreement"]) == (100, 5, 1)
    assert found["C"].interval[0] < 100 and found["C"].tokens > 0 and found["IC"].tokens > 0
    assert found["IC"].value == 7 and found["IC"].beside["unreadable marks"] == 0
    assert found["T"].value == 1 and found["T"].beside["other"] == 4 and "TagGPT" in found["T"].computation
    asked = len(says.asked)
    run()
    assert len(says.asked) == asked  # what was recorded is not asked again


@pytest.mark.parametrize("sees", (False, True))
def test_what_a_judge_is_told_and_shown(folder, sees):
    says = Says(reply)
    says.accepts_images = sees
    helpers = Helpers(judge=Recorded(says, folder / "replies.jsonl"), describe=lambda sample: f"told of {sample.id}")
    found = measured(folder / "data.jsonl", Settings(votes=1), folder, helpers)
    chats = [chat for chat in says.asked if "Is the answer right" in chat.messages[-1][1]]
    assert all(("told of" in chat.messages[-1][1]) != sees for chat in chats)
    images = Counter(chat.image.rpartition("/")[2] for chat in chats)
    assert images == ({"a.png": 3, "b.png": 1} if sees else {"": 5})
    assert found["C"].beside["pictures missing"] == sees and found["C"].measured == 5 - sees


def test_own_task_field_and_lexicon(folder):
    path = write_lines(folder / "own.jsonl", [*(one | {"task": "mine"} for one in ITEMS[:2]), ITEMS[2]])
    (folder / "names.txt").write_text("Color\n\ndetail\n")
    vlit("quality", path, "--task-field", "--lexicon", folder / "names.txt", "--out", folder / "out")
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["tasks"] == {"mine": 3, "detailed description": 1}
    assert next(one["value"] for one in report["indicators"] if one["key"] == "O/G") == pytest.approx(2 / 4)


@pytest.mark.parametrize("command, words", (
    ("quality --kept 0", "--kept is 0"), ("quality --eps 3", "3.0"), ("quality --size 50", "4 readable"),
    ("quality -n 2 --generator replay", "2 votes"), ("quality --generator replay", "--replies"),
    ("quality --annotations missing.json", "missing.json"), ("quality --encoder missing", "config.json"),
    ("filter --per-task 0", "--per-task is 0"), ("filter --near 0", "between 0 and 1"),
    ("filter --matching-percentile 100", "from 0 to below 100"),
))  # fmt: skip
def test_bad_flags_end_with_a_message(folder, capsys, command, words):
    name, *flags = command.split()
    vlit(name, folder / "data.jsonl", "--out", folder / "out", *flags, code=2)
    assert words in capsys.readouterr().err


def test_what_cannot_be_measured(folder, monkeypatch):
    monkeypatch.setattr(indicators, "MOST_TASKS", 3)
    path = write_lines(folder / "own.jsonl", [item(n, "Why?", "So.", task=f"task {n}") for n in range(5)])
    with pytest.raises(ValueError, match="more than 3 tasks, the last 'task 3'; leave out --task-field"):
        measure(path, Settings(task_field=True))
    with pytest.raises(ValueError, match="no instruction with a response"):
        measure(write_lines(folder / "bare.jsonl", [item(1, "A question?")]))


@pytest.mark.parametrize("instruction, task", (
    ("What color is the car?", "instance attribute"), ("How many people?", "instance counting"),
    ("Where is the red star?", "object localization"), ("Why is he laughing?", "complex reasoning"),
    ("Describe the image concisely.", "image captioning"), ("Is there a dog?", "existence"),
    ("What is the person in the box doing?", "region understanding"), ("Who?", "visual question answering"),
    ("Portray the picture now, briefly", "image captioning"), ("Hmpf", OTHER), ("", OTHER),
))  # fmt: skip
def test_tasks_by_rule(instruction, task):
    assert tag(instruction) == task and (task == OTHER or task in TASKS)


def test_labels_of_a_language_model(tmp_path):
    judge = Recorded(Says(reply), tmp_path / "replies.jsonl")
    tags = propose(judge, [f"instruction {n}" for n in range(45)])
    assert tags == ["counting", "asking why"]  # numbers and bullets gone, equal names merged
    assert assign(judge, ["how many?", "why?"], tags) == ["counting", OTHER]
    assert covering(["a"] * 98 + ["b", OTHER]) == {"a": 98, OTHER: 2}
    with pytest.raises(ValueError, match="named no task"):
        propose(Recorded(Says(lambda chat, n: []), tmp_path / "none.jsonl"), ["one"])


@pytest.mark.parametrize("instruction, number", (
    ("Describe.", 0),
    ("How many dogs and cats are left of the two wine glasses?", 5),  # dog, cat, wine glass; two; left of
    ("Is the red dog next to the dog?", 3),  # dog once; next to; red
    ("What is marked by the box [0.1, 0.2, 0.3, 0.4]?", 2),  # box, and the region itself
    ("Who is marked?", 1),
))  # fmt: skip
def test_semantic_elements(instruction, number):
    assert elements(instruction) == number


def test_samples_are_drawn_evenly():
    """Reservoirs from a stream; exactly so many of a known number, in their order, past what cannot be read."""
    kept, counts, broken = Counter(), Counter(), Unreadable("x")
    stream = [("", broken if n == 2 else n) for n in range(21)]
    for seed in range(600):
        sample = Reservoir(3, seed)
        for n in range(10):
            sample.add(n)
        kept.update(set(sample.kept))
        found = [value for _, value in chosen(iter(stream), 20, 5, seed) if value is not broken]
        assert found == sorted(found)
        counts.update(found)
    assert kept.total() == 1800 and all(130 < kept[n] < 230 for n in range(10))  # 180 expected, sd 11
    assert counts.total() == 3000 and all(100 < counts[n] < 200 for n in range(21) if n != 2)  # 150 expected, sd 10.6


def test_means_intervals_balance_marks_and_proxy_by_hand():
    numbers = numpy.random.default_rng(0).normal(10, 3, 50).tolist() * 2
    mean, reach = numpy.mean(numbers), 1.96 * numpy.std(numbers, ddof=1) / 10
    for values in (numbers, Counter(numbers)):
        found = mean_of("key", "name", "how", values)
        assert (found.value, *found.interval, found.measured) == pytest.approx((mean, mean - reach, mean + reach, 100))
    assert mean_of("key", "name", "how", []).value is mean_of("key", "name", "how", [1.0]).interval is None
    assert balance({"a": 3, "b": 1}) == pytest.approx({"variance": 625, "entropy": 0.5623, "gini": 0.25, "largest": 0.75}, rel=1e-4)
    marks = {"7": 7, "1": 1, "Mark: 10/10": 10, "0, then 3": 3, "3.5 or 4": 4, "many": None, "11": None}
    assert {text: whole_number(text, 1, 10) for text in marks} == marks
    hard = proxy("Why might they stand there, and what would you compare if it rained?")
    assert 1 <= proxy("What color is it?") < hard <= 10 == proxy("why " * 50)
    assert proxy("Why?", turns=5) > proxy("Why?")


def many(path, number):
    rng, asked = random.Random(0), ("What color is the {}?", "How many {}s are there?", "Why is the {} here?")
    words = [" ".join(f"w{rng.randrange(100)}" for _ in range(12)) for _ in range(number)]
    return write_lines(path, [item(n, rng.choice(asked).format(one), one) for n, one in enumerate(words)])


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(indicators, "NAMED", 10)
    monkeypatch.setattr(json_files, "CHUNK", 1 << 12)
    peaks = []
    for number in (300, 1500):
        path = many(tmp_path / f"{number}.jsonl", number)
        tracemalloc.start()
        Survey(path, Settings(instructions=30, responses=50, draws=2, kept=40))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 150_000  # 1,200 records more are over a megabyte as objects


def test_the_same_seed_gives_the_same_report(tmp_path):
    path = many(tmp_path / "a.jsonl", 120)
    settings = [Settings(size=60, seed=seed, instructions=10, responses=20, draws=2) for seed in (1, 1, 2)]
    first, again, other = ({key: (one.value, one.beside) for key, one in measured(path, how).items()} for how in settings)
    assert first == again != other


def test_simcse_learns_by_equation_2_and_ignores_padding():
    texts = [f"the {color} {thing} stands" for color in ("red", "blue") for thing in ("dog", "cup", "car", "bus")]
    model, fresh, state = train_encoder(texts, steps=15), SentenceEncoder(), torch.get_rng_state()
    points = simcse_vectors([*texts[:3], texts[0], ""])
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        alone, among = model(word_ids(["a dog"])), model(word_ids(["a dog", "a much longer text than the other one"]))
        losses = [simcse_loss(one.train()(word_ids(texts)), one(word_ids(texts))).item() for one in (fresh, model)]
    assert torch.allclose(alone[0], among[0], atol=1e-5) and losses[1] < losses[0] / 2
    assert numpy.allclose(points[0], points[3], atol=1e-5)
    assert numpy.allclose(numpy.linalg.norm(points, axis=1), 1, atol=1e-5)
    first, second = (torch.nn.functional.normalize(torch.randn(5, 7), dim=1) for _ in range(2))
    terms = (first @ second.T / 0.05).double().exp()
    by_hand = -(terms.diag() / terms.sum(1)).log().mean()
    assert simcse_loss(first, second).item() == pytest.approx(by_hand.item(), rel=1e-4)
