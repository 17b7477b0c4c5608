"""Many processes train as one: the same losses and weights, each with its own share of examples and of parameters."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import many
import train
from nanovlm.training import optimizer, processes, trainer
from nanovlm.training.checkpoint import complete
from nanovlm.data import feed
from nanovlm.training.progress import Stopped
from nanovlm.recipes.__main__ import main as recipes_main
from test_trainer import StopAfter

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "tests" / "many_recipe.py")


def work(rank, out, flags, last=None):
    """One process of a run of `many_recipe`, stopped after step `last`: what it has seen."""
    optimizers, build = [], optimizer.build
    optimizer.build = lambda *arguments: optimizers.append(build(*arguments)) or optimizers[-1]
    many.READ.clear()
    parser = train.make_parser()
    wishes = parser.parse([RECIPE, "--out", str(out), "--threads", "1", *flags])
    last = None if rank else last  # only who writes the log can read it: to another process a line may be half written
    with open(Path(out).with_suffix(f".{rank}.txt"), "a") as sys.stdout, StopAfter(Path(out), last) as stop:
        run = train.prepare(parser, wishes, train.meet(parser, wishes))
        one = trainer.Trainer(run, stop)
        with contextlib.suppress(Stopped):
            one.train()
    parameters = dict(run.model.named_parameters())
    return {
        "read": list(many.READ),
        "step": one.step,
        "sharded": {name: isinstance(p, DTensor) for name, p in parameters.items()},
        "own": {name: (p.to_local() if isinstance(p, DTensor) else p).numel() for name, p in parameters.items()},
        "all": {name: p.numel() for name, p in parameters.items()},
        "state": {name: (value.to_local() if isinstance(value, DTensor) else value).numel()
                  for made in optimizers[-1] for group in made.param_groups
                  for name, p in zip(group["param_names"], group["params"]) if p in made.state
                  for key, value in made.state[p].items() if key == "exp_avg"},
        "graded": sorted(name for name, p in parameters.items() if p.grad is not None),
    }  # fmt: skip


def losses(out):
    entries = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def weights(out):
    return load_file(out / "model.safetensors") | load_file(out / "text_tower.safetensors")


def assert_close(out, expected, loss, weight):
    """Losses (relative) and final weights (absolute) of two runs."""
    assert losses(out) == pytest.approx(losses(expected), rel=loss)
    found, wanted = weights(out), weights(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=weight, msg=lambda text, name=name: f"{name}: {text}")


SHORT = ["--size", "float32", "--set", "tower.steps=4", "--set", "tune.steps=6", "--set", "tower.eps=1e-5"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Ten steps of one process, in float32."""
    out = tmp_path_factory.mktemp("short") / "run"
    many.run(1, work, out, SHORT)
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Sixty steps of one process, in float64."""
    out = tmp_path_factory.mktemp("whole") / "run"
    many.run(1, work, out, ["--size", "float64"])
    return out


def test_ddp_is_one_process(tmp_path, short):
    found = many.run(2, work, tmp_path / "run", [*SHORT, "--parallel", "ddp"])
    assert_close(tmp_path / "run", short, 1e-6, 1e-6)
    read = [one["read"] for one in found]
    assert all(len(set(mine)) == len(mine) == 10 * 3 for mine in read) and not set(read[0]) & set(read[1])
    assert {n for kind, n in read[0] + read[1] if kind == "pictures"} == set(range(24))
    trained = set(found[0]["state"])
    assert any(name.startswith("vision.blocks.0") for name in trained)
    assert not any(name.startswith(("vision.blocks.1", "vision.post_norm", "decoder.embedding")) for name in trained)
    assert set(found[0]["graded"]) == trained, "the embedding is frozen, the tower's last block out of reach"
    assert (tmp_path / "run.1.txt").read_text() == "", "one process prints"


@pytest.mark.slow
def test_fsdp_is_one_process_and_each_holds_its_share(tmp_path, short):
    found = many.run(2, work, tmp_path / "run", [*SHORT, "--parallel", "fsdp"])
    assert_close(tmp_path / "run", short, 1e-6, 1e-6)
    for one in found:
        assert all(one["sharded"].values()), one["sharded"]
        assert set(one["state"]) == set(one["graded"]), "what is frozen has neither gradient nor state"
        assert not any(name.startswith(("vision.blocks.1", "decoder.embedding")) for name in one["state"])
        assert all(one["state"][name] == one["own"][name] for name in one["state"])
    for name, size in found[0]["all"].items():
        assert found[0]["own"][name] + found[1]["own"][name] == size, name
    assert 0.4 < sum(found[0]["own"].values()) / sum(found[0]["all"].values()) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "size", "flags"), [
    ("ddp", 2, []), ("ddp", 4, ["--recompute"]), ("fsdp", 2, ["--recompute", "--save-in-background"]), ("fsdp", 4, ["--shards", "2"])])
def test_sixty_steps_in_float64_are_those_of_one_process(tmp_path, whole, mode, size, flags):
    assert len(losses(whole)) == 60
    found = many.run(size, work, tmp_path / "run", ["--size", "float64", "--parallel", mode, *flags])
    assert_close(tmp_path / "run", whole, 1e-10, 1e-10)
    assert sorted(sum((one["read"] for one in found), [])) == sorted(
        [("pictures", n) for n in range(120)] + [("clips", n) for n in range(96)] + [("text", n) for n in range(144)])
    if flags[:1] == ["--shards"]:
        assert found[0]["own"] == found[2]["own"] and found[1]["own"] == found[3]["own"]
        assert all(found[0]["own"][name] + found[1]["own"][name] == size for name, size in found[0]["all"].items())


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, whole):
    """Stops in both stages and between them; sharded and whole checkpoints, read by more, by fewer, by one."""
    out = tmp_path / "run"
    for size, mode, last in ((4, "fsdp", 7), (2, "ddp", 20), (2, "fsdp", 25), (3, "fsdp", 30), (1, "none", None)):
        flags = ["--size", "float64", *(["--parallel", mode] if size > 1 else []), *(["--resume"] if out.exists() else [])]
        found = many.run(size, work, out, flags, last)
        assert [one["step"] for one in found] == [last or 60] * size
        assert any(complete(out)[-1].glob("shard-*")) == (mode == "fsdp")
    assert_close(out, whole, 1e-10, 1e-10)
    assert "2 processes wrote the checkpoint, 3 go on" in (tmp_path / "run.0.txt").read_text()


def troubled(rank, out, trouble):
    """One of two processes, of which the second finds something wrong in the third update: (exit code, what it said)."""
    said, calls, loss, next_records = io.StringIO(), [], processes.ContrastiveLoss.forward, feed.Feed.next

    def bad_loss(*arguments):
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) == 3 else 1)

    def bad_data(self):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the disk with the pictures is gone")
        return next_records(self)

    if rank == 1:
        if trouble == "loss":
            processes.ContrastiveLoss.forward = bad_loss
        else:
            feed.Feed.next = bad_data
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = train.main([RECIPE, "--out", str(out), "--threads", "1", *SHORT, "--parallel", "ddp"])
    return code, said.getvalue()


@pytest.mark.parametrize(("trouble", "words"), [
    ("loss", "step 3 of 4: the loss is nan; records: pictures-1[357], pictures-1[357]"),
    ("data", "step 3 of 4: the disk with the pictures is gone")])
def test_what_is_wrong_in_one_process_ends_all_with_a_checkpoint(tmp_path, trouble, words):
    for code, said in many.run(2, troubled, tmp_path / "run", trouble):
        assert code == 1 and re.search(words, said), said
    assert [path.name for path in complete(tmp_path / "run")] == ["step-00000002"]


def compiled(rank, out, flags):
    """A process whose blocks are compiled, if the flags say so, to the same operations (inductor takes minutes): exit code."""
    torch.compile = functools.partial(torch.compile, backend="eager")
    with contextlib.redirect_stdout(io.StringIO()):
        return train.main([RECIPE, "--out", str(out), "--threads", "1", "--size", "float32", "--stages", "tune",
                           "--set", "tune.precision=bfloat16", "--set", "tune.steps=3", *flags])


@pytest.mark.slow
def test_compiled_blocks_and_half_precision(tmp_path):
    """In bfloat16 compiled blocks and two processes round otherwise than one; the master weights stay float32."""
    assert many.run(1, compiled, tmp_path / "one", []) == [0]
    assert many.run(1, compiled, tmp_path / "compiled", ["--compile", "--recompute"]) == [0]
    assert many.run(2, compiled, tmp_path / "two", ["--parallel", "fsdp"]) == [0, 0]
    for name in ("compiled", "two"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=0.02) and len(losses(tmp_path / name)) == 3
        assert {tensor.dtype for tensor in load_file(tmp_path / name / "model.safetensors").values()} == {torch.float32}


@pytest.mark.slow
def test_torchrun_starts_the_processes_and_a_checkpoint_becomes_a_model(tmp_path, short):
    """The command of the README, really run; then the newest checkpoint's shards are put together."""
    out, environment = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(many.free_port()), "train.py",
               RECIPE, "--out", str(out), "--threads", "1", *SHORT, "--parallel", "fsdp"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_close(out, short, 1e-6, 1e-6)
    finished = weights(out)
    (out / "model.safetensors").unlink()
    assert recipes_main(["consolidate", str(out)]) == 0
    found = weights(out)
    assert found.keys() == finished.keys() and all(torch.equal(found[name], finished[name]) for name in found)


def reading_ahead(rank, *arguments):
    """`work` in a process that may have children, as torchrun's may: those of a test are daemons."""
    multiprocessing.current_process()._config["daemon"] = False
    return work(rank, *arguments)


@pytest.mark.slow
def test_two_processes_with_workers_are_one_without(tmp_path):
    """Grouped and packed updates, read ahead by workers, are those of one process."""
    flags = [*SHORT, "--set", "tune.group=2", "--set", "tune.packing=true"]
    both = [*flags, "--parallel", "ddp", "--workers", "1"]
    many.run(1, work, tmp_path / "one", flags)
    many.run(2, reading_ahead, tmp_path / "two", both)
    assert_close(tmp_path / "two", tmp_path / "one", 1e-6, 1e-5)
    many.run(2, reading_ahead, tmp_path / "again", both, 7)  # between the two updates of a group
    many.run(2, work, tmp_path / "again", [*both[:-1], "0", "--resume"])
    assert losses(tmp_path / "again") == losses(tmp_path / "two")
    found, expected = weights(tmp_path / "again"), weights(tmp_path / "two")
    assert all(bool((found[name] == tensor).all()) for name, tensor in expected.items())
