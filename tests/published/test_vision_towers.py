"""Published vision towers against transformers: features, image-text similarity, losses and gradients.

Every parameter is moved off its start; pictures are 20 pixels, 5 patches a side.
"""

import pytest
import torch

from nanovlm.contrastive import CLIP, TextTower
from nanovlm.contrastive import BidirectionalTextTower, SigLIP
from nanovlm.vit import ViT, ViTConfig
from parity import CLOSE, copy_weights, perturb, same_gradients

transformers = pytest.importorskip("transformers")

VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3, image_size=20, patch_size=4
)
TEXT = dict(
    hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2, vocab_size=30,
    max_position_embeddings=9, bos_token_id=0, eos_token_id=29,
)  # fmt: skip
SIZES = dict(image_size=20, patch_size=4, width=24, num_layers=4, num_heads=3, mlp_width=40)
CLIP_VIT = SIZES | dict(pre_norm=True, patch_bias=False, activation="quick_gelu", norm_eps=1e-5)
EVA = SIZES | dict(qkv_bias="qv")
SIGLIP_VIT = SIZES | dict(class_token=False, activation="gelu_tanh")

BLOCKS = [
    (r"embeddings\.class_embedding", "class_token"),
    (r"embeddings\.position_embedding(\.weight)?", "positions"),
    (r"embeddings\.patch_embedding\.", "patch_embedding."),
    (r"embeddings\.token_embedding\.", "embedding."),
    (r"pre_layrnorm\.", "pre_norm."),
    (r"post_layernorm\.", "post_norm."),
    (r"encoder\.layers\.", "blocks."),
    (r"layer_norm([12])\.", r"norm_\1."),
    (r"self_attn\.([qkv])_proj\.", r"attention.\1."),
    (r"self_attn\.qkv\.", "attention.{q,k,v}."),
    (r"self_attn\.(out_proj|projection)\.", "attention.o."),
    (r"mlp\.fc([12])\.", r"fc_\1."),
    (r"^vision_model\.", "vision."),
    (r"^text_model\.", "text."),
    (r"^text\.final_layer_norm\.", "text.norm."),
    (r"^visual_projection\.", "project_image."),
    (r"^text_projection\.", "project_text."),
    (r"^logit_scale", "log_scale"),
]
NO_KEY_BIAS = [(r"attention\.k\.bias$", None)]
SIGLIP_HEADS = [
    (r"^vision\.head\.attention\.in_proj_(weight|bias)", r"pool.{q,k,v}.\1"),
    (r"^vision\.head\.attention\.out_proj\.", "pool.o."),
    (r"^vision\.head\.layernorm\.", "pool.norm."),
    (r"^vision\.head\.", "pool."),
    (r"^text\.head\.", "project_text."),
    (r"^logit_bias", "bias"),
]


def backward(ours, theirs, pixels, same_pixels):
    """The same random weighted sum of both outputs, differentiated; the pictures' gradients agree."""
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(pixels.grad, same_pixels.grad, atol=1e-5, rtol=1e-4)


def pictures(image_size=20):
    pixels = torch.randn(2, 3, image_size, image_size)
    return pixels.clone().requires_grad_(), pixels.clone().requires_grad_()


def clip_vision():
    theirs = perturb(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    return theirs, BLOCKS


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("feature_layer", [1, 3, 4])
@pytest.mark.parametrize("drop_class_token", [True, False])
def test_clip_s_hidden_states(feature_layer, drop_class_token, backend):
    """LLaVA reads hidden_states[-2] without the class token; nothing behind is computed."""
    theirs, rules = clip_vision()
    ours = ViT(ViTConfig(**CLIP_VIT, feature_layer=feature_layer, drop_class_token=drop_class_token))
    copy_weights(ours, theirs, rules)
    ours.backend = backend
    pixels, same_pixels = pictures()
    expected = theirs(same_pixels, output_hidden_states=True).hidden_states[feature_layer]
    expected = expected[:, 1:] if drop_class_token else expected
    found = ours(pixels)
    assert found.shape[1] == ours.num_tokens(20) == 26 - drop_class_token
    torch.testing.assert_close(found, expected, **CLOSE)
    backward(found, expected, pixels, same_pixels)
    unused = [f"blocks.{i}." for i in range(feature_layer, 4)] + ["post_norm."]
    same_gradients(ours, theirs, rules, unused)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_clip_s_last_layer_and_norm(backend):
    """mPLUG-Owl2 reads the last layer behind the norm, class token kept (transformers leaves the norm to the pooled token)."""
    theirs, rules = clip_vision()
    ours = copy_weights(ViT(ViTConfig(**CLIP_VIT)), theirs, rules)
    ours.backend = backend
    pixels, same_pixels = pictures()
    post_norm = next(module for name, module in theirs.named_modules() if name.endswith("post_layernorm"))
    expected = post_norm(theirs(same_pixels).last_hidden_state)
    found = ours(pixels)
    assert found.shape == (2, ours.num_tokens(20), 24) == (2, 26, 24)
    torch.testing.assert_close(found, expected, **CLOSE)
    backward(found, expected, pixels, same_pixels)
    same_gradients(ours, theirs, rules)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_eva_of_blip2(backend):
    """Norm on all tokens, class token kept; the key bias that the fused vector has room for changes nothing."""
    theirs = perturb(transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**VISION)))
    rules = BLOCKS + NO_KEY_BIAS
    ours = copy_weights(ViT(ViTConfig(**EVA)), theirs, rules)
    ours.backend = backend
    pixels, same_pixels = pictures()
    found, expected = ours(pixels), theirs(same_pixels).last_hidden_state
    torch.testing.assert_close(found, expected, **CLOSE)
    backward(found, expected, pixels, same_pixels)
    same_gradients(ours, theirs, rules)


@pytest.mark.parametrize("image_size", [12, 28, 36])
@pytest.mark.parametrize("family", ["clip", "eva", "siglip"])
def test_another_resolution(family, image_size):
    """`resize` once equals what transformers interpolates in every call."""
    if family == "clip":
        (theirs, rules), options = clip_vision(), CLIP_VIT | dict(feature_layer=4)
    elif family == "eva":
        theirs = perturb(transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**VISION)))
        rules, options = BLOCKS + NO_KEY_BIAS, EVA
    else:
        theirs = perturb(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, vision_use_head=False)))
        rules, options = BLOCKS, SIGLIP_VIT
    ours = copy_weights(ViT(ViTConfig(**options)), theirs, rules)
    ours.resize(image_size)
    pixels = torch.randn(2, 3, image_size, image_size)
    expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert expected.shape[1] == ours.num_tokens(image_size) == (image_size // 4) ** 2 + (family != "siglip")
    torch.testing.assert_close(ours(pixels), expected, **CLOSE)


def captions():
    """int[3, 7] closed by 29, and padded with it as CLIP's are; lengths 7, 4 and 2."""
    ids = torch.randint(1, 28, (3, 7))
    ids[0, 6], ids[1, 3:], ids[2, 1:] = 29, 29, 29
    return ids, (ids == 29).int().argmax(1) + 1


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_clip(num_layers):
    text = TEXT | dict(num_hidden_layers=num_layers, pad_token_id=29)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=10))
    rules = BLOCKS
    perturb(theirs)
    tower = TextTower(30, 16, num_layers, 2, 28, 9, activation="quick_gelu", norm_eps=1e-5)
    ours = copy_weights(CLIP(ViT(ViTConfig(**CLIP_VIT)), 24, tower, 16, joint_width=10), theirs, rules)
    ids, lengths = captions()
    assert lengths.tolist() == [7, 4, 2]
    pixels = torch.randn(3, 3, 20, 20, requires_grad=True)
    same_pixels = pixels.detach().clone().requires_grad_()
    expected = theirs(input_ids=ids, pixel_values=same_pixels, return_loss=True)
    images, texts = ours.embed_images(pixels), ours.embed_texts(ids, lengths)
    torch.testing.assert_close(images, expected.image_embeds, **CLOSE)
    torch.testing.assert_close(texts, expected.text_embeds, **CLOSE)
    torch.testing.assert_close(ours.similarity(images, texts), expected.logits_per_image, **CLOSE)
    loss = ours.loss(pixels, ids, lengths)
    torch.testing.assert_close(loss, expected.loss, **CLOSE)
    loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(pixels.grad, same_pixels.grad, **CLOSE)
    same_gradients(ours, theirs, rules)


def test_siglip():
    text = TEXT | dict(projection_size=24, pad_token_id=1)
    theirs = perturb(transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=text)))
    rules = BLOCKS + SIGLIP_HEADS
    tower = BidirectionalTextTower(30, 16, 2, 2, 28, context_length=9, pad_id=1)
    ours = copy_weights(SigLIP(ViT(ViTConfig(**SIGLIP_VIT)), tower, 16), theirs, rules)
    ids, lengths = captions()
    padded = torch.ones(3, 9, dtype=torch.long)  # as the published tokenizer writes them
    for row, length in enumerate(lengths):
        padded[row, :length] = ids[row, :length]
    pixels = torch.randn(3, 3, 20, 20, requires_grad=True)
    same_pixels = pixels.detach().clone().requires_grad_()
    expected = theirs(input_ids=padded, pixel_values=same_pixels, return_loss=True)
    images, texts = ours.embed_images(pixels), ours.embed_texts(ids, lengths)
    torch.testing.assert_close(images, expected.image_embeds, **CLOSE)
    torch.testing.assert_close(texts, expected.text_embeds, **CLOSE)
    torch.testing.assert_close(ours.similarity(images, texts), expected.logits_per_image, **CLOSE)
    loss = ours.loss(pixels, ids, lengths)
    torch.testing.assert_close(loss, expected.loss, **CLOSE)
    loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(pixels.grad, same_pixels.grad, **CLOSE)
    same_gradients(ours, theirs, rules)


def test_siglip_features_for_a_bridge():
    """Without the head: every patch behind the last norm."""
    theirs = perturb(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)))
    rules = [*BLOCKS, (r"^head\.", None)]
    ours = copy_weights(ViT(ViTConfig(**SIGLIP_VIT)), theirs, rules)
    pixels, same_pixels = pictures()
    found, expected = ours(pixels), theirs(same_pixels).last_hidden_state
    assert found.shape == (2, 25, 24)
    torch.testing.assert_close(found, expected, **CLOSE)
    backward(found, expected, pixels, same_pixels)
    same_gradients(ours, theirs, rules)
