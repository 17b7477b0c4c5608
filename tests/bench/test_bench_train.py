"""The benchmark of training steps, on models small enough for a test."""

import pytest
import torch

from nanovlm.bench import decode, train
from nanovlm.bench.__main__ import main
from nanovlm.recipes import RECIPES
from nanovlm.training.cost import example_cost
from nanovlm.vlm import IGNORE, IMAGE_TOKEN

pytest.importorskip("transformers")
TINY = dict(vocab_size=97, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(decode.SIZES, "tiny", TINY)
    monkeypatch.setitem(train.CASES, "tiny", (3, 10))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("tied", [True, False])
def test_both_sides_learn_the_same_in_every_step(tied, monkeypatch):
    monkeypatch.setitem(decode.SIZES, "tiny", TINY | {"tie_word_embeddings": tied})
    monkeypatch.setattr(train, "LEARNING_RATE", 1e-2)
    contenders = train.sides("tiny", 3, 10)
    losses = {name: [step() for _ in range(6)] for name, step in contenders.items()}
    assert losses["nanovlm"] == pytest.approx(losses["transformers"], rel=1e-4) and losses["nanovlm"][-1] < losses["nanovlm"][0] - 0.1


def test_report(capsys):
    assert main(["train", "--case", "tiny", "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "tiny: 3 rows of 10 tokens" in printed and "ratio of medians" in printed and "(required 0.95: " in printed
    assert "3 losses equal" in printed


def test_another_loss_is_no_result(monkeypatch):
    sides = train.sides

    def one_learns_more(*arguments):
        found = sides(*arguments)
        other = found["nanovlm"]
        return found | {"nanovlm": lambda: other() * 1.01}

    monkeypatch.setattr(train, "sides", one_learns_more)
    with pytest.raises(RuntimeError, match="step 1: the loss is .* in transformers and .* here: no speed to compare"):
        train.compare("tiny", 3, 10, 1)


def test_what_a_gpu_would_train():
    """The cases' shapes: four layers of LLaMA-7B, and a LLaVA-Phi whose every part trains."""
    with torch.device("meta"):
        model, stage, rows, text, frames = train.slice_of_7b()
        costs = example_cost(model, stage, text, frames)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    products = 6 * text * (4 * layer + 4096 * 32000)  # forward, and twice that backward
    attention = 3 * 4 * 4 * 4096 * text * (text + 1) / 2
    assert costs["decoder"].flops + costs["head"].flops == pytest.approx(products + attention, rel=1e-6) and frames == 0
    with torch.device("meta"):
        model, stage, *_ = train.GPU_CASES["llava_phi"][0]()
    assert set(stage.learning_rates) == {"vision", "bridge", *train.WORDS} and stage.precision == "auto"


def test_its_batch_trains_the_words_behind_the_picture():
    model = RECIPES["llava_phi"].build("tiny", 0)
    batch = train.make_batch(model.decoder.config.vocab_size, 2, 5, "cpu", model.num_image_tokens(56), 56)
    assert batch.ids.shape == (2, 21) and (batch.ids[:, :16] == IMAGE_TOKEN).all() and (batch.labels[:, :16] == IGNORE).all()
    assert model.loss(batch)[1] == 10
