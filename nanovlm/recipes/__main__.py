"""python -m nanovlm.recipes [list | compare | coverage | inspect | convert]"""

import argparse
import sys

MISFIT, INTERRUPTED = 1, 130  # exit codes; 2 is argparse's for a command line that makes no sense


def parser():
    """The command line, every command with the function that runs it (imported only then)."""
    top = argparse.ArgumentParser(prog="python -m nanovlm.recipes", description="the models and their published weights",
                                  allow_abbrev=False)
    commands = top.add_subparsers(dest="command")
    commands.add_parser("list", help="the table of the models: tokens, parameters, memory", allow_abbrev=False)
    one = commands.add_parser("compare", help="run a golden file through the port and compare", allow_abbrev=False)
    one.add_argument("file", help="GOLDEN.safetensors")
    one = commands.add_parser("coverage", help="check every tensor of a manifest", allow_abbrev=False)
    one.add_argument("file", help="MANIFEST.json")
    one = commands.add_parser("inspect", help="what a checkpoint holds, and what it lacks", allow_abbrev=False)
    one.add_argument("path", help="safetensors file, or folder")
    one.add_argument("--family", help="what it is, where its files do not say so")
    one = commands.add_parser("convert", help="published weights into our folder, or back", allow_abbrev=False)
    one.add_argument("paths", nargs="+", metavar="SOURCE ... OUT", help="checkpoints to read, and the folder to write")
    one.add_argument("--family", help="what it is, where its config.json does not say so")
    one.add_argument("--to", choices=("ours", "published"), default="ours", help="layout to write")
    one.add_argument("--vision", metavar="PATH", help="checkpoint of a vision tower to start from")
    one.add_argument("--language", metavar="PATH", help="checkpoint of a language model to start from")
    one.add_argument("--config", metavar="FILE", help="JSON of the sizes, instead of the source's")
    one.add_argument("--size", help="sizes of the recipe: full or tiny")
    one.add_argument("--image-size", type=int, metavar="PIXELS", help="resize the position table to pictures of this size")
    one.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the written weights; default: the source's")
    one.add_argument("--seed", type=int, default=0, help="of the weights that no source holds")
    one.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a shard, 10^9 bytes")
    return top


def run(wishes):
    """Run a command: the exit code."""
    if wishes.command == "compare":
        from nanovlm.recipes.compare import main
        return main(wishes.file)
    if wishes.command == "coverage":
        from nanovlm.recipes.coverage import check
        print("\n".join(check(wishes.file).lines()))
    elif wishes.command == "inspect":
        from nanovlm.recipes.inspect import inspect
        print("\n".join(inspect(wishes.path, wishes.family)))
    elif wishes.command == "convert":
        from nanovlm.recipes.convert import convert
        for line in convert(wishes):
            print(line)
    else:
        from nanovlm.recipes.table import main
        return main()
    return 0


def main(arguments=None):
    """Run the command line; returns the exit code."""
    wishes = parser().parse_args(arguments)
    try:
        return run(wishes) or 0
    except (ValueError, OSError) as error:
        print(f"recipes {wishes.command}: {error}", file=sys.stderr)
        return MISFIT
    except KeyboardInterrupt:
        print()
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
