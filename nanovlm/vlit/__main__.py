"""Instruction data: make it, measure it, clean it.

    python -m nanovlm.vlit                                  the commands
    python -m nanovlm.vlit construct --annotations captions.json instances.json --images val2014 --out out/vlit
    python -m nanovlm.vlit lint FILE                        what breaks the rules that can be checked without a model
    python -m nanovlm.vlit quality FILE                     the eight indicators of the VLIT review
    python -m nanovlm.vlit filter FILE --out FOLDER         the samples that are good to train on, and why not the rest
    python -m nanovlm.vlit compare A B C                    several data sets side by side, at equal size

VLIT is short for vision-language instruction tuning. Every command explains its flags with --help.
"""

import argparse
import inspect
import sys

from nanovlm.names import nearest
from nanovlm.vlit import construct, filtering, quality, samples

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes
COMMANDS = {  # name -> (what --help says, function that adds flags, function(args) -> list of str, what to print)
    "construct": (construct.__doc__, construct.add_flags, construct.run),
    "lint": (inspect.getdoc(samples.lint), samples.add_lint_flags, samples.lint),
    "quality": (quality.__doc__, quality.add_flags, quality.run),
    "filter": (filtering.__doc__, filtering.add_flags, filtering.run),
    "compare": (inspect.getdoc(quality.compare), quality.add_compare_flags, quality.compare),
}


class Parser(argparse.ArgumentParser):
    """argparse with the nearest flag named for an unknown one."""

    def parse(self, arguments):
        """Parse a list of str; exit with status 2 and one line if a flag is unknown."""
        args, unknown = self.parse_known_args(arguments)
        for word in unknown:
            self.error(f"unknown argument {word!r}.{nearest(word.split('=')[0], self._option_string_actions)}")
        return args


def main(arguments):
    """Run the command line: exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, *(f"{name:<12}{about.splitlines()[0]}" for name, (about, *_) in COMMANDS.items()), sep="\n")
        return 0
    name, *rest = arguments
    if name == "review":
        successor = "the review's statistics are computed by python notebooks/ablations/review.py"
        print(f"python -m nanovlm.vlit: {successor}", file=sys.stderr)
        return BAD_INPUT
    if name not in COMMANDS:
        print(f"python -m nanovlm.vlit: unknown command {name!r}.{nearest(name, COMMANDS)}", file=sys.stderr)
        return BAD_INPUT
    (about, add_flags, run), program = COMMANDS[name], f"python -m nanovlm.vlit {name}"
    as_written = argparse.RawDescriptionHelpFormatter
    parser = Parser(program, description=about, allow_abbrev=False, formatter_class=as_written)
    add_flags(parser)
    args = parser.parse(rest)
    try:
        print("\n".join(run(args)))
    except (ValueError, OSError, ImportError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
