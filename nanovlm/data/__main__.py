"""Look at what a stage trains on; bring other data sets into the forms that training reads.

    python -m nanovlm.data show                                   the last stage of the recipe nano
    python -m nanovlm.data show --recipe nano --stage align -n 2  another stage, two records
    python -m nanovlm.data show --data FILE.json --images FOLDER  your own file, as that stage would read it
    python -m nanovlm.data convert FORMAT SOURCE OUT.jsonl        another data set as LLaVA's JSON lines
    python -m nanovlm.data convert FORMAT SOURCE OUT --shards N   the same as tar shards of N samples
    python -m nanovlm.data index FOLDER                           count the samples of tar shards once and for all

FORMAT: llava, sharegpt, mimic-it, m3it, minigpt4, coco-captions, coco-boxes, vqa, qa-lines or folder, see formats.py and
picture_formats.py.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from nanovlm.data.batching import Report, build_batch
from nanovlm.data.convert import convert
from nanovlm.data.convert import Job
from nanovlm.data.feed import Mixture
from nanovlm.data.show import legend, paint, use_color
from nanovlm.data.tar_shards import write_index
from nanovlm.names import nearest

COMMANDS = ("show", "convert", "index")


def make_parser():
    """The flags of the commands."""
    style = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    top = argparse.ArgumentParser(prog="python -m nanovlm.data", description=__doc__, **style)
    commands = top.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    parser = commands.add_parser("show", help="the first records of a stage, as it would train on them", **style)
    parser.add_argument("--recipe", default="nano", help="a recipe's name, or a Python file that defines RECIPE")
    parser.add_argument("--stage", help="default: the recipe's last")
    parser.add_argument("--data", metavar="FILE.json", help="LLaVA-style JSON to show instead of the stage's mixture")
    parser.add_argument("--images", metavar="FOLDER", help="where the image paths in --data start")
    parser.add_argument("--datasets", metavar="FILE.json", help="data sources by name, for the stage's mixture")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("-n", type=int, default=4, help="records to show")
    parser = commands.add_parser("convert", help="another data set", **style)
    add = parser.add_argument
    add("format", help="see above")
    add("source", type=Path, help="file or folder")
    add("out", type=Path, help="OUT.jsonl, or with --shards a folder")
    add("--shards", type=int, metavar="N", help="write tar shards of N samples")
    add("--images", type=Path, metavar="FOLDER", help="where the pictures lie; of mimic-it the file that holds them")
    add("--annotations", type=Path, metavar="FILE", help="of vqa: the file with the answers")
    add("--question", default="", help="put to every picture without one; of coco-boxes with {box}; default: no words")
    add("--prompts", type=Path, metavar="FILE", help="of minigpt4: instructions, one a line, drawn for each picture")
    add("--names", type=Path, metavar="FILE", help="of folder: names of the classes, JSON or lines of FOLDER NAME")
    add("--image-name", default="", metavar="NAME", help="how a picture's file is called, such as COCO_val2014_{id:012d}.jpg")
    add("--in-context", type=int, default=0, metavar="N", help="of mimic-it: put N related examples in front")
    parser = commands.add_parser("index", help="count the samples of tar shards", **style)
    parser.add_argument("folder", type=Path)
    return top


def convert_data(wishes, color):
    """Convert a data set, see convert.py: list of str, lines that say what was done."""
    if wishes.shards is not None and wishes.shards < 1:
        raise ValueError(f"--shards {wishes.shards}: at least one sample must stand in a shard")
    job = Job(wishes.source, wishes.images, wishes.annotations, wishes.question, wishes.prompts, wishes.names,
              wishes.image_name, wishes.in_context)
    return convert(wishes.format, job, wishes.out, wishes.shards)


def index(wishes, color):
    """Write index.json beside shards: list of str, a line."""
    return [write_index(wishes.folder)]


def show(wishes, color):
    """The first records of a stage, as the trainer would batch them.

    Args:
      wishes: the values of the flags.
      color: bool.
    Returns: list of str, lines.
    Raises: ValueError or OSError, in words for the user.
    """
    # recipes stand above data: only this command line knows both
    from nanovlm.recipes import find
    from nanovlm.training.start import find_sources
    from nanovlm.training.start import build_models, choose_size, choose_stages

    if wishes.n < 1:
        raise ValueError(f"-n {wishes.n}: at least one record must be shown")
    recipe = find(wishes.recipe)
    stages = None if wishes.stage is None else [wishes.stage]
    wishes = argparse.Namespace(**vars(wishes), size=None, smoke=False, stages=stages, without=[], set=[], allow_missing=False)
    stage = choose_stages(recipe, wishes)[-1]
    if stage.objective == "contrastive":
        raise ValueError(f"stage {stage.name!r} compares pictures with captions; --stage names one that trains tokens")
    sources, (stage,), _ = find_sources(recipe, (stage,), wishes)
    mixture = Mixture(sources, stage.mixture)
    drawn = [mixture.next() for _ in range(wishes.n)]
    tokenizer, report = recipe.tokenizer(), Report()
    with torch.device("meta"):  # sizes only, no weights
        model, _ = build_models(recipe, choose_size(recipe, None), tokenizer.vocab_size, wishes.seed)
    batch = build_batch(
        [record for _, record in drawn], recipe.template, tokenizer, model.num_image_tokens,
        stage.image_size, stage.image_fit, stage.max_tokens, report,
    )  # fmt: skip
    sources = ", ".join(f"{record.id} ({name})" for name, record in drawn)
    cut = f"; {report.truncated_rows} cut to {stage.max_tokens} tokens" if report.truncated_rows else ""
    return [
        f"recipe {recipe.name}, stage {stage.name}: {len(drawn)} records in {report.rows} rows{cut}",
        f"records: {sources}",
        legend(color),
        *paint(batch, tokenizer, color),
    ]


def main(arguments):
    """Run the command line: list of str. Unknown names and unusable files end it with a message and status 2."""
    parser = make_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"unknown command {arguments[0]!r}.{nearest(arguments[0], COMMANDS)}")
    wishes = parser.parse_args(arguments)
    try:
        run = {"show": show, "convert": convert_data, "index": index}[wishes.command]
        lines = run(wishes, use_color(sys.stdout, os.environ))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
