"""Prompts in groups of similar length: the same scores and cache, and less padding."""

import itertools

import pytest
import torch

from nanovlm import length_groups
from nanovlm.prefill import Rows
from tiny import random_vlm


def cost(groups, lengths):
    return sum(len(rows) * max(lengths[row] for row in rows) + length_groups.COST_OF_A_GROUP["cpu"] for rows in groups)


def partitions(items):
    """All ways to split a list into groups."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for place in range(len(rest)):
            yield [*rest[:place], [items[0], *rest[place]], *rest[place + 1 :]]


@pytest.mark.parametrize("lengths", [[5], [40, 40, 40], [90, 3, 50, 4, 88, 45], [1, 33, 65, 97], [7, 1, 12, 6]])
def test_no_other_split_computes_less(lengths):
    groups = length_groups.group(lengths)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert cost(groups, lengths) == min(cost(split, lengths) for split in partitions(list(range(len(lengths)))))


def test_a_gpu_takes_larger_groups():
    lengths = [10, 20, 60, 70]
    assert len(length_groups.group(lengths)) > len(length_groups.group(lengths, "cuda")) == 1


def test_scores_and_cache_are_those_of_padded_rows():
    model = random_vlm(context_length=200)
    image = [-1] * 4
    lengths = [90, 3, 50, 4, 88, 45]
    prompts = [(torch.arange(length) * 7 % 23).tolist() for length in lengths]
    prompts[2][5:9] = prompts[4][:4] = image
    tokens = list(torch.randn(2, 4, 16))
    widths = []
    forward = type(model.decoder).forward
    with torch.no_grad():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                type(model.decoder), "forward", lambda self, x, *a, **k: widths.append(tuple(x.shape[:2])) or forward(self, x, *a, **k)
            )
            groups = Rows(model, prompts, tokens, [0, 1], 3)
        model.share_prefix = False
        padded = Rows(model, prompts, tokens, [0, 1], 3)
        assert widths == [(2, 4), (2, 50), (2, 90)]
        torch.testing.assert_close(groups.logits, padded.logits, atol=1e-5, rtol=1e-4)
        for got, want in zip(groups.cache.layers, padded.cache.layers):
            for row, length in enumerate(lengths):
                torch.testing.assert_close(got[:, row, :, 90 - length : 90], want[:, row, :, 90 - length : 90], atol=1e-5, rtol=1e-4)
        for rows in (groups, padded):
            rows.step(torch.arange(6))
        torch.testing.assert_close(groups.logits, padded.logits, atol=1e-5, rtol=1e-4)
