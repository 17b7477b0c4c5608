"""The gradient of one update: what is divided by what, and that micro-batches and threads change nothing."""

import dataclasses
import math
import threading
import types

import pytest
import torch
from test_trainer import RECIPE, Squares, make

from nanovlm.data.batching import Report, build_batch, contrastive_batch
from nanovlm.training import optimizer, update
from nanovlm.training.processes import stage_loss
from nanovlm.training.update import TrainingError, split

RECORDS = [Squares(0).record(n) for n in range(5)] + [Squares(0, "text").record(0)]
TEXTS = [Squares(0, "text").record(n) for n in range(3)]


@pytest.fixture
def run(tmp_path):
    return make(tmp_path / "run")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def language(**values):
    return dataclasses.replace(RECIPE.stages("full", False)[1], image_size=8, **{"clip": None} | values)


def tower(**values):
    return dataclasses.replace(RECIPE.stages("full", False)[0], clip=None, **values)


def gradients(run, stage, records, report=None):
    """An update without its step: (loss, norm, tokens, gradients by name)."""
    run.loss = stage_loss(run, stage)
    model = run.loss.model
    model.zero_grad()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    one = update.Update(run, stage, records, parameters, report or Report())
    for micro_batch in one.micro_batches():
        loss = run.loss(*micro_batch.inputs)
        one.add(micro_batch, loss)
        if loss.requires_grad:
            loss.backward()
    loss, tokens = one.average()
    norm = one.clip(stage.clip)
    return loss, norm, tokens, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, rtol=1e-4, atol=1e-6):
    """Of two updates."""
    assert found[:3] == (pytest.approx(expected[0], rel=1e-5), pytest.approx(expected[1], rel=1e-5), expected[2])
    assert found[3].keys() == expected[3].keys()
    for name, gradient in expected[3].items():
        torch.testing.assert_close(found[3][name], gradient, rtol=rtol, atol=atol, msg=name)


def assert_equal(found, expected):
    assert found[:3] == expected[:3] and found[3].keys() == expected[3].keys()
    assert all(torch.equal(found[3][name], gradient) for name, gradient in expected[3].items())


@pytest.mark.parametrize("number, size", [(2, None), (3, 2), (8, 1)])
def test_threads_that_share_an_update_change_nothing(run, threads, number, size):
    stage, reports = language(micro_batch_size=size), (Report(), Report())
    threads(1)
    alone = gradients(run, stage, RECORDS, reports[0])
    threads(number)
    many = gradients(run, stage, RECORDS, reports[1])
    assert_close(many, alone)
    assert reports[0] == reports[1] and reports[0].rows > 0 and torch.get_num_threads() == number
    assert_equal(gradients(run, stage, RECORDS), many)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("frozen", ["", "vision.", "text."])
@pytest.mark.parametrize("regions", [(), ((0.1, 0.9), (0.6, 0.2))])
def test_threads_that_share_a_contrastive_update_change_nothing(run, threads, number, frozen, regions):
    records, stage, reports = RECORDS[:5], tower(), (Report(), Report())
    for n in range(1, 5) if regions else ():
        (turns, *_) = records[n].conversations
        records[n] = dataclasses.replace(records[n], conversations=(turns, turns), kinds=(), regions=regions)
    for name, parameter in run.contrastive.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    threads(1)
    alone = gradients(run, stage, records, reports[0])
    threads(number)
    many = gradients(run, stage, records, reports[1])
    assert_close(many, alone)
    assert reports[0] == reports[1] and torch.get_num_threads() == number
    assert alone[3].keys() == {name for name, one in run.contrastive.named_parameters() if one.requires_grad}
    assert_equal(gradients(run, stage, records), many)


def test_every_optimizer_takes_its_step_on_a_thread_of_its_own_if_on_the_cpu(threads):
    threads(3)
    seen, together = [], threading.Barrier(2, timeout=60)

    class Optimizer:
        param_groups = []

        def step(self):
            seen.append(torch.get_num_threads())
            together.wait()
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.Together([Optimizer(), Optimizer()], torch.device("cpu")).step(1.0)
    assert seen == [1, 1] and torch.get_num_threads() == 3
    seen = []
    one = types.SimpleNamespace(step=lambda: seen.append(threading.current_thread()), param_groups=[])
    optimizer.Together([one, one], torch.device("meta")).step(1.0)
    assert seen == [threading.current_thread()] * 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gradient_does_not_depend_on_which_thread_is_faster(run, threads, precision):
    threads(2)
    stage = language(precision=precision)
    records = [dataclasses.replace(one, conversations=one.conversations * 2, kinds=()) for one in RECORDS[:4]]

    def slowed(module):
        """Where one thread stops behind its first pass through a module, until the other has reached the end."""
        slow, ready = [], threading.Event()

        def stop(*_):
            if not slow:
                slow.append(threading.get_ident())
                assert ready.wait(60)

        def go_on(*_):
            if threading.get_ident() not in slow:
                ready.set()

        hooks = [run.model.decoder.norm.register_forward_hook(go_on), module.register_forward_hook(stop)]
        found = gradients(run, stage, records)
        for hook in hooks:
            hook.remove()
        assert slow and ready.is_set()
        return found

    assert_equal(slowed(run.model.vision), slowed(run.model.decoder.layers[0]))


@pytest.mark.parametrize("number", [1, 2])
def test_text_that_reaches_no_trained_parameter_adds_no_gradient(run, threads, number):
    threads(number)
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_(name.startswith("bridge."))
    assert len(gradients(run, language(), RECORDS)[3]) == len(list(run.model.bridge.parameters()))
    loss, norm, _, found = gradients(run, language(), TEXTS)
    assert math.isfinite(loss) and norm == 0 and not found


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_micro_batches_change_nothing(run, size):
    assert_close(gradients(run, language(micro_batch_size=size), RECORDS), gradients(run, language(), RECORDS))


def test_the_loss_is_per_trained_token(run):
    batch = build_batch(RECORDS, RECIPE.template, run.tokenizer, run.model.num_image_tokens, 8, "crop", 40)
    total, trained = run.model.loss(batch)
    found = gradients(run, language(micro_batch_size=2), RECORDS)
    assert found[2] == (batch.segments >= 0).sum() < batch.ids.numel() and trained > 11
    run.model.zero_grad()
    (total / trained).backward()
    expected = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert_close(found, (total.item() / trained, norm, found[2], expected))
    pixels, ids, lengths, right, _ = contrastive_batch(RECORDS[:4], run.tokenizer, 8, "crop", 24)
    loss, _, tokens, _ = gradients(run, tower(), RECORDS[:4])
    assert loss == pytest.approx(run.contrastive.loss(pixels, ids, lengths, right).item()) and tokens == lengths.sum()


def test_clipping_shortens_the_whole_gradient(run):
    free = gradients(run, language(), RECORDS)
    clipped = gradients(run, language(clip=free[1] / 4), RECORDS)
    assert_close(clipped, (*free[:3], {name: gradient / 4 for name, gradient in free[3].items()}), atol=1e-8)
    assert_equal(gradients(run, language(clip=free[1] * 4), RECORDS), free)
    exact = gradients(run, language(), RECORDS)[0]
    loss, *_, found = gradients(run, language(precision="bfloat16"), RECORDS)
    assert loss != exact and loss == pytest.approx(exact, rel=0.02)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


def test_pictures_and_plain_text_run_apart():
    found = [[one.id for one in part] for part in split(RECORDS, 2)]
    assert sorted(sum(found, [])) == sorted(one.id for one in RECORDS)
    kinds = [{one.startswith("text") for one in part} for part in found]
    assert all(len(kind) == 1 for kind in kinds) and {True, False} == set.union(*kinds)
    assert max(map(len, found)) == 2


def spoil_weight(run):
    run.model.decoder.norm.weight.data[0] = float("nan")


def spoil_gradient(run):
    run.model.decoder.norm.weight.register_hook(lambda gradient: gradient * float("inf"))


def spoil_tower(run):
    norm = run.contrastive.text.norm
    norm.forward = lambda x, forward=norm.forward: forward(x) * float("nan")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("spoil", "stage", "words"), [
    (spoil_weight, language, "the loss is nan; records: square-0, square-1; a weight is not finite itself: decoder.norm.weight$"),
    (spoil_gradient, language, "norm is .*; records: square-0, square-1; .* part language_model, first seen at decoder.norm.weight$"),
    (spoil_tower, tower, "the loss is nan; records: square-0, .* part text_tower, first seen at text.norm$"),
])
def test_what_is_not_finite_names_its_records_and_where_it_arose(run, threads, number, spoil, stage, words):
    threads(number)
    spoil(run)
    with pytest.raises(TrainingError, match=words):
        gradients(run, stage(), RECORDS[:2])
    assert torch.get_num_threads() == number


def test_bad_data_is_a_training_error_and_a_bug_is_not(run):
    with pytest.raises(TrainingError, match="max_tokens"):
        gradients(run, language(max_tokens=3), RECORDS)
    run.model.vision.resize(16)
    with pytest.raises(ValueError, match="pixels"):
        gradients(run, language(), RECORDS[:1])
