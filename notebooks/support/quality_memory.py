"""How much memory and time `quality` and `filter` take on many records: a synthetic file, measured in a process of its
own.

python notebooks/support/quality_memory.py quality 1000000
python notebooks/support/quality_memory.py filter 100000
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THINGS = "dog cat car bus person bicycle chair table cup bird kite pizza horse clock".split()
COLORS = "red blue green white black brown".split()


def record(n, rng):
    """The n-th record: one instruction about a picture and its response; about 100 bytes of words."""
    thing, other, color = rng.choice(THINGS), rng.choice(THINGS), rng.choice(COLORS)
    asked, said = rng.choice((
        (f"What color is the {thing}?", f"The {thing} is {color}."),
        (f"How many {thing}s are there?", f"There are {rng.randint(1, 9)} {thing}s next to the {color} {other}."),
        (f"Why is the {thing} near the {other}?", f"It may rest near the {color} {other}, for {rng.randint(1, 99999)} reasons."),
        ("Describe the image in detail.", f"A {color} {thing} and {rng.randint(2, 9)} {other}s, number {rng.randint(1, 10**6)}."),
    ))  # fmt: skip
    return {"id": n, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]}


def main(command, number):
    """Write the file, run the command on it, print its last words, its peak memory and its processor time."""
    with tempfile.TemporaryDirectory() as folder:
        path, rng = Path(folder, "many.jsonl"), random.Random(0)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record(n, rng)) + "\n" for n in range(number))
        flags = ["--without-report"] if command == "filter" else []
        subprocess.run(
            [sys.executable, "-m", "nanovlm.vlit", command, str(path), "--out", str(Path(folder, "out")), *flags],
            cwd=ROOT,
            check=True,
        )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{command}, {number} records: peak {used.ru_maxrss / 1024:.0f} MiB, {used.ru_utime + used.ru_stime:.0f} CPU-seconds"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
