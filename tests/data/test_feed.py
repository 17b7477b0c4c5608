"""The feed of a stage: exact shares, which records come when, whoever reads them and wherever it is interrupted."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanovlm.data.augment import View
from nanovlm.data.batching import Preparation, Report, build_batch
from nanovlm.data.feed import DamageReport, Feed, Mixture
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.templates import LYNX, NANO

BAD = {("pictures", 5), ("pictures", 6), ("words", 3)}


def words(record):
    return sum(len(turn.text) for turn in record.conversations[0])


class Source:
    """Record n says its number, at a length that depends on it; some records are damaged."""

    def __init__(self, name, bad=()):
        self.name, self.bad = name, bad

    def __len__(self):
        return 1000

    def record(self, n):
        if (self.name, n) in self.bad:
            raise ValueError(f"{self.name} {n} is damaged")
        visuals = (Visual(f"v{n}", (Image.new("RGB", (8, 8), (n % 256, 0, 0)),)),) if self.name == "pictures" else ()
        asked = Turn("user", (*range(len(visuals)), "word " * (n * 7 % 30)))
        return Record(f"{self.name}-{n}", visuals, ((asked, Turn("assistant", ("yes",))),))


NAMES = {name: None for name in "abc"}  # sources of which none is read


def draw(mixture, number):
    return [mixture.draw() for _ in range(number)]


def test_shares_are_exact_at_every_moment_and_resumed_through_sorted_json():
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    mixture, drawn = Mixture(NAMES, weights), dict.fromkeys("abc", 0)
    for n in range(1, 301):
        name, place = mixture.draw()
        assert place == drawn[name]  # every source is read in its own order, nothing left out
        drawn[name] += 1
        assert all(abs(drawn[source] - n * weight) < 1 for source, weight in weights.items())
    weights = {"c": 0.5, "a": 0.3, "b": 0.2}
    whole = draw(Mixture(NAMES, weights), 40)
    for cut in (0, 1, 7, 23):
        first, second = Mixture(NAMES, weights), Mixture(NAMES, weights)
        draw(first, cut)
        second.resume(json.loads(json.dumps(first.drawn, sort_keys=True)))
        assert draw(second, 40 - cut) == whole[cut:]
    with pytest.raises(ValueError, match=r"reads \['a', 'c'\], not \['a', 'b', 'c'\]"):
        first.resume({"a": 1, "c": 1})


@pytest.mark.parametrize("weights, drawn", [
    ({"a": 3, "b": 1}, "aabaaaba"), ({"a": 3e-7, "b": 1e-7}, "aabaaaba"), ({"c": 2}, "cccccccc"),
    ({"b": 1, "a": 1}, "babababa"),  # ties go to the one named first
    ({"a": 0.1, "b": 0.2, "c": 0.3}, "cbacbccb"),  # 0.1 + 0.2 is not 0.3 in floating point; as written it is
])
def test_weights_are_relative_and_exact(weights, drawn):
    assert "".join(name for name, _ in draw(Mixture(NAMES, weights), 8)) == drawn


def same(record):
    return record


def make(group=1, bad=(), steps=11, batch_size=6, prepare=same, **options):
    mixture = Mixture({name: Source(name, bad) for name in ("pictures", "words")}, {"pictures": 2, "words": 1})
    return Feed(mixture, prepare, batch_size, steps, group, words, seed=3, **options)


def taken(feed, number=11):
    return [[record.id for record in feed.next()] for _ in range(number)]


@pytest.fixture(scope="module", params=[1, 4])
def group(request):
    return request.param


@pytest.fixture(scope="module")
def whole(group):
    """What a feed gives without workers and interruptions."""
    return taken(make(group))


def test_every_group_holds_the_exact_shares(whole, group):
    drawn = [id for update in whole for id in update]
    for stop in (*range(6 * group, 67, 6 * group), 66):  # the last group is cut short by the stage's end
        counts = Counter(id.split("-")[0] for id in drawn[:stop])
        assert counts == {"pictures": stop * 2 // 3, "words": stop // 3}
        assert sorted(drawn[:stop]) == sorted(f"{name}-{n}" for name, count in counts.items() for n in range(count))
    mixture = make().mixture
    assert group > 1 or drawn == ["-".join(map(str, mixture.draw())) for _ in range(66)]


def test_grouped_batches_hold_one_modality_and_similar_lengths():
    updates = taken(make(group=4, steps=8), 8)
    for window in (updates[:4], updates[4:]):
        mixed = [update for update in window if len({id.split("-")[0] for id in update}) > 1]
        assert len(mixed) <= 1, "24 records, 8 of them text: of four batches of six one is mixed"
        lengths = {id: words(Source(id.split("-")[0]).record(int(id.split("-")[1]))) for update in window for id in update}
        ranges = sorted((id[:1] == "p", lengths[id], place) for place, update in enumerate(window) for id in update)
        places = [place for _, _, place in ranges]
        assert len([1 for one, other in zip(places, places[1:]) if one != other]) == 3, "one stretch of lengths each"
    shortest = [min(update) for update in updates[:4]]
    assert shortest != sorted(shortest), "short and long batches come in no order"


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(whole, group, workers):
    before = torch.get_rng_state()
    feed = make(group, workers=workers)
    assert taken(feed) == whole
    assert torch.equal(torch.get_rng_state(), before) and feed.waited > 0
    feed.close()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_every_update(whole, group, world):
    shares = [taken(make(group, rank=rank, world=world)) for rank in range(world)]
    for update, *parts in zip(whole, *shares):
        assert [len(part) for part in parts] == [len(update[rank::world]) for rank in range(world)]
        assert sorted(sum(parts, [])) == sorted(update)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", range(1, 11, 3))
def test_a_feed_goes_on_where_it_was(whole, group, workers, stop):
    first = make(group, workers=workers)
    assert taken(first, stop) == whole[:stop]
    state = json.loads(json.dumps(first.state()))  # as a checkpoint keeps it
    assert taken(first, 1) == whole[stop : stop + 1], "taking a state changes nothing"
    first.close()
    again = make(group)
    again.load_state(state)
    assert again.state() == state
    assert taken(again, 11 - stop) == whole[stop:]
    assert again.state()["drawn"] == {"pictures": 44, "words": 22}


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_records_are_replaced_by_the_next(workers, group):
    good, feed, found, damaged = taken(make(group)), make(group, BAD, workers=workers), [], []
    for _ in range(11):
        found.append([record.id for record in feed.next()])
        damaged += feed.damaged
    instead = {"pictures-5": "pictures-7", "pictures-6": "pictures-7", "words-3": "words-4"}
    if group == 1:  # a damaged record has no length, so that its group is sorted otherwise
        assert found == [[instead.get(id, id) for id in update] for update in good]
    else:
        assert sorted(sum(found, [])) == sorted(instead.get(id, id) for id in sum(good, []))
    listed = sorted((one["source"], one["record"], one["replaced_by"], one["error"]) for one in damaged)
    assert listed == [("pictures", 5, 6, "pictures 5 is damaged"), ("pictures", 6, 7, "pictures 6 is damaged"),
                      ("pictures", 6, 7, "pictures 6 is damaged"), ("words", 3, 4, "words 3 is damaged")]
    feed.close()


class Broken:
    """Not a record that is damaged, but a reader with a mistake in it."""

    def __call__(self, record):
        if record.id == "pictures-9":
            raise TypeError("what the worker says")
        return record


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_come_with_their_words(workers):
    feed = make(prepare=Broken(), workers=workers)
    with pytest.raises(TypeError, match="what the worker says"):
        taken(feed)
    feed.close()
    hopeless = make(bad={("words", n) for n in range(500)}, workers=workers)
    with pytest.raises(ValueError, match="source 'words': 100 records in a row are damaged; the last: words 99 is damaged"):
        taken(hopeless)
    hopeless.close()


def children():
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return set(file.read().split())


def test_workers_end_with_the_feed_and_leave_signals_to_the_trainer():
    before = children()
    feed = make(workers=2, steps=10_000)
    taken(feed, 2)
    workers = children() - before
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(int(worker), number)
    assert taken(feed, 3) == taken(make(steps=10_000), 5)[2:]
    feed.close()
    assert not children() & workers
    feed.close()


ABANDONED = """
import sys
sys.path.insert(0, {tests!r})
from test_feed import Broken, Source, make, taken
feed = make(prepare=Broken(), workers=2, steps=10_000)
taken(feed)
"""


@pytest.mark.slow
def test_a_program_that_fails_does_not_wait_for_its_workers():
    done = subprocess.run([sys.executable, "-c", ABANDONED.format(tests=os.path.dirname(__file__))], capture_output=True,
                          text=True, timeout=120, cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 1 and "TypeError" in done.stderr and "what the worker says" in done.stderr


def test_the_report_names_each_and_forgets_what_is_done_again(tmp_path):
    path = tmp_path / "damaged.jsonl"
    one = {"source": "coco", "record": 7, "id": "007", "error": "7.jpg is cut short", "replaced_by": 8}
    report = DamageReport(path, "align", 0, limit=0.02)
    report.add(1, [], 10)
    assert not path.exists()
    report.add(2, [one], 20)
    report.add(4, [one], 40)
    entry = {"stage": "align", "step": 4} | one
    assert [json.loads(line) for line in path.read_text().splitlines()] == [entry | {"step": 2}, entry]
    with open(path, "a") as file:
        file.write('{"stage": "align", "st')  # cut short by a kill
    assert DamageReport(path, "instruct", 4, 0.02).count == 0
    again = DamageReport(path, "align", 3, 0.02)
    assert again.count == 1 and path.read_text().count("\n") == 1
    again.add(4, [one], 40)  # two of 100
    with pytest.raises(ValueError, match="3 of 149 records are damaged, more than max_damaged 0.02 .*; the last: 7.jpg is"):
        again.add(5, [one], 149)
    with pytest.raises(ValueError, match="1 of 5 records are damaged, more than max_damaged 0 allows"):
        DamageReport(tmp_path / "other.jsonl", "align", 0, 0.0).add(1, [one], 5)


def counted(image_size, frames):
    return image_size // 4 + frames - 1


@pytest.mark.parametrize("template", [NANO, LYNX])
def test_prepared_records_make_the_same_batch(tokenizer, template, tmp_path):
    Image.radial_gradient("L").resize((30, 20)).save(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")
    visuals = (Visual("a", (picture,)), Visual("view", (picture,), View((0.5, 1.0), flip=0.5, seed=(1,))),
               Visual("clip", (picture, Image.new("RGB", (5, 9), "red"))), Visual("square", (Image.new("RGB", (8, 8), "blue"),)))
    talk = (Turn("user", (0, 1, "what?", 2)), Turn("assistant", ("a cat",)), Turn("user", (3, "a?")), Turn("assistant", ("no " * 9,)))
    record = Record("r", visuals, (talk, talk[:2]))
    prepare = Preparation(8, "pad", template=template, tokenizer=tokenizer, num_image_tokens=counted, max_tokens=40)
    done = prepare(record)
    assert all(isinstance(frame, Image.Image) for visual in done.visuals for frame in visual.frames)
    reports = Report(), Report()
    batches = [build_batch([one], template, tokenizer, counted, 8, "pad", 40, report)
               for one, report in zip((record, done), reports)]
    for name, value in vars(batches[0]).items():
        assert torch.equal(value, vars(batches[1])[name]), name
    assert reports[0] == reports[1] and reports[0].truncated_rows == 1
    assert prepare.length(record) == sum(len(turn.text) for turn in (*talk, *talk[:2])) // 4 + 2 + 2 + 3 + 2


def test_what_cannot_be_prepared_is_damage(tokenizer, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    prepare = Preparation(8, "pad", template=NANO, tokenizer=tokenizer, num_image_tokens=counted, max_tokens=20)
    talk = (Turn("user", ("what? " * 50,)), Turn("assistant", ("a",)))
    with pytest.raises(ValueError, match="bad.png: the image is damaged"):
        prepare(Record("r", (Visual("v", (str(tmp_path / "bad.png"),)),), (talk[1:],)))
    with pytest.raises(ValueError, match="record 'r', conversation 0 has no trained token within max_tokens 20"):
        prepare(Record("r", (), (talk,)))
    pictures, square = replace(prepare, template=None), Visual("v", (Image.new("RGB", (8, 8)),))
    cut = Visual("v", square.frames, View((0.5, 1.0), seed=(1,)))
    for record, message in ((Record("r", (), (talk,)), "needs one picture"),
                            (Record("r", (cut,), (talk,), regions=((0.5, 0.5),)), "without augmentation")):
        with pytest.raises(ValueError, match=message):
            pictures(record)
    assert pictures(Record("r", (square,), (talk,))) == Record("r", (square,), (talk,))
