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


def positive(text):
    """A whole number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 is needed")
    return int(text)


def make_parser():
    """The command line, as an argparse parser."""
    parser = argparse.ArgumentParser(prog="python -m nanovlm.bench", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(required=True)

    def command(name, run, text, rounds=None, device=None, out=None):
        one = commands.add_parser(name, allow_abbrev=False, help=text)
        one.set_defaults(run=run)
        if rounds:
            one.add_argument("--rounds", type=positive, default=rounds, metavar="N",
                             help="measurements of each side (%(default)s)")
        if device:
            one.add_argument("--device", choices=("cpu", "cuda"), default=device)
        if out:
            one.add_argument("--out", default=out, metavar="FOLDER", help="where the results go (default: %(default)s)")
        return one.add_argument

    several, tables = "may be given several times (default: all)", "notebooks/results"
    add = command("decode", decode.decode, "tokens per second against transformers.generate", 5, "cpu")
    add("--case", action="append", metavar="NAME", help=several)
    add = command("train", train.train, "training steps against transformers, or a GPU's peak", 7, "cpu", tables)
    add("--case", action="append", metavar="NAME", help=several)
    add("--compile", action="store_true", help="on a GPU: torch.compile around every block")
    add = command("kernels", kernels.measure_all, "the Triton kernels against torch's, on a GPU", 20, None, tables)
    add("--only", default="", metavar="WORD", help="what has this in its name: causal, projection, loss …")
    add = command("compile", compile.judge_all, "registers, spills and memory of every kernel, without a GPU")
    add("--kernel", action="append", choices=compile.KERNELS, help=several)
    add("--record", action="store_true", help="remember how long the loops are, for later runs to compare with")
    add = command("gpu", gpu.measure_all, "all that a GPU can tell; one JSON file", None, "cuda", "out/gpu")
    add("--minutes", type=float, default=25.0, metavar="N", help="begin no part after this time (default: 25)")
    add("--part", action="append", choices=gpu.PARTS, help=several)
    add("--tiny", action="store_true", help="a rehearsal at sizes that a CPU manages")
    return parser


def main(arguments=None):
    """Run the command line; returns the exit code."""
    args = make_parser().parse_args(arguments)
    try:
        return args.run(args)
    except ImportError as error:
        print(f"bench: {error.name} is missing; pip install -r tests/requirements.txt", file=sys.stderr)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
