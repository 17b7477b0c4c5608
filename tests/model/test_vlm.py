"""Pictures put in place, rows kept apart, the loss, and the parts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanovlm import lora
from nanovlm.attention import causal
from nanovlm.decoder import LayerOptions
from nanovlm.projector import LinearProjector
from nanovlm.resampler import Resampler
from nanovlm.vlm import IGNORE, IMAGE_TOKEN, PARTS, VLM, part_of, visible_rows
from parity import close
from random_models import image_batch, randomise, small_decoder, small_vit, small_vlm, text_batch

I = IMAGE_TOKEN
OPTIONS = {
    "llama": dict(),
    "qwen2": dict(qkv_bias="qkv", tied_head=True),
    "phi": dict(norm="layer", ffn="plain", activation="gelu_tanh", qkv_bias="qkv", output_bias=True, ffn_bias=True,
                head_bias=True, parallel=True, rotary_width=2),
    "opt": dict(norm="layer", ffn="plain", activation="relu", qkv_bias="qkv", output_bias=True, ffn_bias=True,
                tied_head=True, rotary_width=0, position_offset=2),
    "mpt": dict(norm="layer_no_bias", ffn="plain", activation="gelu", tied_head=True, rotary_width=0, qk_norm=True, qkv_clip=2.0,
                alibi=(0.9, 0.4, 0.2, 0.1)),
}  # fmt: skip


def mixed_batch():
    """Four rows, padded: a clip and an image, text alone, the image again, another image behind text; 3 tokens each."""
    no = IGNORE
    return image_batch(
        ids=[[I, I, I, 4, I, I, I, 5, 6], [7, 8, 9, 10, 11, 12, 13, 0, 0], [I, I, I, 14, 15, 0, 0, 0, 0],
             [16, I, I, I, 17, 18, 19, 20, 0]],
        segments=[[0] * 9, [0] * 7 + [-1] * 2, [0] * 5 + [-1] * 4, [0] * 8 + [-1]],
        labels=[[I, I, I, no, I, I, I, no, 6], [no, no, 9, 10, no, 12, 13, no, no], [I, I, I, 14, 15, no, no, no, no],
                [16, I, I, I, no, 18, 19, 20, no]],
        frames=[1, 2, 1], shown=[1, 0, 0, 2], owner=[0, 0, 2, 3],
    )  # fmt: skip


def test_the_kth_image_token_stands_in_the_kth_place():
    model, batch = small_vlm(), mixed_batch()
    image_tokens = [torch.full((3, 16), 10.0 * m) + torch.arange(3.0)[:, None] for m in range(3)]
    embeddings = model.embed(batch.ids, image_tokens, batch.shown)
    place = iter([10, 11, 12, 0, 1, 2, 0, 1, 2, 20, 21, 22])  # clip 1, image 0, image 0 again, image 2
    for b, row in enumerate(batch.ids.tolist()):
        for t, token in enumerate(row):
            expected = torch.full((16,), float(next(place))) if token == I else model.decoder.embedding.weight[token]
            assert torch.equal(embeddings[b, t], expected)
    assert next(place, None) is None


@pytest.mark.parametrize("found", [2, 4])
def test_counts_that_do_not_agree(found):
    model = small_vlm()
    ids = torch.tensor([[I] * found + [5] * (5 - found)])
    with pytest.raises(ValueError, match=f"{found} image-token ids for 3 image tokens of 1 visual inputs"):
        model.embed(ids, [torch.randn(3, 16)], [0])
    with pytest.raises(ValueError, match=f"{found} image-token ids for 0 image tokens"):
        model.embed(ids)
    with pytest.raises(ValueError, match=f"{found} image-token ids"):
        model(image_batch(ids, [1], [0], [0]))


@pytest.mark.parametrize("bridge", ["resampler", "projector"])
def test_encode_mixes_clips_and_images(bridge):
    model, pixels = small_vlm(bridge), torch.randn(7, 3, 12, 12)
    tokens = model.encode(pixels, torch.tensor([1, 3, 1, 2]))
    assert len(tokens) == 4
    for m, columns in enumerate((slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 7))):
        num_frames = columns.stop - columns.start
        features = model.vision(pixels[columns]).reshape(1, num_frames * 9, 12)
        close(tokens[m], model.bridge(features, num_frames)[0])
        assert len(tokens[m]) == model.num_image_tokens(12, num_frames) == (3 if bridge == "resampler" else 9 * num_frames)


def naive_logits(model, batch):
    """One row at a time, its pictures encoded for it alone, no padding."""
    begins = [0, *batch.frames.cumsum(0).tolist()]
    appearances, rows = iter(batch.shown.tolist()), []
    for ids, segments, positions in zip(batch.ids, batch.segments, batch.positions):
        ids, positions = ids[segments >= 0], positions[segments >= 0]
        embeddings, t = [], 0
        while t < len(ids):
            if ids[t] >= 0:
                embeddings.append(model.decoder.embedding(ids[t : t + 1]))
                t += 1
                continue
            m = next(appearances)
            features = model.vision(batch.pixels[begins[m] : begins[m + 1]]).flatten(0, 1)[None]
            embeddings.append(model.bridge(features, int(batch.frames[m]))[0])
            t += len(embeddings[-1])
        visible = causal(torch.zeros(1, len(ids), dtype=torch.long))
        hidden = model.decoder(torch.cat(embeddings)[None], positions[None], visible, (ids[None] == I).long())
        rows.append(model.decoder.logits(hidden)[0])
    return rows


@pytest.mark.parametrize("family", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_forward_and_loss_equal_rows_run_one_by_one(backend, family):
    model, batch = small_vlm(**OPTIONS[family]), mixed_batch()
    model.set_backend(backend)
    logits, expected = model(batch), naive_logits(model, batch)
    assert logits.shape == (*batch.ids.shape, 23)
    total, count = torch.zeros(()), 0
    for b, row in enumerate(expected):
        close(logits[b][batch.segments[b] >= 0], row, atol=2e-5, rtol=1e-4)
        for t in range(1, len(row)):
            if batch.labels[b, t] != IGNORE:
                total = total - row[t - 1].log_softmax(-1)[batch.labels[b, t]]
                count += 1
    loss, trained = model.loss(batch)
    assert trained == count and isinstance(trained, int)
    close(loss, total, atol=1e-4, rtol=1e-5)
    names, parameters = zip(*model.named_parameters())
    expected_grads = torch.autograd.grad(total, parameters, allow_unused=True)
    for name, expected, found in zip(names, expected_grads, torch.autograd.grad(loss, parameters, allow_unused=True)):
        if expected is None:  # no clip in the batch: no frame embedding
            assert found is None, name
        else:
            close(found, expected, atol=1e-4, rtol=1e-3, msg=lambda text: f"{name}: {text}")


def test_backends_agree_and_unknown_ones_are_refused():
    model, batch = small_vlm(), mixed_batch()
    assert [module.backend for module in (model.vision, model.bridge, model.decoder)] == ["sdpa"] * 3
    before = model(batch)
    model.set_backend("reference")
    assert [module.backend for module in (model.vision, model.bridge, model.decoder)] == ["reference"] * 3
    close(model(batch), before)
    with pytest.raises(ValueError, match="unknown attention backend 'refrence'. Did you mean 'reference'?"):
        model.set_backend("refrence")
    assert model.decoder.backend == "reference"


def test_text_alone_needs_no_picture():
    model = small_vlm()
    batch = text_batch([[3, 4, 5, 6], [7, 8, 9, 10]])
    model.vision.forward = model.bridge.forward = None  # calling either would raise
    logits = model(batch)
    for b in range(2):
        close(logits[b], naive_logits(model, batch)[b])
    loss, trained = model.loss(batch)
    assert trained == 6
    close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="sum"))
    batch = text_batch([[3, 4, 5]], labels=[[3, IGNORE, IGNORE]])  # nothing predicts the first token of a row
    loss, trained = small_vlm().loss(batch)
    assert trained == 0 and loss == 0


def test_half_precision_keeps_a_float32_loss():
    model = small_vlm()
    model.decoder.bfloat16()  # the tower and the bridge stay in float32
    batch = mixed_batch()
    logits, trained = model(batch), batch.labels[:, 1:] != IGNORE
    assert logits.dtype == torch.bfloat16
    loss, count = model.loss(batch)
    expected = F.cross_entropy(logits[:, :-1][trained].float(), batch.labels[:, 1:][trained], reduction="sum")
    assert loss.dtype == torch.float32 and count == int(trained.sum())
    close(loss, expected, atol=1e-3, rtol=1e-4)


def test_visible_rows_takes_the_fast_case_only_where_it_is_exact():
    for second, pattern in (
        ([0, 0, -1], "causal"), ([-1, -1, -1], "causal"), ([-1, 0, 0], "intervals"), ([0, -1, 0], "intervals"),
        ([0, 1, 1], "intervals"), ([1, 1, 1], "intervals"),
    ):  # fmt: skip
        segments = torch.tensor([[0, 0, 0], second])
        visible = visible_rows(segments)
        assert visible.pattern == pattern
        real = segments >= 0
        assert torch.equal(visible.mask(3)[real], causal(segments).mask(3)[real])


PLACES = {  # a parameter of each kind, or a module
    "vision": ["vision.positions", "vision.blocks.0.norm_1.bias"], "bridge": ["bridge.layers.0.q.weight"],
    "embedding": ["decoder.embedding.weight"], "lm_head": ["decoder.lm_head.weight", "decoder.lm_head.bias"],
    "language_model": ["decoder.norm.", "decoder.positions", "decoder.layers.1.norm_1.weight",
                       "decoder.layers.0.norm_2.text.weight", "decoder.layers.0.attention.k.text.weight"],
    "adapters": ["decoder.layers.0.adapter.scale"], "cross_attention": ["decoder.layers.1.cross_attention.norm.weight"],
    "vision_branch": ["decoder.layers.0.norm_1.vision.weight", "decoder.layers.0.attention.v.vision.bias"],
    "lora": [f"{name}.lora_{letter}" for name in ("vision.blocks.0.fc_1", "decoder.lm_head", "decoder.layers.0.attention.k.vision")
             for letter in "ab"],
}  # fmt: skip


def test_every_parameter_has_its_part():
    assert PLACES.keys() == PARTS.keys()
    assert all(part_of(name) == part for part, names in PLACES.items() for name in names)
    layers = (LayerOptions(3, modality_adaptive=True), LayerOptions(2, cross_attention=True), LayerOptions())
    decoder = small_decoder(layers, cross_attention_width=12, **OPTIONS["phi"])
    model = VLM(small_vit(), Resampler(12, 12, 3, 1, 2, 5, 18), decoder, media_token=4)
    lora.add(model, 2, 2, "")
    parts = model.parts()
    assert tuple(parts) == tuple(PARTS) and all(parts.values())
    assert {name: p for part in parts.values() for name, p in part.items()} == dict(model.named_parameters())


def test_image_tokens_from_features():
    model, pixels, frames = small_vlm(), torch.randn(4, 3, 12, 12), torch.tensor([1, 3])
    given = model.encode_features(model.vision(pixels), frames, out := {})
    for found, expected in zip(given, model.encode(pixels, frames), strict=True):
        assert torch.equal(found, expected)
    assert len(out["latents"]) == 4  # two layers, for one frame and for three
    model.vision = None
    with pytest.raises(ValueError, match="visual inputs of 4 frames in all, but pixels hold 3"):
        model.encode_features(torch.randn(3, 9, 12), frames)


def test_image_copies_are_made_anew_from_the_text_s():
    model = small_vlm()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.copy_vision_branch()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(model.parts()["vision_branch"])
    for name in moved:
        assert torch.equal(model.get_parameter(name), model.get_parameter(name.replace(".vision.", ".text.")))
        assert model.get_parameter(name) is not model.get_parameter(name.replace(".vision.", ".text."))


def test_bridges_that_do_not_fit():
    with pytest.raises(ValueError, match="output_width is 9, the decoder reads 16"):
        VLM(small_vit(), LinearProjector(12, 9), small_decoder())

    class Mean(nn.Module):  # no num_image_tokens
        output_width = 16

        def forward(self, patches, num_frames):
            return patches.mean(1, keepdim=True)

    with pytest.raises(ValueError, match="Mean lacks num_image_tokens"):
        VLM(small_vit(), Mean(), small_decoder())
    with pytest.raises(ValueError, match="str lacks output_width, num_image_tokens, forward"):
        VLM(small_vit(), "linear", small_decoder())
    with pytest.raises(ValueError, match="Module lacks output_width, num_image_tokens, forward"):
        VLM(small_vit(), nn.Module(), small_decoder())
    class Eye(nn.Module):  # neither has a backend to switch
        def num_tokens(self, image_size):
            return 2

        def forward(self, pixels):
            return pixels.mean((2, 3), keepdim=True).flatten(1)[:, None].expand(-1, 2, -1)

    class OneToken(nn.Module):  # and no attention maps to leave
        output_width = 16

        def num_image_tokens(self, num_patches, num_frames):
            return 1

        def forward(self, patches, num_frames):
            return F.pad(patches.mean(1, keepdim=True), (0, 13))

    model = VLM(Eye(), OneToken(), small_decoder())
    assert model(image_batch([[I, 4]], [2], [0], [0])).shape == (1, 2, 23) and model.num_image_tokens(12) == 1
    model = VLM(Eye(), randomise(LinearProjector(3, 16)), small_decoder())
    model.set_backend("reference")
    assert model.decoder.backend == "reference" and not hasattr(model.vision, "backend")
    assert model(image_batch([[I, I, 4]], [1], [0], [0])).shape == (1, 3, 23)


@pytest.mark.parametrize("made, message", [
    (lambda patches: patches[:, ::2], r"Half makes \(5, 16\) of a visual input, .* say \(10, 16\)"),
    (lambda patches: patches[..., :3], r"Half makes \(10, 3\) .* say \(10, 16\)"),
])  # fmt: skip
def test_a_bridge_that_makes_something_else_than_it_says_is_named(made, message):
    class Half(LinearProjector):
        def forward(self, patches, num_frames, out=None):
            return made(super().forward(patches, num_frames))

    model = VLM(small_vit(), Half(12, 16), small_decoder())
    with pytest.raises(ValueError, match=message):
        model.encode(torch.randn(1, 3, 12, 12), torch.tensor([1]))


def test_batch_moves_as_a_whole():
    batch = mixed_batch()
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        value = getattr(moved, field.name)
        assert value.device.type == "meta" and value.shape == getattr(batch, field.name).shape
    assert text_batch([[1, 2]]).to("meta").pixels is None
