"""The generated table of the models: counted numbers against torch's counter, known totals and sums by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanovlm.attention import causal_rows
from nanovlm.recipes import RECIPES, table

PUBLISHED = [name for name, recipe in RECIPES.items() if recipe.published]


@pytest.fixture(scope="module")
def counted():
    return {one.name: one for one in table.rows()}


def tiny(name):
    torch.manual_seed(0)
    published = RECIPES[name].published
    return published.build(published.configs["tiny"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_are_those_of_a_real_run(name):
    """Of a tiny model on the CPU, all layers run, against the count on the meta device with one layer of each kind."""
    model = tiny(name)
    model.set_backend("reference")  # torch does not count the CPU's fused attention
    size = model.vision.image_size
    with FlopCounterMode(display=False) as counter:
        (tokens,) = model.encode(torch.randn(1, 3, size, size), torch.ones(1, dtype=torch.long))
    encode = counter.get_total_flops()
    if model.media_token is None:
        embeddings, media = tokens[None].detach(), None
    else:
        embeddings = torch.randn(1, 1, model.decoder.config.width)
        media = model.media(torch.tensor([[model.media_token]]), torch.zeros(1, 1, dtype=torch.long), [tokens.detach()], [0])
    num_tokens = embeddings.shape[1]
    where, modality = torch.arange(num_tokens)[None], torch.ones(1, num_tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.decoder(embeddings, where, causal_rows(1, num_tokens), modality, media=media)
    with torch.device("meta"):
        light = tiny(name)
    assert (table.encode_flops(light), table.language_flops(light, len(tokens))) == (encode, counter.get_total_flops())


def test_totals_tokens_memory_and_flops_by_hand(counted):
    """Of the published checkpoints; BLIP-2's hold zeros in place of the keys' bias."""
    for name, total in {"lynx": 8_413_647_120, "mplug_owl2": 8_197_859_328, "llava_phi": 3_092_371_456,
                        "llava": 7_063_427_072, "blip2": 3_744_761_856 - 39 * 1408, "smolvlm": 256_484_928,
                        "smolvlm 500M": 507_482_304}.items():  # fmt: skip
        assert counted[name].total == total
    found = {name: (one.image_size, one.vision_tokens, one.image_tokens) for name, one in counted.items()}
    assert found["lynx"] == (420, 901, 32) and found["mplug_owl2"] == (448, 1025, 65)
    assert found["llava"] == (336, 576, 576) and found["llava linear"] == (224, 256, 256)
    assert found["blip2"] == (224, 257, 32) and found["blip2 full_364"] == (364, 677, 32)
    assert found["open_flamingo"] == (224, 256, 64) and found["smolvlm"] == (512, 1024, 64)
    lynx, nano = counted["lynx"], counted["nano"]
    assert lynx.train_bytes("align") == 2 * (8_413_647_120 - 688_430_224) + 16 * 688_430_224
    trained = nano.trained["tower"]
    assert set(trained) == {"vision", "text_tower"} and "text_tower" not in nano.parameters
    frozen = nano.total - trained["vision"]
    assert nano.train_bytes("tower") == 2 * frozen + 16 * (trained["vision"] + trained["text_tower"])
    image = 576
    clip = 23 * (577 * 2 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024) + image * 2 * 3 * 14**2 * 1024
    bridge = image * 2 * (1024 * 4096 + 4096**2)
    llama = 32 * (image * 2 * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * image**2 * 4096)
    assert (counted["llava"].encode_flops, counted["llava"].language_flops) == (clip + bridge, llama)


def test_every_size_but_the_tiny_ones_has_a_row(counted):
    expected = [name if size == recipe.sizes[0] else f"{name} {size}" for name, recipe in RECIPES.items()
                for size in recipe.sizes if not size.startswith("tiny")]  # fmt: skip
    assert list(counted) == expected
    for title, headings, cells in table.tables(list(counted.values())):
        assert cells and all(len(line) == len(headings) for line in cells), title
    models, parts, stages = table.tables(list(counted.values()))
    assert [line[0] for line in models[2]] == [line[0] for line in parts[2]] == expected
    assert len(stages[2]) == sum(len(one.trained) for one in counted.values())


def test_numbers_are_short_and_columns_align():
    shown = [table.short(number) for number in (8_413_647_120, 999_499_999, 999_500_000, 66_000, 999, 0, 1_952_000_000_000)]
    assert shown == ["8.41 B", "999 M", "1 B", "66 k", "999", "0", "1.95 T"]
    assert (table.gib(2**30), table.gib(2**20)) == ("1.0", "0.001")
    lines = table.lines("Title", ["name", "number"], [["a", "7"], ["longer", "1,234"]])
    assert lines == ["Title", "", "name    number", "a            7", "longer   1,234", ""]
