"""The key/value cache: what is written comes back, rows may be dropped, repeated and copied."""

import pytest
import torch

from nanovlm.cache import KeyValueCache
from nanovlm.decoder import DecoderConfig, LayerOptions

CONFIG = DecoderConfig(11, 24, 4, num_kv_heads=2, ffn_width=8, context_length=9, layers=(LayerOptions(),) * 3)


def keys(rows, tokens):
    return torch.randn(rows, 2, tokens, 6)


def filled(rows=3, columns=7, length=4):
    """A cache with `length` columns written, and what was written: {layer: (k, v)}."""
    torch.manual_seed(0)
    cache, written = KeyValueCache(CONFIG, rows, columns), {}
    for layer in range(3):
        written[layer] = keys(rows, length), keys(rows, length)
        cache.update(layer, *written[layer])
    cache.advance(length)
    return cache, written


def test_every_layer_gets_back_all_its_columns_from_memory_taken_once():
    cache, written = filled()
    assert cache.length == 4 and cache.num_columns == 7
    for layer in range(3):
        k, v = keys(3, 2), keys(3, 2)
        got_k, got_v = cache.update(layer, k, v)
        assert torch.equal(got_k, torch.cat([written[layer][0], k], dim=2))
        assert torch.equal(got_v, torch.cat([written[layer][1], v], dim=2))
    assert cache.length == 4, "only advance moves the cursor"
    cache = KeyValueCache(CONFIG, 3, 7, dtype=torch.bfloat16)
    before = [buffer.data_ptr() for buffer in cache.layers]
    k, _ = cache.update(1, keys(3, 5), keys(3, 5))
    assert k.dtype == torch.bfloat16 and cache.layers[1].shape == (2, 3, 2, 7, 6)
    assert [buffer.data_ptr() for buffer in cache.layers] == before
    cache, _ = filled()
    cache.update(0, keys(3, 3), keys(3, 3))
    with pytest.raises(ValueError, match="no room for 4: 7 columns, 4 written"):
        cache.update(0, keys(3, 4), keys(3, 4))


def test_select_rows_drops_and_repeats():
    cache, written = filled()
    cache.select_rows([2, 0, 0, 2])
    assert cache.length == 4
    for layer in range(3):
        k, v = keys(4, 3), keys(4, 3)  # the columns are as many as before
        got_k, got_v = cache.update(layer, k, v)
        for row, old in enumerate([2, 0, 0, 2]):
            assert torch.equal(got_k[row], torch.cat([written[layer][0][old], k[row]], dim=1))
            assert torch.equal(got_v[row], torch.cat([written[layer][1][old], v[row]], dim=1))
    cache, written = filled(rows=4)
    memory = [buffer.data_ptr() for buffer in cache.layers]
    before = [buffer.clone() for buffer in cache.layers]
    cache.select_rows([0, 3])  # the last row takes the place of one that ended
    assert [buffer.data_ptr() for buffer in cache.layers] == memory
    for layer in range(3):
        assert torch.equal(cache.layers[layer][:, 0], before[layer][:, 0]) and cache.layers[layer].shape[1] == 2
        for got, old in zip(cache.update(layer, keys(2, 1), keys(2, 1)), written[layer]):
            assert torch.equal(got[:, :, :4], old[[0, 3]])
    cache.select_rows([1, 0])
    assert torch.equal(cache.update(0, keys(2, 1), keys(2, 1))[1][:, :, :4], written[0][1][[3, 0]])


def test_copied_rows_leave_the_prompt_where_it_is():
    cache, written = filled()
    buffers = [buffer.data_ptr() for buffer in cache.layers]
    cache.copy_rows(torch.tensor([0, 2]), torch.tensor([1, 0]), first_column=3)  # row 2 gets what row 0 held before
    assert [buffer.data_ptr() for buffer in cache.layers] == buffers
    for layer in range(3):
        for got, old in zip(cache.update(layer, keys(3, 1), keys(3, 1)), written[layer]):
            assert torch.equal(got[:, :, :3], old[:, :, :3])
            assert torch.equal(got[:, :, 3], old[[1, 1, 0], :, 3])
    cache.copy_rows(torch.tensor([2]), torch.tensor([0]))
    assert torch.equal(cache.update(0, keys(3, 1), keys(3, 1))[0][2, :, :3], written[0][0][0, :, :3])
