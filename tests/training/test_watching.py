"""What is looked at beside the training: movement, spikes, what is not finite, held-out records, curves, a GPU's peak."""

import dataclasses
import errno
import functools
import math
import zlib


import pytest
import torch
import torch.nn.functional as F
from test_trainer import hooked, log, make, train
from tiny_recipe import RECIPE, Squares

from nanovlm.training import diagnostics, trainer
from nanovlm.training.checkpoint import CheckpointError
from nanovlm.data.batching import build_batch
from nanovlm.data.records import Changed, Record, Turn
from nanovlm.training.update import gradient_origin, next_to_train, TrainingError
from nanovlm.training.diagnostics import FEWEST, Movement, SAMPLE, SPIKE, sample, spike_limit
from nanovlm.training.progress import StopRequests
from nanovlm.recipes import RECIPES
from nanovlm.training.cost import example_cost, total_cost
from nanovlm.training.stages import Stage
from nanovlm.training.cost import make_meter

STAGE = Stage("align", "language", {"bridge": 1e-3, "adapters": 1e-3}, {"scenes": 1.0}, steps=40, batch_size=8)


# ---- movement

def test_movement_is_the_distance_from_the_beginning():
    parts = {"bridge": {"a": torch.full((3, 4), 2.0), "b": torch.zeros(5)}, "adapters": {"c": torch.zeros(2)}, "vision": {"d": torch.ones(1)}}
    movement = Movement(parts, STAGE)
    assert movement.measure(parts) == {"bridge": 0.0, "adapters": 0.0}
    parts["bridge"]["a"] += 0.3
    parts["bridge"]["b"] += 0.4
    parts["adapters"]["c"] += 1
    found = movement.measure(parts)
    assert found["bridge"] == pytest.approx(math.sqrt(12 * 0.09 + 5 * 0.16) / math.sqrt(12 * 4)) and found["adapters"] == 1.0
    torch.manual_seed(0)
    weight = torch.randn(300, 100)
    assert len(sample(weight)) == math.ceil(30_000 / math.ceil(30_000 / SAMPLE)) <= SAMPLE and torch.equal(sample(weight[:2]), weight[:2].flatten())
    movement = Movement({"bridge": {"a": weight}, "adapters": {}}, STAGE)
    change = 0.1 * torch.randn(300, 100)
    found = movement.measure({"bridge": {"a": weight + change}, "adapters": {}})
    assert found == {"bridge": pytest.approx((change.norm() / weight.norm()).item(), rel=0.05)}


def test_a_run_logs_and_prints_what_moved_and_a_resumed_one_the_same(tmp_path, capsys):
    whole = train(make(tmp_path / "whole"))
    printed = capsys.readouterr().out
    entries = log(whole.out, "parts")
    assert [entry["step"] for entry in entries] == [5, 6, 10, 12]  # every fifth step, and the last of each stage
    assert [set(entry["parts"]) for entry in entries[1::2]] == [{"vision", "text_tower"}, {"bridge", "adapters", "vision_branch"}]
    for part, last in entries[1]["parts"].items():
        assert last["moved"] > entries[0]["parts"][part]["moved"] > 0 and last["gradient"] > 0
        assert f"{part:<18}" in printed and f"{last['moved']:.2%}" in printed
    for entry in log(whole.out):  # the parts' gradients add up to the whole
        for parts in (one["parts"] for one in entries if one["step"] == entry["step"]):
            assert math.hypot(*(one["gradient"] for one in parts.values())) == pytest.approx(entry["gradient_norm"], rel=1e-4)
    out, stopped = tmp_path / "run", 0
    while not (out / "results.json").exists():
        try:
            train(make(out, max_minutes=0))
        except trainer.Stopped:
            stopped += 1
    assert stopped > 5 and log(out, "parts") == entries


# ---- guards


def test_a_spike_is_far_above_the_last_losses(tmp_path, monkeypatch, capsys):
    quiet = [1.0 + 0.1 * (n % 3) for n in range(FEWEST)]  # median 1.1, median distance 0.1
    assert spike_limit(quiet) == pytest.approx(1.1 + SPIKE * 0.1)
    assert spike_limit(quiet[:-1]) == math.inf, "too few to tell"
    monkeypatch.setattr("nanovlm.training.diagnostics.FEWEST", 2)
    monkeypatch.setattr("nanovlm.training.diagnostics.SPIKE", -1e9)
    run = train(make(tmp_path / "run"))
    assert [("spike" in entry) for entry in log(run.out)] == [False, False, True, True, True, True] * 2
    assert "stage tower, step 3: the loss jumped to " in capsys.readouterr().out


def poisoned(every):
    """The tiny recipe, whose bridge gives out what is not finite in some of its calls, which are counted from 1."""
    calls = []

    def build(size, vocab_size):
        model = RECIPE.build(size, vocab_size)

        def spoil(module, inputs, output):
            if not torch.is_grad_enabled():  # the blank picture before the run
                return output
            calls.append(output)
            return output * float("nan") if every(len(calls)) else output

        model.bridge.register_forward_hook(spoil)
        return model

    return hooked(build=build)


def settings(**values):
    return {"stages": ["align"], "set": [f"align.{name}={value}" for name, value in values.items()]}


def test_what_is_not_finite_is_left_out_on_request(tmp_path, capsys):
    """The weights are those of the other updates: none of them is touched."""
    run = train(make(tmp_path / "run", poisoned(lambda call: call == 2), **settings(non_finite="skip", micro_batch_size=6)))
    skipped = log(run.out, "skipped")
    assert len(skipped) == 1 and "the loss is nan; records: " in skipped[0]["skipped"]
    steps = [entry["step"] for entry in log(run.out)]
    assert sorted([*steps, skipped[0]["step"]]) == [1, 2, 3, 4, 5, 6]
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())
    assert "the update is left out: the loss is nan" in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path):
    """The second update's gradient is infinite in one place: without the guard every weight of the optimizer would go."""
    seen = []

    def build(size, vocab_size):
        model = RECIPE.build(size, vocab_size)
        weight = model.bridge.linear.weight

        def spoil(gradient):
            seen.append(weight.detach().clone())
            return gradient * float("inf") if len(seen) == 2 else gradient

        weight.register_hook(spoil)
        return model

    run = train(make(tmp_path / "run", hooked(build=build), **settings(non_finite="skip", micro_batch_size=6, **{"mixture.words": "none"})))
    (skipped,) = log(run.out, "skipped")
    assert skipped["step"] == 2 and "the gradient's norm is " in skipped["skipped"] and "it arose in the part bridge" in skipped["skipped"]
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3])


def test_a_bad_gradient_arose_where_it_is_nearest_to_the_loss(tmp_path):
    run = make(tmp_path / "run")
    for names, found in ((["decoder.layers.0.ffn.up.weight", "bridge.linear.bias", "vision.positions"], "language_model, first seen at decoder.layers.0"),
                         (["bridge.linear.bias", "vision.positions"], "bridge, first seen at bridge.linear.bias")):
        for name, parameter in run.model.named_parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if name in names else 1.0)
        assert gradient_origin(run, run.stages[1]).startswith(f"it arose in the part {found}")


def test_not_forever(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "MOST_SKIPPED", 2)
    with pytest.raises(TrainingError, match="stage align, step 3 of 6: the loss is nan"):
        train(make(tmp_path / "run", poisoned(lambda call: True), **settings(non_finite="skip")))
    assert [entry["step"] for entry in log(tmp_path / "run", "skipped")] == [1, 2]


def test_a_log_that_cannot_be_written_ends_in_words(tmp_path, monkeypatch):
    def fail(*values):
        raise OSError(errno.EROFS, "Read-only file system")

    run = make(tmp_path / "run")
    one = trainer.Trainer(run, StopRequests())
    monkeypatch.setattr("nanovlm.files.json.dumps", fail)
    with pytest.raises(CheckpointError, match="log.jsonl cannot be written.*Read-only file system.*make room"):
        one.log.write(step=1)


def test_an_update_that_is_left_out_has_no_gradient_to_measure(tmp_path):
    """Steps 5 and 6, where movement is measured: the first is left out."""
    run = train(make(tmp_path / "run", poisoned(lambda call: call == 5), **settings(non_finite="skip", micro_batch_size=6, **{"mixture.words": "none"})))
    assert [entry["step"] for entry in log(run.out, "skipped")] == [5] and [entry["step"] for entry in log(run.out, "parts")] == [6]


# ---- held-out records

class Numbers:
    """Record n says n; every epoch of 300 in the same order."""

    name = "numbers"

    def __len__(self):
        return 300

    def record(self, n):
        if n % 300 == 7:
            raise ValueError("damaged")
        return Record(str(n % 300), (), ((Turn("user", (f"say {n % 300}",)), Turn("assistant", ("yes",))),))


HELD = [n for n in range(300) if zlib.crc32(str(n).encode()) % 100 == 0]  # 37, 40, 181, 226


def test_held_out_records_are_never_trained_on():
    source = Changed(Numbers(), functools.partial(next_to_train, limit=1.0))
    seen = [source.record(n).id for n in range(600) if n % 300 != 7]
    assert not set(map(int, seen)) & set(HELD) and len(HELD) == 4
    assert seen[:6] == ["0", "1", "2", "3", "4", "5"] and source.record(37).id == "38" and source.record(337).id == "38"
    found = [int(record.id) for record in diagnostics.held_out(Numbers())]
    assert len(found) == 3 and set(found) < set(HELD)
    class Same(Numbers):
        def record(self, n):
            return Record("37", (), ((Turn("user", ("a",)), Turn("assistant", ("b",))),))

    with pytest.raises(ValueError, match="numbers: 1000 held-out records behind record 3; records need ids of their own"):
        Changed(Same(), functools.partial(next_to_train, limit=1.0)).record(3)


@pytest.mark.parametrize("length, number", [(900, 8), (60, 3), (12, 2), (5, 1), (4, 0)])
def test_a_small_file_holds_out_a_few(length, number):
    class Few(Numbers):
        __len__ = lambda self: length
        record = lambda self, n: Record(f"x{n}", (), super().record(8).conversations) if n != 7 else super().record(7)

    assert len(diagnostics.held_out(Few())) == number


class Named(Squares):
    """Squares whose every third record is held out."""

    def __init__(self, seed, kind="picture"):
        super().__init__(seed, kind)
        self.asked = set()

    def record(self, n):
        record = super().record(n)
        self.asked.add(n)
        return Record(str(HELD[n % 4] if n % 3 == 0 else 1000 + 10 * n), record.visuals, record.conversations)


def test_a_run_asks_its_held_out_records(tmp_path, capsys):
    recipe = hooked(sources={"pictures": Named, "words": lambda seed: Named(seed, "text")})
    run = make(tmp_path / "run", recipe)
    run.recipe = dataclasses.replace(recipe, published=True, sources={})  # what a recipe draws itself is not held out
    train(run)
    entries = log(run.out, "held_out")
    assert [entry["step"] for entry in entries] == [6, 10, 12] and all(set(entry["held_out"]) == {"pictures", "words"} for entry in entries)
    assert all(0 < loss < 20 for entry in entries for loss in entry["held_out"].values())
    assert len(entries[0]["answers"]) == 3 and all("-> " in line and "(right: " in line for line in entries[0]["answers"])
    printed = capsys.readouterr().out
    assert "step 10: held-out loss pictures " in printed and entries[0]["answers"][0] in printed
    plain = train(make(tmp_path / "plain", recipe))
    assert not log(plain.out, "held_out")


def test_held_out_losses_by_hand(tmp_path):
    run = make(tmp_path / "run")
    stage = run.stages[1]
    records = [Squares(0).record(n) for n in range(5)]
    run.model.vision.resize(stage.image_size)
    found = diagnostics.held_out_losses(run, stage, {"some": records, "none": []})
    batch = build_batch(records, run.template_of(stage), run.tokenizer, run.model.num_image_tokens, 16, "crop", 40)
    scores, labels = run.model(batch)[:, :-1], batch.labels[:, 1:]
    assert found == {"some": pytest.approx(F.cross_entropy(scores.flatten(0, 1), labels.flatten()).item(), rel=1e-5)}


# ---- curves, log, peak


def test_curves_are_drawn_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnostics, "CURVES", 0.0)
    drawn = []
    monkeypatch.setattr(diagnostics, "plot_curves", lambda entries, path, seed: (drawn.append(len(entries)), path.write_bytes(b"png")))
    train(make(tmp_path / "run"))
    assert drawn and drawn == sorted(drawn) and drawn[0] < 12


def test_the_share_of_the_peak_by_hand():
    """LLaVA-Phi instructed: a picture and rows of 876 tokens, against what the rehearsal of such a row counts."""
    recipe = RECIPES["llava_phi"]
    stage = recipe.stages("tiny", False)[2]
    with torch.device("meta"):
        model = recipe.build("tiny", 0)
        whole = example_cost(model, stage, 50)
        meter = make_meter(model, stage, peak=1e9)
    flops = total_cost(cost for part, cost in whole.items() if part != "head").flops
    tokens = 50 + model.num_image_tokens(stage.image_size)
    assert meter(3, 3, 3 * tokens, seconds=2.0) == pytest.approx(3 * flops / 2 / 1e9, rel=1e-6)
