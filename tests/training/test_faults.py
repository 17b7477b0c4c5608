"""Processes of one run that are killed, stopped, asked to stop or given bad data: nobody waits forever, nothing is lost."""

import os
import signal
import time

import pytest
import torch.distributed as dist

import faults
import many
from nanovlm.training import processes
from nanovlm.training.checkpoint import complete
from nanovlm.training.processes import join


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The runs that nobody interrupts, by mode."""
    made = {}

    def make(mode):
        if mode not in made:
            out = tmp_path_factory.mktemp("whole") / mode
            faults.finish(out, mode, 2)
            made[mode] = faults.result(out)
        return made[mode]

    return make


def test_a_process_is_killed_and_the_other_says_so(tmp_path, whole):
    out = tmp_path / "run"
    codes = faults.wait(faults.start(out, "ddp", 2, {0: 16}))
    assert codes == [-signal.SIGKILL, 1]
    said = (tmp_path / "run.1.txt").read_text()
    assert "process 1 of 2: another process is gone, or was silent for 300 s" in said and "--resume" in said
    assert "Traceback" not in said
    faults.finish(out, "ddp", 2)
    assert faults.same(faults.result(out), whole("ddp"))


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "flags", "kills"), [
    ("ddp", [], 5), ("fsdp", ["--save-in-background", "--keep", "2"], 3)])
def test_kills_of_one_of_two_lose_nothing(tmp_path, whole, mode, flags, kills):
    _, runs = faults.storm(tmp_path / "run", mode, 2, kills, seed=kills, flags=["--timeout", "60", *flags])
    for out in runs:
        faults.finish(out, mode, 2, flags)
        assert faults.same(faults.result(out), whole(mode))


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up(tmp_path):
    started = faults.start(tmp_path / "run", "ddp", 2, flags=["--timeout", "20", "--set", "tune.steps=2000"])
    deadline = time.monotonic() + 300
    while faults.lines(tmp_path / "run") < 30:  # in the second stage; between stages nobody is hurried
        assert time.monotonic() < deadline and started[0].is_alive()
        time.sleep(0.01)
    os.kill(started[1].pid, signal.SIGSTOP)
    try:
        started[0].join(300)
        assert started[0].exitcode == 1
        assert "was silent for 20 s" in (tmp_path / "run.0.txt").read_text()
    finally:
        os.kill(started[1].pid, signal.SIGKILL)
        started[1].join(10)


class Unreachable(dist.Store):
    """The processes' store, from one that is gone as soon as the others have read where to find it."""

    def __init__(self, store):
        super().__init__()
        self.store = store

    def set(self, key, value):
        """Hand a value on, wait until the other process has seen it, and be gone."""
        self.store.set(key, value)
        os._exit(1)

    def get(self, key):
        """A value of the others'."""
        return self.store.get(key)


def unreachable(rank):
    """Meet with 10 seconds of patience; process 1 is gone when the other has its address and calls."""
    if rank == 1:
        meet = processes.rendezvous
        processes.rendezvous = lambda *where, **options: iter([(Unreachable(next(meet(*where, **options))[0]), 1, 2)])
    began = time.monotonic()
    try:
        join("ddp", "cpu", timeout=10)
    except ValueError:
        return time.monotonic() - began


def test_a_process_that_cannot_be_reached_is_given_up_in_time():
    process, here = many.start(2, unreachable)[0]
    assert here.poll(120)
    fine, seconds = here.recv()
    assert fine and seconds < 30  # Gloo tries five times
    process.join(10)


def meeting(rank):
    """Meet with 3 seconds of patience; process 1 is gone before the groups that wait long are there."""
    new_group, made = dist.new_group, []

    def one_less(**options):
        made.append(options)
        if rank == 1 and len(made) == 2:
            os._exit(1)
        return new_group(**options)

    dist.new_group = one_less
    try:
        join("ddp", "cpu", timeout=3)
    except ValueError:
        return "given up"


def test_a_process_that_is_gone_while_all_meet_is_given_up():
    process, here = many.start(2, meeting)[0]
    assert here.poll(120) and here.recv() == (True, "given up")
    process.join(10)


@pytest.mark.slow
def test_sigterm_for_one_writes_one_checkpoint_for_all(tmp_path, whole):
    out = tmp_path / "run"
    started = faults.start(out, "fsdp", 2)
    deadline = time.monotonic() + 300
    while faults.lines(out) < 4:
        assert time.monotonic() < deadline and started[0].is_alive()
        time.sleep(0.005)
    os.kill(started[1].pid, signal.SIGTERM)
    assert faults.wait(started) == [143, 143]
    assert "SIGTERM received" in (tmp_path / "run.0.txt").read_text() and len(complete(out)) == 1
    faults.finish(out, "fsdp", 2)
    assert faults.same(faults.result(out), whole("fsdp"))
