"""How fast, and on a GPU how right: `python -m nanovlm.bench [decode | train | kernels | compile | gpu]`.

    python -m nanovlm.bench decode                     135M and 4M parameters, one prompt and 16, against transformers
    python -m nanovlm.bench decode --case 4M --rounds 9
    python -m nanovlm.bench train                      training steps against transformers
    python -m nanovlm.bench train --device cuda --compile    against the GPU's peak
    python -m nanovlm.bench kernels                    the Triton kernels against torch's, on a GPU
    python -m nanovlm.bench compile                    compiled code of every kernel, without a GPU
    python -m nanovlm.bench gpu --minutes 25           all that a GPU can tell, into one JSON file
"""

import argparse
import sys

from nanovlm.bench import compile, decode, gpu, kernels, train

BAD_INPUT = 2  # exit code


def make_parser():
    """The command line, as an argparse parser."""
    parser = argparse.ArgumentParser(prog="python -m nanovlm.bench", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, text, rounds=1):
        one = commands.add_parser(name, allow_abbrev=False, help=text)
        one.set_defaults(run=run, rounds=rounds, device="cuda" if name == "gpu" else "cpu")
        if rounds > 1:
            one.add_argument("--rounds", type=int, metavar="N", help=f"measurements of each side (default: {rounds})")
        if name in ("decode", "train", "gpu"):
            one.add_argument("--device", choices=("cpu", "cuda"))
        if name in ("decode", "train"):
            one.add_argument("--case", action="append", metavar="NAME", help="one of the cases; may be given several times")
        return one

    command("decode", decode.decode, "tokens per second against transformers.generate", 5)
    one = command("train", train.train, "training steps against transformers; on a GPU, against its peak", 7)
    one.add_argument("--compile", action="store_true", help="on a GPU: torch.compile around every block")
    one.add_argument("--out", default="notebooks/results", metavar="FOLDER", help="where the dated table of a GPU goes")
    one = command("kernels", kernels.measure_all, "the Triton kernels against torch's, on a GPU", 20)
    one.add_argument("--out", default="notebooks/results", metavar="FOLDER", help="where the dated table goes")
    one.add_argument("--only", default="", metavar="WORD", help="what has this in its name: causal, projection, loss …")
    one = command("compile", compile.judge_all, "registers, spills and memory of every kernel, without a GPU")
    one.add_argument("--kernel", action="append", choices=compile.KERNELS, help="may be given several times")
    one.add_argument("--record", action="store_true", help="remember how long the loops are, for later runs to compare with")
    one = command("gpu", gpu.measure_all, "all that a GPU can tell: kernels, nano, Lynx, decoding; one JSON file")
    one.add_argument("--minutes", type=float, default=25.0, metavar="N", help="begin no part after this time (default: 25)")
    one.add_argument("--out", default="out/gpu", metavar="FOLDER", help="where gpu.json and nano's run go (default: out/gpu)")
    one.add_argument("--part", action="append", choices=gpu.PARTS, help="may be given several times (default: all)")
    one.add_argument("--tiny", action="store_true", help="a rehearsal at sizes that a CPU manages")
    return parser


def main(arguments=None):
    """Run the command line; returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1 is needed")
    try:
        return args.run(args)
    except ImportError as error:
        print(f"bench: {error.name} is missing; pip install -r tests/requirements.txt", file=sys.stderr)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
