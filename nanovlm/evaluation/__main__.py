"""Measure a model on a benchmark.

    python -m nanovlm.evaluation                                              the tasks
    python -m nanovlm.evaluation easy_vqa --model out/nano
    python -m nanovlm.evaluation pope --model FOLDER --data pope/ --images val2014/
    python -m nanovlm.evaluation open_vqa --model FOLDER --data open_vqa/ --images open_vqa/ --judge FOLDER
    python -m nanovlm.evaluation rank OUT_A OUT_B --judge FOLDER --out OUT      Elo and Bradley-Terry of several runs
    python -m nanovlm.evaluation rank OUT_A OUT_B --sheet FILE.csv              a sheet for people's marks, 1 to 5
    python -m nanovlm.evaluation compare OUT_A OUT_B                            two runs, question by question
    python -m nanovlm.evaluation attention MODEL --ask "…" --image PATH         attention on picture and words, by layer

Answers go to predictions.jsonl as they are made; the same command again goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

import numpy

from nanovlm import recipes
from nanovlm.data import images
from nanovlm.data.scene_questions import parse_scene
from nanovlm.data.scenes import render
from nanovlm.evaluation import attention_maps, pairwise, protocols
from nanovlm.evaluation.runner import endpoint_judge, local_judge, run
from nanovlm.evaluation.tasks import TASKS
from nanovlm.machine import check_device, default_device, DEVICES, DTYPES, slow_line
from nanovlm.names import nearest

NOTHING_MEASURED, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit codes


def command_line(command, text):
    """An empty command line: argparse parser. command: what stands behind `python -m nanovlm.evaluation`."""
    form = argparse.RawDescriptionHelpFormatter
    name = f"python -m nanovlm.evaluation {command}".strip()
    return argparse.ArgumentParser(prog=name, description=text, allow_abbrev=False, formatter_class=form)


def make_parser():
    """The command line of the tasks, as an argparse parser."""
    parser = command_line("", __doc__)
    add = parser.add_argument
    add("task", nargs="?", metavar="TASK", help="one of the tasks; without one: their table")
    add("--model", metavar="FOLDER", help="what train.py or convert wrote, or a published model's folder")
    add("--data", default=".", metavar="PATH", help="the benchmark's files, as published: a folder or a file")
    add("--images", default="", metavar="FOLDER", help="its pictures or films (default: --data)")
    add("--split", default="", metavar="WORD", help="which of the benchmark's splits (default: its usual one)")
    add("--out", default="", metavar="FOLDER", help="default: out/evaluation/MODEL/TASK")
    add("--prompt", metavar="TEXT", help="instead of the task's; {question}, {options}, {hint}, {ocr}")
    add("--preset", default="", metavar="NAME", help="one of the recipe's decodings (default: the task's)")
    add("--describe-first", action="store_true", help="describe the picture, then answer in that history")
    add("--shots", type=int, default=0, metavar="K", help="the first K questions are shown with their answers")
    add("--shots-split", default="", metavar="WORD", help='take them from this split: "dev" of MMLU')
    add("--limit", type=int, metavar="N", help="ask only the first N questions")
    add("--batch-size", type=int, default=16, metavar="N", help="questions that run together")
    add("--num-frames", type=int, default=4, metavar="N", help="frames of a film")
    add("--seed", type=int, default=0, help="of sampling, where the preset samples")
    add("--unrelated-image", default="", metavar="PATH", help="show it with every question that has no picture")
    return add_judge_flags(parser)


def rank_parser():
    """The command line of `rank`, as an argparse parser."""
    parser = command_line("rank", pairwise.__doc__)
    add = parser.add_argument
    add("folders", nargs="+", metavar="OUT", help="folders of finished runs of one task")
    add("--out", default="out/evaluation/ranking", metavar="FOLDER")
    add("--sheet", metavar="FILE.csv", help="write an empty sheet of marks, and rank nothing")
    add("--marks", nargs="+", metavar="FILE.csv", help="filled sheets: mean marks, and what breaks the rules")
    add("--seed", type=int, default=0, help="of shuffles and bootstrap")
    return add_judge_flags(parser)


def compare_parser():
    """The command line of `compare`, as an argparse parser."""
    parser = command_line("compare", pairwise.__doc__)
    parser.add_argument("folders", nargs=2, metavar="OUT", help="folders of two finished runs of one task")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser


def attention_parser():
    """The command line of `attention`, as an argparse parser."""
    parser = command_line("attention", attention_maps.__doc__)
    add = parser.add_argument
    add("folders", nargs="+", metavar="MODEL", help="one model, or several that are compared")
    add("--ask", required=True, metavar="QUESTION")
    add("--image", action="append", default=[], metavar="PATH", help="shown with the question; repeatable")
    add("--draw", metavar="TEXT", help='a drawn scene in place of a file: "red star left of blue ring"')
    add("--as-text", action="store_true", help="MAM models also with image tokens taken for words")
    add("--max-new-tokens", type=int, metavar="N", help="of the answer")
    add("--out", type=Path, default=Path("attention.png"), metavar="PNG")
    add("--recipe", metavar="FILE.py", help="the recipe file that a model was trained from")
    add("--device", default=default_device(), help=DEVICES)
    return parser


def add_judge_flags(parser):
    """Who judges, and how models are held: the parser."""
    add = parser.add_argument
    add("--judge", metavar="FOLDER", help="a model of this project, or a published one, that judges")
    add("--judge-endpoint", metavar="NAME", help="a model behind $OPENAI_BASE_URL, any server of OpenAI's chat completions")
    add("--judgements", default="", metavar="FILE", help='JSON lines {"id", "judgement"} made elsewhere')
    add("--recipe", metavar="FILE.py", help="the recipe file that a model was trained from")
    add("--device", default=default_device(), help=DEVICES)
    add("--dtype", choices=DTYPES, default="float32")
    return parser


def parse(parser, arguments):
    """Flags as a namespace; ends the program with code 2 for what is unknown or contradicts."""
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unknown flag {unknown[0]!r}.{nearest(unknown[0].split('=')[0], parser._option_string_actions)}")
    if "ask" in args and not args.image and args.draw is None:
        parser.error("a picture is needed: give --image or --draw")
    if getattr(args, "task", None) is None:
        return args
    if args.task not in TASKS:
        parser.error(f"unknown task {args.task!r}.{nearest(args.task, [*TASKS, *COMMANDS])}")
    if args.model is None:
        parser.error("--model is needed: the folder of the model to measure")
    if (args.judge or args.judge_endpoint) and TASKS[args.task].protocol is not protocols.judged:
        parser.error(f"--judge: answers of {args.task} are not judged")
    if args.judge and args.judge_endpoint:
        parser.error("--judge and --judge-endpoint: one of them judges")
    for name, least in (("shots", 0), ("limit", 1), ("batch_size", 1), ("num_frames", 1)):
        if vars(args)[name] is not None and vars(args)[name] < least:
            parser.error(f"--{name.replace('_', '-')} is {vars(args)[name]}; it must be {least} or more")
    args.out = args.out or str(Path("out", "evaluation", Path(args.model).resolve().name, args.task))
    return args


def load(folder, args):
    """The model of a folder: recipes.Loaded."""
    return recipes.load(folder, dtype=DTYPES[args.dtype], device=args.device, recipe=args.recipe)


def open_judge(args):
    """The judge of --judge or --judge-endpoint, or None."""
    if args.judge:
        return local_judge(load(args.judge, args))
    return endpoint_judge(args.judge_endpoint) if args.judge_endpoint else None


def measure(args):
    """What a task prints, or the table of the tasks: (list of str, exit code)."""
    if args.task is None:
        rows = [("task", "protocol", "counted by", "read as")]
        for name, task in TASKS.items():
            read = task.read.__doc__.split("\n")[0]
            rows.append((name, task.protocol.__name__, task.way or task.summarise.__name__, read))
        return [f"{name:<16}{protocol:<14}{way:<14}{read}" for name, protocol, way, read in rows], 0
    check_device(args.device)
    if line := slow_line(args.dtype, args.device):
        print(f"({line})", file=sys.stderr)
    loaded = load(args.model, args)
    try:
        lines, number = run(args, loaded, open_judge(args))
    except KeyboardInterrupt:
        print(f"\nstopped; the answers so far are in {args.out}, the same command goes on", file=sys.stderr)
        return [], INTERRUPTED
    return [*lines, f"report, predictions and pictures: {args.out}"], 0 if number else NOTHING_MEASURED


def rank(args):
    """What `rank` prints: (list of str, exit code)."""
    if args.sheet:
        pairwise.write_sheet(pairwise.read_answers(args.folders), args.sheet)
        return [f"marks from 1 to 5 go into {args.sheet}; read it with --marks"], 0
    if args.marks:
        means, breaches = pairwise.read_sheets(args.marks)
        return [f"{model:<32}{mark:>8.2f}" for model, mark in means.items()] + breaches, 0
    return pairwise.rank(args.folders, open_judge(args), args.judgements, args.out, seed=args.seed), 0


def compare(args):
    """What `compare` prints: (list of str, exit code)."""
    return pairwise.compare(args.folders, args.seed), 0


def attention(args):
    """What `attention` prints: (list of str, exit code)."""
    looks = []
    for folder in args.folders:
        loaded = recipes.load(folder, device=args.device, recipe=args.recipe)
        shown = [images.load(path) for path in args.image]
        if args.draw is not None:
            rng = numpy.random.default_rng(0)
            shown.append(render(parse_scene(args.draw, rng, loaded.image_size), rng))
        for as_text in (False, True) if args.as_text and attention_maps.is_adaptive(loaded.model) else (False,):
            name = f"{folder}, image tokens as words" if as_text else folder
            looks.append(attention_maps.look(name, loaded, args.ask, shown, as_text, args.max_new_tokens))
    attention_maps.draw_by_layer(looks, args.ask, args.out)
    return [*attention_maps.table(looks), f"drawn: {args.out}"], 0


COMMANDS = {  # beside the tasks
    "rank": (rank_parser, rank), "compare": (compare_parser, compare), "attention": (attention_parser, attention),
}  # fmt: skip


def main(arguments):
    """Run the command line: exit code."""
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    make, work = COMMANDS.get(command, (make_parser, measure))
    parser = make()
    args = parse(parser, arguments[1:] if command else arguments)
    try:
        lines, code = work(args)
    except (ValueError, OSError, ImportError, KeyError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return BAD_INPUT
    if lines:
        print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
