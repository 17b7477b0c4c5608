"""Prompts side by side in one row: the same scores and cache, and no padding."""

import pytest
import torch

from nanovlm.generation.prefill import Rows
from tiny import random_vlm


def test_scores_and_cache_are_those_of_padded_rows():
    model = random_vlm(context_length=200)
    image = [-1] * 4
    lengths = [90, 3, 50, 1, 88, 45]
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
            packed = Rows(model, prompts, tokens, [0, 1], 3)
        padded = Rows(model, prompts, tokens, [0, 1], 3, share=False)
        assert widths == [(1, sum(lengths))]
        torch.testing.assert_close(packed.logits, padded.logits, atol=1e-5, rtol=1e-4)
        for got, want in zip(packed.cache.layers, padded.cache.layers):
            for row, length in enumerate(lengths):
                torch.testing.assert_close(got[:, row, :, 90 - length : 90], want[:, row, :, 90 - length : 90], atol=1e-5, rtol=1e-4)
        for rows in (packed, padded):
            rows.step(torch.arange(6))
        torch.testing.assert_close(packed.logits, padded.logits, atol=1e-5, rtol=1e-4)
