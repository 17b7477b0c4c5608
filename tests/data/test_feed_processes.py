"""The feed of several processes: grouped and packed updates, read ahead by workers, are those of one process."""

import multiprocessing

import pytest

import many
from test_parallel import SHORT, assert_close, losses, weights, work

FLAGS = [*SHORT, "--set", "tune.group=2", "--set", "tune.packing=true"]


def reading_ahead(rank, *arguments):
    """`work` in a process that may have children, as torchrun's may: those of a test are daemons."""
    multiprocessing.current_process()._config["daemon"] = False
    return work(rank, *arguments)


@pytest.mark.slow
def test_two_processes_with_workers_are_one_without(tmp_path):
    many.run(1, work, tmp_path / "one", FLAGS)
    both = [*FLAGS, "--parallel", "ddp", "--workers", "1"]
    many.run(2, reading_ahead, tmp_path / "two", both)
    assert_close(tmp_path / "two", tmp_path / "one", 1e-6, 1e-5)
    many.run(2, reading_ahead, tmp_path / "again", both, 7)  # between the two updates of a group
    many.run(2, work, tmp_path / "again", [*both[:-1], "0", "--resume"])
    assert losses(tmp_path / "again") == losses(tmp_path / "two")
    found, expected = weights(tmp_path / "again"), weights(tmp_path / "two")
    assert all(bool((found[name] == tensor).all()) for name, tensor in expected.items())
