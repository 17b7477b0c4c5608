"""Real processes, really killed: what the tests and the soak command (tests/soak.py) do to a run of several processes."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import many
import train

RECIPE = str(Path(__file__).parent / "faults_recipe.py")
SETTINGS = ["--threads", "1", "--set", "tower.steps=6", "--set", "tune.steps=10", "--timeout", "300", "--size", "float32"]


def work(rank, out, flags, fuse):
    """One process of a run; its messages go to OUT.RANK.txt. It kills itself before its fuse-th fsync, if fuse is not 0."""
    text = open(out.with_suffix(f".{rank}.txt"), "a", buffering=1)
    os.dup2(text.fileno(), 1)
    os.dup2(text.fileno(), 2)
    sys.stdout = sys.stderr = text
    fsync, calls = os.fsync, []

    def fused(descriptor):
        calls.append(descriptor)
        if len(calls) == fuse:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = fused
    code = train.main([RECIPE, "--out", str(out), *SETTINGS, *flags])
    sys.stdout.flush()
    os._exit(code)


def start(out, mode, size, fuses=None, flags=()):
    """Start or continue a run: list of processes. fuses: {rank: number of the fsync at which it dies}."""
    flags = [*flags, *(["--parallel", mode] if mode != "none" else []), *(["--resume"] if out.exists() else [])]
    started = []
    port = str(many.free_port())
    for rank in range(size):
        started.append(many.fork(rank, size, port, work, out, flags, (fuses or {}).get(rank, 0))[0])
    return started


def lines(out):
    """Lines of the log so far."""
    path = out / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait(started, seconds=600):
    """Exit codes of processes that end by themselves. Fails if one hangs."""
    for process in started:
        process.join(seconds)
        assert process.exitcode is not None, "a process hangs"
    return [process.exitcode for process in started]


def kill_one(out, mode, size, draw, flags=()):
    """Start or continue a run and kill one of its processes, at a random moment or within a checkpoint's writing.

    Returns: (exit codes, str what the survivors said). If the run is over before the kill, all codes are 0.
    """
    victim, before = draw.randrange(size), lines(out)
    said = {rank: out.with_suffix(f".{rank}.txt") for rank in range(size)}
    sizes = {rank: path.stat().st_size if path.exists() else 0 for rank, path in said.items()}
    if draw.random() < 0.5:  # the main process syncs more files than the others
        started = start(out, mode, size, {victim: draw.randint(1, 30 if victim == 0 else 8)}, flags)
    else:
        started, more = start(out, mode, size, None, flags), draw.randint(0, 6)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and abs(lines(out) - before) < more and all(one.is_alive() for one in started):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(started[victim].pid, signal.SIGKILL)
    codes = wait(started)
    words = "".join(said[rank].read_bytes()[sizes[rank]:].decode() for rank in range(size) if rank != victim and said[rank].exists())
    return codes, words


def finish(out, mode, size, flags=()):
    """Continue a run to its end."""
    codes = wait(start(out, mode, size, None, flags))
    assert codes == [0] * size, out.with_suffix(".0.txt").read_text()[-2000:]


def result(out):
    """What must not depend on what was killed: the losses by step, and every weight."""
    entries = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    kept = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    weights = {name: load_file(out / f"{name}.safetensors") for name in ("model", "text_tower")}
    return kept, weights


def same(found, expected):
    """Whether two results are equal, bit for bit."""
    return found[0] == expected[0] and all(
        torch.equal(tensor, found[1][name][key]) for name, content in expected[1].items() for key, tensor in content.items()
    )


def storm(out, mode, size, kills, seed, flags=(), say=lambda text: None):
    """Kill one process of a run again and again; when it is done, begin another in its place, until there were enough.

    Returns: (survivors that ended with the message that another process is gone, list of Path of the runs).
    Raises: AssertionError for a survivor that hangs or ends without a word.
    """
    draw, done, runs, warned = random.Random(seed), 0, 0, 0
    while done < kills:
        path = out.with_name(f"{out.name}-{runs}")
        codes, words = kill_one(path, mode, size, draw, flags)
        if -signal.SIGKILL in codes:
            done += 1
            survivors = [code for code in codes if code != -signal.SIGKILL]
            told = "another process is gone" in words or "do not come together" in words
            assert all(code == 0 for code in survivors) or told, (codes, words[-2000:])
            warned += told
            say(f"kill {done} of {kills}: exit codes {codes}, {lines(path)} lines in the log")
        if codes == [0] * size or lines(path) > 18:
            runs += 1
    return warned, [out.with_name(f"{out.name}-{n}") for n in range(runs + 1)]
