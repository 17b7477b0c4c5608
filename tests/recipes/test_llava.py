"""LLaVA and LLaVA-1.5: equal to transformers in values, gradients and generated tokens; published layouts in and out."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovlm.recipes import llava
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.vlm import IMAGE_TOKEN
from nanovlm.published.weights import WeightsError, to_ours, to_published
from parity import CLOSE, perturb
from published_models import as_published, make_batch, real_logits, same_gradients, there_and_back

VOCABULARY, IMAGE, PAD = 330, 320, 321
CONFIG = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14,
        "image_size": 42,
    },
    "text_config": {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 6, "max_position_embeddings": 128, "rms_norm_eps": 1e-3,
    },
    "image_token_index": IMAGE,
}  # fmt: skip
LINEAR = CONFIG | {"mm_projector_type": "linear"}
DECODING = Decoding(max_new_tokens=12)


def ours(config, published=None):
    """Our model, random or with published weights."""
    torch.manual_seed(1)
    model = perturb(llava.build(config))
    if published is not None:
        model.load_state_dict(to_ours(llava.LAYOUT(config), published, model.state_dict()))
    return model


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=CONFIG["vision_config"] | {"model_type": "clip_vision_model"},
        text_config=CONFIG["text_config"] | {"model_type": "llama", "pad_token_id": PAD},
        image_token_index=IMAGE,
    )
    return perturb(transformers.LlavaForConditionalGeneration(config))


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    """What save_pretrained of transformers 5 writes: {name: tensor}."""
    folder = tmp_path_factory.mktemp("llava")
    theirs.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rows(seed=0):
    """One image, none, three of which the last two touch; odd lengths."""
    torch.manual_seed(seed)
    picture = torch.randn(1, 3, 42, 42)
    a, b, c, d = torch.randn(4, 1, 3, 42, 42)
    words = torch.randint(1, 79, (30,)).tolist()
    return [[1, *words[:4], a, *words[4:9]], [1, *words[9:20]], [1, b, *words[20:23], c, d, 5], [picture, 7]]


def run_theirs(theirs, batch):
    return theirs(**as_published(batch, IMAGE), pixel_values=batch.pixels).logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(theirs, saved, side):
    model = ours(CONFIG, saved)
    batch = make_batch(model, rows(), side, PAD)
    expected = run_theirs(theirs, batch)
    for row, found in enumerate(real_logits(model, batch)):
        torch.testing.assert_close(found, expected[row][batch.segments[row] >= 0], **CLOSE)


def test_image_tokens_are_those_of_the_second_to_last_layer_without_the_class_token(theirs, saved):
    model, pixels = ours(CONFIG, saved), torch.randn(2, 3, 42, 42)
    expected = theirs.model.get_image_features(pixels, vision_feature_layer=-2, vision_feature_select_strategy="default")
    found = model.encode(pixels, torch.ones(2, dtype=torch.long))
    assert model.num_image_tokens(42) == len(found[0]) == 9
    torch.testing.assert_close(torch.stack(found), torch.stack(list(expected.pooler_output)), **CLOSE)


@pytest.mark.parametrize("layer,features", [(-1, "full"), (1, "default"), (-3, "full")])
def test_another_layer_and_the_class_token(theirs, saved, layer, features):
    model = ours(CONFIG | {"vision_feature_layer": layer, "vision_feature_select_strategy": features}, saved)
    pixels = torch.randn(1, 3, 42, 42)
    expected = theirs.model.get_image_features(pixels, vision_feature_layer=layer, vision_feature_select_strategy=features)
    torch.testing.assert_close(model.encode(pixels, torch.ones(1, dtype=torch.long))[0], expected.pooler_output[0], **CLOSE)


def test_gradients(theirs, saved, tmp_path):
    """Of every parameter, and of the pixels."""
    model = ours(CONFIG, saved)
    batch = make_batch(model, rows(), "left", PAD)
    target = torch.randn(*batch.ids.shape, VOCABULARY) * (batch.segments >= 0)[..., None]
    gradients = []
    for run in (model, lambda batch: run_theirs(theirs, batch)):
        batch = dataclasses.replace(batch, pixels=batch.pixels.detach().clone().requires_grad_())
        (run(batch) * target).sum().backward()
        gradients.append(batch.pixels.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    behind_the_features = ("vision.blocks.2.", "vision.post_norm.")
    same_gradients(model, theirs, llava.LAYOUT(CONFIG), tmp_path, behind_the_features)


def test_greedy_generation(theirs, saved):
    model, given = ours(CONFIG, saved), rows()
    pictures = [[item for item in row if torch.is_tensor(item)] for row in given]
    prompts = [[id for item in row for id in ([IMAGE_TOKEN] * 9 if torch.is_tensor(item) else [item])] for row in given]
    batch = make_batch(model, given, "left", PAD)
    expected = theirs.generate(
        **as_published(batch, IMAGE), pixel_values=batch.pixels, max_new_tokens=12, do_sample=False, eos_token_id=None,
        pad_token_id=PAD,
    )  # fmt: skip
    found = generate(model, prompts, DECODING, pictures)
    assert found == expected[:, batch.ids.shape[1] :].tolist()
    assert len({tuple(answer) for answer in found}) > 1


def old_spelling(saved):
    """The names of llava-1.5-7b-hf."""
    return {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in saved.items()}


def original_spelling(saved):
    """The names of liuhaotian/llava-v1.5-7b."""
    original = {}
    for name, tensor in old_spelling(saved).items():
        name = name.replace("vision_tower.", "model.vision_tower.vision_tower.").removeprefix("language_model.")
        name = name.replace("multi_modal_projector.linear_1.", "model.mm_projector.0.")
        original[name.replace("multi_modal_projector.linear_2.", "model.mm_projector.2.")] = tensor
    return original


def test_every_spelling_loads(theirs, saved):
    """transformers 5 fresh, as published (4.x), in memory (4.57 and 5), the original's; with and without buffers."""
    assert "vision_tower.embeddings.class_embedding" in saved and "language_model.model.norm.weight" in saved
    memory = theirs.state_dict()
    assert "model.language_model.norm.weight" in memory
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in memory.items()}
    buffers = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    reference = ours(CONFIG, saved).state_dict()
    for spelled in (saved, old_spelling(saved), old_spelling(saved) | buffers, memory, older, original_spelling(saved)):
        found = to_ours(llava.LAYOUT(CONFIG), spelled, reference)
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[name], reference[name]) for name in reference)


def test_what_is_missing_or_strange_is_named(saved):
    model = ours(CONFIG)
    spoiled = dict(saved) | {"multi_modal_projector.linear_3.weight": torch.zeros(2)}
    del spoiled["multi_modal_projector.linear_2.bias"]
    with pytest.raises(WeightsError, match=r"(?s)linear_2\.bias.*linear_3\.weight"):
        to_ours(llava.LAYOUT(CONFIG), spoiled, model.state_dict())


def test_export_runs_in_transformers(theirs, tmp_path):
    model = ours(CONFIG)
    exported = to_published(llava.LAYOUT(CONFIG), model.state_dict())
    again = to_ours(llava.LAYOUT(CONFIG), exported, model.state_dict())
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    theirs.config.save_pretrained(tmp_path)
    save_file(exported, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other, loading = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    batch = make_batch(model, rows(), "left", PAD)
    expected = run_theirs(other.eval(), batch)
    for row, found in enumerate(real_logits(model, batch)):
        torch.testing.assert_close(found, expected[row][batch.segments[row] >= 0], **CLOSE)


def test_a_folder_of_transformers(theirs, saved, tmp_path):
    """Sharded in, converted to ours and back: bit-identical."""
    loaded, back = there_and_back(theirs, tmp_path)
    assert (loaded.image_size, loaded.image_fit) == (42, "pad")
    reference = ours(CONFIG, saved).state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in loaded.model.state_dict().items())
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in back.state_dict().items())


def test_linear_projector_is_written_as_the_original():
    model = ours(LINEAR)
    exported = to_published(llava.LAYOUT(LINEAR), model.state_dict())
    assert {"model.mm_projector.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"} <= exported.keys()
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight" in exported
    again = to_ours(llava.LAYOUT(LINEAR), exported, model.state_dict())
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    pixels = torch.randn(1, 3, 42, 42)
    features = model.vision(pixels)
    expected = features @ exported["model.mm_projector.weight"].T + exported["model.mm_projector.bias"]
    torch.testing.assert_close(model.encode(pixels, torch.ones(1, dtype=torch.long))[0], expected[0], **CLOSE)


def test_the_original_config_means_the_same():
    """Vicuna's config.json with mm_ added, as in liuhaotian/llava-v1.5-7b and llava-7b."""
    flat = CONFIG["text_config"] | {"mm_hidden_size": 1024, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
                                    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}  # fmt: skip
    with torch.device("meta"):
        new, old = llava.build(flat), llava.build(CONFIG["text_config"] | {"mm_hidden_size": 1024})
    assert new.vision.config.feature_layer == 23 and new.num_image_tokens(336) == 576
    assert hasattr(new.bridge, "linear_2") and not hasattr(old.bridge, "linear_2")
    assert old.vision.image_size == 224
    with pytest.raises(ValueError, match="mm_projector_type is 'conv'"):
        llava.build(flat | {"mm_projector_type": "conv"})


def test_what_cannot_be_built_is_said():
    with pytest.raises(ValueError, match="vision_feature_layer"):
        llava.build(CONFIG | {"vision_feature_layer": [-2, -5]})
    with pytest.raises(ValueError, match="projector_hidden_act"):
        llava.build(CONFIG | {"projector_hidden_act": "relu"})


def test_stages_are_those_of_table_6():
    align, instruct = llava.stages("linear", False)
    assert set(align.learning_rates) == {"bridge"}
    assert "vision" not in instruct.learning_rates and {"bridge", "language_model"} <= set(instruct.learning_rates)
    assert set(instruct.learning_rates.values()) == {2e-5}
    assert instruct.batch_size == 4 * 2 * 8
    assert (instruct.schedule, instruct.weight_decay, instruct.max_tokens) == ("cosine", 0, 2048)
    assert abs(instruct.warmup_steps / instruct.steps - 0.03) < 1e-3
    assert [stage.batch_size for stage in llava.stages("full", False)] == [256, 128]
