"""SmolVLM: equal to transformers in values, gradients and generated tokens; its layout in and out."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from nanovlm.generation.sampler import Decoding, generate
from nanovlm.published.weights import to_ours
from nanovlm.recipes import RECIPES, find, smolvlm
from parity import CLOSE, perturb
from published_models import as_published, make_batch, real_logits, same_gradients, there_and_back

IMAGE, PAD = 320, 1
CONFIG = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8,
        "image_size": 48,
    },
    "text_config": {
        "model_type": "llama", "vocab_size": 330, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 5, "num_key_value_heads": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-3,
        "pad_token_id": PAD, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "image_token_id": IMAGE, "scale_factor": 3,
}  # fmt: skip


@pytest.fixture(scope="module", params=["Idefics3", "SmolVLM"])
def pair(request, tmp_path_factory):
    """transformers' model, how it reads one of our batches, what its save_pretrained writes, and ours with these weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**CONFIG)
    theirs = perturb(getattr(transformers, f"{request.param}ForConditionalGeneration")(config))
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")

    def inputs(batch):
        frames = batch.frames.new_zeros(len(batch.ids)).index_add(0, batch.owner, batch.frames)  # of each row
        rows = batch.pixels.split(frames.tolist())  # the others' tiles are zeros
        return as_published(batch, IMAGE) | {"pixel_values": pad_sequence(rows, True)}

    def ours():
        torch.manual_seed(1)
        model = perturb(smolvlm.build(CONFIG))
        model.load_state_dict(to_ours(smolvlm.LAYOUT(CONFIG), saved, model.state_dict()))
        return model

    return SimpleNamespace(theirs=theirs, saved=saved, inputs=inputs, ours=ours)


def rows():
    """A picture of one square, text alone, one of five tiles and one of three in a row, one in front; odd lengths."""
    torch.manual_seed(0)
    a, b, c, d = (torch.randn(n, 3, 48, 48) for n in (1, 5, 3, 1))
    words = torch.randint(4, 319, (30,)).tolist()
    return [[2, *words[:4], a, *words[4:9]], [2, *words[9:20]], [2, b, *words[20:23], c, 5], [d, 7]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_features_image_tokens_and_logits(pair, side):
    model, batch = pair.ours(), make_batch(pair.ours(), rows(), side, PAD)
    features = pair.theirs.model.vision_model(pixel_values=batch.pixels).last_hidden_state
    torch.testing.assert_close(model.vision(batch.pixels), features, **CLOSE)
    found = torch.cat(model.encode(batch.pixels, batch.frames))
    torch.testing.assert_close(found, pair.theirs.model.connector(features).flatten(0, 1), **CLOSE)
    expected = pair.theirs(**pair.inputs(batch))
    for row, logits in enumerate(real_logits(model, batch)):
        torch.testing.assert_close(logits, expected.logits[row][batch.segments[row] >= 0], **CLOSE)


def test_loss_and_gradients(pair, tmp_path):
    """Their loss is a mean; image tokens are not trained."""
    model = pair.ours()
    batch = make_batch(model, rows(), "right", PAD)
    expected = pair.theirs(**pair.inputs(batch), labels=batch.labels).loss
    expected.backward()
    loss, trained = model.loss(batch)
    (loss / trained).backward()
    torch.testing.assert_close(loss / trained, expected, **CLOSE)
    same_gradients(model, pair.theirs, smolvlm.LAYOUT(CONFIG), tmp_path)


def test_greedy_generation(pair):
    model, given = pair.ours(), rows()
    batch = make_batch(model, given, "left", PAD)
    prompts = [ids[segments >= 0].tolist() for ids, segments in zip(batch.ids, batch.segments)]
    expected = pair.theirs.generate(**pair.inputs(batch), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    found = generate(model, prompts, Decoding(max_new_tokens=12), [[one for one in row if torch.is_tensor(one)] for row in given])
    assert found == expected[:, -12:].tolist() and len({tuple(answer) for answer in found}) > 1


def test_a_folder_of_transformers(pair, tmp_path):
    """Sharded in, converted to ours and back: bit-identical."""
    loaded, back = there_and_back(pair.theirs, tmp_path)
    assert (loaded.image_size, loaded.tiles, loaded.preprocessing.mean) == (48, 4, (0.5, 0.5, 0.5))
    reference = pair.ours().state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in loaded.model.state_dict().items())
    assert all(torch.equal(tensor, pair.theirs.state_dict()[name]) for name, tensor in back.state_dict().items())


def test_what_a_config_leaves_out_is_as_their_classes_have_it():
    """The public 500M-Video file does not say how many layers the tower has."""
    transformers = pytest.importorskip("transformers")
    theirs, text = transformers.Idefics3Config(), {"vocab_size": 99, "hidden_size": 64, "num_attention_heads": 8}
    with torch.device("meta"):
        model = smolvlm.build({"vision_config": {"image_size": 256}, "text_config": text | {"num_hidden_layers": 2}})
    tower, named = model.vision.config, theirs.vision_config
    assert (tower.width, tower.num_layers, tower.num_heads, tower.mlp_width, tower.patch_size) == (
        named.hidden_size, named.num_hidden_layers, named.num_attention_heads, named.intermediate_size, named.patch_size)
    assert model.bridge.merge == theirs.scale_factor and model.decoder.lm_head is not None


@pytest.mark.parametrize("size,total,layers", [("256M", 256_484_928, 30), ("500M", 507_482_304, 32)])
def test_full_sizes(size, total, layers):
    """Totals in print; 17 squares of 64 tokens are a picture of 4 x 4 tiles."""
    with torch.device("meta"):
        model = smolvlm.build(smolvlm.CONFIGS[size])
    assert sum(p.numel() for p in model.parameters()) == total and len(model.decoder.layers) == layers
    assert model.num_image_tokens(512) == 64 and model.num_image_tokens(512, 17) == 1088
    assert model.decoder.config.rope_base == 1e5 and model.decoder.config.norm_eps == 1e-5


def test_the_former_name_finds_it():
    assert find("small") is RECIPES["small"] is RECIPES["smolvlm"] and "small" not in list(RECIPES)


def test_squares_that_do_not_divide_the_picture():
    with pytest.raises(ValueError, match="36 patches"):
        smolvlm.build(CONFIG | {"scale_factor": 4})
