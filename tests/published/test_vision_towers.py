"""Published vision towers against transformers: features, image-text similarity, losses and gradients.

Every parameter is moved off its start; pictures are 20 pixels, 5 patches a side.
"""

import pytest
import torch

from nanovlm import contrastive
from nanovlm.contrastive import BidirectionalTextTower, TextTower
from nanovlm.published.vision import CLIP, CLIP_PAIR, EVA, OTHER_SIDE, SIGLIP, SIGLIP_PAIR
from nanovlm.published.weights import to_ours
from nanovlm.vit import ViT, ViTConfig
from parity import CLOSE, perturb
from published_models import same_gradients

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
EVA_VIT = SIZES | dict(qkv_bias="qv")
SIGLIP_VIT = SIZES | dict(class_token=False, activation="gelu_tanh")

FAMILIES = {  # their class, the options of ours, the table
    "CLIP": (CLIP_VIT, CLIP), "Blip2": (EVA_VIT, EVA), "Siglip": (SIGLIP_VIT, (*SIGLIP, *OTHER_SIDE)),
}  # fmt: skip


def copy(ours, theirs, table):
    """Ours with their weights; a name that is left over on either side raises."""
    ours.load_state_dict(to_ours(table, {name: p.detach() for name, p in theirs.named_parameters()}, ours.state_dict()))
    return ours.eval()


def towers(family, **options):
    """A tower of transformers, ours with its weights, and the table."""
    sizes, table = FAMILIES[family]
    config = getattr(transformers, f"{family}VisionConfig")(**VISION)
    theirs = perturb(getattr(transformers, f"{family}VisionModel")(config))
    return theirs, copy(ViT(ViTConfig(**sizes | options)), theirs, table), table


def same_outputs(found, expected, pixels, same_pixels):
    """Values, and the pictures' gradients of a random weighted sum; the parameters have theirs afterwards."""
    torch.testing.assert_close(found, expected, **CLOSE)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(pixels.grad, same_pixels.grad, atol=1e-5, rtol=1e-4)


def pictures(image_size=20):
    pixels = torch.randn(2, 3, image_size, image_size)
    return pixels.clone().requires_grad_(), pixels.clone().requires_grad_()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("feature_layer", [1, 3, 4])
@pytest.mark.parametrize("drop_class_token", [True, False])
def test_clip_s_hidden_states(feature_layer, drop_class_token, backend):
    """LLaVA reads hidden_states[-2] without the class token; nothing behind is computed."""
    theirs, ours, table = towers("CLIP", feature_layer=feature_layer, drop_class_token=drop_class_token)
    ours.backend = backend
    pixels, same_pixels = pictures()
    expected = theirs(same_pixels, output_hidden_states=True).hidden_states[feature_layer][:, int(drop_class_token) :]
    found = ours(pixels)
    assert found.shape[1] == ours.num_tokens(20) == 26 - drop_class_token
    same_outputs(found, expected, pixels, same_pixels)
    unused = [f"blocks.{i}." for i in range(feature_layer, 4)] + ["post_norm."]
    same_gradients(ours, theirs, table, unused=unused)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_behind_the_norm(family, backend):
    """As mPLUG-Owl2 reads CLIP (transformers leaves the norm to the pooled token), BLIP-2 EVA, whose fused vector has room
    for a key bias that changes nothing, and a bridge SigLIP: every patch, without the head."""
    theirs, ours, table = towers(family)
    ours.backend = backend
    pixels, same_pixels = pictures()
    expected = theirs(same_pixels).last_hidden_state
    if family == "CLIP":
        expected = next(module for name, module in theirs.named_modules() if name.endswith("post_layernorm"))(expected)
    found = ours(pixels)
    assert found.shape == (2, ours.num_tokens(20), 24) == (2, 25 + (family != "Siglip"), 24)
    same_outputs(found, expected, pixels, same_pixels)
    same_gradients(ours, theirs, table)


@pytest.mark.parametrize("image_size", [12, 28, 36])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_resolution(family, image_size):
    """`resize` once equals what transformers interpolates in every call."""
    theirs, ours, _ = towers(family, **{"feature_layer": 4} if family == "CLIP" else {})
    ours.resize(image_size)
    pixels = torch.randn(2, 3, image_size, image_size)
    theirs.use_head = False
    expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert expected.shape[1] == ours.num_tokens(image_size) == (image_size // 4) ** 2 + (family != "Siglip")
    torch.testing.assert_close(ours(pixels), expected, **CLOSE)


def captions():
    """int[3, 7] closed by 29, and padded with it as CLIP's are; lengths 7, 4 and 2."""
    ids = torch.randint(1, 28, (3, 7))
    ids[0, 6], ids[1, 3:], ids[2, 1:] = 29, 29, 29
    return ids, (ids == 29).int().argmax(1) + 1


@pytest.mark.parametrize(("name", "num_layers"), [("CLIP", 1), ("CLIP", 2), ("CLIP", 5), ("Siglip", 2)])
def test_pairs(name, num_layers):
    ids, lengths = captions()
    assert lengths.tolist() == [7, 4, 2]
    text, their_ids = TEXT | dict(num_hidden_layers=num_layers), ids
    if name == "CLIP":
        text |= dict(pad_token_id=29)
        tower = TextTower(30, 16, num_layers, 2, 28, 9, activation="quick_gelu", norm_eps=1e-5)
        ours, table = contrastive.CLIP(ViT(ViTConfig(**CLIP_VIT)), 24, tower, 16, joint_width=10), CLIP_PAIR
    else:
        text |= dict(projection_size=24, pad_token_id=1)
        tower = BidirectionalTextTower(30, 16, num_layers, 2, 28, context_length=9, pad_id=1)
        ours, table = contrastive.SigLIP(ViT(ViTConfig(**SIGLIP_VIT)), tower, 16), SIGLIP_PAIR
        columns = torch.arange(9)
        their_ids = torch.where(columns < lengths[:, None], ids[:, columns.clamp(max=6)], 1)  # as its tokenizer pads
    config = getattr(transformers, f"{name}Config")(vision_config=VISION, text_config=text, projection_dim=10)
    theirs = perturb(getattr(transformers, f"{name}Model")(config))
    copy(ours, theirs, table)
    pixels = torch.randn(3, 3, 20, 20, requires_grad=True)
    same_pixels = pixels.detach().clone().requires_grad_()
    expected = theirs(input_ids=their_ids, pixel_values=same_pixels, return_loss=True)
    images, texts = ours.embed_images(pixels), ours.embed_texts(ids, lengths)
    torch.testing.assert_close(images, expected.image_embeds, **CLOSE)
    torch.testing.assert_close(texts, expected.text_embeds, **CLOSE)
    torch.testing.assert_close(ours.similarity(images, texts), expected.logits_per_image, **CLOSE)
    loss = ours.loss(pixels, ids, lengths)
    torch.testing.assert_close(loss, expected.loss, **CLOSE)
    loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(pixels.grad, same_pixels.grad, **CLOSE)
    same_gradients(ours, theirs, table)
