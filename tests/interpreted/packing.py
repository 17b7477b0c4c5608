"""Packed rows under the fused kernels, as numpy: each document sees its own interval of keys; started by test_packing."""

import pytest

from nanovlm import flash_attention
from test_packing import tiny, trains_alike  # noqa: F401  the fixture, of other models here

assert flash_attention.INTERPRETED


@pytest.mark.parametrize("tiny", ["lynx", "mplug_owl2"], indirect=True)
def test_packed_rows_train_as_rows_of_their_own(tiny):
    trains_alike(*tiny, "triton")
