"""Instruction data: make it, measure it, clean it.

    python -m nanovlm.vlit                                  the commands
    python -m nanovlm.vlit construct --annotations captions.json instances.json --images val2014 --out out/vlit
    python -m nanovlm.vlit lint FILE                        what breaks the rules that can be checked without a model
    python -m nanovlm.vlit quality FILE                     the eight indicators of the VLIT review
    python -m nanovlm.vlit filter FILE --out FOLDER         the samples that are good to train on, and why not the others
    python -m nanovlm.vlit compare A B C                    several data sets side by side, at equal size
    python -m nanovlm.vlit review                           the statistics that the review prints, computed again

VLIT is short for vision-language instruction tuning. Every command explains its flags with --help.
"""

import argparse
import sys

from nanovlm.names import nearest
from nanovlm.vlit import compare, construct, filtering, linting, quality, review

COMMANDS = {
    "construct": construct,
    "lint": linting,
    "quality": quality,
    "filter": filtering,
    "compare": compare,
    "review": review,
}  # each: its docstring, add_flags(parser), run(wishes) -> list of str
BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


class Parser(argparse.ArgumentParser):
    """argparse with the nearest flag named for an unknown one."""

    def parse(self, arguments):
        """Parse a list of str; exit with status 2 and one line if a flag is unknown."""
        wishes, unknown = self.parse_known_args(arguments)
        for word in unknown:
            self.error(f"unknown argument {word!r}.{nearest(word.split('=')[0], self._option_string_actions)}")
        return wishes


def listing():
    """The table of the commands: list of str."""
    return [f"{name:<12}{command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]


def main(arguments):
    """Run the command line: exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("\n".join([__doc__, *listing()]))
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"python -m nanovlm.vlit: unknown command {name!r}.{nearest(name, COMMANDS)}", file=sys.stderr)
        return BAD_INPUT
    command = COMMANDS[name]
    parser = Parser(
        prog=f"python -m nanovlm.vlit {name}", description=command.__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_flags(parser)
    wishes = parser.parse(rest)
    try:
        lines = command.run(wishes)
    except (ValueError, OSError) as error:
        print(f"python -m nanovlm.vlit {name}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
