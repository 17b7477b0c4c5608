"""Look at what a stage trains on; bring other data sets into the forms that training reads.

    python -m nanovlm.data show                                   the last stage of the recipe nano
    python -m nanovlm.data show --recipe nano --stage align -n 2  another stage, two records
    python -m nanovlm.data show --data FILE.json --images FOLDER  your own file, as that stage would read it
    python -m nanovlm.data convert FORMAT SOURCE OUT.jsonl        another data set as LLaVA's JSON lines
    python -m nanovlm.data convert FORMAT SOURCE OUT --shards N   the same as tar shards of N samples
    python -m nanovlm.data index FOLDER                           count the samples of tar shards once and for all
"""

import argparse
import pkgutil
import sys
from pathlib import Path

from nanovlm.data import convert
from nanovlm.names import nearest

# What runs each command: MODULE:FUNCTION of the flags' values, which returns lines. It is looked up when the command is
# run: `show` needs a recipe, and nothing in this folder may need one.
COMMANDS = {
    "show": "nanovlm.recipes.show:show",
    "convert": "nanovlm.data.convert:convert",
    "index": "nanovlm.data.tar_shards:write_index",
}


def make_parser():
    """The flags of the commands."""
    style = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    top = argparse.ArgumentParser(prog="python -m nanovlm.data", description=__doc__, **style)
    commands = top.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    add = commands.add_parser("show", help="the first records of a stage, as trained on", **style).add_argument
    add("--recipe", default="nano", help="a recipe's name, or a Python file that defines RECIPE")
    add("--stage", help="default: the recipe's last")
    add("--set", action="append", default=[], metavar="STAGE.FIELD=VALUE", help="change a value of a stage")
    add("--data", metavar="FILE.json", help="LLaVA-style JSON to show instead of the stage's mixture")
    add("--images", metavar="FOLDER", help="where the image paths in --data start")
    add("--datasets", metavar="FILE.json", help="data sources by name, for the stage's mixture")
    add("--seed", type=int, default=0, help="of the data")
    add("-n", type=int, default=4, help="records to show")
    convert.add_flags(commands.add_parser("convert", help="another data set", **style).add_argument)
    commands.add_parser("index", help="count the samples of tar shards", **style).add_argument("folder", type=Path)
    return top


def main(arguments):
    """Run the command line. Unknown names and unusable files end it with a message and status 2."""
    parser = make_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"unknown command {arguments[0]!r}.{nearest(arguments[0], COMMANDS)}")
    args = parser.parse_args(arguments)
    try:
        lines = pkgutil.resolve_name(COMMANDS[args.command])(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
