"""Kill one process of a run of several, again and again, and hold what comes of it against a run that nobody touched.

    python tests/soak.py                                  100 kills, half of them with ddp, half with fsdp
    python tests/soak.py --kills 1000 --seed 7 --processes 4 --out /tmp/soak

Every kill is a SIGKILL at a random moment or between two files of a checkpoint; the run is then resumed, and killed again.
Nothing may hang, every survivor must say why it ends, and when the runs are done at last, their losses and weights must be
those of the untouched run, bit for bit. Takes about a second of CPU time per kill and process.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import faults  # noqa: E402  (the paths above come first)

PATIENCE = ["--timeout", "60"]  # seconds; who is killed before the processes have met costs the others so many


def soak(out, mode, size, kills, seed, flags):
    """One storm, and the comparison: a line for the report."""
    untouched = out / f"{mode}-untouched"
    faults.finish(untouched, mode, size, flags)
    expected = faults.result(untouched)
    warned, runs = faults.storm(out / f"{mode}-killed", mode, size, kills, seed, flags, say=lambda text: print(mode, text, flush=True))
    for run in runs:
        faults.finish(run, mode, size, flags)
        if not faults.same(faults.result(run), expected):
            raise SystemExit(f"{run} differs from {untouched}")
    return f"{mode}: {kills} kills in {len(runs)} runs of {size} processes, {warned} with a message; all equal, bit for bit"


def main():
    """Parse the flags, raise the storms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a new folder, which stays; default: a temporary one")
    wishes = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = wishes.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        storms = (("ddp", wishes.kills - wishes.kills // 2, PATIENCE),
                  ("fsdp", wishes.kills // 2, [*PATIENCE, "--save-in-background", "--keep", "2"]))
        for line in [soak(out, mode, wishes.processes, kills, wishes.seed, flags) for mode, kills, flags in storms]:
            print(line)


if __name__ == "__main__":
    main()
