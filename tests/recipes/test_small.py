"""small: SigLIP, pixel shuffle and SmolLM2 put together by hand from transformers' halves give the same scores."""

import pytest
import torch
from safetensors.torch import load_file

from nanovlm.recipes import small
from nanovlm.published.weights import to_ours, to_published
from parity import CLOSE, perturb
from published_models import make_batch, real_logits

CONFIG = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
        "image_size": 48,
    },
    "text_config": {
        "vocab_size": 89, "hidden_size": 36, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "merge": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def halves():
    """SigLIP's vision tower and a LLaMA, of transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = dict(CONFIG["text_config"])
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**CONFIG["vision_config"]))
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, rope_parameters=rope))
    return perturb(tower), perturb(language)


@pytest.fixture(scope="module")
def model(halves, tmp_path_factory):
    """Ours, from the two files that transformers writes; the bridge is random."""
    torch.manual_seed(1)
    model = perturb(small.build(CONFIG))
    published = to_published(small.LAYOUT(CONFIG), model.state_dict())
    for half, prefix in zip(halves, ("vision_tower.", "language_model.")):
        folder = tmp_path_factory.mktemp("half")
        half.save_pretrained(folder)
        for name, tensor in load_file(folder / "model.safetensors").items():
            name = prefix + ("" if name.startswith(("vision_model.", "model.")) else "vision_model.") + name
            if ".head." not in name:  # attention pooling, which serves SigLIP's own loss
                assert name in published, name
                published[name] = tensor
    model.load_state_dict(to_ours(small.LAYOUT(CONFIG), published, model.state_dict()))
    return model


def test_put_together_by_hand(halves, model):
    tower, language = halves
    torch.manual_seed(2)
    pictures = torch.randn(2, 3, 48, 48)
    ids = [7, 3, 55, 21, 9]
    found = real_logits(model, make_batch(model, [[pictures[:1], *ids], [4, pictures[1:], *ids]]))
    features = tower(pictures).last_hidden_state  # 2 36 32
    first, second = model.bridge.mlp.linear, model.bridge.mlp.linear_2
    for picture, (before, scores) in enumerate(zip(([], [4]), found)):
        tokens = []
        for top in (0, 3):
            for left in (0, 3):  # a square of 3 x 3 of the 6 x 6 patches, row by row
                square = [features[picture, 6 * (top + y) + left + x] for y in range(3) for x in range(3)]
                hidden = torch.nn.functional.gelu(torch.cat(square) @ first.weight.T + first.bias)
                tokens.append(hidden @ second.weight.T + second.bias)
        words = language.get_input_embeddings()
        row = torch.cat([words(torch.tensor(before, dtype=torch.long)), torch.stack(tokens), words(torch.tensor(ids))])
        torch.testing.assert_close(scores, language(inputs_embeds=row[None]).logits[0], **CLOSE)


@pytest.mark.parametrize("size,tokens", [("full", 64), ("full_224", 49)])
def test_full_sizes(size, tokens):
    """SmolLM2-135M has 134,515,008 parameters; the docstring's 228 million fit 16 bytes each beside activations."""
    with torch.device("meta"):
        model = small.build(small.CONFIGS[size])
    total = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.decoder.parameters()) == 134_515_008
    assert model.num_image_tokens(model.vision.image_size) == tokens
    assert 16 * total < 4 * 2**30 and round(total / 1e6) == {"full": 228, "full_224": 222}[size]
    assert {stage.image_size for stage in small.stages(size, False)} == {model.vision.image_size}


def test_squares_that_do_not_divide_the_picture():
    with pytest.raises(ValueError, match="36 patches"):
        small.build(CONFIG | {"merge": 4})
