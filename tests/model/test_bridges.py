"""Projectors by formula, frames, maps, every bridge in a model, adapters; their equations: tests/official."""

import math

import pytest
import torch

from nanovlm.abstractor import Abstractor
from nanovlm.adapter import Adapter
from nanovlm.projector import LinearProjector, MLPProjector, PixelShuffleProjector, WordProjector
from nanovlm.qformer import QFormer
from nanovlm.resampler import Resampler
from nanovlm.vlm import VLM
from parity import close
from random_models import image_batch, randomise, small_decoder, small_vit


def make(vision_width=7, output_width=10, **options):
    sizes = dict(num_latents=3, num_layers=2, num_heads=2, head_width=4, ffn_width=11)
    return randomise(Resampler(vision_width, output_width, **(sizes | options)))


@pytest.mark.parametrize("kind", [LinearProjector, MLPProjector])
def test_projectors(kind):
    projector, patches = randomise(kind(5, 8)), torch.randn(2, 6, 5)
    expected = patches @ projector.linear.weight.T + projector.linear.bias
    if kind is MLPProjector:
        expected = expected * 0.5 * (1 + torch.erf(expected / math.sqrt(2)))
        expected = expected @ projector.linear_2.weight.T + projector.linear_2.bias
    close(projector(patches), expected)
    assert projector.output_width == 8 and projector.num_image_tokens(6) == 6 and projector.num_image_tokens(6, 3) == 18


def test_frame_embeddings_mark_every_patch_of_their_frame():
    resampler, clip = make(max_frames=3), torch.randn(2, 2, 5, 7)  # M frames N width
    expected = clip.clone()
    for frame in range(2):
        expected[:, frame] += resampler.frame_embedding[frame]
    close(resampler(clip.flatten(1, 2), 2), resampler(expected.flatten(1, 2)))
    swapped = clip.flip(1).flatten(1, 2)
    assert (resampler(clip.flatten(1, 2), 2) - resampler(swapped, 2)).abs().max() > 1e-3
    close(resampler(clip.flatten(1, 2)), resampler(swapped))  # a picture's patches have no order
    for bridge, num_frames, known in ((make(), 2, 0), (resampler, 5, 3)):
        with pytest.raises(ValueError, match=f"a clip of {num_frames} frames, but embeddings for {known}"):
            bridge(clip.flatten(1, 2), num_frames)
    assert resampler(torch.randn(1, 12, 7), 3).shape == (1, 3, 10)
    with pytest.raises(ValueError, match="latents of 10 channels among patches of 7"):
        make(attend_to_latents=True)
    resampler = Resampler(64, 96, num_latents=32, num_layers=1, num_heads=2, head_width=4, ffn_width=8, max_frames=20)
    assert resampler.num_image_tokens(900) == resampler.num_image_tokens(17, 5) == 32
    assert resampler.latents.shape == (32, 96) and 0.95 < resampler.latents.std() < 1.05
    assert resampler.frame_embedding.shape == (20, 64) and 0.018 < resampler.frame_embedding.std() < 0.022


@pytest.mark.parametrize("attend_to_latents", [False, True])
def test_attention_maps(attend_to_latents):
    resampler = make(output_width=7, attend_to_latents=attend_to_latents)
    patches, out = torch.randn(2, 5, 7), {}
    close(resampler(patches, out=out), resampler(patches))
    assert len(out["latents"]) == 2
    for weights in out["latents"]:
        assert weights.shape == (2, 2, 3, 8 if attend_to_latents else 5)
        close(weights.sum(-1), torch.ones(2, 2, 3))
        assert (weights > 0).all()


def test_an_adapter_starts_near_zero_but_not_at_zero():
    adapter = Adapter(96, 64)
    for linear, shape in ((adapter.down, (64, 96)), (adapter.up, (96, 64))):
        assert linear.weight.shape == shape
        assert 0.018 < linear.weight.std() < 0.022 and abs(linear.weight.mean()) < 0.002
        assert (linear.bias == 0).all()
    assert adapter.scale.shape == (1,) and adapter.scale == 1.0
    assert (adapter.norm.weight == 1).all() and (adapter.norm.bias == 0).all()
    hidden = torch.randn(3, 7, 96)
    update = (adapter(hidden) - hidden).std()
    assert 0.001 < update < 0.1  # disturbs the frozen model a little from the first step


@pytest.mark.parametrize("num_frames", [1, 2])
@pytest.mark.parametrize("merge", [2, 3])
def test_pixel_shuffle_lays_each_square_behind_one_another(num_frames, merge):
    bridge = randomise(PixelShuffleProjector(5, 7, merge))
    patches = torch.randn(2, num_frames * 36, 5)  # frames of 6 x 6 patches
    tokens = []
    for frame in patches.unflatten(1, (num_frames, 6, 6)).unbind(1):
        for row in range(0, 6, merge):
            for column in range(0, 6, merge):
                square = [frame[:, row + i, column + j] for i in range(merge) for j in range(merge)]
                tokens.append(bridge.mlp(torch.cat(square, dim=-1)))
    close(bridge(patches, num_frames), torch.stack(tokens, dim=1))
    count = bridge.num_image_tokens(36, num_frames)
    assert isinstance(count, int) and count == len(tokens) == 36 * num_frames // merge**2


@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize("side", [2, 3, 4])
def test_pixel_shuffle_tells_where_its_squares_stand(num_frames, side):
    """Sines and cosines of the squares' centres on a grid of 8 x 8, whatever the number of squares."""
    bridge = randomise(PixelShuffleProjector(5, 8, merge=2, positions=True))
    plain = PixelShuffleProjector(5, 8, merge=2)
    plain.load_state_dict({name: value for name, value in bridge.state_dict().items() if name != "position_scale"})
    patches = torch.randn(2, num_frames * 4 * side**2, 5)
    told = (bridge(patches, num_frames) - plain(patches, num_frames)) / bridge.position_scale
    told = told.unflatten(1, (num_frames, side, side))
    centres = (torch.arange(side) + 0.5) * 8 / side - 0.5
    waves = [wave(centres * speed) for wave in (torch.sin, torch.cos) for speed in (1.0, 0.01)]  # of a width of 4
    expected = torch.stack(waves, dim=1)
    expected = torch.cat([expected[:, None].expand(side, side, 4), expected.expand(side, side, 4)], dim=-1)
    # cubic interpolation of a sine is not quite a sine, least so beside the border
    assert (told - expected).abs().max() < 0.12
    fresh = PixelShuffleProjector(5, 8, merge=2, positions=True)
    assert torch.equal(fresh.position_scale, torch.full((8,), 0.3)) and plain.position_scale is None


@pytest.mark.parametrize("num_patches", [35, 25, 37])
def test_pixel_shuffle_refuses_a_grid_that_does_not_divide(num_patches):
    with pytest.raises(ValueError, match=f"{num_patches} patches are no square grid of 2 x 2 squares"):
        PixelShuffleProjector(4, 4, merge=2).num_image_tokens(num_patches)


def test_a_square_says_means_of_words():
    bridge = randomise(WordProjector(5, 7, 2, said=3, vocabulary=4))
    squares = PixelShuffleProjector(5, 7, 2).squares(patches := torch.randn(2, 2 * 16, 5), 2)
    tokens = []
    for square in squares.unbind(1):
        for scores in bridge.scores(square).split(4, dim=1):
            chances = scores.exp() / scores.exp().sum(1, keepdim=True)
            tokens.append(sum(chances[:, n, None] * bridge.words[n] for n in range(4)))
    close(bridge(patches, 2), torch.stack(tokens, dim=1))
    assert bridge.num_image_tokens(16, 2) == len(tokens) == 2 * 4 * 3


BRIDGES = {  # from the ViT's width 12 to the decoder's 16
    "resampler": lambda: Resampler(12, 16, 3, num_layers=2, num_heads=2, head_width=5, ffn_width=18, max_frames=3),
    "abstractor": lambda: Abstractor(12, 16, num_queries=3, num_layers=2, num_heads=2, ffn_width=18),
    "qformer": lambda: QFormer(12, 16, 8, num_queries=3, num_heads=2, ffn_width=18, cross_attention=(True, False, True)),
    "mlp": lambda: MLPProjector(12, 16),
    "words": lambda: WordProjector(12, 16, 1, said=2, vocabulary=5),
}


@pytest.mark.parametrize("name", BRIDGES)
def test_every_bridge_in_a_whole_model(name):
    """Stills and clips of one batch keep apart, as many tokens come out as were announced, every parameter trains."""
    model = VLM(small_vit(drop_class_token=name in ("mlp", "words")), randomise(BRIDGES[name]()), small_decoder())
    pixels, frames = torch.randn(6, 3, 12, 12), torch.tensor([1, 3, 1, 1])
    tokens = model.encode(pixels, frames)
    assert [len(t) for t in tokens] == [model.num_image_tokens(12, f) for f in frames.tolist()]
    for found, picture in zip(tokens, pixels.split(frames.tolist())):
        alone = model.encode(picture, torch.tensor([len(picture)]))[0]
        close(found, alone)
    n, clip = model.num_image_tokens(12), model.num_image_tokens(12, 3)
    rows = [[5, *[-1] * n, 7, 8] + [9] * (clip - n), [5, *[-1] * clip, 7, 8]]
    batch = image_batch(rows, frames=[1, 3], shown=[0, 1], owner=[0, 1])
    loss, trained = model.loss(batch)
    (loss / trained).backward()
    for parameter_name, parameter in model.bridge.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name
