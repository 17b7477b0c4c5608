"""The loop in one process: what trains, what is divided by what, what is written, and that any step can be the last."""

import dataclasses
import json
import math
import os
import signal
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

from nanovlm.training import checkpoint, trainer
from nanovlm.training.checkpoint import CheckpointError, complete, read, read_state
from nanovlm.training.progress import StopRequests, Stopped
from nanovlm.training.stages import everything, text_side
from nanovlm.training.start import make_run
from nanovlm.training.update import TrainingError
from tiny_recipe import RECIPE, Squares

WISHES = {"recipe": "tiny", "size": None, "stages": None, "without": [], "set": [], "init": None, "lora": None, "resume": False,
          "data": None, "images": None, "datasets": None, "device": "cpu", "threads": 1, "precision": None, "seed": 0, "max_minutes": None,
          "workers": 0, "max_damaged": 0.01, "allow_missing": False, "smoke": False, "tests": False, "epochs": None,
          "recompute": False, "compile": False, "keep": 1, "save_in_background": False, "tune": None}


def make(out, recipe=RECIPE, **wishes):
    """A run of the tiny recipe; resumed if the folder holds one."""
    return make_run(recipe, Namespace(**WISHES | {"resume": out.exists()} | wishes), out)


def hooked(**hooks):
    return dataclasses.replace(RECIPE, **hooks)


def train(run, stop=None):
    trainer.Trainer(run, stop or StopRequests()).train()
    return run


def log(out, key="loss"):
    return [entry for entry in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if key in entry]


def losses(out):
    return [(entry["step"], entry["loss"]) for entry in log(out)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run."""
    torch.manual_seed(1)  # a run must not depend on what was drawn before it
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(make(out))


def assert_same(out, whole):
    assert losses(out) == losses(whole.out)
    for name in ("model", "text_tower"):
        found, expected = load_file(out / f"{name}.safetensors"), load_file(whole.out / f"{name}.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    for key in ("measures", "exam"):
        assert log(out, key) == log(whole.out, key)


def test_what_a_run_leaves_behind_and_its_log_tells(whole):
    assert sorted(os.listdir(whole.out)) == [
        "config.json", "curves.png", "log.jsonl", "model.safetensors", "results.json", "state", "text_tower.safetensors",
        "tokenizer.json"]
    assert [path.name for path in complete(whole.out)] == ["step-00000012"]
    results = json.loads((whole.out / "results.json").read_text())
    assert results["parameters"] == sum(p.numel() for p in whole.model.parameters()) and results["seconds"] > 0
    assert set(results) == {"color", "parameters", "seconds", "cpu_seconds"} and results["cpu_seconds"] > 0
    config = json.loads((whole.out / "config.json").read_text())
    assert config["image_size"] == 16 and config["recipe"] == "tiny" and config["threads"] == 1
    assert (whole.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    entries = log(whole.out)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert [entry["stage"] for entry in entries] == ["tower"] * 6 + ["align"] * 6
    assert all(entry["tokens_per_second"] > 0 and entry["gradient_norm"] > 0 for entry in entries)
    seconds = [entry["seconds"] for entry in entries]
    assert seconds == sorted(seconds) and 0 < seconds[0]
    moments = [(entry["stage"], entry["step"], entry["when"]) for entry in log(whole.out, "measures")]
    assert moments == [("tower", 0, "before"), ("tower", 6, "after"), ("align", 6, "before"), ("align", 12, "after")]
    assert [entry["step"] for entry in log(whole.out, "exam")] == [10], "a tower cannot answer"
    rates = [entry["lr"] for entry in log(whole.out)]
    assert rates[:4] == [2e-3] * 4 and rates[4] > rates[5] > 0  # trapezoid over 6 steps
    warmup = [0.1, 0.55] + [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates[6:] == pytest.approx([5 * 2e-3 * factor for factor in warmup])  # the largest is Muon's


def test_the_sources_read_on_where_the_stage_before_stopped(tmp_path):
    asked = []

    class Spy(Squares):
        def record(self, n):
            asked.append((self.kind, n))
            return super().record(n)

    train(make(tmp_path / "run", hooked(sources={"pictures": Spy, "words": lambda seed: Spy(seed, "text")})))
    assert sorted(n for kind, n in asked if kind == "picture") == list(range(36 + 24))
    assert sorted(n for kind, n in asked if kind == "text") == list(range(12))


class StopAfter(StopRequests):
    """A request to stop that comes when the log has so many steps; with `last` None there is none, and nothing is read."""

    def __init__(self, out, last):
        super().__init__()
        self.out, self.last = out, last

    @property
    def requested(self):
        if self.last is None or not (self.out / "log.jsonl").exists():
            return None
        return Stopped(130, "test") if len(losses(self.out)) == self.last else None

    @requested.setter
    def requested(self, value):
        assert value is None


@pytest.mark.parametrize("last", [1, 4, 5, 6, 7, 9, 12])
def test_any_step_can_be_the_last_of_a_process(tmp_path, whole, last):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(make(out), StopAfter(out, last))
    assert losses(out)[-1][0] == last
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # a line that the kill cut short
    torch.rand(5)
    train(make(out))
    assert_same(out, whole)


def test_checkpoints_come_when_due_and_a_finished_run_can_be_resumed(tmp_path, whole, capsys, monkeypatch):
    out, written, begin = tmp_path / "run", [], checkpoint.begin
    monkeypatch.setattr(checkpoint, "begin", lambda out, step, *rest: written.append(step) or begin(out, step, *rest))
    train(make(out))
    assert written == [4, 6, 8, 12]
    (out / "results.json").unlink()
    capsys.readouterr()
    train(make(out))
    assert_same(out, whole)
    assert (out / "results.json").exists()
    shown = capsys.readouterr().out
    assert "continuing after step 12, in stage align" in shown and "stage align: 6 steps of 6 examples at 16 pixels" in shown
    assert "bridge                     544  yes     0.002" in shown
    assert "stage align: none of the 64 frozen tensors has moved" in shown


class Spoiled(Squares):
    """A source with one bad record."""

    broken = True

    def record(self, n):
        if n == 40 and self.broken:  # read in step 2 of the second stage
            torch.rand(3)
            raise ValueError("square-40: the picture is damaged")
        return super().record(n)


def test_a_bad_record_stops_the_run_with_everything_saved(tmp_path, whole):
    out = tmp_path / "run"
    recipe = hooked(sources=RECIPE.sources | {"pictures": Spoiled})
    message = "stage align, step 2 of 6: 1 of 12 records are damaged, more than .* square-40: the picture is damaged"
    with pytest.raises(TrainingError, match=message):
        train(make(out, recipe, max_damaged=0.0))
    assert [path.name for path in complete(out)] == ["step-00000007"]
    random = [read(complete(folder)[0])["random"]["cpu"] for folder in (out, whole.out)]
    assert torch.equal(*random), "what the failed step has drawn is forgotten"
    train(make(out))
    assert_same(out, whole)


def test_time_is_told_right(tmp_path, monkeypatch):
    """Time that passes only when an update is averaged, two seconds each."""
    now, tokens, average, out = [1000.0], [], trainer.Update.average, tmp_path / "run"

    def slow(update):
        now[0] += 2
        tokens.append(average(update)[1])
        return 1.5, tokens[-1]

    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(trainer.time, "process_time", lambda: 2 * now[0])
    monkeypatch.setattr(trainer.Update, "average", slow)
    with pytest.raises(Stopped, match="0.1 are over"):
        train(make(out, max_minutes=0.1))
    assert [entry["tokens_per_second"] for entry in log(out)] == [round(number / 2) for number in tokens]
    now[0] = 0.0  # another process, other clocks
    train(make(out))
    assert [entry["seconds"] for entry in log(out)] == [2.0 * step for step in range(1, 13)]
    assert {entry["loss"] for entry in log(out)} == {1.5}
    results = json.loads((out / "results.json").read_text())
    assert results["seconds"] == 24.0


def test_the_random_state_of_a_gpu_is_resumed(tmp_path, monkeypatch):
    one, gpu, found = trainer.Trainer(make(tmp_path / "run"), StopRequests()), torch.device("cuda", 1), []
    one.begin(0, None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device.index], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: found.append((value.tolist(), device)))
    one.save(one.feed.state(), trainer.random_state(gpu))
    one.run.device = gpu
    one.restore(*one.last_checkpoint())
    assert found == [([1], gpu)]


@pytest.mark.parametrize("made", [lambda patches: patches[:, ::2], lambda patches: patches @ torch.ones(3, 3)])
def test_a_bridge_that_does_not_fit_is_refused_before_the_run(tmp_path, made):
    def build(size, vocab_size):
        model = RECIPE.build(size, vocab_size)
        forward = model.bridge.forward
        model.bridge.forward = lambda patches, num_frames: made(forward(patches, num_frames))
        return model

    with pytest.raises(ValueError, match="the bridge MLPProjector"):
        make(tmp_path / "run", hooked(build=build))
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_a_contrastive_model(tmp_path, whole):
    recipe = hooked(contrastive=None)
    run = train(make(tmp_path / "run", recipe, without=["tower"]))
    assert not (run.out / "text_tower.safetensors").exists() and "text_tower" not in run.parts()
    assert "text_tower" in whole.parts() and len(losses(run.out)) == 6
    assert make(tmp_path / "again", recipe, without=["tower"], init=[str(whole.out)]).contrastive is None
    with pytest.raises(ValueError, match="'tower' is contrastive, but the recipe has no contrastive model"):
        make(tmp_path / "other", recipe)


def test_a_signal_during_a_measurement_takes_effect_at_once(tmp_path, whole):
    out, reached = tmp_path / "run", []

    def evaluate(run, stage):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(stage)

    with StopRequests() as stop, pytest.raises(Stopped) as stopped:
        train(make(out, hooked(evaluate=evaluate)), stop)
    assert stopped.value.exit_code == 130 and reached == [] and str(stopped.value) == "SIGINT received"
    train(make(out))
    assert_same(out, whole)


def test_asking_twice_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    before = signal.getsignal(signal.SIGINT)
    with StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [] and stop.requested.exit_code == 130
        os.kill(os.getpid(), signal.SIGTERM)
        assert left == [143]
        with pytest.raises(Stopped), stop.anywhere():
            pytest.fail("a request made before must not wait for the end")
    assert signal.getsignal(signal.SIGINT) is before


def test_only_the_parts_of_a_stage_move(tmp_path):
    run = make(tmp_path / "run")
    one = trainer.Trainer(run, StopRequests())
    for index, stage in enumerate(run.stages):
        one.begin(index, None)
        before = {name: tensor.clone() for name, tensor in everything(run.model, run.contrastive).items()}
        one.train_stage()
        moved = {name for name, now in everything(run.model, run.contrastive).items() if not torch.equal(now, before[name])}
        assert moved == {name for part in stage.learning_rates for name in run.parts()[part]}
    assert run.model.vision.positions.shape[0] == 16


@pytest.mark.parametrize("wanted", [True, False])
def test_the_vision_branch_may_start_as_a_copy_of_the_text(tmp_path, wanted):
    run = make(tmp_path / "run", set=[f"align.copy_vision_branch={wanted}"])
    run.model.decoder.layers[0].norm_1.text.weight.data += 1
    trainer.Trainer(run, StopRequests()).begin(1, None)
    norm = run.model.decoder.layers[0].norm_1
    assert torch.equal(norm.vision.weight, norm.text.weight) is wanted


@pytest.mark.parametrize("broken", ["decoder.embedding.weight", "log_scale"])
def test_a_frozen_tensor_that_moves_is_found(tmp_path, broken):
    def exam(run):
        tensors = run.model.state_dict() | text_side(run.contrastive)
        tensors[broken].view(-1)[:1] += 1e-3
        return []

    run = make(tmp_path / "run", hooked(exam=exam, exam_every=10))
    with pytest.raises(TrainingError, match=f"stage align: frozen tensors have moved: {broken}$"):
        train(run)


def test_measuring_leaves_no_trace(tmp_path, whole):
    """evaluate of the tiny recipe draws random numbers; exam and evaluate see the models in evaluation mode."""
    modes = []

    def evaluate(run, stage):
        modes.append((run.model.training, run.contrastive.training, torch.is_grad_enabled()))
        return {"color": 0.5}

    run = make(tmp_path / "run", hooked(evaluate=evaluate))
    state = torch.get_rng_state()
    one = trainer.Trainer(run, StopRequests())
    one.ask(lambda run: torch.rand(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert run.model.training and run.contrastive.training
    train(run)
    assert modes == [(False, False, False)] * 4
    assert losses(run.out) == losses(whole.out)


def test_a_summary_is_filled_and_checked(tmp_path, capsys):
    shares = iter([0.43, 0.985, 0.5, 0.5])
    train(make(tmp_path / "run", hooked(evaluate=lambda run, stage: {"color": next(shares)})))
    shown = capsys.readouterr().out
    assert "tower: colours told apart 43.0% → 98.5%\n" in shown and shown.count("colours told apart") == 1
    assert "align       color                         50.0%    50.0%" in shown and "results: ['color'" in shown
    with pytest.raises(ValueError, match="stage 'tower' names what .* 'color'. Did you mean 'colour'"):
        make(tmp_path / "other", hooked(measures=lambda stage: ("colour",)))


def test_the_exam_prints_only_what_has_changed(tmp_path, capsys):
    answers = iter([["a", "b"], ["a", "b"], ["a", "c"], ["a"], ["a", "c", "d"], ["a", "c", "d"]])
    train(make(tmp_path / "run", hooked(exam=lambda run: next(answers), exam_every=1)))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert shown == ["step 7: a", "step 7: b", "step 9: c", "step 11: c", "step 11: d"]
    assert [(entry["step"], entry["exam"]) for entry in log(tmp_path / "run", "exam")] == [
        (7, ["a", "b"]), (9, ["a", "c"]), (10, ["a"]), (11, ["a", "c", "d"])]


def test_cut_rows_are_reported(tmp_path, capsys):
    train(make(tmp_path / "run", set=["align.max_tokens=14", "align.mixture.pictures=none", "align.steps=4"]))
    assert "align: 24 of 24 rows were cut to max_tokens 14, 72 tokens lost" in capsys.readouterr().out
    assert read_state(complete(tmp_path / "run")[0])["report"] == {"rows": 24, "truncated_rows": 24, "truncated_tokens": 72}


def test_another_run_in_the_checkpoint_is_refused_and_the_proof_survives_a_resume(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(make(out, max_minutes=0))
    with pytest.raises(CheckpointError, match="stages.align.steps 6, now 7"):
        make(out, set=["align.steps=7"])
    run = make(out)
    run.identity["seed"] = 1
    with pytest.raises(CheckpointError, match="step-00000001 belongs to another run: seed 0, now 1"):
        train(run)
    run = make(out)
    one = trainer.Trainer(run, StopRequests())
    one.begin(0, one.last_checkpoint())
    run.model.decoder.embedding.weight.data += 1  # as if it had been damaged before the process began
    assert one.frozen == read_state(complete(out)[0])["frozen"]
    one.train_stage()
    with pytest.raises(TrainingError, match="decoder.embedding.weight"):
        one.end()
