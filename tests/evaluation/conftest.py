"""A tiny random model for all tests of the benchmarks."""

import pytest
from tiny import random_vlm

from nanovlm.data.templates import NANO
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.generation.chat import Assistant
from nanovlm.generation.sampler import Decoding


@pytest.fixture(scope="package")
def loaded():
    tokenizer = train_tokenizer(["user: what color is this? A. B. C. yes no describe the image.\nbot: red blue"] * 3, 300)
    decodings = {"default": Decoding(max_new_tokens=5), "vqa": Decoding(max_new_tokens=2), "describe": Decoding(max_new_tokens=3)}
    return Assistant(random_vlm(tokenizer.vocab_size, context_length=600), tokenizer, NANO, 8, decodings=decodings)
