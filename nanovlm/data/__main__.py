"""Look at what a stage trains on.

    python -m nanovlm.data show                                   the last stage of the recipe nano
    python -m nanovlm.data show --recipe nano --stage align -n 2  another stage, two records
    python -m nanovlm.data show --data FILE.json --images FOLDER  your own file, as that stage would read it
"""

import argparse
import os
import sys

import torch

from nanovlm.data.batching import Report, build_batch
from nanovlm.data.mixture import Mixture
from nanovlm.data.show import legend, paint, use_color
from nanovlm.names import nearest

COMMANDS = ("show",)


def make_parser():
    """The flags of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.data",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", help="show")
    parser.add_argument("--recipe", default="nano", help="a recipe's name, or a Python file that defines RECIPE")
    parser.add_argument("--stage", help="default: the recipe's last")
    parser.add_argument("--data", metavar="FILE.json", help="LLaVA-style JSON to show instead of the stage's mixture")
    parser.add_argument("--images", metavar="FOLDER", help="where the image paths in --data start")
    parser.add_argument("--datasets", metavar="FILE.json", help="data sources by name, for the stage's mixture")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("-n", type=int, default=4, help="records to show")
    return parser


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
    from nanovlm.recipes.start import build_models, choose_size, choose_stages, make_sources

    if wishes.n < 1:
        raise ValueError(f"-n {wishes.n}: at least one record must be shown")
    recipe = find(wishes.recipe)
    stages = None if wishes.stage is None else [wishes.stage]
    wishes = argparse.Namespace(**vars(wishes), size=None, smoke=False, stages=stages, without=[], set=[])
    stage = choose_stages(recipe, wishes)[-1]
    if stage.objective == "contrastive":
        raise ValueError(f"stage {stage.name!r} compares pictures with captions; --stage names one that trains tokens")
    mixture = Mixture(make_sources(recipe, (stage,), wishes), stage.mixture)
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
    wishes = parser.parse_args(arguments)
    if wishes.command not in COMMANDS:
        parser.error(f"unknown command {wishes.command!r}.{nearest(wishes.command, COMMANDS)}")
    try:
        lines = show(wishes, use_color(sys.stdout, os.environ))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
