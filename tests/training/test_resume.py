"""A real process, really killed, resumed until it is done: losses and weights as if nothing had happened, bit for bit."""

import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A recipe file that ends its own process, with SIGKILL and at a chosen place, as long as OUT/fuse has lines: each line
# is the number of the os.fsync call (one per file of a checkpoint) before which the process dies.
FUSED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from tiny_recipe import RECIPE
fuse = {fuse!r}
with open(fuse) as file:
    first, *rest = file.read().split() or ["0"]
with open(fuse, "w") as file:
    file.write(" ".join(rest))
calls, fsync = 0, os.fsync
def counted(descriptor):
    global calls
    calls += 1
    if calls == int(first):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = counted
"""


TIMES = ("seconds", "data_seconds", "tokens_per_second")

def recipe_file(folder, fuse):
    """A recipe that dies at each of these fsync calls in turn, one per process."""
    path = folder / "fused.py"
    path.write_text(FUSED.format(tests=str(ROOT / "tests"), fuse=str(folder / "fuse")))
    (folder / "fuse").write_text(" ".join(map(str, fuse)))
    return path


def start(recipe, out, *flags, **options):
    command = [sys.executable, "train.py", str(recipe), "--out", str(out), "--threads", "1", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def finish(recipe, out, *flags, **options):
    """Run to the end: (exit code, what it printed)."""
    process = start(recipe, out, *flags, **options)
    printed, _ = process.communicate(timeout=600)
    return process.returncode, printed


def resume_until_done(recipe, out, limit):
    for kills in range(limit):
        code, printed = finish(recipe, out, "--resume")
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, printed
    raise AssertionError(f"not done after {limit} processes")


def result(out):
    """What must not depend on interruptions: losses, measures, exams, and the bytes of the weights."""
    entries = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    kept = [{key: value for key, value in entry.items() if key not in TIMES} for entry in entries]
    weights = [(out / f"{name}.safetensors").read_bytes() for name in ("model", "text_tower")]
    return kept, [hashlib.sha256(content).hexdigest() for content in weights]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    code, printed = finish(recipe_file(folder, []), folder / "out")
    assert code == 0, printed
    return result(folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [[6, 16], list(range(1, 12)), [12, 13, 14, 9, 9, 9], [36, 5, 6, 7, 8]])
def test_kills_at_every_write(tmp_path, whole, fuse):
    recipe = recipe_file(tmp_path, fuse)
    assert finish(recipe, tmp_path / "out")[0] == -signal.SIGKILL
    assert resume_until_done(recipe, tmp_path / "out", len(fuse) + 1) >= 1
    assert result(tmp_path / "out") == whole


def kill_at_random(recipe, out, times, seed):
    """Start, wait for some more log lines, kill; again and again."""
    draw = random.Random(seed)
    for _ in range(times):
        process = start(recipe, out, *(["--resume"] if out.exists() else []))
        log, lines, deadline = out / "log.jsonl", draw.randint(1, 5), time.monotonic() + 120
        before = len(log.read_text().splitlines()) if log.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and abs(len(log.read_text().splitlines()) - before) >= lines:
                break
            time.sleep(draw.uniform(0.001, 0.01))
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("seed", "times"), [(0, 1), *(pytest.param(seed, 5, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_kills_at_random_moments(tmp_path, whole, seed, times):
    recipe = recipe_file(tmp_path, [])
    kill_at_random(recipe, tmp_path / "out", times, seed)
    resume_until_done(recipe, tmp_path / "out", 1)
    assert result(tmp_path / "out") == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_names_the_command(tmp_path, whole, number, code):
    out, recipe = tmp_path / "out", recipe_file(tmp_path, [])
    process = start(recipe, out)
    printed = ""
    while "tower 2/6" not in printed:
        printed += process.stdout.readline()
        assert process.poll() is None, printed
    process.send_signal(number)
    printed += process.communicate(timeout=300)[0]
    assert process.returncode == code, printed
    assert f"{number.name} received" in printed and "Traceback" not in printed
    command = f"python train.py {recipe} --out {out} --threads 1 --resume"
    assert printed.rstrip().endswith(command)
    assert len(list((out / "state").iterdir())) == 1
    if number == signal.SIGINT:
        resume_until_done(recipe, out, 1)
        assert result(out) == whole


@pytest.mark.slow
def test_a_disk_that_takes_no_more(tmp_path, whole):
    """A limit on the size of files, which the checkpoint of the second stage exceeds, stands for a full disk."""
    out, recipe = tmp_path / "out", recipe_file(tmp_path, [])
    code, printed = finish(recipe, out, "--max-minutes", "0")
    assert code == 0 and "--max-minutes 0 are over" in printed
    largest = max(path.stat().st_size for path in next((out / "state").iterdir()).iterdir())

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, largest - 1))

    code, printed = finish(recipe, out, "--resume", preexec_fn=limit)
    assert code == 1 and "could not be written" in printed and "step-00000001 is intact" in printed
    assert "Traceback" not in printed
    assert [path.name for path in (out / "state").iterdir()] == ["step-00000001"]
    resume_until_done(recipe, out, 1)
    assert result(out) == whole
