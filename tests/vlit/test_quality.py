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

from nanovlm.data import json_files
from nanovlm.vlit import indicators, replies
from nanovlm.vlit.__main__ import main
from nanovlm.vlit.indicators import elements, parse_mark, proxy
from nanovlm.vlit.indicators import Settings
from nanovlm.vlit.indicators import Helpers, Settings, measure
from nanovlm.vlit.simcse import SentenceEncoder, loss, simcse_vectors, train_encoder, word_ids
from nanovlm.vlit.indicators import Mean, Reservoir, chosen
from nanovlm.vlit.tagging import OTHER, TASKS, assign, balance, covering, propose, tag

INDICATORS = ["MD", "C", "T", "I", "R", "O/G", "IC", "B"]  # the review's eight, in the order of its Table 4


def item(id, *said, image=None, **more):
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
    return {"id": str(id), "conversations": turns} | ({"image": image} if image else {}) | more


ITEMS = [
    item(0, "<image>\nWhat color is the dog?", "Brown.", image="a.png"),
    item(
        1,
        "<image>\nHow many dogs are there?",
        "Two.",
        "Why are they wet?",
        "They may have been swimming.",
        image="a.png",
    ),
    item(2, "<image>\nDescribe the image in detail.", "Two brown dogs stand on the grass.", image="b.png"),
    item(3, "Is there a cat?", "Brown.", image="none.png"),  # neither placeholder nor picture
]
NOTES = [
    {"id": name, "image": f"{name}.png", "captions": [], "instances": [{"category": "dog", "bbox": [0, 0, 1, 1]}] * 2}
    for name in "ab"
]


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8), (120, 80, 20)).save(tmp_path / f"{name}.png")
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(one) for one in ITEMS] + ['{"id": 9, "conv']))
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, NOTES)))
    return tmp_path


def test_every_indicator_of_a_small_file(folder, capsys):
    out = folder / "out"
    arguments = ["quality", str(folder / "data.jsonl"), "--annotations", str(folder / "notes.jsonl"), "--out", str(out)]
    assert main(arguments) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["records"], report["unreadable"], report["defective"], report["pairs"]) == (4, 1, 1, 5)
    assert report["defects"] == {"placeholders": 1, "image": 1}
    assert any("data.jsonl, line 5: unreadable" in line for line in report["problems"])
    found = {one["key"]: one for one in report["indicators"]}
    assert [one["key"] for one in report["indicators"] if one["key"] != "grounding"] == INDICATORS
    assert all(len(one["computation"]) > 20 for one in found.values())
    assert found["MD"]["value"] is None
    assert (found["C"]["value"], found["C"]["measured"], found["C"]["beside"]["coverage"]) == (
        100,
        1,
        0.2,
    )  # the count alone
    assert found["grounding"]["value"] == 100 and found["grounding"]["measured"] == 1
    tasks = {
        "instance attribute": 1,
        "instance counting": 1,
        "complex reasoning": 1,
        "detailed description": 1,
        "existence": 1,
    }
    assert report["tasks"] == tasks and found["T"]["value"] == 5 and found["B"]["value"] == 0
    assert found["I"]["value"] == 0 and found["I"]["beside"]["literal"] == 1  # five tasks of one instruction each
    assert found["R"]["value"] == pytest.approx(math.log(4))  # "Brown." stands twice
    assert found["R"]["beside"]["literal"] is None and found["R"]["beside"]["noise"] == 1
    assert found["O/G"]["value"] == pytest.approx((1 + 1 + 0 + 0 + 1) / 5)
    text = (out / "report.txt").read_text()
    assert text in capsys.readouterr().out
    for words in ("eps 0.3", "min_samples 1", "literal", "not measured", "seconds", "tokens", "proxy", "peak memory"):
        assert words in text
    assert Image.open(out / "report.png").width > 800


def asked_through(judge, folder):
    return replies.Judge(judge, replies.Replies(folder / "replies.jsonl"))


class Judge:
    """Says yes to everything, gives the mark 7, names two tasks."""

    name, accepts_images, batch_size, workers = "judge", False, 4, 1

    def __init__(self):
        self.asked = 0

    def generate(self, chats, *, n, temperature, max_tokens, seed, stop):
        self.asked += len(chats)
        found = []
        for chat in chats:
            text = chat.messages[-1][1]
            reply = "Yes" if "Is the answer right" in text else "Mark: 7" if "Rate how" in text else None
            reply = reply or (
                "1. Counting\n2. counting \n- asking why"
                if "Name the kinds" in text
                else "It is counting."
                if "many" in text
                else "?"
            )
            found.append([reply] * n)
        return found


def test_a_judge_votes_marks_and_names_tasks(folder):
    judge, settings = Judge(), Settings(votes=3)
    found, _ = measure(folder / "data.jsonl", settings, folder, Helpers(judge=asked_through(judge, folder)))
    found = {one.key: one for one in found}
    assert found["C"].value == 100 and found["C"].measured == 5 and found["C"].beside["agreement"] == 1
    assert found["C"].interval[0] < 100 and found["C"].tokens > 0
    assert found["IC"].value == 7 and found["IC"].tokens > 0 and found["IC"].beside["unreadable marks"] == 0
    assert found["T"].value == 1 and found["T"].beside["other"] == 4 and "TagGPT" in found["T"].computation
    asked = judge.asked
    measure(folder / "data.jsonl", settings, folder, Helpers(judge=asked_through(judge, folder)))
    assert judge.asked == asked  # what was recorded is not asked again


def test_what_a_judge_is_told_and_shown(folder):
    class Watcher(Judge):
        def generate(self, chats, **how):
            self.chats = self.__dict__.get("chats", []) + list(chats)
            return super().generate(chats, **how)

    blind, seeing = Watcher(), Watcher()
    seeing.accepts_images = True
    for judge in (blind, seeing):
        helpers = Helpers(judge=replies.Judge(judge), describe=lambda sample: f"told of {sample.id}")
        found, _ = measure(folder / "data.jsonl", Settings(votes=1), folder, helpers)
    judged = {
        judge: [chat for chat in judge.chats if "Is the answer right" in chat.messages[-1][1]]
        for judge in (blind, seeing)
    }
    assert all("told of" in chat.messages[-1][1] and not chat.image for chat in judged[blind])
    assert Counter(chat.image.rpartition("/")[2] for chat in judged[seeing]) == {"a.png": 3, "b.png": 1}
    assert found[1].beside["pictures missing"] == 1 and found[1].measured == 4
    assert not any("told of" in chat.messages[-1][1] for chat in judged[seeing])


def test_own_task_field_and_lexicon(folder):
    lines = [json.dumps(one | {"task": "mine"}) for one in ITEMS[:2]] + [json.dumps(ITEMS[2])]
    (folder / "own.jsonl").write_text("\n".join(lines))
    (folder / "names.txt").write_text("Color\n\ndetail\n")
    out = folder / "out"
    flags = ["--task-field", "--lexicon", str(folder / "names.txt"), "--out", str(out)]
    assert main(["quality", str(folder / "own.jsonl"), *flags]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["tasks"] == {"mine": 3, "detailed description": 1}
    assert next(one["value"] for one in report["indicators"] if one["key"] == "O/G") == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    "flags, words",
    (
        (["--kept", "0"], "--kept is 0"),
        (["--min-samples", "0"], "--min-samples is 0"),
        (["--eps", "3"], "eps 3.0"),
        (["--size", "50"], "holds 4 readable samples; 50 were asked for"),
        (["--generator", "replay"], "needs --replies"),
        (["--annotations", "missing.json"], "missing.json"),
        (["--encoder", "missing"], "config.json"),
    ),
)
def test_bad_flags_end_with_a_message(folder, capsys, flags, words):
    assert main(["quality", str(folder / "data.jsonl"), "--out", str(folder / "out"), *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_field_with_too_many_tasks_is_none(folder, monkeypatch):
    monkeypatch.setattr(indicators, "MOST_TASKS", 3)
    lines = [json.dumps(item(n, "Why?", "So.", task=f"task {n}")) for n in range(5)]
    (folder / "own.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="more than 3 different tasks, the last 'task 3'; leave out --task-field"):
        measure(folder / "own.jsonl", Settings(task_field=True))


def test_a_file_without_a_single_answer_is_an_error(folder):
    (folder / "bare.jsonl").write_text(json.dumps(item(1, "A question?")))
    with pytest.raises(ValueError, match="no instruction with a response"):
        measure(folder / "bare.jsonl")


@pytest.mark.parametrize(
    "instruction, task",
    (
        ("What color is the car?", "instance attribute"), ("How many people?", "instance counting"),
        ("Where is the red star?", "object localization"), ("Why is he laughing?", "complex reasoning"),
        ("Describe the image concisely.", "image captioning"), ("Give a detailed description.", "detailed description"),
        ("Is there a dog?", "existence"), ("What is left of the cup?", "spatial relation"), ("Read the text.", "text recognition"),
        ("What is the person in the box doing?", "region understanding"), ("Is it raining?", "verification"),
        ("What is the man doing?", "action recognition"), ("Write a poem.", "visual storytelling"), ("Who?", "visual question answering"),
        ("Portray the picture now, briefly", "image captioning"), ("Hmpf", OTHER), ("", OTHER),
    ),
)  # fmt: skip
def test_tasks_by_rule(instruction, task):
    assert tag(instruction) == task and (task == OTHER or task in TASKS)


def test_labels_of_a_language_model():
    tags = propose(replies.Judge(Judge()), [f"instruction {n}" for n in range(45)])
    assert tags == ["counting", "asking why"]  # numbers and bullets gone, equal names merged
    assigned = assign(replies.Judge(Judge()), ["how many?", "why?"], tags)
    assert assigned == ["counting", OTHER]
    assert covering(["a"] * 98 + ["b", OTHER]) == {"a": 98, OTHER: 2}

    class Silent(Judge):
        def generate(self, chats, **how):
            return [[] for _ in chats]

    with pytest.raises(ValueError, match="named no task"):
        propose(replies.Judge(Silent()), ["one"])


def test_balance_by_hand():
    assert balance({"a": 5, "b": 5}) == {
        "variance": 0,
        "entropy": pytest.approx(math.log(2)),
        "gini": 0,
        "largest": 0.5,
    }
    told = balance({"a": 3, "b": 1})  # shares 75 and 25 percent
    assert told["variance"] == 625 and told["gini"] == pytest.approx(0.25) and told["largest"] == 0.75
    assert balance({"a": 7})["variance"] == 0


@pytest.mark.parametrize(
    "instruction, number",
    (
        ("Describe.", 0),
        ("How many dogs and cats are left of the two wine glasses?", 5),  # dog, cat, wine glass; two; left of
        ("Is the red dog next to the dog?", 3),  # dog once; next to; red
        ("What is marked by the box [0.1, 0.2, 0.3, 0.4]?", 2),  # box, and the region itself
        ("Who is marked?", 1),
    ),
)
def test_semantic_elements(instruction, number):
    assert elements(instruction) == number


def test_marks_and_proxy():
    assert [parse_mark(text) for text in ("7", "Mark: 10/10", "0, then 3", "3.5 or 4", "many", "11")] == [
        7,
        10,
        3,
        4,
        None,
        None,
    ]
    easy, hard = (
        proxy("What color is it?"),
        proxy("Why might they stand there, and what would you compare if it rained?"),
    )
    assert 1 <= easy < hard <= 10 and proxy("why " * 50) == 10
    assert proxy("Why?", turns=5) > proxy("Why?")


def test_a_reservoir_is_a_fair_sample():
    counts = Counter()
    for seed in range(600):
        sample = Reservoir(3, seed)
        for n in range(10):
            sample.add(n)
        assert len(set(sample.kept)) == 3 and sample.seen == 10
        counts.update(sample.kept)
    assert all(130 < counts[n] < 230 for n in range(10))  # 180 expected, sd 11


def test_exactly_so_many_are_chosen():
    from nanovlm.vlit.samples import Unreadable

    broken = Unreadable("x", "")
    stream = [("", broken if n == 2 else n) for n in range(21)]
    counts = Counter()
    for seed in range(300):
        found = [value for _, value in chosen(iter(stream), 20, 5, seed)]
        assert (
            broken in found
            and len(found) == 6
            and [n for n in found if n is not broken] == sorted(n for n in found if n is not broken)
        )
        counts.update(n for n in found if n is not broken)
    assert all(40 < counts[n] < 115 for n in range(21) if n != 2)  # 75 expected, sd 7.5


def test_running_means():
    rng, values = numpy.random.default_rng(0), Mean()
    numbers = rng.normal(1e6, 3, 50)
    for value in numbers:
        values.add(float(value))
    assert values.mean == pytest.approx(numbers.mean()) and values.count == 50
    reach = 1.96 * numbers.std(ddof=1) / math.sqrt(50)
    assert values.interval() == pytest.approx((numbers.mean() - reach, numbers.mean() + reach))
    assert Mean().interval() is None


def many(path, number):
    rng = random.Random(0)
    with open(path, "w") as file:
        for n in range(number):
            words = " ".join(f"w{rng.randrange(100)}" for _ in range(12))
            asked = rng.choice(("What color is the {}?", "How many {}s are there?", "Why is the {} here?")).format(
                words
            )
            file.write(json.dumps(item(n, asked, words)) + "\n")
    return path


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(indicators, "NAMED", 10)
    monkeypatch.setattr(json_files, "CHUNK", 1 << 12)
    options, peaks = Settings(instructions=30, responses=50, draws=2, kept=40), []
    for number in (300, 1500):
        path = many(tmp_path / f"{number}.jsonl", number)
        tracemalloc.start()
        indicators.Survey(path, options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 150_000  # 1,200 records more are over a megabyte as objects


def test_the_same_seed_gives_the_same_report(tmp_path):
    path = many(tmp_path / "a.jsonl", 120)

    def values(seed):
        found, _ = measure(path, Settings(size=60, seed=seed, instructions=10, responses=20, draws=2))
        return [(one.key, one.value, {k: v for k, v in one.beside.items()}) for one in found]

    assert values(1) == values(1) != values(2)


def test_simcse_loss_is_equation_2():
    torch.manual_seed(0)
    first, second = (torch.nn.functional.normalize(torch.randn(5, 7), dim=1) for _ in range(2))
    by_hand = 0.0
    for i in range(5):
        terms = [math.exp((first[i] @ second[j]).item() / 0.05) for j in range(5)]
        by_hand -= math.log(terms[i] / sum(terms)) / 5
    assert loss(first, second).item() == pytest.approx(by_hand, rel=1e-4)


def test_simcse_learns_and_ignores_padding():
    texts = [
        f"the {color} {thing} stands {place}"
        for color in ("red", "blue")
        for thing in ("dog", "cup", "car")
        for place in ("here", "there")
    ]
    model = train_encoder(texts, steps=15)
    ids, lengths = word_ids(texts)
    fresh = SentenceEncoder()
    with torch.no_grad():
        alone, among = model(*word_ids(["a dog"])), model(*word_ids(["a dog", "a much longer text than the other one"]))
        losses = [loss(one.train()(ids, lengths), one(ids, lengths)).item() for one in (fresh, model)]
    assert torch.allclose(alone[0], among[0], atol=1e-5)
    assert losses[1] < losses[0] / 2
    state = torch.get_rng_state()
    points = simcse_vectors(texts[:3] + texts[:1] + [""])
    assert numpy.allclose(points[0], points[3], atol=1e-5) and numpy.allclose(
        numpy.linalg.norm(points, axis=1), 1, atol=1e-5
    )
    assert torch.equal(state, torch.get_rng_state())
