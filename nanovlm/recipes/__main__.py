"""python -m nanovlm.recipes [list | inspect | convert | consolidate]"""

import argparse
import sys
from pathlib import Path

from nanovlm.names import nearest
from nanovlm.published.convert import convert
from nanovlm.published.inspect import inspect
from nanovlm.recipes import FAMILIES, RECIPES, folder_of, table
from nanovlm.training.checkpoint import consolidate

COMMANDS = {
    "list": "the table of the models: tokens, parameters, memory (also without a command)",
    "inspect": "what a checkpoint holds, and what it lacks; of a manifest of names and shapes, whether it fits",
    "convert": "published weights into our folder, or back; separate towers into a model to train",
    "consolidate": "the newest checkpoint of a run, whole or in shards, as a model that sample.py can load",
}
GONE = {"compare": "python tests/official/compare.py FILE.safetensors", "coverage": "inspect MANIFEST.json"}
MISFIT, USAGE, INTERRUPTED = 1, 2, 130  # exit codes
USAGE_TEXT = "usage: python -m nanovlm.recipes [COMMAND] [-h]\n\n" + "\n".join(
    f"  {name:11} {what}" for name, what in COMMANDS.items()
)


def parser(command):
    """The command line of a command: argparse.ArgumentParser."""
    one = argparse.ArgumentParser(prog=f"python -m nanovlm.recipes {command}", description=COMMANDS[command],
                                  allow_abbrev=False)
    if command == "consolidate":
        one.add_argument("folder", metavar="OUT", help="output folder of train.py")
    if command == "inspect":
        one.add_argument("path", metavar="FILE_OR_FOLDER")
        one.add_argument("--family", help="what it is, where its files do not say so")
    if command == "convert":
        one.add_argument("paths", nargs="+", metavar="PATH", help="checkpoints to read, if any, and a folder to write")
        one.add_argument("--family", help="what it is, where its config.json does not say so or is wrong")
        one.add_argument("--to", choices=("ours", "published", "adapter"), default="ours",
                         help="layout to write (default: ours); adapter: what --lora learned alone, as PEFT has it")
        one.add_argument("--vision", metavar="PATH", help="checkpoint of the vision tower")
        one.add_argument("--language", metavar="PATH", help="checkpoint of the language model")
        one.add_argument("--config", metavar="FILE.json", help="the sizes, instead of the source's")
        one.add_argument("--size", help="the sizes of the recipe, full or tiny, instead of the source's")
        one.add_argument("--image-size", type=int, metavar="PIXELS", help="resize the position table for such pictures")
        one.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="to write (default: the source's)")
        one.add_argument("--seed", type=int, default=0, help="of what no source holds (default: 0)")
        one.add_argument("--max-shard-gb", type=float, default=5.0, help="10^9 bytes a file (default: 5)")
    return one


def main(arguments=None):
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("list", [])
    if command in ("-h", "--help"):
        print(USAGE_TEXT)
        return 0
    if command not in COMMANDS:
        hint = f"use {GONE[command]}" if command in GONE else f"unknown command.{nearest(command, COMMANDS)}"
        print(f"{USAGE_TEXT}\n\nrecipes {command}: {hint}", file=sys.stderr)
        return USAGE
    args = parser(command).parse_intermixed_args(rest)
    try:
        if command == "list":
            return table.main()
        if command == "inspect":
            lines = inspect(folder_of(args.path), args.family, FAMILIES, RECIPES)
        elif command == "convert":
            args.paths[:-1] = map(folder_of, args.paths[:-1])  # the last is written
            lines = convert(args, FAMILIES, RECIPES)
        else:
            lines = consolidate(Path(args.folder))
        print("\n".join(lines))
        return 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"recipes {command}: {error}", file=sys.stderr)
        return MISFIT
    except KeyboardInterrupt:
        print()
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
