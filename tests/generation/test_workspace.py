"""Times and counts of generation."""

import pytest
import torch

from nanovlm.generation.sampler import Decoding, generate, stream
from nanovlm.generation.prefill import Workspace
from tiny import random_vlm

IMAGE = [-1] * 4


class Clock:
    """Every look at it takes a second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=4), Decoding(max_new_tokens=4, num_beams=2)])
def test_every_part_is_timed_and_counted(decoding):
    workspace, model, pixels = Workspace(clock=Clock()), random_vlm(), torch.zeros(1, 3, 8, 8)
    for _ in range(2):
        generate(model, [[*IMAGE, 3], [4]], decoding, [[pixels], []], workspace=workspace)
    assert workspace.num_images == 1, "the second call knows the picture"
    assert workspace.num_prompt_tokens == 2 * 6 and workspace.num_new_tokens == 2 * 2 * 4
    assert workspace.seconds["images"] == workspace.seconds["prompt"] == 2.0
    assert workspace.seconds["decoding"] == (2.0 if decoding.num_beams > 1 else 2 * 7.0)
    images, prompt, answers = workspace.report()
    assert "2.000 s  (1 encoded)" in images and "2.000 s  (12 tokens)" in prompt
    assert "(16 tokens, " in answers and "tokens/s)" in answers


def test_what_the_caller_does_between_two_tokens_does_not_count():
    clock = Clock()
    workspace = Workspace(clock=clock)
    for _ in stream(random_vlm(), [5], Decoding(max_new_tokens=3), workspace=workspace):
        clock.now += 1000
    assert workspace.seconds["decoding"] == 5.0


def test_nothing_done_yet():
    assert "tokens/s" not in Workspace().report()[2]
