"""Train a vision-language model.

    python train.py                                   the recipe nano, from nothing, into out/nano
    python train.py nano --resume                     go on after an interruption, as if there had been none
    python train.py nano --set instruct.steps=2000    change one value of a stage
    python train.py my_recipe.py                      a recipe of your own
    torchrun --nproc-per-node 2 train.py nano --parallel ddp     two processes
"""

import argparse
import math
import os
import shlex
import sys
from pathlib import Path

from nanovlm import recipes
from nanovlm.machine import DEVICES, check_device, default_device
from nanovlm.names import nearest
from nanovlm.recipes import ALIASES, find, folder_of
from nanovlm.training.checkpoint import CheckpointError, complete
from nanovlm.training.cost import plan
from nanovlm.training.processes import join, leave
from nanovlm.training.progress import Stopped, StopRequests
from nanovlm.training.stages import PRECISIONS
from nanovlm.training.start import as_after_init, make_run
from nanovlm.training.trainer import Trainer
from nanovlm.training.update import TrainingError


class Parser(argparse.ArgumentParser):
    """argparse with the nearest flag named for an unknown one."""

    def parse(self, arguments):
        """Parse a list of str; exit with status 2 and one line if a flag is unknown."""
        args, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(f"unknown argument {unknown[0]!r}.{nearest(unknown[0], self._option_string_actions)}")
        return args

    def error(self, message):
        """Print one line and leave with status 2."""
        self.exit(2, f"train.py: {message}\n")


def names(text):
    """Names with commas between them, as a list."""
    return [name.strip() for name in text.split(",")]


def number(kind, low, high=math.inf):
    """A reader of numbers from low to high; kind: int or float."""
    def read(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} lies outside of {low} to {high}")
        return kind(text)
    return read


COUNT = number(int, 1)


def low_rank(text):
    """RANK or RANK:ALPHA, as keyword arguments of lora.add; without ALPHA the update counts once, as in the paper."""
    rank, _, alpha = text.partition(":")
    return {"rank": COUNT(rank), "alpha": float(alpha or rank)}


def model(text):
    """"MODEL" or "PART=MODEL", the folder of a model that comes along in the place of its name: str."""
    part, equals, place = text.partition("=")
    return f"{part}={folder_of(place)}" if equals and not Path(text).exists() else str(folder_of(text))


def make_parser():
    """All flags."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe", nargs="?", default="nano", help="a recipe's name, or a Python file that defines RECIPE")
    add("--size", help="the recipe's size to build; default: its first")
    add("--stages", type=names, help="train only these stages, with commas between them")
    add("--without", type=names, action="extend", default=[], metavar="STAGE", help="leave out a stage")
    add("--set", action="append", default=[], metavar="STAGE.FIELD=VALUE", help="change a value of a stage")
    add("--init", nargs="+", type=model, metavar="MODEL",
        help="start from the model in this folder, of this name at huggingface.co, or from nano, which comes along, instead of from "
        "nothing; a published one also from parts: vision=MODEL language=MODEL [bridge=MODEL] [trained=FILE]")
    add("--lora", type=low_rank, metavar="RANK[:ALPHA]", help="low-rank updates in the decoder; the last stage trains nothing else")
    add("--tune", type=names, metavar="PART,PART", help="what the last stage trains, for example bridge,lora; default: the recipe's parts")
    add("--out", metavar="FOLDER", type=Path, help="output folder; default: out/RECIPE")
    add("--resume", action="store_true", help="continue after the last checkpoint in the output folder")
    add("--data", metavar="FILE.json",
        help="LLaVA-style JSON, or a folder of tar shards, that the last stage trains on instead of its mixture")
    add("--images", metavar="FOLDER", help="where the image paths in --data start")
    add("--epochs", type=number(float, 1e-6), metavar="N", help="how often the last stage reads --data; default: once in a published "
        "model, else the recipe's steps")
    add("--tests", action="store_true", help="with --data: the recipe's own tests as well, not only held-out records")
    add("--datasets", metavar="FILE.json", help="data sources by name, for the stages' mixtures")
    add("--allow-missing", action="store_true", help="train on what is there of a mixture; its shares grow alike")
    add("--workers", type=number(int, 0), default=0, help="processes that read and decode the data ahead; 0: none")
    add("--max-damaged", type=number(float, 0, 1), default=0.01, metavar="SHARE",
        help="of the records that may be unusable (each is replaced by the next, see OUT/damaged.jsonl); default: 0.01")
    add("--parallel", default="none", help="none: one process; ddp: each of torchrun's holds the model; fsdp: a share of it")
    add("--shards", type=COUNT, metavar="N", help="with fsdp: N processes hold the model once; default: all")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="give up on a process that is silent for so long")
    add("--recompute", action="store_true", help="run blocks again in the backward pass instead of remembering their inside")
    add("--compile", action="store_true", help="torch.compile around every block")
    add("--keep", type=COUNT, default=1, metavar="N", help="checkpoints that stay; default: the last")
    add("--save-in-background", action="store_true", help="a thread writes the checkpoints while training goes on")
    add("--device", default=default_device(), help=DEVICES)
    add("--precision", choices=PRECISIONS, help="of every stage; auto: what this machine is fast in")
    add("--threads", type=COUNT, help="CPU threads; default: 2, or the cores if there are fewer")
    add("--seed", type=int, default=0, help="of weights and data")
    add("--max-minutes", type=float, help="stop after this time, with a checkpoint to resume from")
    add("--smoke", action="store_true", help="a run of a minute or two through all stages, which learns nothing")
    add("--against", metavar="RECIPE", help="train this recipe, too, both from --init (default: nano) with three seeds, and compare")
    add("--print", action="store_true", help="show stages and sizes, train nothing")
    return parser


def resume_command(arguments):
    """The command line that continues this run: str."""
    number = os.environ.get("LOCAL_WORLD_SIZE")
    start = ["torchrun", "--nproc-per-node", number] if "--parallel" in arguments and number else ["python"]
    return shlex.join([*start, "train.py", *arguments, *([] if "--resume" in arguments else ["--resume"])])


def meet(parser, args):
    """Meet the other processes, if there are any: processes.Processes; what this one prints is the main process's to print."""
    try:
        processes, args.device = join(args.parallel, args.device, args.shards, args.timeout)
    except ValueError as error:
        parser.error(str(error))
    if not processes.main:
        sys.stdout = open(os.devnull, "w")
    return processes


def prepare(parser, args, processes):
    """Find the recipe and make the run; mistakes end the program with one line and status 2."""
    try:
        recipe, args.recipe = as_after_init(find(args.recipe), args), ALIASES.get(args.recipe, args.recipe)
        if args.print:
            print("\n".join(plan(recipe, args)))
            sys.exit(0)
        check_device(args.device)
        out = args.out or Path("out") / recipe.name
        run = make_run(recipe, args, out, processes)
        if args.resume and not complete(out):
            print(f"no checkpoint in {out} yet: starting at the beginning")
        return run
    except (ValueError, OSError, CheckpointError) as error:
        parser.error(str(error))


def main(arguments):
    """Run the command line: exit code."""
    parser = make_parser()
    args, going_on = parser.parse(arguments), f"To go on:\n  {resume_command(arguments)}"
    if not args.against:
        return train(parser, args, going_on)
    try:
        return recipes.compare(args, lambda run: train(parser, run, going_on))
    except (ValueError, OSError, CheckpointError) as error:
        parser.error(str(error))


def train(parser, args, going_on):
    """One run: exit code. going_on: what is said, with the command, of a run that can be continued."""
    with StopRequests() as stop:
        processes = meet(parser, args)
        try:
            with stop.anywhere():
                run = prepare(parser, args, processes)
            Trainer(run, stop).train()
        except Stopped as stopped:
            print(f"stopped: {stopped}. {going_on}", flush=True)
            return stopped.exit_code
        except (TrainingError, CheckpointError) as error:
            print(f"train.py: {error}\n{going_on}", file=sys.stderr)
            return 1
        except RuntimeError as error:
            if not processes.is_lost(error):
                raise
            print(f"train.py: {processes}: another process is gone, or was silent for {args.timeout:g} s ({error})\n"
                  f"{going_on}", file=sys.stderr, flush=True)
            os._exit(1)  # no goodbye to the others, which nobody might hear
        leave(processes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
