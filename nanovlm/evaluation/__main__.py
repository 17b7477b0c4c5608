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
import dataclasses
import sys
from pathlib import Path

from nanovlm import recipes
from nanovlm.evaluation import attention_maps, pairwise, protocols
from nanovlm.evaluation.runner import Wishes, generator_judge, local_judge, run
from nanovlm.evaluation.tasks import TASKS
from nanovlm.machine import DEVICES, DTYPES, check_device, default_device, slow_line
from nanovlm.names import nearest
from nanovlm.vlit.endpoint import OpenAICompatible

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


def make_parser():
    """The command line, as an argparse parser."""
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.evaluation", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("task", nargs="?", metavar="TASK", help="one of the tasks; without one: their table")
    parser.add_argument(
        "--model", metavar="FOLDER", help="what train.py or convert wrote, or a published model's folder"
    )
    parser.add_argument(
        "--data", default=".", metavar="PATH", help="the benchmark's files, as published: a folder or a file"
    )
    parser.add_argument("--images", default="", metavar="FOLDER", help="its pictures or films (default: --data)")
    parser.add_argument(
        "--split", default="", metavar="WORD", help="which of the benchmark's splits (default: its usual one)"
    )
    parser.add_argument("--out", default="", metavar="FOLDER", help="default: out/evaluation/MODEL/TASK")
    parser.add_argument("--prompt", metavar="TEXT", help="instead of the task's; {question}, {options}, {hint}, {ocr}")
    parser.add_argument(
        "--preset", default="", metavar="NAME", help="one of the recipe's decodings (default: the task's)"
    )
    parser.add_argument(
        "--describe-first", action="store_true", help="describe the picture, then answer in that history"
    )
    parser.add_argument(
        "--shots", type=int, default=0, metavar="K", help="the first K questions are shown with their answers"
    )
    parser.add_argument("--shots-split", default="", metavar="WORD", help='take them from this split: "dev" of MMLU')
    parser.add_argument("--limit", type=int, metavar="N", help="ask only the first N questions")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions that run together")
    parser.add_argument("--num-frames", type=int, default=4, metavar="N", help="frames of a film")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, where the preset samples")
    parser.add_argument(
        "--unrelated-image", default="", metavar="PATH", help="show it with every question that has no picture"
    )
    add_judge_flags(parser)
    return parser


def parse(arguments):
    """Flags as a namespace; ends the program with code 2 for what is unknown or contradicts."""
    parser = make_parser()
    wishes, unknown = parser.parse_known_args(arguments)
    flags = ["--" + name.replace("_", "-") for name in vars(wishes) if name != "task"]
    for word in unknown:
        parser.error(f"unknown flag {word!r}.{nearest(word.split('=')[0], flags)}")
    if wishes.task is None:
        return wishes
    if wishes.task not in TASKS:
        parser.error(f"unknown task {wishes.task!r}.{nearest(wishes.task, [*TASKS, *COMMANDS])}")
    if wishes.model is None:
        parser.error("--model is needed: the folder of the model to measure")
    if (wishes.judge or wishes.judge_endpoint) and TASKS[wishes.task].protocol is not protocols.judged:
        parser.error(f"--judge: answers of {wishes.task} are not judged")
    if wishes.judge and wishes.judge_endpoint:
        parser.error("--judge and --judge-endpoint: one of them judges")
    for name, least in (("shots", 0), ("limit", 1), ("batch_size", 1), ("num_frames", 1)):
        if vars(wishes)[name] is not None and vars(wishes)[name] < least:
            parser.error(f"--{name.replace('_', '-')} is {vars(wishes)[name]}; it must be {least} or more")
    return wishes


def rank_parser():
    """The command line of `rank`, as an argparse parser."""
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.evaluation rank",
        description=pairwise.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", metavar="OUT", help="folders of finished runs of one task")
    parser.add_argument("--out", default="out/evaluation/ranking", metavar="FOLDER")
    parser.add_argument("--sheet", metavar="FILE.csv", help="write an empty sheet of marks, and rank nothing")
    parser.add_argument(
        "--marks", nargs="+", metavar="FILE.csv", help="filled sheets: mean marks, and what breaks the rules"
    )
    parser.add_argument("--seed", type=int, default=0, help="of shuffles and bootstrap")
    add_judge_flags(parser)
    return parser


def rank_main(arguments):
    """Run `rank`: exit code."""
    try:
        print("\n".join(rank(rank_parser().parse_args(arguments))))
    except (ValueError, OSError, KeyError) as error:
        print(f"python -m nanovlm.evaluation rank: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def rank(wishes):
    """What `rank` prints: list of str."""
    if wishes.sheet:
        pairwise.write_sheet(pairwise.read_answers(wishes.folders), wishes.sheet)
        return [f"marks from 1 to 5 go into {wishes.sheet}; read it with --marks"]
    if wishes.marks:
        means, breaches = pairwise.read_sheets(wishes.marks)
        return [f"{model:<32}{mark:>8.2f}" for model, mark in means.items()] + breaches
    judge = open_judge(wishes)
    return pairwise.rank(wishes.folders, judge, wishes.judgements, wishes.out, seed=wishes.seed)


def add_judge_flags(parser):
    """Who judges, and how models are held."""
    parser.add_argument("--judge", metavar="FOLDER", help="a model of this project, or a published one, that judges")
    parser.add_argument(
        "--judge-endpoint", metavar="NAME", help="a model behind $OPENAI_BASE_URL, any server of OpenAI's chat completions"
    )
    parser.add_argument(
        "--judgements", default="", metavar="FILE", help='JSON lines {"id", "judgement"} made elsewhere'
    )
    parser.add_argument("--recipe", metavar="FILE.py", help="the recipe file that a model was trained from")
    parser.add_argument("--device", default=default_device(), help=DEVICES)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def open_judge(wishes):
    """The judge of --judge or --judge-endpoint, or None."""
    if wishes.judge:
        return local_judge(recipes.load(wishes.judge, dtype=DTYPES[wishes.dtype], device=wishes.device, recipe=wishes.recipe))
    return generator_judge(OpenAICompatible(wishes.judge_endpoint)) if wishes.judge_endpoint else None


def listing():
    """The table of the tasks: list of str."""
    lines = [f"{'task':<16}{'protocol':<14}{'counted by':<14}read as"]
    for name, task in TASKS.items():
        read = (task.read.__doc__ or "").split("\n")[0]
        lines.append(f"{name:<16}{task.protocol.__name__:<14}{task.way or task.summarise.__name__:<14}{read}")
    return lines


COMMANDS = {  # beside the tasks
    "rank": rank_main, "compare": pairwise.main, "attention": attention_maps.main,
}  # fmt: skip


def main(arguments):
    """Run the command line: exit code."""
    if arguments[:1] == ["ablate"]:
        print("python -m nanovlm.evaluation ablate: use python notebooks/ablations/ablate.py", file=sys.stderr)
        return BAD_INPUT
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    wishes = parse(arguments)
    if wishes.task is None:
        print("\n".join(listing()))
        return 0
    fields = {field.name for field in dataclasses.fields(Wishes)}
    chosen = Wishes(**{name: value for name, value in vars(wishes).items() if name in fields})
    if not chosen.out:
        folder = Path("out") / "evaluation" / Path(wishes.model).resolve().name / wishes.task
        chosen = dataclasses.replace(chosen, out=str(folder))
    try:
        check_device(wishes.device)
        if line := slow_line(wishes.dtype, wishes.device):
            print(f"({line})", file=sys.stderr)
        loaded = recipes.load(wishes.model, dtype=DTYPES[wishes.dtype], device=wishes.device, recipe=wishes.recipe)
        lines = run(wishes.task, TASKS[wishes.task], loaded, Path(wishes.model).name, chosen, open_judge(wishes))
    except (ValueError, OSError, ImportError) as error:
        print(f"python -m nanovlm.evaluation: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"\nstopped; the answers so far are in {chosen.out}, the same command goes on", file=sys.stderr)
        return INTERRUPTED
    print("\n".join([*lines, f"report, predictions and pictures: {chosen.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
