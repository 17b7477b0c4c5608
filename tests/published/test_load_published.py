"""Published folders open with any type and resolution; whatever is wrong with one is said by name."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovlm import recipes
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.decoder import Decoder
from nanovlm.published.language import LLAMA, llama_config
from nanovlm.vit import resize_positions
from tests.published_folders import LLAMA_SIZES, folder_with, language  # noqa: F401
from tests.random_models import randomise


def test_bare_language_model_in_other_types_and_with_anothers_tokenizer(language):
    loaded = recipes.load(language[0], dtype=torch.bfloat16)
    assert loaded.model.vision is None and loaded.image_size == 0
    for name, tensor in loaded.model.decoder.state_dict().items():
        assert torch.equal(tensor, language[1].state_dict()[name].bfloat16())
    words = [f"{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{chr(97 + n // 7 % 26)}x" for n in range(2000)]
    train_tokenizer(words, 900).save(language[0] / "tokenizer.json")
    with pytest.raises(ValueError, match="embeddings"):
        recipes.load(language[0])


def test_another_resolution_only_when_asked(tmp_path):
    published, config = recipes.FAMILIES["llava_phi"], recipes.FAMILIES["llava_phi"].configs["tiny"]
    model = randomise(published.build(config))
    folder = folder_with(tmp_path / "phi", config | {"model_type": "llava_phi"}, published.layout(config), model.state_dict())
    assert recipes.load(folder).notes[0].startswith("512 embedding rows")
    loaded = recipes.load(folder, image_size=28)
    assert loaded.image_size == 28 and "17 rows resized to 5" in " ".join(loaded.notes)
    assert torch.equal(loaded.model.vision.positions, resize_positions(model.vision.positions.data, 4))
    wrong = config | {"vision": config["vision"] | {"image_size": 28}, "model_type": "llava_phi"}
    (folder / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="image_size"):
        recipes.load(folder)


def shard(folder, number):
    return sorted(folder.glob("model-*.safetensors"))[number]


def configured(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return spoil


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda folder: os.truncate(shard(folder, 1), 4000), "model-00002-of-00005.safetensors is cut short"),
    (lambda folder: shard(folder, 1).unlink(), "model-00002"),
    (lambda folder: shard(folder, 0).write_bytes(b"\xff" * 64), "model-00001"),
    (lambda folder: shard(folder, 0).write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}'), "index.json"),
    (configured(model_type="opt"), "another family"),
    (configured(model_type="llame"), "Did you mean 'llama'"),
    (configured(model_type="phi-msft"), "January 2024"),
    (configured(rope_scaling={"rope_type": "yarn"}), "yarn"),
    (configured(num_hidden_layers=3), "model.layers.3.self_attn.q_proj.weight"),
    (configured(vocab_size=511), "vocabulary"),
])  # fmt: skip
def test_bad_folders_are_refused_by_name(language, spoil, words):
    spoil(language[0])
    with pytest.raises((ValueError, OSError)) as caught:
        recipes.load(language[0])
    assert words in str(caught.value)


def test_tied_and_untied_heads(tmp_path):
    sizes = LLAMA_SIZES | {"tie_word_embeddings": True, "model_type": "llama", "num_key_value_heads": 1}
    decoder = randomise(Decoder(llama_config(sizes)))
    folder = folder_with(tmp_path / "tied", sizes, LLAMA, decoder.state_dict())
    tensors = load_file(folder / "model.safetensors")
    for change, fits in ((lambda t: {"lm_head.weight": t.pop("model.embed_tokens.weight")}, True),
                         (lambda t: {"lm_head.weight": t["model.embed_tokens.weight"].clone()}, True),
                         (lambda t: {"lm_head.weight": t["model.embed_tokens.weight"] + 1}, False)):  # fmt: skip
        changed = dict(tensors)
        changed |= change(changed)
        save_file(changed, folder / "model.safetensors")
        if fits:
            assert torch.equal(recipes.load(folder).model.decoder.embedding.weight, decoder.embedding.weight)
        else:
            with pytest.raises(ValueError, match="second copy"):
                recipes.load(folder)
