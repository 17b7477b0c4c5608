"""Flamingo's cross-attention: whom each token sees, gates, and what must not matter; OpenFlamingo's numbers: test_official."""

import dataclasses

import pytest
import torch

from nanovlm.attention import causal
from nanovlm.cross_attention import GatedCrossAttention, gather_media, latest_picture
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.projector import LinearProjector
from nanovlm.resampler import Resampler
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.vlm import IGNORE, IMAGE_TOKEN, VLM
from parity import close
from random_models import image_batch, randomise, small_vit, text_batch

PLAIN, CROSS = LayerOptions(), LayerOptions(cross_attention=True)
MEDIA = 20  # the media token of the small model


def test_whom_each_token_sees():
    for _ in range(20):
        is_media = torch.rand(3, 11) < 0.3
        segments = torch.tensor([[0] * 4 + [1] * 5 + [-1] * 2, [-1] * 3 + [0] * 8, [-1] + [0] * 3 + [3] * 4 + [-1] * 3])
        is_media &= segments >= 0
        mask = latest_picture(is_media, segments, 2).check(22).mask(22)
        for b in range(3):
            for t in range(11):
                seen = [p for p in range(t + 1) if is_media[b, p] and segments[b, p] == segments[b, t]]
                expected = torch.zeros(22, dtype=torch.bool)
                if seen:
                    place = int(is_media[b, : seen[-1]].sum())
                    expected[2 * place : 2 * place + 2] = True
                assert torch.equal(mask[b, t], expected), (b, t)


def test_pictures_stand_behind_one_another_maps_show_them_and_gates_start_closed():
    is_media = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
    pictures = [torch.full((2, 5), float(m + 1)) for m in range(3)]
    media = gather_media(pictures, [2, 0, 2], is_media, torch.zeros(3, 4, dtype=torch.long))
    assert media.tokens.shape == (3, 4, 5)
    assert media.tokens[..., 0].tolist() == [[3, 3, 1, 1], [0, 0, 0, 0], [3, 3, 0, 0]]
    assert gather_media(pictures, [], is_media[1:2], torch.zeros(1, 4, dtype=torch.long)) is None
    step, other = media.step(), media.select(torch.tensor([2, 2, 0]))
    assert step.tokens is media.tokens
    assert step.visible.first.tolist() == [[2], [0], [0]] and step.visible.stop.tolist() == [[4], [0], [2]]
    assert torch.equal(other.tokens, media.tokens[[2, 2, 0]])
    assert torch.equal(other.visible.mask(4), media.visible.mask(4)[[2, 2, 0]])
    with pytest.raises(ValueError, match=r"pictures of \[2, 3\] image tokens in one batch"):
        gather_media([pictures[0], torch.ones(3, 5)], [0, 1], is_media[:1], torch.zeros(1, 4, dtype=torch.long))
    layer, out = randomise(GatedCrossAttention(6, 5)), {}
    is_media = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    media = gather_media([torch.randn(3, 5) for _ in range(2)], [1, 0], is_media, torch.zeros(2, 4, dtype=torch.long))
    layer(torch.randn(2, 4, 6), media, out=out)
    (weights,) = out["cross_attention"]
    assert weights.shape == (2, 8, 4, 6)
    close(weights.sum(-1)[0], torch.tensor([0.0, 1, 1, 1]).expand(8, 4))
    assert (weights[0, :, 1:3, 3:] == 0).all() and (weights[0, :, 3, :3] == 0).all() and (weights[1] == 0).all()
    layer, x = GatedCrossAttention(6, 5), torch.randn(1, 3, 6)
    media = gather_media([torch.randn(2, 5)], [0], torch.tensor([[True, False, False]]), torch.zeros(1, 3).long())
    assert torch.equal(layer(x, media), x)


LAYERS = (CROSS, PLAIN, CROSS)


def small_flamingo(layers=LAYERS, bridge="resampler", **options):
    """Cross-attention before the first and the last of three layers; pictures of 3 latents, or of 9 patches."""
    config = DecoderConfig(23, 16, 4, 2, 20, 32, layers, cross_attention_width=12, **options)
    if bridge == "resampler":
        bridge = Resampler(12, 12, 3, 2, num_heads=2, head_width=5, ffn_width=18, max_frames=2, attend_to_latents=True)
    else:
        bridge = LinearProjector(12, 12)
    decoder = randomise(Decoder(config))
    return VLM(small_vit(class_token=False), randomise(bridge), decoder, MEDIA).eval()


def mixed_batch(front=0, behind=0):
    """Two pictures in a row, text alone, a clip behind words, the first picture again; pads as asked for."""
    rows = [[MEDIA, 4, 5, MEDIA, 6, 7], [8, 9, 10, 11, 12, 13], [3, 4, MEDIA, 5, 6], [MEDIA, 2, 3]]
    length = max(map(len, rows)) + front + behind
    ids, segments, positions = torch.full((4, length), 5), torch.full((4, length), -1), torch.zeros(4, length).long()
    for b, row in enumerate(rows):
        start = length - behind - len(row) if front else 0
        ids[b, start : start + len(row)] = torch.tensor(row)
        segments[b, start : start + len(row)] = 0
        positions[b, start : start + len(row)] = torch.arange(len(row))
    torch.manual_seed(3)
    labels = torch.where((segments < 0) | (positions == 0), IGNORE, ids)  # nothing predicts a row's first token
    return image_batch(ids, [1, 2, 1], [2, 0, 1, 2], [0, 0, 2, 3], labels, segments, positions)


def alone(ids, pictures):
    """The Batch of one row without padding. pictures: list of float[F, 3, H, W]."""
    batch = text_batch([ids])
    if pictures:
        batch.pixels, batch.frames = torch.cat(pictures), torch.tensor([len(pixels) for pixels in pictures])
        batch.shown, batch.owner = torch.arange(len(pictures)), torch.zeros(len(pictures), dtype=torch.long)
    return batch


def one_by_one(model, batch):
    """Logits of each row alone, unpadded, its pictures encoded for it alone."""
    pictures, shown, rows = batch.pixels.split(batch.frames.tolist()), iter(batch.shown.tolist()), []
    for ids, segments in zip(batch.ids, batch.segments):
        ids = ids[segments >= 0].tolist()
        rows.append(model(alone(ids, [pictures[next(shown)] for _ in range(ids.count(MEDIA))]))[0])
    return rows


@pytest.mark.parametrize("padding, backend", [((0, 0), "reference"), ((2, 0), "sdpa"), ((0, 2), "reference"), ((1, 2), "sdpa")])
def test_rows_run_together_as_alone(padding, backend):
    model, batch = small_flamingo(), mixed_batch(*padding)
    model.set_backend(backend)
    logits, loss, count = model(batch), 0, 0
    for b, expected in enumerate(one_by_one(model, batch)):
        close(logits[b][batch.segments[b] >= 0], expected)
        words = batch.ids[b][batch.segments[b] >= 0]
        loss = loss - expected[:-1].log_softmax(-1).gather(1, words[1:, None]).sum()
        count += len(words) - 1
    found, trained = model.loss(batch)
    assert trained == count
    close(found, loss, atol=1e-4, rtol=1e-5)
    found.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_a_media_token_among_the_pads_shows_nothing_and_kept_keys_are_used():
    model, batch = small_flamingo(), mixed_batch(2)
    before, real = model(batch), batch.segments >= 0
    batch.ids[~real] = MEDIA
    close(model(batch)[real], before[real])
    model, batch = small_flamingo(), mixed_batch()
    image_tokens = model.encode(batch.pixels, batch.frames)
    media = model.media(batch.ids, batch.segments, image_tokens, batch.shown.tolist(), batch.owner)
    kept = model.decoder.keep(media)
    assert [one is None for one in kept.kept] == [False, True, False] and model.decoder.keep(None) is None

    def hidden(media):
        visible, modality = causal(batch.segments), torch.zeros_like(batch.ids)
        return model.decoder(model.embed(batch.ids), batch.positions, visible, modality, media=media)

    expected = hidden(media)
    assert torch.equal(hidden(kept), expected)
    for layer in (0, 2):
        randomise(model.decoder.layers[layer].cross_attention.k)
    assert torch.equal(hidden(kept), expected) and not torch.equal(hidden(media), expected)


def test_text_alone_reads_no_picture():
    model = small_flamingo()
    batch = text_batch([[3, 4, 5, 6]])
    model.vision.forward = model.bridge.forward = None  # calling either would raise
    loss, trained = model.loss(batch)
    assert trained == 3 and loss.isfinite() and model.num_image_tokens(12) == 0
    loss.backward()
    layer = model.decoder.layers[0].cross_attention
    assert layer.ffn_gate.grad.abs() > 0 and layer.attention_gate.grad is None


def test_what_does_not_fit():
    model, batch = small_flamingo(), mixed_batch()
    spoiled = dataclasses.replace(batch, ids=batch.ids.clone())
    spoiled.ids[2, 0] = MEDIA
    with pytest.raises(ValueError, match=r"row 2 has 2 media tokens \(id 20\) for 1 visual inputs"):
        model(spoiled)
    with pytest.raises(ValueError, match="row 0 has 1 media tokens .* for 0 visual inputs"):
        model(text_batch([[MEDIA, 4, 5]]))
    with pytest.raises(ValueError, match="in all rows there are 4 for 1"):
        model.media(batch.ids, batch.segments, [torch.randn(3, 12)], [0])
    with pytest.raises(ValueError, match=r"pictures of \[9, 18\] image tokens"):
        small_flamingo(bridge="projector")(batch)
    prompts, pictures = prompts_and_pictures()
    with pytest.raises(ValueError, match=r"prompt 1 .*id.* 20"):
        generate(model, prompts, Decoding(), [pictures[0], pictures[2], pictures[2]])
    with pytest.raises(ValueError, match="1 image-token ids"):
        generate(model, [[IMAGE_TOKEN, 3]], Decoding())
    model, plain = small_flamingo(), Decoder(DecoderConfig(23, 12, 2, 2, 20, 32, (PLAIN,)))
    for vlm, words in (
        (lambda: VLM(model.vision, model.bridge, model.decoder), "media_token is None; .* 12"),
        (lambda: VLM(model.vision, model.bridge, plain, MEDIA), "media_token is 20; .* None"),
        (lambda: VLM(model.vision, model.bridge, model.decoder, 23), r"media_token is 23; .* range\(0, 23\)"),
        (lambda: VLM(model.vision, LinearProjector(12, 16), model.decoder, 3), "output_width is 16, the decoder reads 12"),
        (lambda: DecoderConfig(23, 16, 4, 2, 20, 32, LAYERS), "cross_attention_width None"),
        (lambda: DecoderConfig(23, 16, 4, 2, 20, 32, (PLAIN,), cross_attention_width=5), "cross_attention_width 5"),
    ):
        with pytest.raises(ValueError, match=words):
            vlm()


def prompts_and_pictures():
    """Of unequal length: two pictures, none, and a clip."""
    torch.manual_seed(5)
    one, two, clip = torch.randn(1, 3, 12, 12), torch.randn(1, 3, 12, 12), torch.randn(2, 3, 12, 12)
    return [[MEDIA, 4, 5, MEDIA, 6], [7, 8], [3, MEDIA, 9]], [[one, two], [], [clip]]


def greedy(model, prompt, pictures, steps):
    """Token by token through VLM.forward, with no cache. A media token that the model itself says shows no picture."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(alone(ids, pictures))[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def test_cached_equals_uncached_for_beams_and_samples_with_keys_made_once(monkeypatch):
    model = small_flamingo()
    model.decoder.lm_head.weight[MEDIA] = 0  # never the largest of 23 scores
    prompts, pictures = prompts_and_pictures()
    expected = [greedy(model, prompt, shown, 6) for prompt, shown in zip(prompts, pictures)]
    assert generate(model, prompts, Decoding(max_new_tokens=6), pictures) == expected
    blind = [generate(model, [prompt], Decoding(max_new_tokens=6), [[0 * pixels for pixels in shown]])[0]
             for prompt, shown in zip(prompts, pictures)]  # fmt: skip
    assert blind[0] != expected[0] and blind[1] == expected[1] and blind[2] != expected[2]
    beams = Decoding(max_new_tokens=5, num_beams=3, eos_ids=(2,))
    together = generate(model, prompts, beams, pictures)
    assert together == [generate(model, [prompt], beams, [shown])[0] for prompt, shown in zip(prompts, pictures)]
    samples = Decoding(max_new_tokens=5, do_sample=True, num_return_sequences=2, eos_ids=(2, 3))
    draws = lambda seeds: [torch.Generator().manual_seed(seed) for seed in seeds]
    together = generate(model, prompts, samples, pictures, draws(range(6)))
    alone = [generate(model, [prompt], samples, [shown], draws((2 * i, 2 * i + 1)))
             for i, (prompt, shown) in enumerate(zip(prompts, pictures))]  # fmt: skip
    assert together == [answer for answers in alone for answer in answers]
    calls, make = [], GatedCrossAttention.keys_and_values
    monkeypatch.setattr(GatedCrossAttention, "keys_and_values", lambda self, tokens: calls.append(1) or make(self, tokens))
    generate(small_flamingo(), prompts, Decoding(max_new_tokens=6), pictures)
    assert len(calls) == 2 * 2
