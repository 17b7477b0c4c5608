"""Prompts that begin alike: the same answers, and less work."""

import pytest
import torch

from nanovlm.generation import prefill
from nanovlm.decoder import DecoderConfig, LayerOptions
from nanovlm.generation.prefill import Rows
from nanovlm.generation.sampler import Decoding, generate
from tiny import random_vlm, vision_language_model

IMAGE = [-1] * 4
DECODING = Decoding(max_new_tokens=6, eos_ids=(5, 22))


@pytest.fixture(params=["adaptive", "learned positions"])
def model(request):
    if request.param == "adaptive":
        return random_vlm()
    return vision_language_model(
        DecoderConfig(23, 16, 4, 4, 24, 40, (LayerOptions(),) * 2, norm="layer", rotary_width=0, position_offset=2)
    )


def cases():
    """(prompts, pictures of each by number, columns that are run row by row)."""
    a, b = 0, 1
    yield [[*IMAGE, 3, 7], [*IMAGE, 4, 8], [*IMAGE, 9, 9]], [[a], [a], [a]], 2
    yield [[1, *IMAGE, 3, 7, 8, 9], [1, *IMAGE, 3], [1, *IMAGE, 3, 6]], [[a], [a], [a]], 3  # the longest parts first
    yield [[*IMAGE, *IMAGE, 3], [*IMAGE, *IMAGE, 4], [*IMAGE, *IMAGE, 3, 4]], [[a, b]] * 3, 2  # two pictures alike
    yield [[*IMAGE, *IMAGE, 3], [*IMAGE, *IMAGE, 4], [*IMAGE, *IMAGE, 3]], [[a, b], [a, a], [a, b]], 5
    yield [[*IMAGE, 3]] * 5 + [[*IMAGE, 4]] * 4 + [[6]], [[a]] * 5 + [[b]] * 4 + [[]], 1
    yield [[*IMAGE, 2]] * 3, [[a]] * 3, 1


@pytest.mark.parametrize("number", range(6))
def test_scores_cache_and_answers_are_those_of_whole_rows(model, number):
    prompts, shown, columns = list(cases())[number]
    tokens = list(torch.randn(2, 4, 16))
    flat = [picture for one in shown for picture in one]
    widths = []
    with torch.no_grad():
        forward = type(model.decoder).forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                type(model.decoder), "forward", lambda self, x, *a, **k: widths.append(tuple(x.shape[:2])) or forward(self, x, *a, **k)
            )
            together = Rows(model, prompts, tokens, flat, 3)
        apart = Rows(model, prompts, tokens, flat, 3, share=False)
    assert widths[-1] == (len(prompts), columns) and len(widths) == 2
    assert widths[0][0] < len(prompts) and sum(r * c for r, c in widths) < len(prompts) * max(map(len, prompts))
    torch.testing.assert_close(together.logits, apart.logits, atol=1e-5, rtol=1e-4)
    assert together.cache.length == apart.cache.length
    for got, want in zip(together.cache.layers, apart.cache.layers):
        for row, prompt in enumerate(prompts):
            places = slice(apart.cache.length - len(prompt), apart.cache.length)
            torch.testing.assert_close(got[:, row, :, places], want[:, row, :, places], atol=1e-5, rtol=1e-4)
    pixels = list(torch.randn(2, 1, 3, 8, 8))
    inputs = [[pixels[picture] for picture in one] for one in shown]
    want = generate(model, prompts, DECODING, inputs, workspace=prefill.Workspace(share=False))
    assert generate(model, prompts, DECODING, inputs) == want


@pytest.mark.parametrize(
    "prompts, shown",
    [
        ([[*IMAGE, 3], [*IMAGE, 3]], [[0], [1]]),  # other pictures
        ([[1, *IMAGE, 3], [2, *IMAGE, 3]], [[0], [0]]),  # other words before it
        ([[3, 4, 5], [3, 4, 6]], [[], []]),  # words alone
        ([[*IMAGE, 3]], [[0]]),
        ([[*IMAGE, 3], [*IMAGE, *range(1, 20)]], [[0], [0]]),  # too little is saved
    ],
)
def test_nothing_is_shared_where_nothing_is_saved(prompts, shown):
    flat = [picture for one in shown for picture in one]
    groups, start = prefill.plan_beginnings(prompts, list(torch.randn(2, 4, 16)), flat)
    lengths = set(map(len, prompts))
    assert groups == [[row] for row in range(len(prompts))] and start == (max(lengths) if len(lengths) > 1 else 0)
