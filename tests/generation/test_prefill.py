"""Prompts that begin alike run once where they do, others side by side: the same answers, and less work. Times and counts."""

import pytest
import torch

from nanovlm.generation import prefill
from nanovlm.decoder import DecoderConfig, LayerOptions
from nanovlm.generation.prefill import Rows, Workspace
from nanovlm.generation.sampler import Decoding, generate, stream
from tiny import random_vlm, vision_language_model

IMAGE = [-1] * 4
DECODING = Decoding(max_new_tokens=6, eos_ids=(5, 22))


@pytest.fixture(params=["adaptive", "learned positions", "distances"])
def model(request):
    if request.param == "adaptive":
        return random_vlm()
    where = dict(position_offset=2) if request.param == "learned positions" else dict(alibi=(0.9, 0.4, 0.2, 0.1))
    return vision_language_model(DecoderConfig(23, 16, 4, 4, 24, 40, (LayerOptions(),) * 2, norm="layer", rotary_width=0, **where))


def cases():
    """(prompts, pictures of each by number, columns that are run row by row)."""
    a, b = 0, 1
    yield [[*IMAGE, 3, 7], [*IMAGE, 4, 8], [*IMAGE, 9, 9]], [[a], [a], [a]], 2
    yield [[1, *IMAGE, 3, 7, 8, 9], [1, *IMAGE, 3], [1, *IMAGE, 3, 6]], [[a], [a], [a]], 3  # the longest parts first
    yield [[*IMAGE, *IMAGE, 3], [*IMAGE, *IMAGE, 4], [*IMAGE, *IMAGE, 3, 4]], [[a, b]] * 3, 2  # two pictures alike
    yield [[*IMAGE, *IMAGE, 3], [*IMAGE, *IMAGE, 4], [*IMAGE, *IMAGE, 3]], [[a, b], [a, a], [a, b]], 5
    yield [[*IMAGE, 3]] * 5 + [[*IMAGE, 4]] * 4 + [[6]], [[a]] * 5 + [[b]] * 4 + [[]], 1
    yield [[*IMAGE, 2]] * 3, [[a]] * 3, 1


def watched(model, prompts, tokens, shown):
    """(Rows, (rows, columns) of every pass through the decoder that made them)."""
    widths, forward = [], type(model.decoder).forward

    def watch(self, embeddings, *args, **kwargs):
        widths.append(tuple(embeddings.shape[:2]))
        return forward(self, embeddings, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(model.decoder), "forward", watch)
        return Rows(model, prompts, tokens, shown, 3), widths


def assert_same_rows(got, want, prompts):
    """Scores and cache; columns of padding may hold anything."""
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-4)
    assert got.cache.length == want.cache.length
    for mine, theirs in zip(got.cache.layers, want.cache.layers):
        for row, prompt in enumerate(prompts):
            places = slice(want.cache.length - len(prompt), want.cache.length)
            torch.testing.assert_close(mine[:, row, :, places], theirs[:, row, :, places], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("number", range(6))
def test_scores_cache_and_answers_are_those_of_whole_rows(model, number):
    prompts, shown, columns = list(cases())[number]
    tokens = list(torch.randn(2, 4, 16))
    flat = [picture for one in shown for picture in one]
    together, widths = watched(model, prompts, tokens, flat)
    assert widths[-1] == (len(prompts), columns) and len(widths) == 2
    assert widths[0][0] < len(prompts) and sum(r * c for r, c in widths) < len(prompts) * max(map(len, prompts))
    with torch.no_grad():
        assert_same_rows(together, Rows(model, prompts, tokens, flat, 3, share=False), prompts)
    pixels = list(torch.randn(2, 1, 3, 8, 8))
    inputs = [[pixels[picture] for picture in one] for one in shown]
    want = generate(model, prompts, DECODING, inputs, workspace=Workspace(share=False))
    assert generate(model, prompts, DECODING, inputs) == want


@pytest.mark.parametrize("prompts, shown", [
    ([[*IMAGE, 3], [*IMAGE, 3]], [[0], [1]]),  # other pictures
    ([[1, *IMAGE, 3], [2, *IMAGE, 3]], [[0], [0]]),  # other words before it
    ([[3, 4, 5], [3, 4, 6]], [[], []]),  # words alone
    ([[*IMAGE, 3]], [[0]]),
    ([[*IMAGE, 3], [*IMAGE, *range(1, 20)]], [[0], [0]]),  # too little is saved
])
def test_nothing_is_shared_where_nothing_is_saved(prompts, shown):
    flat = [picture for one in shown for picture in one]
    groups, start = prefill.plan_beginnings(prompts, list(torch.randn(2, 4, 16)), flat)
    lengths = set(map(len, prompts))
    assert groups == [[row] for row in range(len(prompts))] and start == (max(lengths) if len(lengths) > 1 else 0)


def test_prompts_of_unequal_length_run_side_by_side_without_padding():
    model = random_vlm(context_length=200)
    prompts = [(torch.arange(length) * 7 % 23).tolist() for length in (90, 3, 50, 1, 88, 45)]
    prompts[2][5:9] = prompts[4][:4] = IMAGE
    tokens = list(torch.randn(2, 4, 16))
    packed, widths = watched(model, prompts, tokens, [0, 1])
    assert widths == [(1, sum(map(len, prompts)))]
    with torch.no_grad():
        padded = Rows(model, prompts, tokens, [0, 1], 3, share=False)
        assert_same_rows(packed, padded, prompts)
        for rows in (packed, padded):
            rows.step(torch.arange(6))
    torch.testing.assert_close(packed.logits, padded.logits, atol=1e-5, rtol=1e-4)


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock takes a second; clock[0] is the time."""
    now = [0.0]

    def look():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(prefill.time, "perf_counter", look)
    return now


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=4), Decoding(max_new_tokens=4, num_beams=2)])
def test_every_part_is_timed_and_counted(clock, decoding):
    workspace, model, pixels = Workspace(), random_vlm(), torch.zeros(1, 3, 8, 8)
    for _ in range(2):
        generate(model, [[*IMAGE, 3], [4]], decoding, [[pixels], []], workspace=workspace)
    assert workspace.num_images == 1, "the second call knows the picture"
    assert workspace.num_prompt_tokens == 2 * 6 and workspace.num_new_tokens == 2 * 2 * 4
    assert workspace.seconds["images"] == workspace.seconds["prompt"] == 2.0
    assert workspace.seconds["decoding"] == (2.0 if decoding.num_beams > 1 else 2 * 7.0)
    images, prompt, answers = workspace.report()
    assert "2.000 s  (1 encoded)" in images and "2.000 s  (12 tokens)" in prompt
    assert "(16 tokens, " in answers and "tokens/s)" in answers


def test_what_the_caller_does_between_two_tokens_does_not_count(clock):
    workspace = Workspace()
    assert "tokens/s" not in workspace.report()[2]
    for _ in stream(random_vlm(), [5], Decoding(max_new_tokens=3), workspace=workspace):
        clock[0] += 1000
    assert workspace.seconds["decoding"] == 5.0
