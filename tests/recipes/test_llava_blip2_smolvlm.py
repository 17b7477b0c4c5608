"""LLaVA, BLIP-2 and SmolVLM: equal to transformers in values, gradients and generated tokens; layouts in and out."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from nanovlm.generation.sampler import Decoding, generate
from nanovlm.published.weights import to_ours, to_published
from nanovlm.recipes import RECIPES, blip2, find, llava, smolvlm
from parity import CLOSE, perturb
from published_models import as_published, make_batch, real_logits, same_gradients, there_and_back

VOCABULARY, IMAGE, PAD = 330, 320, 1
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14,
          "image_size": 42}  # fmt: skip
LLAVA = {
    "vision_config": VISION | {"model_type": "clip_vision_model"},
    "text_config": {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 128, "rms_norm_eps": 1e-3,
        "model_type": "llama", "pad_token_id": PAD,
    },
    "image_token_index": IMAGE,
}  # fmt: skip
LINEAR = LLAVA | {"mm_projector_type": "linear"}
BLIP2 = {
    "vision_config": VISION | {"num_hidden_layers": 2},
    "qformer_config": {
        "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 3,
        "encoder_hidden_size": 32, "vocab_size": 20, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "text_config": {
        "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 36, "ffn_dim": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "word_embed_proj_dim": 36, "max_position_embeddings": 64, "pad_token_id": PAD,
        "dropout": 0.0, "bos_token_id": 2, "eos_token_id": 2,
    },
    "num_query_tokens": 5,
    "image_token_index": IMAGE,
}  # fmt: skip
SMOLVLM = {
    "vision_config": VISION | {"patch_size": 8, "image_size": 48},
    "text_config": LLAVA["text_config"] | {
        "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "image_token_id": IMAGE, "scale_factor": 3,
}  # fmt: skip
FAMILIES = {"Llava": (llava, LLAVA), "Blip2": (blip2, BLIP2), "Idefics3": (smolvlm, SMOLVLM), "SmolVLM": (smolvlm, SMOLVLM)}


def ours(recipe, config, published=None):
    """Our model, random or with published weights."""
    torch.manual_seed(1)
    model = perturb(recipe.build(config))
    if published is not None:
        model.load_state_dict(to_ours(recipe.LAYOUT(config), published, model.state_dict()))
    return model


def make_pair(name, folder):
    """A recipe with transformers' model, how it reads one of our batches, what its save_pretrained writes, and ours."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    recipe, config = FAMILIES[name]
    theirs = perturb(getattr(transformers, f"{name}ForConditionalGeneration")(getattr(transformers, f"{name}Config")(**config)))
    for place, parameter in theirs.named_parameters():
        if place.endswith("qkv.bias"):
            parameter.data[32:64] = 0  # as published: the keys of EVA have no bias
    theirs.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")

    def inputs(batch):
        pixels = batch.pixels
        if recipe is smolvlm:  # by rows; the others' tiles are zeros
            frames = batch.frames.new_zeros(len(batch.ids)).index_add(0, batch.owner, batch.frames)
            pixels = pad_sequence(pixels.split(frames.tolist()), True)
        return as_published(batch, IMAGE) | {"pixel_values": pixels}

    return SimpleNamespace(theirs=theirs, saved=saved, inputs=inputs, recipe=recipe, config=config,
                           ours=lambda: ours(recipe, config, saved))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def for_llava(tmp_path_factory):
    return make_pair("Llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def for_blip2(tmp_path_factory):
    return make_pair("Blip2", tmp_path_factory.mktemp("blip2"))


def rows(recipe, size=None):
    """One image, none, three of which the last two touch, one in front; odd lengths. SmolVLM's are of one to five tiles."""
    torch.manual_seed(0)
    counts, size = ((1, 5, 3, 1, 1), 48) if recipe is smolvlm else ((1,) * 5, size or 42)
    a, b, c, d, e = (torch.randn(n, 3, size, size) for n in counts)
    words = torch.randint(4, 79, (30,)).tolist()
    return [[2, *words[:4], a, *words[4:9]], [2, *words[9:20]], [2, b, *words[20:23], c, d, 5], [e, 7]]


def compare(pair, model, batch, **options):
    expected = pair.theirs(**pair.inputs(batch), **options).logits
    for row, found in enumerate(real_logits(model, batch)):
        torch.testing.assert_close(found, expected[row][batch.segments[row] >= 0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(pair, side):
    model = pair.ours()
    compare(pair, model, make_batch(model, rows(pair.recipe), side, PAD))


def test_vision_features_and_image_tokens_of_blip2_also_of_larger_pictures(for_blip2):
    model, pixels = for_blip2.ours(), torch.randn(2, 3, 42, 42)
    expected = for_blip2.theirs.get_image_features(pixels)
    torch.testing.assert_close(model.vision(pixels), expected.last_hidden_state, **CLOSE)
    found = torch.stack(model.encode(pixels, torch.ones(2, dtype=torch.long)))
    torch.testing.assert_close(found, expected.pooler_output, **CLOSE)
    model.vision.resize(70)
    compare(for_blip2, model, make_batch(model, rows(blip2, 70), "left", PAD), interpolate_pos_encoding=True)


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_vision_features_and_image_tokens_of_smolvlm(name, tmp_path):
    pair = make_pair(name, tmp_path)
    model, pixels = pair.ours(), torch.randn(4, 3, 48, 48)
    features = pair.theirs.model.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(model.vision(pixels), features, **CLOSE)
    found = torch.cat(model.encode(pixels, torch.tensor([1, 3])))
    torch.testing.assert_close(found, pair.theirs.model.connector(features).flatten(0, 1), **CLOSE)


@pytest.mark.parametrize("layer,features", [(-2, "default"), (-1, "full"), (1, "default"), (-3, "full")])
def test_image_tokens_of_llava_from_any_layer_with_and_without_the_class_token(for_llava, layer, features):
    options = {"vision_feature_layer": layer, "vision_feature_select_strategy": features}
    model, pixels = ours(llava, LLAVA | options, for_llava.saved), torch.randn(2, 3, 42, 42)
    expected = for_llava.theirs.model.get_image_features(pixels, **options)
    found = model.encode(pixels, torch.ones(2, dtype=torch.long))
    assert model.num_image_tokens(42) == len(found[0]) == 9 + (features == "full")
    torch.testing.assert_close(torch.stack(found), torch.stack(list(expected.pooler_output)), **CLOSE)


def test_loss_and_gradients(pair, tmp_path):
    """Of every parameter, and of the pixels. Their loss is a mean; image tokens are not trained."""
    model = pair.ours()
    batch, gradients = make_batch(model, rows(pair.recipe), "right", PAD), []
    for run in (lambda batch: torch.div(*model.loss(batch)), lambda batch: pair.theirs(**pair.inputs(batch), labels=batch.labels).loss):
        batch = dataclasses.replace(batch, pixels=batch.pixels.detach().clone().requires_grad_())
        loss = run(batch)
        loss.backward()
        gradients.append((loss, batch.pixels.grad))
    torch.testing.assert_close(*gradients, **CLOSE)
    behind_the_features = ("vision.blocks.2.", "vision.post_norm.") if pair.recipe is llava else ()
    same_gradients(model, pair.theirs, pair.recipe.LAYOUT(pair.config), tmp_path, behind_the_features)


def test_greedy_generation(pair):
    """transformers' BLIP-2 wants one picture a row."""
    model, given = pair.ours(), rows(pair.recipe)[:: 3 if pair.recipe is blip2 else 1]
    pictures = [[item for item in row if torch.is_tensor(item)] for row in given]
    batch = make_batch(model, given, "left", PAD)
    prompts = [ids[segments >= 0].tolist() for ids, segments in zip(batch.ids, batch.segments)]
    expected = pair.theirs.generate(**pair.inputs(batch), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    found = generate(model, prompts, Decoding(max_new_tokens=12), pictures)
    assert found == expected[:, -12:].tolist() and len({tuple(answer) for answer in found}) > 1


def test_a_folder_of_transformers(pair, tmp_path):
    """Sharded in, converted to ours and back: bit-identical."""
    loaded, back = there_and_back(pair.theirs, tmp_path)
    shown = {llava: (42, "pad", None), blip2: (42, "stretch", None), smolvlm: (48, "stretch", 4)}[pair.recipe]
    assert (loaded.image_size, loaded.image_fit, loaded.tiles) == shown
    reference = pair.ours().state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in loaded.model.state_dict().items())
    assert all(torch.equal(tensor, pair.theirs.state_dict()[name]) for name, tensor in back.state_dict().items())


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


def test_every_spelling_of_llava_loads(for_llava):
    """transformers 5 fresh, as published (4.x), in memory (4.57 and 5), the original's; with and without buffers."""
    saved, memory = for_llava.saved, for_llava.theirs.state_dict()
    assert "vision_tower.embeddings.class_embedding" in saved and "language_model.model.norm.weight" in saved
    assert "model.language_model.norm.weight" in memory
    buffers = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    reference = for_llava.ours().state_dict()
    for spelled in (saved, old_spelling(saved), old_spelling(saved) | buffers, memory, old_spelling(memory),
                    original_spelling(saved)):
        found = to_ours(llava.LAYOUT(LLAVA), spelled, reference)
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[name], reference[name]) for name in reference)


def test_linear_projector_is_written_as_the_original():
    model = ours(llava, LINEAR)
    exported = to_published(llava.LAYOUT(LINEAR), model.state_dict())
    assert {"model.mm_projector.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"} <= exported.keys()
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight" in exported
    again = to_ours(llava.LAYOUT(LINEAR), exported, model.state_dict())
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    pixels = torch.randn(1, 3, 42, 42)
    expected = model.vision(pixels) @ exported["model.mm_projector.weight"].T + exported["model.mm_projector.bias"]
    torch.testing.assert_close(model.encode(pixels, torch.ones(1, dtype=torch.long))[0], expected[0], **CLOSE)


def test_the_original_config_means_the_same():
    """Vicuna's config.json with mm_ added, as in liuhaotian/llava-v1.5-7b and llava-7b."""
    flat = LLAVA["text_config"] | {"mm_hidden_size": 1024, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
                                   "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}  # fmt: skip
    with torch.device("meta"):
        new, old = llava.build(flat), llava.build(LLAVA["text_config"] | {"mm_hidden_size": 1024})
    assert new.vision.config.feature_layer == 23 and new.num_image_tokens(336) == 576
    assert hasattr(new.bridge, "linear_2") and not hasattr(old.bridge, "linear_2")
    assert old.vision.image_size == 224


def test_full_sizes_and_the_former_name():
    """364 pixels change the position table alone; 17 squares of 64 tokens are 4 x 4 tiles; totals: test_recipe_table.py."""
    with torch.device("meta"):
        model, larger = blip2.build(blip2.CONFIGS["full"]), blip2.build(blip2.CONFIGS["full_364"])
    assert model.vision.positions.shape == (257, 1408) and larger.vision.positions.shape == (26 * 26 + 1, 1408)
    assert model.num_image_tokens(224) == larger.num_image_tokens(364) == 32
    assert [layer.cross_attention is not None for layer in model.bridge.layers] == [True, False] * 6
    with torch.device("meta"):
        model = smolvlm.build(smolvlm.CONFIGS["256M"])
    assert model.num_image_tokens(512) == 64 and model.num_image_tokens(512, 17) == 1088
    assert model.decoder.config.rope_base == 1e5 and model.decoder.config.norm_eps == 1e-5
    assert find("small") is RECIPES["small"] is RECIPES["smolvlm"] and "small" not in list(RECIPES)


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


@pytest.mark.parametrize(("recipe", "change", "words"), [
    (llava, {"mm_projector_type": "conv"}, "mm_projector_type is 'conv'"),
    (llava, {"vision_feature_layer": [-2, -5]}, "one layer"),
    (llava, {"projector_hidden_act": "relu"}, "projector_hidden_act"),
    (blip2, {"text_config": {"model_type": "t5"}}, "model_type is 't5'"),
    (blip2, {"qformer_config": {"layer_norm_eps": 1e-5}}, "layer_norm_eps is 1e-05"),
    (blip2, {"qformer_config": {"use_qformer_text_input": True}}, "use_qformer_text_input"),
    (blip2, {"vision_config": {"qkv_bias": False}}, "qkv_bias"),
    (smolvlm, SMOLVLM | {"scale_factor": 4}, "36 patches"),
])  # fmt: skip
def test_what_cannot_be_built_is_said(recipe, change, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        recipe.build({"text_config": {}} | change)


def test_stages_are_those_of_tables_6_and_7():
    align, instruct = llava.stages("linear", False)
    assert set(align.learning_rates) == {"bridge"}
    assert "vision" not in instruct.learning_rates and {"bridge", "language_model"} <= set(instruct.learning_rates)
    assert set(instruct.learning_rates.values()) == {2e-5}
    assert instruct.batch_size == 4 * 2 * 8
    assert (instruct.schedule, instruct.weight_decay, instruct.max_tokens) == ("cosine", 0, 2048)
    assert abs(instruct.warmup_steps / instruct.steps - 0.03) < 1e-3
    assert [stage.batch_size for stage in llava.stages("full", False)] == [256, 128]
    align, instruct = blip2.RECIPE.stages("full", False)
    assert set(align.learning_rates) == {"bridge"} and align.image_size == 224
    assert instruct.learning_rates == {"vision": 1e-5, "bridge": 1e-5}  # freeze_vit is False
    assert (instruct.warmup_steps, instruct.weight_decay, instruct.schedule, instruct.image_size) == (1000, 0.05, "cosine", 364)
    assert instruct.start_lr_factor * 1e-5 == pytest.approx(1e-8) and instruct.end_lr_factor == 0
    table = blip2.DECODINGS["table_7"]
    assert (table.num_beams, table.max_new_tokens, table.min_new_tokens) == (3, 50, 1)
