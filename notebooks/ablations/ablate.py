"""Train the variants of the papers' ablations at nano scale, each with several seeds, and draw what they found.

    python notebooks/ablations/ablate.py                       all of them
    python notebooks/ablations/ablate.py queries tower         some of them
    python notebooks/ablations/ablate.py --draw                tables and pictures anew, from the CSV files alone

Finished runs are kept: the same command again trains only what is missing.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from ablations import ablation_report
from ablations.ablation_runs import AblationError, run
from ablations.variants import ABLATIONS
from support.provenance import ROOT
from nanovlm.names import nearest

TABLES = ROOT / "notebooks" / "results" / "ablations"


def make_parser():
    """The command line, as an argparse parser."""
    parser = argparse.ArgumentParser(
        prog="python notebooks/ablations/ablate.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ABLATIONS)}")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="of weights and data, with commas between them")
    parser.add_argument("--out", type=Path, default=Path("out/ablations"), metavar="FOLDER", help="where the runs go")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help=f"where CSV files and pictures go (default: {TABLES.relative_to(ROOT)}; of a smoke run: with the runs)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each run, which teach nothing")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    return parser


def main(arguments):
    """Run the command line: exit code."""
    parser = make_parser()
    wishes = parser.parse_args(arguments)
    for name in wishes.names:
        if name not in ABLATIONS:
            parser.error(f"unknown ablation {name!r}.{nearest(name, ABLATIONS)}")
    if not all(seed.isdecimal() for seed in wishes.seeds.split(",")):
        parser.error(f"--seeds {wishes.seeds!r}: whole numbers with commas between them")
    seeds = list(dict.fromkeys(map(int, wishes.seeds.split(","))))
    tables = wishes.tables or (wishes.out / "tables" if wishes.smoke else TABLES)
    chosen = {name: ABLATIONS[name] for name in wishes.names or ABLATIONS}
    try:
        done = (
            ((name, tables / f"{name}.csv") for name in chosen) if wishes.draw
            else run(chosen, seeds, wishes.out, tables, wishes.smoke)
        )  # fmt: skip
        for name, path in done:
            print("\n".join([*ablation_report.write(path, ABLATIONS[name]), ""]), flush=True)
    except (AblationError, ValueError, OSError) as error:
        print(f"python notebooks/ablations/ablate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
