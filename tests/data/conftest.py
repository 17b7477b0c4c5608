"""A tokenizer for the tests of batches."""

import pytest

from nanovlm.data.tokenizer import train_tokenizer


@pytest.fixture(scope="package")
def tokenizer():
    return train_tokenizer(["user: what is this?\nbot: a cat"] * 20, 290)
