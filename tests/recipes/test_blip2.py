"""BLIP-2 on OPT: equal to transformers in values, gradients and generated tokens; published layout in and out."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovlm.recipes import blip2
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.vlm import IMAGE_TOKEN
from nanovlm.published.weights import to_ours, to_published
from parity import CLOSE, perturb
from published_models import as_published, make_batch, real_logits, same_gradients, there_and_back

VOCABULARY, IMAGE, PAD, QUERIES = 330, 320, 1, 5
CONFIG = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14,
        "image_size": 42,
    },
    "qformer_config": {
        "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 3, "encoder_hidden_size": 32,
        "vocab_size": 20, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "text_config": {
        "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 36, "ffn_dim": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "word_embed_proj_dim": 36, "max_position_embeddings": 64, "pad_token_id": PAD, "dropout": 0.0,
        "bos_token_id": 2, "eos_token_id": 2,
    },
    "num_query_tokens": QUERIES,
    "image_token_index": IMAGE,
}  # fmt: skip
LAYOUT = blip2.LAYOUT(CONFIG)


def ours(published=None):
    """Our model, random or with published weights."""
    torch.manual_seed(1)
    model = perturb(blip2.build(CONFIG))
    if published is not None:
        model.load_state_dict(to_ours(LAYOUT, published, model.state_dict()))
    return model


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = transformers.OPTConfig(**{key: value for key, value in CONFIG["text_config"].items() if key != "model_type"})
    config = transformers.Blip2Config(
        vision_config=CONFIG["vision_config"], qformer_config=CONFIG["qformer_config"], text_config=text,
        num_query_tokens=QUERIES, image_token_index=IMAGE,
    )  # fmt: skip
    model = perturb(transformers.Blip2ForConditionalGeneration(config))
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            parameter.data[32:64] = 0  # as published: the keys have no bias
    return model


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    """What save_pretrained writes: {name: tensor}."""
    folder = tmp_path_factory.mktemp("blip2")
    theirs.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rows(size=42):
    """Image tokens in front, between words, and two pictures in one row."""
    torch.manual_seed(0)
    a, b, c, d = torch.randn(4, 1, 3, size, size)
    words = torch.randint(4, 79, (30,)).tolist()
    return [[a, 2, *words[:7]], [2, *words[7:9], b, *words[9:20]], [c, d, 2, 5]]


def run_theirs(theirs, batch, **options):
    return theirs(**as_published(batch, IMAGE), pixel_values=batch.pixels, **options).logits


def compare(model, batch, expected):
    for row, found in enumerate(real_logits(model, batch)):
        torch.testing.assert_close(found, expected[row][batch.segments[row] >= 0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(theirs, saved, side):
    model = ours(saved)
    batch = make_batch(model, rows(), side, PAD)
    compare(model, batch, run_theirs(theirs, batch))


def test_vision_features_and_image_tokens(theirs, saved):
    model, pixels = ours(saved), torch.randn(2, 3, 42, 42)
    expected = theirs.get_image_features(pixels)
    torch.testing.assert_close(model.vision(pixels), expected.last_hidden_state, **CLOSE)
    found = torch.stack(model.encode(pixels, torch.ones(2, dtype=torch.long)))
    assert found.shape == (2, QUERIES, 36)
    torch.testing.assert_close(found, expected.pooler_output, **CLOSE)


def test_a_larger_picture_with_a_resized_position_table(theirs, saved):
    """As BLIP-2 at 364 pixels comes from 224."""
    model = ours(saved)
    model.vision.resize(70)
    batch = make_batch(model, rows(70), "left", PAD)
    compare(model, batch, run_theirs(theirs, batch, interpolate_pos_encoding=True))


def test_gradients(theirs, saved, tmp_path):
    model = ours(saved)
    batch = make_batch(model, rows(), "left", PAD)
    target = torch.randn(*batch.ids.shape, VOCABULARY) * (batch.segments >= 0)[..., None]
    gradients = []
    for run in (model, lambda batch: run_theirs(theirs, batch)):
        batch = dataclasses.replace(batch, pixels=batch.pixels.detach().clone().requires_grad_())
        (run(batch) * target).sum().backward()
        gradients.append(batch.pixels.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    same_gradients(model, theirs, LAYOUT, tmp_path)


def test_greedy_generation(theirs, saved):
    """transformers' generate wants one picture a row."""
    model, given = ours(saved), rows()[:2]
    pictures = [[item for item in row if torch.is_tensor(item)] for row in given]
    prompts = [[id for item in row for id in ([IMAGE_TOKEN] * QUERIES if torch.is_tensor(item) else [item])] for row in given]
    batch = make_batch(model, given, "left", PAD)
    expected = theirs.generate(
        **as_published(batch, IMAGE), pixel_values=batch.pixels, max_new_tokens=12, do_sample=False, eos_token_id=None,
        pad_token_id=PAD,
    )  # fmt: skip
    found = generate(model, prompts, Decoding(max_new_tokens=12), pictures)
    assert found == expected[:, -12:].tolist()
    assert found[0] != found[1]


def test_layout_back_and_forth(saved):
    model = ours(saved)
    exported = to_published(LAYOUT, model.state_dict())
    extra = set(saved) - set(exported)
    assert extra <= {"language_model.lm_head.weight"}, extra  # tied: the .bin files have it too
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, saved[name], atol=0, rtol=0)
    tied = exported | {"language_model.lm_head.weight": exported["language_model.model.decoder.embed_tokens.weight"]}
    again = to_ours(LAYOUT, tied, model.state_dict())
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_export_runs_in_transformers(theirs, tmp_path):
    model = ours()
    theirs.config.save_pretrained(tmp_path)
    save_file(to_published(LAYOUT, model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    other, loading = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    batch = make_batch(model, rows(), "left", PAD)
    compare(model, batch, run_theirs(other.eval(), batch))


def test_a_folder_of_transformers(theirs, saved, tmp_path):
    """Sharded in, converted to ours and back: bit-identical."""
    loaded, back = there_and_back(theirs, tmp_path)
    assert (loaded.image_size, loaded.image_fit) == (42, "stretch")
    reference = ours(saved).state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in loaded.model.state_dict().items())
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in back.state_dict().items())


def test_the_config_that_transformers_saves_builds_the_same_model(theirs, tmp_path):
    """Nested, with what is default left out."""
    import json

    theirs.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in blip2.build(config).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in ours().state_dict().items()}


def test_full_sizes():
    """The published numbers are those of the paper's towers; 364 pixels change the position table alone."""
    with torch.device("meta"):
        model, larger = blip2.build(blip2.CONFIGS["full"]), blip2.build(blip2.CONFIGS["full_364"])
    zeros = 39 * 1408  # in every file, in place of the keys' bias
    assert sum(p.numel() for p in model.parameters()) + zeros == 3_744_761_856
    assert model.vision.positions.shape == (257, 1408) and larger.vision.positions.shape == (26 * 26 + 1, 1408)
    assert model.num_image_tokens(224) == larger.num_image_tokens(364) == 32
    assert [layer.cross_attention is not None for layer in model.bridge.layers] == [True, False] * 6


@pytest.mark.parametrize(
    "part,key,value,words",
    [
        ("text_config", "model_type", "t5", "model_type is 't5'"),
        ("qformer_config", "layer_norm_eps", 1e-5, "layer_norm_eps is 1e-05"),
        ("qformer_config", "use_qformer_text_input", True, "InstructBLIP"),
        ("vision_config", "qkv_bias", False, "qkv_bias"),
    ],
)
def test_what_cannot_be_built_is_said(part, key, value, words):
    with pytest.raises(ValueError, match=words):
        blip2.build(CONFIG | {part: CONFIG[part] | {key: value}})


def test_stages_are_those_of_table_7():
    align, instruct = blip2.RECIPE.stages("full", False)
    assert set(align.learning_rates) == {"bridge"} and align.image_size == 224
    assert instruct.learning_rates == {"vision": 1e-5, "bridge": 1e-5}  # freeze_vit is False
    assert (instruct.warmup_steps, instruct.weight_decay, instruct.schedule, instruct.image_size) == (1000, 0.05, "cosine", 364)
    assert instruct.start_lr_factor * 1e-5 == pytest.approx(1e-8) and instruct.end_lr_factor == 0
    table = blip2.DECODINGS["table_7"]
    assert (table.num_beams, table.max_new_tokens, table.min_new_tokens) == (3, 50, 1)
