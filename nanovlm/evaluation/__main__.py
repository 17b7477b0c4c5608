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
from nanovlm.evaluation.runner import JUDGE_TOKENS, endpoint_judge, run
from nanovlm.evaluation.tasks import TASKS
from nanovlm.generation.sampler import Decoding
from nanovlm.names import nearest

COMMANDS = {"rank": pairwise.__doc__, "compare": pairwise.__doc__, "attention": attention_maps.__doc__}  # no tasks
NOTHING_MEASURED, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit codes


def make_parser(command=""):
    """The command line of the tasks, or of one of COMMANDS: argparse parser."""
    name, about = f"python -m nanovlm.evaluation {command}".strip(), COMMANDS.get(command, __doc__)
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, description=about, allow_abbrev=False, formatter_class=form)
    parser.set_defaults(command=command)
    add = parser.add_argument
    if command == "":
        add("task", nargs="?", help="one of the tasks; without one: their table")
        add("--model", metavar="FOLDER", help="what train.py or convert wrote, or a published model's folder")
        add("--data", default=".", metavar="PATH", help="the benchmark's files, as published: a folder or a file")
        add("--images", default="", metavar="FOLDER", help="its pictures or films (default: --data)")
        add("--split", default="", help="which of the benchmark's splits (default: its usual one)")
        add("--out", default="", metavar="FOLDER", help="default: out/evaluation/MODEL/TASK")
        add("--prompt", help="instead of the task's; {question}, {options}, {hint}, {ocr}")
        add("--preset", default="", help="one of the recipe's decodings (default: the task's)")
        add("--describe-first", action="store_true", help="describe the picture, then answer in that history")
        add("--shots", type=int, default=0, help="so many first questions are shown with their answers")
        add("--shots-split", default="", help='take them from this split: "dev" of MMLU')
        add("--limit", type=int, help="ask only so many questions, the first ones")
        add("--batch-size", type=int, default=16, help="questions that run together")
        add("--num-frames", type=int, default=4, help="frames of a film")
        add("--seed", type=int, default=0, help="of sampling, where the preset samples")
        add("--unrelated-image", default="", metavar="PATH", help="show it with every question that has no picture")
    elif command == "attention":
        add("folders", nargs="+", metavar="MODEL", help="one model, or several that are compared")
        add("--ask", required=True, metavar="QUESTION")
        add("--image", action="append", default=[], metavar="PATH", help="shown with the question; repeatable")
        add("--draw", metavar="TEXT", help='a drawn scene in place of a file: "red star left of blue ring"')
        add("--as-text", action="store_true", help="MAM models also with image tokens taken for words")
        add("--max-new-tokens", type=int, help="of the answer")
        add("--out", type=Path, default=Path("attention.png"), metavar="PNG")
    else:
        number = 2 if command == "compare" else "+"
        add("folders", nargs=number, metavar="OUT", help="folders of finished runs of one task")
        add("--seed", type=int, default=0, help="of shuffles and bootstrap")
    if command == "rank":
        add("--out", default="out/evaluation/ranking", metavar="FOLDER")
        add("--sheet", metavar="FILE.csv", help="write an empty sheet of marks, and rank nothing")
        add("--marks", nargs="+", metavar="FILE.csv", help="filled sheets: mean marks, and what breaks the rules")
    if command in ("", "rank"):
        one = parser.add_mutually_exclusive_group().add_argument
        one("--judge", metavar="FOLDER", help="a model of this project, or a published one, that judges")
        one("--judge-endpoint", metavar="NAME", help="a model behind $OPENAI_BASE_URL, any server of chat completions")
        add("--judgements", default="", metavar="FILE", help='JSON lines {"id", "judgement"} made elsewhere')
    if command != "compare":
        recipes.model_flags(parser)
    return parser


def parse(arguments):
    """Flags as a namespace; ends the program with code 2 for what is unknown or contradicts."""
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    parser = make_parser(command)
    args, unknown = parser.parse_known_args(arguments[1:] if command else arguments)
    if unknown:
        parser.error(f"unknown flag {unknown[0]!r}.{nearest(unknown[0].split('=')[0], parser._option_string_actions)}")
    if command == "attention" and not args.image and args.draw is None:
        parser.error("a picture is needed: give --image or --draw")
    if command or args.task is None:
        return args
    if args.task == "ablate":
        parser.error("the ablations are run by python notebooks/ablations/ablate.py")
    if args.task not in TASKS:
        parser.error(f"unknown task {args.task!r}.{nearest(args.task, [*TASKS, *COMMANDS])}")
    if args.model is None:
        parser.error("--model is needed: the folder of the model to measure")
    if (args.judge or args.judge_endpoint) and TASKS[args.task].protocol is not protocols.judged:
        parser.error(f"--judge: answers of {args.task} are not judged")
    for name, least in (("shots", 0), ("limit", 1), ("batch_size", 1), ("num_frames", 1)):
        value = vars(args)[name]
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be {least} or more")
    args.out = args.out or str(Path("out", "evaluation", Path(args.model).resolve().name, args.task))
    return args


def open_judge(args):
    """The judge of --judge (greedy) or --judge-endpoint, a function list of prompts -> list of texts, or None."""
    if args.judge:
        loaded, decoding = recipes.load_by_flags(args.judge, args), Decoding(max_new_tokens=JUDGE_TOKENS)
        return lambda prompts: loaded.ask(prompts, decoding=decoding)
    return endpoint_judge(args.judge_endpoint) if args.judge_endpoint else None


def table():
    """The tasks in words: list of str."""
    rows = [("task", "protocol", "counted by", "read as")]
    for name, task in TASKS.items():
        read = task.read.__doc__.split("\n")[0]
        rows.append((name, task.protocol.__name__, task.way or task.summarise.__name__, read))
    return ["{:<16}{:<14}{:<19}{}".format(*row) for row in rows]


def rank(args):
    """What `rank` prints: list of str."""
    if args.sheet:
        pairwise.write_sheet(pairwise.read_answers(args.folders), args.sheet)
        return [f"marks from 1 to 5 go into {args.sheet}; read it with --marks"]
    if args.marks:
        means, breaches = pairwise.read_sheets(args.marks)
        return [f"{model:<32}{mark:>8.2f}" for model, mark in means.items()] + breaches
    return pairwise.rank(args.folders, open_judge(args), args.judgements, args.out, seed=args.seed)


def attention(args):
    """What `attention` prints: list of str."""
    looks = []
    for folder in args.folders:
        loaded = recipes.load_by_flags(folder, args)
        shown = [images.load(path) for path in args.image]
        if args.draw is not None:
            rng = numpy.random.default_rng(0)
            shown.append(render(parse_scene(args.draw, rng, loaded.image_size), rng))
        for as_text in (False, True)[: 1 + (args.as_text and attention_maps.is_adaptive(loaded.model))]:
            name = f"{folder}, image tokens as words" if as_text else folder
            looks.append(attention_maps.look(name, loaded, args.ask, shown, as_text, args.max_new_tokens))
    attention_maps.draw_by_layer(looks, args.ask, args.out)
    return [*attention_maps.table(looks), f"drawn: {args.out}"]


def main(arguments):
    """Run the command line: exit code."""
    args, code = parse(arguments), 0
    try:
        if args.command == "rank":
            lines = rank(args)
        elif args.command == "compare":
            lines = pairwise.compare(args.folders, args.seed)
        elif args.command == "attention":
            lines = attention(args)
        elif args.task is None:
            lines = table()
        else:
            lines, number = run(args, recipes.load_by_flags(args.model, args), open_judge(args))
            lines, code = [*lines, f"report, predictions and pictures: {args.out}"], 0 if number else NOTHING_MEASURED
    except (ValueError, OSError, ImportError, KeyError) as error:
        print(f"python -m nanovlm.evaluation {args.command or args.task}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"\nstopped; the answers so far are in {args.out}, the same command goes on", file=sys.stderr)
        return INTERRUPTED
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
