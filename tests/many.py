"""Several real processes of a test, forked: each has its rank, talks over Gloo, and hands back a value."""

import multiprocessing
import os
import socket
import traceback

import torch

READ = []  # what this process has read: a recipe's sources write it down, the test takes it


def free_port():
    """A port that nobody listens on at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def fork(rank, size, port, work, *arguments):
    """One process that calls work(rank, *arguments): (Process, connection to its result)."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port}
    process = context.Process(target=_child, args=(environment, there, work, rank, arguments), daemon=True)
    process.start()
    there.close()
    return process, here


def start(size, work, *arguments):
    """`fork` for each of `size` processes."""
    port = str(free_port())
    return [fork(rank, size, port, work, *arguments) for rank in range(size)]


def _child(environment, there, work, rank, arguments):
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        there.send((True, work(rank, *arguments)))
    except BaseException:
        there.send((False, traceback.format_exc()))
    there.close()
    os._exit(0)  # nothing of the parent's is to be cleaned up here


def results(started, seconds=600):
    """What the processes return, by rank. Fails with the tracebacks of all that raised, or if one takes too long."""
    found, failures = [], []
    for rank, (process, here) in enumerate(started):
        assert here.poll(seconds), f"process {rank} hangs; before it: {failures}"
        try:
            fine, value = here.recv()
        except EOFError:
            fine, value = False, f"died with exit code {process.exitcode}"
        found.append(value)
        failures += [] if fine else [f"process {rank}: {value}"]
    assert not failures, "\n".join(failures)  # the first to fail is rarely the first by rank
    for process, _ in started:
        process.join(seconds)
    return found


def run(size, work, *arguments):
    """`results` of `start`."""
    started = start(size, work, *arguments)
    try:
        return results(started)
    finally:
        for process, _ in started:
            process.kill()
