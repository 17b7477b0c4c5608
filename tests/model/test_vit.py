"""The ViT piece by piece: patches, positions, options; whole towers against transformers: tests/published."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.attention import sincos_positions
from nanovlm.vit import ConvStem, ViT, ViTConfig, resize_positions
from parity import close
from random_models import randomise, small_vit


def config(**options):
    sizes = dict(image_size=12, patch_size=4, width=12, num_layers=2, num_heads=3, mlp_width=20)
    return ViTConfig(**(sizes | options))


def test_start_and_sines_and_cosines_that_tell_row_and_column():
    vit = ViT(config(image_size=20, width=48))
    assert vit.class_token.shape == (48,) and 0.014 < vit.class_token.std() < 0.026
    assert (vit.positions[0] == 0).all() and torch.equal(vit.positions[1:], sincos_positions(25, 48))
    for layer in [layer for layer in ConvStem(8, 64) if isinstance(layer, nn.Conv2d)][:-1]:
        he = (2 / (9 * layer.in_channels)) ** 0.5  # keeps the signal's size through a rectifier
        assert 0.85 * he < layer.weight.std() < 1.15 * he and (layer.bias == 0).all()
    table = sincos_positions(9, 8)
    assert table.shape == (9, 8)
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (row, column):  # two speeds: 1 and 1/100 radians per patch
                expected += [math.sin(place), math.sin(place / 100), math.cos(place), math.cos(place / 100)]
            close(table[3 * row + column], torch.tensor(expected))
    far = sincos_positions(64 * 64, 8)[-1]
    assert float(far[1]) == pytest.approx(math.sin(0.63), abs=1e-6)
    assert sincos_positions(1, 12).shape == (1, 12)


@pytest.mark.parametrize("options, message", [
    (dict(image_size=13), "image_size 13 is no multiple of patch_size 4; try 12"), (dict(image_size=3), "image_size 3 .*try 4"),
    (dict(width=16), "width 16 must be a multiple of num_heads 3"),
    (dict(width=18), "width 18 must be a multiple of .* 4"), (dict(activation="gelo"), "'gelo'. Did you mean 'gelu'"),
    (dict(qkv_bias="all"), "qkv_bias 'all'"), (dict(conv_stem=True, patch_size=6), "patch_size 6 is not 2, 4, 8"),
    (dict(conv_stem=True, patch_size=1), "patch_size 1 is not 2, 4, 8"), (dict(feature_layer=3), "feature_layer 3, .* 1 to 2"),
    (dict(feature_layer=0), "feature_layer 0, .* 1 to 2"),
    (dict(class_token=False, drop_class_token=True), "drop_class_token, but there is no class token"),
])  # fmt: skip
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def cubic(distance):
    """The bicubic kernel, a = -3/4."""
    x = abs(distance)
    if x < 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("class_rows", [0, 1])
def test_resize_positions(class_rows):
    ramp, class_token = torch.arange(8.0) ** 2, torch.randn(class_rows, 2)
    grid = torch.stack([ramp.repeat(8), ramp.repeat_interleave(8)], dim=1)  # along columns, along rows
    table = torch.cat([class_token, grid])
    assert torch.equal(resize_positions(table.bfloat16(), 36), resize_positions(table.bfloat16().float(), 36).bfloat16())
    resized = resize_positions(table, 144)
    assert torch.equal(resized[:class_rows], class_token)
    resized = resized[class_rows:].reshape(12, 12, 2)
    expected = torch.zeros(12)
    for new in range(12):
        place = (new + 0.5) * 8 / 12 - 0.5  # centre of the new patch on the old grid
        for old in range(math.floor(place) - 1, math.floor(place) + 3):
            expected[new] += cubic(place - old) * ramp[min(max(old, 0), 7)]  # the rim is repeated
    close(resized[..., 0], expected.expand(12, 12), atol=1e-4, rtol=1e-4)
    close(resized[..., 1], expected[:, None].expand(12, 12), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("class_token", [True, False])
def test_resize(class_token):
    for rows, patches in ((17, 12), (11, 9)):
        with pytest.raises(ValueError, match=f"a table of {rows} rows for {patches} patches"):
            resize_positions(torch.randn(rows, 5), patches)
    vit = small_vit(class_token=class_token)
    before = vit.positions
    vit.resize(12)
    assert vit.positions is before
    vit.positions.requires_grad_(False)
    vit.resize(20)
    assert vit.positions is not before and not vit.positions.requires_grad and vit.image_size == 20
    close(vit.positions, resize_positions(before, 25))
    assert vit(torch.randn(1, 3, 20, 20)).shape == (1, 25 + class_token, 12)
    vit.positions.requires_grad_(True)
    vit.resize(8)
    assert vit.positions.requires_grad and isinstance(vit.positions, nn.Parameter)
    with pytest.raises(ValueError, match="try 12"):
        vit.resize(15)
    assert vit.image_size == 8
    assert [vit.num_tokens(size) - class_token for size in (8, 12, 20)] == [4, 9, 25]


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (1, 1, 12, 12), (3, 12, 12)])
def test_pixels_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match="a ViT of 12 x 12"):
        small_vit()(torch.randn(shape))


# (width, stride) of each convolution; one before and one after the last halving keep the size
@pytest.mark.parametrize("patch_size, plan", [
    (2, [(12, 1), (12, 2), (12, 1)]), (4, [(6, 2), (6, 1), (12, 2), (12, 1)]), (8, [(3, 2), (6, 2), (6, 1), (12, 2), (12, 1)]),
])  # fmt: skip
def test_conv_stem(patch_size, plan):
    stem = randomise(ConvStem(patch_size, 12))
    x = pixels = torch.randn(2, 3, 16, 16) + 1
    convolutions = [layer for layer in stem if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in stem if isinstance(layer, nn.InstanceNorm2d)]
    assert [layer.out_channels for layer in convolutions] == [width for width, _ in plan] + [12]
    assert len(stem) == 3 * len(plan) + 1 and len(norms) == len(plan)
    for convolution, norm, (_, stride) in zip(convolutions, norms, plan):
        x = F.conv2d(x, convolution.weight, convolution.bias, stride=stride, padding=1)
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        x = F.gelu(x * norm.weight[:, None, None] + norm.bias[:, None, None])
    x = torch.einsum("fchw,dc->fdhw", x, convolutions[-1].weight[..., 0, 0]) + convolutions[-1].bias[:, None, None]
    close(stem(pixels), x)
    assert x.shape == (2, 12, 16 // patch_size, 16 // patch_size)


def test_a_vit_with_a_conv_stem():
    vit = small_vit(conv_stem=True)
    assert isinstance(vit.patch_embedding, ConvStem) and vit.num_tokens(12) == 10
    pixels = torch.randn(2, 3, 12, 12)
    patches = vit.patch_embedding(pixels)
    assert patches.shape == (2, 12, 3, 3)
    vit.blocks = nn.ModuleList()
    features = vit(pixels)
    for row in range(3):
        for column in range(3):
            k = 1 + 3 * row + column  # row-major, behind the class token
            close(features[:, k], vit.post_norm(patches[:, :, row, column] + vit.positions[k]))


@pytest.mark.parametrize("feature_layer", [1, 2, 3])
def test_features_of_an_earlier_block(feature_layer):
    """What stands behind exists, is not computed and does not train; the features pass no norm."""
    options = dict(num_layers=3, feature_layer=feature_layer)
    vit, pixels = small_vit(**options), torch.randn(2, 3, 12, 12)
    assert len(vit.blocks) == 3 and isinstance(vit.post_norm, nn.LayerNorm)
    shorter = small_vit(num_layers=feature_layer, post_norm=False)
    shorter.load_state_dict({name: vit.state_dict()[name] for name in shorter.state_dict()})
    assert torch.equal(vit(pixels), shorter(pixels))
    (vit(pixels) * torch.randn(2, 10, 12)).sum().backward()
    behind = ("post_norm.", *(f"blocks.{i}." for i in range(feature_layer, 3)))
    for name, tensor in vit.named_parameters():
        assert (tensor.grad is None) == name.startswith(behind), name
    for i in range(feature_layer, 3):
        vit.blocks[i] = nn.Linear(1, 1)  # calling it would raise
    vit(pixels)


@pytest.mark.parametrize("options", [dict(), dict(feature_layer=1), dict(post_norm=False)])
def test_a_dropped_class_token_still_takes_part(options):
    vit, pixels = small_vit(**options), torch.randn(2, 3, 12, 12)
    dropping = small_vit(**options, drop_class_token=True)
    dropping.load_state_dict(vit.state_dict())
    assert torch.equal(dropping(pixels), vit(pixels)[:, 1:])
    assert (vit.num_tokens(12), dropping.num_tokens(12), dropping.num_tokens(20)) == (10, 9, 25)
    assert type(dropping.num_tokens(12)) is int
    before = dropping(pixels)
    with torch.no_grad():
        dropping.class_token.copy_(torch.randn(12))
    assert (dropping(pixels) - before).abs().max() > 1e-3
