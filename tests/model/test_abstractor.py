"""The visual abstractor: grids, frames, maps, errors; its equations: tests/official."""


import pytest
import torch

from nanovlm.abstractor import Abstractor, patch_positions
from nanovlm.attention import sincos
from parity import close
from random_models import randomise


def make(vision_width=16, output_width=10, **options):
    sizes = dict(num_queries=3, num_layers=2, num_heads=2, ffn_width=11)
    return randomise(Abstractor(vision_width, output_width, **(sizes | options)))


@pytest.mark.parametrize("side, class_token", [(1, 1), (3, 1), (5, 0), (32, 1)])
def test_places_of_any_grid(side, class_token):
    table = patch_positions(side * side + class_token, 16)
    assert table.shape == (side * side + class_token, 16)
    assert (table[:class_token] == 0).all()
    for row, column in {(0, 0), (0, side - 1), (side - 1, 0), (side // 2, side - 1)}:
        place = table[class_token + row * side + column]
        assert torch.equal(place, sincos(side, 8)[[column, row]].flatten())  # x first


def test_sizes_that_do_not_fit():
    for num_features in (3, 11):
        with pytest.raises(ValueError, match=f"{num_features} features a frame are no square grid of patches"):
            make()(torch.randn(1, num_features, 16))
    for options, message in ((dict(num_heads=3), "width 16 .* num_heads 3"), (dict(vision_width=18), "width 18 .* 4")):
        with pytest.raises(ValueError, match=message):
            make(**options)


def test_frames_and_attention_maps():
    """Of clips, and maps: rows are the image tokens, columns the features first; what the queries took of one another stands behind."""
    bridge, clips = make(), torch.randn(2, 3, 10, 16)  # M frames N width
    found = bridge(clips.flatten(1, 2), 3)
    expected = torch.stack([torch.cat([bridge(clips[m, f][None])[0] for f in range(3)]) for m in range(2)])
    close(found, expected)
    assert found.shape == (2, bridge.num_image_tokens(10, 3), 10) == (2, 12, 10)
    for token in (3, 7, 11):
        assert (found[:, token] == bridge.end).all()
    bridge, patches, out = make(), torch.randn(2, 10, 16), {}
    close(bridge(patches, out=out), bridge(patches))
    assert len(out["latents"]) == 2
    for weights in out["latents"]:
        assert weights.shape == (2, 2, 4, 10 + 3)
        close(weights[:, :, :3].sum(-1), torch.ones(2, 2, 3))
        assert (weights[:, :, 3] == 0).all()  # the end token
    layer = bridge.layers[0]
    queries = layer.norm_queries(bridge.queries)
    q = layer.q(queries + sincos(3, 16))[:, :8]
    k = layer.k(torch.cat([layer.norm_patches(patches[0]) + patch_positions(10, 16), queries + sincos(3, 16)]))[:, :8]
    close(out["latents"][0][0, 0, :3], (q @ k.T / 8**0.5).softmax(-1))


def test_start_and_tables_are_made_where_the_features_are():
    bridge = Abstractor(64, 96, num_queries=50, num_layers=1, num_heads=4, ffn_width=128)
    assert bridge.queries.shape == (50, 64) and 0.95 < bridge.queries.std() < 1.05
    assert bridge.end.shape == (96,) and 0.7 < bridge.end.std() < 1.3
    for name, parameter in bridge.named_parameters():
        if parameter.ndim == 2 and name != "queries":
            assert 0.018 < parameter.std() < 0.022, name
    assert (bridge.layers[0].k.bias == 0).all() and (bridge.project.bias == 0).all()
    with torch.device("meta"):
        bridge = make()
    assert bridge(torch.empty(2, 3 * 17, 16, device="meta"), 3, {}).shape == (2, 12, 10)  # a CPU tensor would raise
