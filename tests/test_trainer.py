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

from nanovlm import trainer, update
from nanovlm.checkpoint import CheckpointError, complete, read
from nanovlm.data.batching import Report
from nanovlm.interrupts import Stopped, StopRequests
from nanovlm.recipes.start import make_run
from nanovlm.update import TrainingError
from tiny_recipe import RECIPE, Squares

WISHES = {"recipe": "tiny", "size": None, "stages": None, "without": [], "set": [], "init": None, "resume": False,
          "data": None, "images": None, "datasets": None, "device": "cpu", "threads": 1, "seed": 0, "max_minutes": None,
          "smoke": False}


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
    assert [entry["measures"] for entry in log(out, "measures")] == [entry["measures"] for entry in log(whole.out, "measures")]
    assert log(out, "exam") == log(whole.out, "exam")


def test_what_a_run_leaves_behind(whole):
    assert sorted(os.listdir(whole.out)) == ["config.json", "curves.png", "log.jsonl", "model.safetensors", "results.json", "state",
                                             "text_tower.safetensors", "tokenizer.json"]
    assert [path.name for path in complete(whole.out)] == ["step-00000012"]
    results = json.loads((whole.out / "results.json").read_text())
    assert results["parameters"] == sum(p.numel() for p in whole.model.parameters()) and results["seconds"] > 0
    assert set(results) == {"color", "parameters", "seconds"}
    config = json.loads((whole.out / "config.json").read_text())
    assert config["image_size"] == 16 and config["recipe"] == "tiny" and config["threads"] == 1
    assert (whole.out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_has_a_line_per_step(whole):
    entries = log(whole.out)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert [entry["stage"] for entry in entries] == ["tower"] * 6 + ["align"] * 6
    assert all(entry["tokens_per_second"] > 0 and entry["gradient_norm"] > 0 for entry in entries)
    seconds = [entry["seconds"] for entry in entries]
    assert seconds == sorted(seconds) and 0 < seconds[0]
    moments = [(entry["stage"], entry["step"], entry["when"]) for entry in log(whole.out, "measures")]
    assert moments == [("tower", 0, "before"), ("tower", 6, "after"), ("align", 6, "before"), ("align", 12, "after")]
    assert [entry["step"] for entry in log(whole.out, "exam")] == [5, 10]


def test_learning_rates_follow_the_schedule(whole):
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
    assert len(trainer.Later(Squares(0), 3)) == 10


@pytest.mark.parametrize("last", [1, 4, 5, 6, 7, 9, 12])
def test_any_step_can_be_the_last_of_a_process(tmp_path, whole, last):
    out, stop = tmp_path / "run", StopRequests()

    def exam(run):
        if sum(1 for _ in open(run.out / "log.jsonl") if '"loss"' in _) == last:
            stop.requested = Stopped(130, "test")
        return []

    with pytest.raises(Stopped):
        train(make(out, hooked(exam=exam, exam_every=1)), stop)
    assert losses(out)[-1][0] == last
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # a line that the kill cut short
    torch.rand(5)
    train(make(out))
    assert losses(out) == losses(whole.out)
    assert torch.equal(load_file(out / "model.safetensors")["bridge.linear.weight"],
                       load_file(whole.out / "model.safetensors")["bridge.linear.weight"])


def test_a_finished_run_can_be_resumed(tmp_path, whole):
    out = tmp_path / "run"
    train(make(out))
    (out / "results.json").unlink()
    train(make(out))
    assert_same(out, whole)
    assert (out / "results.json").exists()


class Spoiled(Squares):
    """A source with one bad record."""

    broken = True

    def record(self, n):
        if n == 40 and self.broken:  # read in step 2 of the second stage
            raise ValueError("square-40: the picture is damaged")
        return super().record(n)


def test_a_bad_record_stops_the_run_with_everything_saved(tmp_path, whole):
    out = tmp_path / "run"
    recipe = hooked(sources=RECIPE.sources | {"pictures": Spoiled})
    with pytest.raises(TrainingError, match="stage align, step 2 of 6: square-40: the picture is damaged"):
        train(make(out, recipe))
    assert [path.name for path in complete(out)] == ["step-00000007"]
    train(make(out))
    assert_same(out, whole)


def test_time_that_is_over_stops_the_run(tmp_path, whole):
    out = tmp_path / "run"
    with pytest.raises(Stopped, match="--max-minutes 0 are over") as stopped:
        train(make(out, max_minutes=0))
    assert stopped.value.exit_code == 0 and losses(out)[-1][0] == 1 and len(complete(out)) == 1
    train(make(out, max_minutes=60))
    assert_same(out, whole)


def test_seconds_go_on_counting(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(make(out, max_minutes=0))
    (folder,) = complete(out)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"seconds": 1000.0}))
    with pytest.raises(Stopped):
        train(make(out, max_minutes=0))
    assert 1000 < log(out)[-1]["seconds"] < 1500


def test_a_signal_finishes_the_step_and_saves(tmp_path, whole):
    out = tmp_path / "run"

    def exam(run):
        os.kill(os.getpid(), signal.SIGTERM)
        return RECIPE.exam(run)

    with StopRequests() as stop, pytest.raises(Stopped) as stopped:
        train(make(out, hooked(exam=exam)), stop)
    assert stopped.value.exit_code == 143 and stopped.value.reason == "SIGTERM received"
    assert losses(out)[-1][0] == 5 and [path.name for path in complete(out)] == ["step-00000005"]
    train(make(out))
    assert_same(out, whole)


def test_a_signal_during_a_measurement_takes_effect_at_once(tmp_path, whole):
    out, reached = tmp_path / "run", []

    def evaluate(run, stage):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(stage)

    with StopRequests() as stop, pytest.raises(Stopped) as stopped:
        train(make(out, hooked(evaluate=evaluate)), stop)
    assert stopped.value.exit_code == 130 and reached == []
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
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    one = trainer.Trainer(run, StopRequests())
    one.train_stage(one.begin(0, None))
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) is not name.startswith("vision.")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    tower = {name: p.detach().clone() for name, p in trainer.text_side(run.contrastive).items()}
    current = one.begin(1, None)
    assert run.model.vision.positions.shape[0] == 16 and before["vision.positions"].shape[0] == 4
    before["vision.positions"] = run.model.vision.positions.detach().clone()
    one.train_stage(current)
    parts = run.model.parts()
    for part in parts:
        for name, parameter in parts[part].items():
            if part in ("bridge", "adapters", "vision_branch"):
                assert not torch.equal(parameter, before[name])
            else:
                assert torch.equal(parameter, before[name]) and not parameter.requires_grad
    assert all(torch.equal(p, tower[name]) for name, p in trainer.text_side(run.contrastive).items())


@pytest.mark.parametrize("broken", ["decoder.embedding.weight", "log_scale"])
def test_a_frozen_tensor_that_moves_is_found(tmp_path, broken):
    def exam(run):
        tensors = run.model.state_dict() | trainer.text_side(run.contrastive)
        tensors[broken].view(-1)[:1] += 1e-3
        return []

    run = make(tmp_path / "run", hooked(exam=exam, exam_every=10))
    with pytest.raises(TrainingError, match=f"stage align: frozen tensors have moved: {broken}$"):
        train(run)


def test_the_proof_survives_a_resume(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(make(out, max_minutes=0))
    run = make(out)
    one = trainer.Trainer(run, StopRequests())
    current = one.begin(0, one.last_checkpoint())
    run.model.decoder.embedding.weight.data += 1  # as if it had been damaged before the process began
    assert current.frozen == read(complete(out)[0])[1]["frozen"]
    with pytest.raises(TrainingError, match="decoder.embedding.weight"):
        one.train_stage(current)


def test_measuring_leaves_no_trace(tmp_path, whole):
    """evaluate of the tiny recipe draws random numbers; exam and evaluate see the models in evaluation mode."""
    modes = []

    def evaluate(run, stage):
        modes.append((run.model.training, run.contrastive.training, torch.is_grad_enabled()))
        return {"color": 0.5}

    run = make(tmp_path / "run", hooked(evaluate=evaluate))
    state = torch.get_rng_state()
    one = trainer.Trainer(run, StopRequests())
    with one.looking():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert run.model.training and run.contrastive.training
    train(run)
    assert modes == [(False, False, False)] * 4
    assert losses(run.out) == losses(whole.out)


def test_a_summary_is_filled_and_checked(tmp_path, capsys):
    shares = iter([0.43, 0.985, 0.5, 0.5])
    train(make(tmp_path / "run", hooked(evaluate=lambda run, stage: {"color": next(shares)})))
    shown = capsys.readouterr().out
    assert "tower: colours told apart 43.0% → 98.5%\n" in shown
    assert "align       color                         50.0%    50.0%" in shown and "results: ['color'" in shown
    with pytest.raises(TrainingError, match="stage 'tower' names 'color', which is not measured. Did you mean 'colour'"):
        train(make(tmp_path / "other", hooked(evaluate=lambda run, stage: {"colour": 0.5})))


def test_the_exam_prints_only_what_has_changed(tmp_path, capsys):
    answers = iter([["a", "b"], ["a", "b"], ["a", "c"], ["a", "c", "d"]])
    train(make(tmp_path / "run", hooked(exam=lambda run: next(answers), exam_every=3)))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert shown == ["step 3: a", "step 3: b", "step 9: c", "step 12: d"]
    assert [(entry["step"], entry["exam"]) for entry in log(tmp_path / "run", "exam")] == [
        (3, ["a", "b"]), (9, ["a", "c"]), (12, ["a", "c", "d"])]


def test_cut_rows_are_reported(tmp_path, capsys):
    train(make(tmp_path / "run", set=["align.max_tokens=14", "align.mixture.pictures=none", "align.steps=4"]))
    assert "align: 24 of 24 rows were cut to max_tokens 14, 72 tokens lost" in capsys.readouterr().out
    assert read(complete(tmp_path / "run")[0])[1]["report"] == {"rows": 24, "truncated_rows": 24, "truncated_tokens": 72}


def test_another_run_in_the_checkpoint_is_refused(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(make(out, max_minutes=0))
    with pytest.raises(CheckpointError, match="stages.align.steps was 6, is now 7"):
        make(out, set=["align.steps=7"])
    run = make(out)
    run.identity["seed"] = 1
    with pytest.raises(CheckpointError, match="step-00000001 belongs to another run: seed was 0, is now 1"):
        train(run)


def test_a_log_shorter_than_the_checkpoint_is_refused(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(make(out, max_minutes=0))
    os.truncate(out / "log.jsonl", 10)
    with pytest.raises(CheckpointError, match="has 10 bytes, but"):
        train(make(out))


# --- the gradient of one update ---


@pytest.fixture
def run(tmp_path):
    return make(tmp_path / "run")


def gradients(run, stage, records):
    parameters = list(run.model.parameters())
    loss, norm, tokens = update.gradient(run, stage, records, parameters, Report())
    return loss, norm, tokens, {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


RECORDS = [Squares(0).record(n) for n in range(5)] + [Squares(0, "text").record(0)]


def language(**values):
    return dataclasses.replace(RECIPE.stages("full", False)[1], image_size=8, **{"clip": None} | values)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_micro_batches_change_nothing(run, size):
    loss, norm, tokens, whole = gradients(run, language(micro_batch_size=None), RECORDS)
    other_loss, other_norm, other_tokens, parts = gradients(run, language(micro_batch_size=size), RECORDS)
    assert other_loss == pytest.approx(loss, rel=1e-5) and other_norm == pytest.approx(norm, rel=1e-5) and other_tokens == tokens
    assert parts.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-7)


def test_the_loss_is_per_trained_token(run):
    batch = update.build_batch(RECORDS, run.template, run.tokenizer, run.model.num_image_tokens, 8, "crop", 40)
    total, trained = run.model.loss(batch)
    loss, norm, tokens, found = gradients(run, language(micro_batch_size=2), RECORDS)
    assert loss == pytest.approx(total.item() / trained, rel=1e-6) and trained > 11
    assert tokens == (batch.segments >= 0).sum() < batch.ids.numel()
    run.model.zero_grad()
    (total / trained).backward()
    expected = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in expected.values())), rel=1e-4)


def test_clipping_shortens_the_whole_gradient(run):
    _, norm, _, free = gradients(run, language(), RECORDS)
    _, same, _, clipped = gradients(run, language(clip=norm / 4), RECORDS)
    assert same == pytest.approx(norm)
    for name in free:
        torch.testing.assert_close(clipped[name], free[name] / 4, rtol=1e-4, atol=1e-8)
    _, _, _, untouched = gradients(run, language(clip=norm * 4), RECORDS)
    assert all(torch.equal(untouched[name], free[name]) for name in free)


def test_gradients_do_not_pile_up(run):
    first = gradients(run, language(), RECORDS)
    again = gradients(run, language(), RECORDS)
    assert first[0] == again[0] and all(torch.equal(first[3][name], again[3][name]) for name in first[3])


def test_parameters_that_the_records_do_not_reach_get_no_gradient(run):
    _, _, tokens, found = gradients(run, language(), [Squares(0, "text").record(n) for n in range(3)])
    assert not any(name.startswith(("vision", "bridge")) for name in found) and "decoder.embedding.weight" in found
    assert tokens > 0


def test_the_contrastive_loss_is_that_of_the_batch(run):
    stage = RECIPE.stages("full", False)[0]
    records = RECORDS[:4]
    pixels, ids, lengths = update.contrastive_batch(records, run.tokenizer, 8, "crop", 24)
    expected = run.contrastive.loss(pixels, ids, lengths)
    loss, norm, tokens = update.gradient(run, stage, records, list(run.contrastive.parameters()), Report())
    assert loss == pytest.approx(expected.item()) and tokens == lengths.sum()


def test_bfloat16_is_autocast_of_the_forward_pass(run):
    exact, _, _, _ = gradients(run, language(), RECORDS)
    loss, _, _, found = gradients(run, language(precision="bfloat16"), RECORDS)
    assert loss != exact and loss == pytest.approx(exact, rel=0.02)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


def test_a_loss_that_is_not_finite_names_the_records(run):
    run.model.decoder.norm.weight.data[0] = float("nan")
    with pytest.raises(TrainingError, match="the loss is nan; records: square-4, text-0$"):
        gradients(run, language(micro_batch_size=4), RECORDS[4:])


def test_a_gradient_that_is_not_finite_names_the_records(run):
    run.model.decoder.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="the gradient's norm is .*; records: square-0, square-1$"):
        gradients(run, language(), RECORDS[:2])


def test_a_run_that_diverges_says_where(tmp_path):
    def exam(run):
        run.model.bridge.linear.weight.data[0, 0] = float("nan")
        return []

    with pytest.raises(TrainingError, match="stage align, step 3 of 6: the loss is nan; records: .*square-"):
        train(make(tmp_path / "run", hooked(exam=exam, exam_every=8)))


def test_bad_data_is_a_training_error_and_a_bug_is_not(run):
    with pytest.raises(TrainingError, match="max_tokens"):
        gradients(run, language(max_tokens=3), RECORDS)
    run.model.vision.resize(16)
    with pytest.raises(ValueError, match="stands at"):
        gradients(run, language(), RECORDS[:1])
