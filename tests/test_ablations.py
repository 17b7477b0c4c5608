"""Ablations: what they vary, that finished runs are kept, and what the tables say."""

import pytest
import torch

from nanovlm.evaluation import ablation_runs
from nanovlm.evaluation.ablation_recipe import RECIPE
from nanovlm.evaluation.ablations import ABLATIONS
from nanovlm.recipes.start import add_lora, build_models, check_stages, choose_stages

VARIANTS = {(name, one.name): one for name, ablation in ABLATIONS.items() for one in ablation.variants}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=map(" ".join, VARIANTS))
def test_every_variant_is_a_command_that_train_accepts(variant):
    wishes = ablation_runs.command_line().make_parser().parse(
        [RECIPE.name, "--size", variant.size, "--stages", "align,instruct", *variant.flags]
    )
    stages = choose_stages(RECIPE, wishes)
    with torch.device("meta"):
        model, contrastive = build_models(RECIPE, wishes.size, 300, 0)
        add_lora(model, stages, wishes.lora)
    check_stages(stages, model, contrastive)
    assert set(stages[-1].mixture) <= RECIPE.sources.keys()
