"""What must not change a decoder's states: cache, padding, packing, the future; its numbers: tests/published."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from nanovlm.attention import Visible, causal, causal_rows
from nanovlm.cache import KeyValueCache
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions, per_modality
from nanovlm.modality_adaptive import ModalityAdaptive
from parity import close
from random_models import small_decoder

LAYERS = (LayerOptions(3, modality_adaptive=True), LayerOptions(), LayerOptions(modality_adaptive=True), LayerOptions(5))


def arange(rows, length, start=0):
    return torch.arange(start, start + length).expand(rows, -1)


def run(decoder, embeddings, modality=None, segments=None, positions=None):
    rows, length = embeddings.shape[:2]
    segments = torch.zeros(rows, length, dtype=torch.long) if segments is None else segments
    modality = torch.zeros(rows, length, dtype=torch.long) if modality is None else modality
    positions = arange(rows, length) if positions is None else positions
    return decoder(embeddings, positions, causal(segments), modality)


def test_padding_and_the_future_change_nothing_and_only_distance_matters():
    decoder, embeddings = small_decoder(LAYERS), torch.randn(1, 5, 16)
    modality = torch.tensor([[1, 1, 0, 0, 0]])
    alone = run(decoder, embeddings, modality)
    for front, behind in ((0, 3), (2, 0), (3, 1)):
        pad = lambda x, value: F.pad(x, (front, behind), value=value)
        padded = F.pad(embeddings, (0, 0, front, behind), value=7.0)
        found = run(
            decoder, padded, pad(modality, 0), pad(torch.zeros(1, 5, dtype=torch.long), -1), pad(arange(1, 5), 0)
        )
        close(found[:, front : front + 5], alone)
        assert found.isfinite().all()
    embeddings, modality, visible = torch.randn(1, 6, 16), torch.tensor([[1, 0, 0, 1, 0, 0]]), causal_rows(1, 6)
    before = decoder(embeddings, arange(1, 6), visible, modality)
    changed = embeddings.clone()
    changed[:, 3] += torch.randn(16)
    difference = (decoder(changed, arange(1, 6), visible, modality) - before).abs().amax(-1)[0]
    assert (difference[:3] == 0).all() and (difference[3:] > 1e-4).all()
    decoder, embeddings = small_decoder(LAYERS), torch.randn(1, 5, 16)
    shifted = run(decoder, embeddings, positions=arange(1, 5, start=11))
    close(shifted, run(decoder, embeddings), atol=1e-4, rtol=1e-3)
    stretched = run(decoder, embeddings, positions=2 * arange(1, 5))
    assert (stretched - run(decoder, embeddings)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_cached_equals_uncached(backend):
    decoder, embeddings = small_decoder(LAYERS), torch.randn(2, 9, 16)
    decoder.backend = backend
    modality = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 1, 0]])
    pads = torch.tensor([0, 2])  # row 1 has two pads in front
    segments = torch.where(torch.arange(9) < pads[:, None], -1, 0)
    positions = (torch.arange(9) - pads[:, None]).clamp(min=0)
    whole = run(decoder, embeddings, modality, segments, positions)
    cache = KeyValueCache(decoder.config, 2, 12)
    intervals, parts = causal(segments), []
    for begin, stop in ((0, 4), (4, 6), (6, 7), (7, 8), (8, 9)):  # a prompt, two tokens at once, then one by one
        columns = slice(begin, stop)
        visible = Visible(intervals.first[:, columns], intervals.stop[:, columns])
        part = decoder(embeddings[:, columns], positions[:, columns], visible, modality[:, columns], cache=cache)
        cache.advance(stop - begin)
        parts.append(part)
    close(torch.cat(parts, 1), whole)


def test_layer_options_per_layer():
    decoder = small_decoder(LAYERS)
    for layer, options in zip(decoder.layers, LAYERS):
        splits = [layer.norm_1, layer.norm_2, layer.attention.k, layer.attention.v]
        assert all(isinstance(module, ModalityAdaptive) == options.modality_adaptive for module in splits)
        assert not any(isinstance(m, ModalityAdaptive) for m in (layer.attention.q, layer.attention.o, layer.ffn))
        width = 0 if isinstance(layer.adapter, torch.nn.Identity) else layer.adapter.down.out_features
        assert width == options.adapter_width
    assert LayerOptions() == LayerOptions(adapter_width=0, modality_adaptive=False, cross_attention=False)
    norms = [module for module in small_decoder(LAYERS, norm_eps=0.5).modules() if isinstance(module, torch.nn.RMSNorm)]
    assert len(norms) == 4 * 2 + 2 * 2 + 1 and {norm.eps for norm in norms} == {0.5}
    copy = per_modality(lambda: torch.nn.Linear(4, 4), True)
    assert torch.equal(copy.text.weight, copy.vision.weight) and copy.text.weight is not copy.vision.weight
    decoder = Decoder(DecoderConfig(23, 16, 4, 2, 20, 32, LAYERS))
    embeddings = torch.randn(1, 5, 16)
    text, mixed = torch.zeros(1, 5, dtype=torch.long), torch.tensor([[1, 0, 1, 0, 0]])
    close(run(decoder, embeddings, text), run(decoder, embeddings, mixed))


@pytest.mark.parametrize("options, message", [
    (dict(width=18), "width 18 .* num_heads 4"), (dict(num_kv_heads=3), "num_heads 4.* num_kv_heads 3"),
    (dict(width=12), "3 of a head's 3 channels"), (dict(rotary_width=3), "3 of a head's 4 channels"),
    (dict(rotary_width=6), "6 of a head's 4 channels"),
    (dict(norm="rmsnorm"), "norm .*Did you mean 'rms'"), (dict(ffn="gate"), "ffn .*Did you mean 'gated'"),
    (dict(activation="gelu_new"), "activation .*Did you mean 'gelu_tanh'"), (dict(qkv_bias="qv"), "Did you mean 'qkv'"),
    (dict(head_bias=True, tied_head=True), "head_bias with tied_head"), (dict(alibi=(1.0, 0.5)), "2 slopes for 4 heads"),
])  # fmt: skip
def test_bad_sizes_are_refused(options, message):
    config = DecoderConfig(23, 16, 4, 2, 20, 32, (LayerOptions(),))
    assert (config.rope_base, config.norm_eps, config.num_rotary, config.norm) == (10000.0, 1e-6, 4, "rms")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **options)


def test_heads():
    hidden = torch.randn(2, 3, 16)
    untied, tied, biased = small_decoder(), small_decoder(tied_head=True), small_decoder(head_bias=True)
    close(untied.logits(hidden), hidden @ untied.lm_head.weight.T)
    close(tied.logits(hidden), hidden @ tied.embedding.weight.T)
    close(biased.logits(hidden), hidden @ biased.lm_head.weight.T + biased.lm_head.bias)
    names = {name for name, _ in tied.named_parameters()}
    assert names == {name for name, _ in untied.named_parameters()} - {"lm_head.weight"}


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_attention_maps(backend):
    decoder, embeddings = small_decoder(LAYERS), torch.randn(2, 5, 16)
    decoder.backend, out = backend, {}
    segments = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, -1, -1]])
    modality = torch.zeros(2, 5, dtype=torch.long)
    hidden = decoder(embeddings, arange(2, 5), causal(segments), modality, out=out)
    close(hidden, run(decoder, embeddings, modality, segments))
    assert len(out["attention"]) == 4
    for weights in out["attention"]:
        assert weights.shape == (2, 4, 5, 5)
        close(weights.sum(-1), (segments >= 0).float()[:, None].expand(2, 4, 5))
        assert (weights.triu(1) == 0).all() and (weights[0, :, 3:, :3] == 0).all()


@pytest.mark.parametrize("option, names", [
    (dict(), set()),
    (dict(qkv_bias="qkv"), {"attention.q", "attention.k.text", "attention.k.vision", "attention.v.text", "attention.v.vision"}),
    (dict(output_bias=True), {"attention.o"}),
    (dict(ffn_bias=True), {"ffn.gate", "ffn.up", "ffn.down"}),
    (dict(ffn="plain", activation="relu", ffn_bias=True), {"ffn.fc_1", "ffn.fc_2"}),
    (dict(norm="layer"), {"norm_1.text", "norm_1.vision", "norm_2.text", "norm_2.vision"}),
    (dict(norm="layer", parallel=True), {"norm_1.text", "norm_1.vision"}), (dict(norm="layer_no_bias", qk_norm=True), set()),
])  # fmt: skip
def test_biases_stand_where_they_are_asked_for(option, names):
    decoder = small_decoder((LayerOptions(modality_adaptive=True),), **option)
    found = {name for name, _ in decoder.named_parameters() if name.endswith("bias")} - {"norm.bias"}
    assert found == {f"layers.0.{name}.bias" for name in names}
    assert (decoder.layers[0].norm_2 is None) == ("parallel" in option)
    assert isinstance(decoder.norm, torch.nn.LayerNorm) == ("norm" in option)


def test_rotary_positions_turn_only_their_channels():
    """With none left to turn, a token cannot know where it stands; the order of the past is all the same to it."""
    embeddings = torch.randn(1, 5, 16)
    swapped = embeddings[:, [1, 0, 2, 3, 4]]
    for rotary_width, knows in ((0, False), (2, True), (None, True)):
        decoder = small_decoder((LayerOptions(),), rotary_width=rotary_width)
        difference = (run(decoder, swapped) - run(decoder, embeddings))[0, 2:].abs().max()
        assert (difference > 1e-3) == knows
    decoder = small_decoder(rotary_width=0, position_offset=2)
    assert decoder.positions.shape == (34, 16)
    embeddings, positions = torch.randn(1, 3, 16), torch.tensor([[0, 1, 31]])
    found = run(decoder, embeddings, positions=positions)
    with torch.no_grad():
        table, decoder.positions = decoder.positions, None
    close(found, run(decoder, embeddings + table[[2, 3, 33]], positions=positions))


@pytest.mark.parametrize("kind", [dict(), dict(qk_norm=True), dict(qkv_clip=0.2), dict(qk_norm=True, qkv_clip=0.2, norm="layer")])
def test_alibi_tells_distances_and_nothing_else(kind):
    """Later positions change nothing, other distances do; nor does padding in front."""
    decoder = small_decoder((LayerOptions(),) * 2, rotary_width=0, alibi=(0.9, 0.6, 0.3, 0.1), **kind)
    embeddings = torch.randn(1, 5, 16)
    whole = run(decoder, embeddings)
    assert torch.equal(whole, run(decoder, embeddings, positions=torch.arange(5)[None] + 7))
    swapped = run(decoder, embeddings[:, [1, 0, 2, 3, 4]])
    assert (swapped - whole)[0, 2:].abs().max() > 1e-3
    padded = run(decoder, torch.cat([torch.randn(1, 3, 16), embeddings], dim=1), segments=torch.tensor([[-1] * 3 + [0] * 5]))
    close(padded[:, 3:], whole)


def test_queries_and_keys_are_cut_then_normalised_over_all_heads():
    """What a layer hands to its cache, against the projections done by hand."""
    decoder = small_decoder((LayerOptions(),), qk_norm=True, qkv_clip=0.4, rotary_width=0)
    layer, cache = decoder.layers[0], KeyValueCache(decoder.config, 1, 5)
    assert layer.attention.q_norm.weight.shape == (16,) and layer.attention.k_norm.weight.shape == (8,)
    x = torch.randn(1, 5, 16)
    decoder(x, arange(1, 5), causal_rows(1, 5), None, cache)
    normed = layer.norm_1(x)
    k, v = (normed @ linear.weight.T for linear in (layer.attention.k, layer.attention.v))
    assert (k.abs() > 0.4).any() and (v.abs() > 0.4).any()
    k, v = k.clamp(-0.4, 0.4), v.clamp(-0.4, 0.4)
    k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.attention.k_norm.weight
    for found, expected in zip(cache.layers[0], (k, v)):
        close(found.transpose(1, 2).flatten(2), expected)


@pytest.mark.parametrize("kind, writing", [
    (dict(), {"attention.o", "ffn.down"}), (dict(ffn="plain", activation="relu"), {"attention.o", "ffn.fc_2"}),
])  # fmt: skip
def test_start(kind, writing):
    decoder = Decoder(DecoderConfig(200, 64, 4, 2, 96, 62, (LayerOptions(),) * 8, position_offset=2, **kind))
    assert 0.0195 < decoder.embedding.weight.std() < 0.0205 and 0.019 < decoder.positions.std() < 0.021
    for name, linear in decoder.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            bound = linear.in_features**-0.5  # torch's own start: uniform within it
            if name.partition(".")[2] in writing:  # 8 layers write twice each
                bound /= 4
            assert 0.95 * bound < linear.weight.abs().max() <= bound
