"""Checks of the exercises: each compares the reader's function with what the package itself computes.

In a lesson, `checks.attempt(checks.check_patchify, patchify)` says what is still wrong, and does not stop the notebook.
"""

import torch
from torch import nn

from nanovlm.adapter import Adapter
from nanovlm.attention import Visible, attention, full
from nanovlm.data.batching import Report, build_batch
from nanovlm.data.templates import NANO
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.generation.logits_processors import top_p
from nanovlm.modality_adaptive import ModalityAdaptive, route
from nanovlm.projector import LinearProjector
from nanovlm.training.stages import choose
from nanovlm.vit import ViT, ViTConfig, resize_positions
from nanovlm.vlm import IMAGE_TOKEN, VLM
from support import recipe_12


def attempt(check, answer):
    """Run a check on the reader's function and print the verdict."""
    try:
        check(answer)
    except AssertionError as error:
        print(f"Not yet: {error}")
    else:
        print("Right!")


def compare(answer, expected, hint):
    """Raise AssertionError, with what is wrong in words, unless two tensors are equal up to rounding."""
    assert answer is not None, "your function returned None; write it, and return a tensor."
    assert isinstance(answer, torch.Tensor), f"your function returned a {type(answer).__name__}; a tensor was expected."
    assert answer.shape == expected.shape, f"shape {tuple(answer.shape)}, expected {tuple(expected.shape)}."
    assert torch.allclose(answer, expected, atol=1e-4), hint


def check_patchify(patchify):
    """Lesson 01. patchify(pixels float[F, 3, H, W], patch_size) -> float[F, N, 3 * patch_size ** 2].

    The flattened weights of the patch convolution, applied to it, must give what the convolution gives.
    """
    generator = torch.Generator().manual_seed(0)
    vision = ViT(ViTConfig(image_size=12, patch_size=4, width=8, num_layers=0, num_heads=1, mlp_width=8))
    pixels = torch.randn(2, 3, 12, 20, generator=generator)  # wider than high: rows are no columns
    convolution = vision.patch_embedding
    expected = convolution(pixels).flatten(2).transpose(1, 2)  # F N W
    patches = patchify(pixels, 4)
    if isinstance(patches, torch.Tensor):
        shape = tuple(patches.shape)
        assert shape == (2, 15, 48), f"shape {shape}, expected (2, 15, 48): 15 patches of 48 numbers."
    else:
        compare(patches, expected, "")
    embedded = patches @ convolution.weight.flatten(1).T + convolution.bias
    ordered = torch.allclose(embedded.sort(dim=1).values, expected.sort(dim=1).values, atol=1e-4)
    compare(embedded, expected, (
        "every patch is right, but they stand in another order; go along the rows of the picture." if ordered else
        "the numbers within a patch stand in another order than in the convolution's weight: channel, row, column."
    ))  # fmt: skip


def latest_by_walking(is_media):
    """bool[T] -> bool[T, pictures]: each token sees the picture shown last, and none before the first."""
    seen, latest = torch.zeros(len(is_media), int(is_media.sum()), dtype=torch.bool), -1
    for token in range(len(is_media)):
        latest += int(is_media[token])
        if latest >= 0:
            seen[token, latest] = True
    return seen


def check_sees(sees):
    """Lesson 02. sees(is_media bool[T]) -> bool[T, pictures], True where a token sees a picture."""
    for places in ((1, 4, 8), (0, 1), (5,), ()):
        is_media = torch.zeros(10, dtype=torch.bool)
        is_media[list(places)] = True
        answer, expected = sees(is_media), latest_by_walking(is_media)
        if isinstance(answer, torch.Tensor) and answer.shape == expected.shape:
            answer, first = answer.bool(), min(places, default=10)
            assert not answer[:first].any(), "a token before the first picture sees one; it must see none."
            assert answer[list(places)].any(1).all() and torch.equal(answer[list(places)], expected[list(places)]), (
                "a media token does not see its own picture and that alone; text time counts up to and with the token."
            )
        compare(answer.float() if isinstance(answer, torch.Tensor) else answer, expected.float(), (
            f"with pictures at {places} some token does not see exactly the latest one."
        ))  # fmt: skip


def check_place(place):
    """Lesson 03. place(embeddings float[B, T, W], is_image bool[B, T], image_tokens float[n, W]) -> float[B, T, W]."""
    torch.manual_seed(0)
    vision = ViT(ViTConfig(image_size=8, patch_size=4, width=8, num_layers=0, num_heads=1, mlp_width=8))
    config = DecoderConfig(20, 8, 1, 1, 8, 16, (LayerOptions(),))
    model = VLM(vision, LinearProjector(8, 8), Decoder(config))
    image, word = IMAGE_TOKEN, 3
    ids = torch.tensor([[image, word, image, 4, 5, 6], [7, image, 8, image, image, 9], [1, 2, 3, 4, 5, 6]])
    image_tokens = torch.randn(5, 8)
    embeddings = model.decoder.embedding(ids.clamp(min=0)).detach()
    before = embeddings.clone()
    answer = place(embeddings, ids == IMAGE_TOKEN, image_tokens)
    expected = model.embed(ids, [image_tokens[:2], image_tokens[2:]], [0, 1]).detach()
    if isinstance(answer, torch.Tensor) and answer.shape == expected.shape:
        words = ids != IMAGE_TOKEN
        assert torch.equal(answer[words], expected[words]), "a word's embedding changed; replace image tokens only."
    compare(answer, expected, (
        "the image tokens stand in other places than VLM.embed puts them: the k-th one belongs in the k-th place, "
        "counted along the first row, then along the second, without starting again."
    ))  # fmt: skip
    assert torch.equal(embeddings, before), "your function changed the embeddings it was given; return a new tensor."


def check_look(look):
    """Lesson 04. look(q float[M, H, L, D], k float[M, H, N, D], v float[M, H, N, D]) -> float[M, H, L, D].

    What every latent takes from the patches, as in a resampler's layer.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, 3, number, 8, generator=generator) for number in (4, 10, 10))
    answer = look(q, k, v)
    scores, hint = q @ k.transpose(-1, -2), "it differs from nanovlm.attention; think of scores, softmax, weighted sum."
    for wrong, words in (
        (scores.softmax(-1) @ v, "the scores are not divided by the square root of D, so the softmax is too sharp."),
        ((scores / 8**0.5).softmax(-2) @ v, (
            "the latents compete for every patch; each latent on its own spreads a total weight of 1 over the patches."
        )),
        (v.mean(2, keepdim=True).expand_as(q), "every latent got the mean of all patches, whatever it asked for."),
    ):  # fmt: skip
        if isinstance(answer, torch.Tensor) and answer.shape == q.shape and torch.allclose(answer, wrong, atol=1e-4):
            hint = words
    compare(answer, attention(q, k, v, full(4, 10)), hint)


def check_silence(silence):
    """Lesson 05. silence(adapter.Adapter) changes it in place: it adds nothing, and can still learn."""
    torch.manual_seed(0)
    adapter, hidden = Adapter(12, 6), torch.randn(2, 5, 12)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    silence(adapter)
    added = (adapter(hidden) - hidden).abs().max().item()
    assert torch.equal(adapter(hidden), hidden), (
        f"it still adds up to {added:.2g}; exactly nothing is asked for, and biases add too."
    )
    names = ("down.weight", "up.weight")
    before = {name: adapter.get_parameter(name).clone() for name in names}
    for _ in range(4):
        (adapter(hidden) - hidden.flip(-1)).square().mean().backward()
        with torch.no_grad():
            for parameter in adapter.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                parameter.grad = None
    for name in names:
        assert not torch.equal(adapter.get_parameter(name), before[name]), (
            f"it is silent for good: {name} has not moved in four steps. Where a product is zero because both its "
            "factors are, neither gets a gradient; leave one of them as it was."
        )


def check_gate_gradients(gate_gradients):
    """Lesson 06. gate_gradients(gate float[1], update float[T, W], dy float[T, W]) -> (d gate, d update)."""
    generator = torch.Generator().manual_seed(0)
    for value in (0.0, 0.7, -1.3):
        gate = torch.tensor([value], requires_grad=True)
        x, update, dy = torch.randn(3, 5, 4, generator=generator)
        update.requires_grad_(True)
        expected = torch.autograd.grad(x + gate.tanh() * update, (gate, update), dy)
        answer = gate_gradients(gate.detach(), update.detach(), dy)
        assert isinstance(answer, tuple) and len(answer) == 2, "your function must return a pair: of the gate, of the update."
        d_gate = torch.as_tensor(answer[0])
        assert d_gate.numel() == 1, f"the gate is one number, its gradient has {d_gate.numel()}; every token and channel adds to it."
        compare(answer[1], expected[1], f"at gate {value} the update's gradient differs from what autograd finds; the gate scales it.")
        compare(d_gate.reshape(1), expected[0], (
            f"at gate {value} the gate's gradient differs from what autograd finds; mind the slope of tanh, which is 1 at 0 only."
        ))  # fmt: skip


def check_route(route_by_hand):
    """Lesson 07. route_by_hand(x float[B, T, W], modality int[B, T], text, vision) -> float[B, T, W_out].

    text and vision are layers with different weights.
    """
    generator = torch.Generator().manual_seed(0)
    modality = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 1]])
    x = torch.randn(2, 5, 6, generator=generator)
    for make in (lambda: nn.Linear(6, 4, bias=False), lambda: nn.LayerNorm(6)):
        layer = ModalityAdaptive(make(), make())
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        answer = route_by_hand(x, modality, layer.text, layer.vision)
        expected = layer.as_written(x, route(modality))
        swapped = layer.as_written(x, route(1 - modality))
        if isinstance(answer, torch.Tensor) and answer.shape == expected.shape:
            assert not torch.allclose(answer, swapped, atol=1e-4), (
                "text and vision are exchanged: here 0 is text and 1 is vision; the paper counts the other way round."
            )
        compare(answer, expected, (
            f"with two {type(layer.text).__name__}s it differs from as_written. If only the norm fails: a norm of a "
            "zero row is its bias, not zero, so a masked-out token must be left out after the layer, not before."
        ))  # fmt: skip


def check_stretch(stretch):
    """Lesson 08. stretch(table float[1 + n * n, W], side) -> float[1 + side * side, W]."""
    generator = torch.Generator().manual_seed(0)
    for old, new in ((3, 5), (4, 6), (4, 2)):
        table = torch.randn(1 + old**2, 6, generator=generator)
        answer, expected = stretch(table.clone(), new), resize_positions(table, new**2)
        if isinstance(answer, torch.Tensor) and answer.shape == expected.shape:
            assert torch.equal(answer[0], table[0]), "the first row is the class token's: it stands nowhere, copy it as it is."
            turned = answer[1:].unflatten(0, (new, new)).transpose(0, 1).flatten(0, 1)
            assert not torch.allclose(turned, expected[1:], atol=1e-4), "rows and columns of the grid are exchanged."
        compare(answer, expected, f"from {old} x {old} to {new} x {new} patches: bicubic, align_corners=False, or other numbers?")


def check_merge(merge):
    """Lesson 09. merge(one, other) -> (top float[T], total float[T], acc float[T, D]), as its arguments.

    The largest score, sum(exp(score - top)) and sum(exp(score - top) * value) of two sets of keys.
    """
    generator = torch.Generator().manual_seed(0)
    scores, values = 20 * torch.randn(6, 9, generator=generator), torch.randn(9, 4, generator=generator)

    def part(keys):
        top = scores[:, keys].amax(1)
        shares = (scores[:, keys] - top[:, None]).exp()
        return top, shares.sum(1), shares @ values[keys]

    for border in (5, 2):
        answer = merge(part(slice(0, border)), part(slice(border, 9)))
        assert isinstance(answer, tuple) and len(answer) == 3, "your function must return (top, total, acc)."
        for name, found, expected in zip(("top", "total", "acc"), answer, part(slice(0, 9))):
            compare(found, expected, f"{name} is not that of all keys seen at once; from which maximum was each part measured?")


def check_tile_kinds(tile_kinds):
    """Lesson 09. tile_kinds(first int[T], stop int[T], num_keys, size) -> int[query tiles, key tiles]: 0, 1 or 2."""
    steps = torch.arange(10)
    for words, first, stop, num_keys in (
        ("causal", steps * 0, steps + 1, 10),
        ("a window", (steps - 2).clamp(min=0), steps + 1, 10),
        ("everything", steps * 0, steps * 0 + 7, 7),
        ("two documents", steps // 5 * 5, steps + 1, 10),
        ("padding that sees nothing", steps * 0 + 4, torch.where(steps < 5, 4, 8), 8),
    ):
        visible = Visible(first[None], stop[None])
        expected = torch.stack([
            torch.stack([part.any().long() + part.all().long() for part in rows.split(4, dim=1)])
            for rows in visible.mask(num_keys)[0].split(4)
        ])  # fmt: skip
        compare(tile_kinds(first, stop, num_keys, 4), expected, f"for the mask of {words} some tiles are of another kind.")


def check_blame(blame_scores):
    """Lesson 09. blame_scores(shares float[T, S], d_shares float[T, S]) -> float[T, S]."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 6, generator=generator).requires_grad_()
    d_shares = torch.randn(4, 6, generator=generator)
    shares = scores.softmax(-1)
    (expected,) = torch.autograd.grad(shares, scores, d_shares)
    compare(blame_scores(shares.detach(), d_shares), expected, (
        "it differs from what autograd finds; a share takes from the others of its row what it gains."
    ))  # fmt: skip


def check_nucleus(nucleus):
    """Lesson 10. nucleus(probabilities float[V], p) -> bool[V], the words that nucleus sampling keeps."""
    generator = torch.Generator().manual_seed(0)
    for p in (0.9, 0.5, 0.05):
        for _ in range(4):
            probabilities = (2 * torch.randn(12, generator=generator)).softmax(0)
            before = probabilities.clone()
            expected = top_p(probabilities.log()[None], p)[0].isfinite()
            answer = nucleus(probabilities, p)
            if isinstance(answer, torch.Tensor) and answer.shape == expected.shape:
                answer, number = answer.bool(), int(expected.sum())
                assert answer.sum() != number - 1, "one word is missing: the one that crosses p belongs to the nucleus too."
                assert answer.sum() != number or torch.equal(answer, expected), (
                    "as many words as there should be, but others: your answer stands in sorted order; put it back."
                )
                compare(answer.float(), expected.float(), f"with p = {p} it keeps {int(answer.sum())} words instead of {number}.")
            else:
                compare(answer, expected, "")
            assert torch.equal(probabilities, before), "your function changed the probabilities it was given."


def check_bridge(make):
    """Lesson 11. make(vision_width, output_width) -> a bridge whose image tokens are the rows of the picture."""
    vision_width, width = 8, 12
    try:
        bridge = make(vision_width, width)
        model = VLM(ViT(ViTConfig(8, 4, vision_width, 0, 1, 8)), bridge, Decoder(DecoderConfig(20, width, 1, 1, 8, 16, (LayerOptions(),))))
        count = bridge.num_image_tokens(9)
    except (TypeError, AttributeError, NotImplementedError) as error:
        raise AssertionError(f"it is no bridge yet: {error}") from error
    assert count == 3, f"num_image_tokens(9) is {count}; 3 x 3 patches have 3 rows."
    assert bridge.num_image_tokens(9, 2) == 6, "num_image_tokens forgets the frames: two frames of 3 rows are 6 image tokens."
    linear = getattr(model.bridge, "linear", None)
    assert isinstance(linear, nn.Linear), "it has no layer called linear."
    generator = torch.Generator().manual_seed(0)
    for frames in (1, 2):
        patches = torch.randn(2, frames * 9, vision_width, generator=generator)
        grid = patches.view(2, frames, 3, 3, vision_width)  # M f rows columns D
        expected = torch.stack([
            linear((grid[:, f, row, 0] + grid[:, f, row, 1] + grid[:, f, row, 2]) / 3) for f in range(frames) for row in range(3)
        ], dim=1)  # fmt: skip
        columns = linear(grid.mean(2)).flatten(1, 2)
        answer = bridge(patches, frames)
        hint = "an image token is not the mean of its row of patches, mapped by linear."
        if isinstance(answer, torch.Tensor) and answer.shape == columns.shape and torch.allclose(answer, columns, atol=1e-4):
            hint = "these are the columns; patches stand row by row, so the ones of a row are neighbours."
        compare(answer, expected, hint)


def check_repair(repair):
    """Lesson 12. repair(Stage) -> Stage, in which the seventh run's fault is put right and nothing else changed.

    Raises: AssertionError.
    """
    (broken,) = choose(recipe_12.stages("tiny", False), settings=recipe_12.SEVENTH)
    stage = repair(broken)
    assert stage is not None, "your function returned None; return a Stage, made by dataclasses.replace(stage, ...)."
    changed = [name for name, value in vars(broken).items() if getattr(stage, name) != value]
    for name in changed:
        assert name == "max_tokens", f"{name} is changed, but it was not wrong; look at the ends of the rows that are trained."
    assert changed, "nothing is changed."
    assert stage.max_tokens <= recipe_12.CONTEXT, (
        f"{stage.max_tokens} tokens are more than the model's context of {recipe_12.CONTEXT}; train.py would refuse it."
    )
    tokenizer, report = recipe_12.tokenizer(), Report()
    records = recipe_12.exam(4) + recipe_12.exam(4, describe=True)
    build_batch(records, NANO, tokenizer, lambda *picture: 1, recipe_12.IMAGE_SIZE, "crop", stage.max_tokens, report)
    assert not report.truncated_rows, (
        f"{report.truncated_rows} of {report.rows} rows are still cut to {stage.max_tokens} tokens; {report.truncated_tokens} are lost."
    )
