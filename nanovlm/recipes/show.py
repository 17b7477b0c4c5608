"""`python -m nanovlm.data show`: the first records of a recipe's stage, as the trainer would batch them."""

import argparse
import os
import sys

import torch

from nanovlm.data.batching import Report, build_batch
from nanovlm.data.feed import Mixture
from nanovlm.data.show import legend, paint, use_color
from nanovlm.recipes import find
from nanovlm.training.start import build_models, choose_size, choose_stages, find_sources


def show(args):
    """The records as lines of text: list of str.

    Args:
      args: the values of the flags, see data/__main__.py.
    Raises: ValueError or OSError, in words for the user.
    """
    if args.n < 1:
        raise ValueError(f"-n {args.n}: at least one record must be shown")
    recipe = find(args.recipe)
    stages = None if args.stage is None else [args.stage]
    args = argparse.Namespace(**vars(args), size=None, smoke=False, stages=stages, without=[], allow_missing=False,
                              precision=None, tests=False, tune=None, lora=None)
    stage = choose_stages(recipe, args)[-1]
    if stage.objective == "contrastive":
        raise ValueError(f"stage {stage.name!r} compares pictures with captions; --stage names one that trains tokens")
    sources, (stage,), _ = find_sources(recipe, (stage,), args)
    mixture = Mixture(sources, stage.mixture)
    drawn = [mixture.draw() for _ in range(args.n)]
    records = [sources[name].record(n) for name, n in drawn]
    tokenizer, report, color = recipe.tokenizer(), Report(), use_color(sys.stdout, os.environ)
    with torch.device("meta"):  # sizes only, no weights
        model, _ = build_models(recipe, choose_size(recipe, None), tokenizer.vocab_size, args.seed)
    batch = build_batch(records, recipe.template, tokenizer, model.num_image_tokens, stage.image_size, stage.image_fit,
                        stage.max_tokens, report, num_tiles=stage.tiles)
    named = ", ".join(f"{record.id} ({name})" for record, (name, _) in zip(records, drawn))
    cut = f"; {report.truncated_rows} cut to {stage.max_tokens} tokens" if report.truncated_rows else ""
    return [
        f"recipe {recipe.name}, stage {stage.name}: {len(records)} records in {report.rows} rows{cut}",
        f"records: {named}", legend(color), *paint(batch, tokenizer, color),
    ]
