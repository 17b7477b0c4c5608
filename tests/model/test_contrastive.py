"""InfoNCE and SigLIP's loss against a double loop, what a text tower and a picture's features see."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanovlm.attention import full
from nanovlm.contrastive import BidirectionalTextTower, CLIP, ContrastiveModel, SigLIP, TextTower, info_nce, sigmoid_loss
from parity import close
from random_models import randomise, small_vit


def naive_info_nce(images, texts, scale, same):
    total = 0.0
    for rows, columns, right in ((images, texts, same), (texts, images, same.T)):
        for i in range(len(rows)):
            scores = [scale * float(rows[i] @ columns[j]) for j in range(len(columns))]
            partition = math.log(sum(math.exp(score) for score in scores))
            answers = [j for j in range(len(columns)) if right[i, j]]
            total += sum(partition - scores[j] for j in answers) / len(answers) / len(rows) / 2
    return total


def unit(*shape):
    return F.normalize(torch.randn(shape), dim=-1)


def same(*captions):
    return torch.tensor(captions)[:, None] == torch.tensor(captions)


@pytest.mark.parametrize("right", [
    same(0, 1, 2, 3), same(0, 0, 1, 2), same(3, 3, 3, 3),
    torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]]).bool(),  # a caption of two pictures, one of both
])  # fmt: skip
def test_info_nce_by_a_double_loop(right):
    images, texts = unit(4, 6), unit(4, 6)
    for scale in (1.0, 14.0):
        found = info_nce(scale * images @ texts.T, right)
        assert float(found) == pytest.approx(naive_info_nce(images, texts, scale, right), rel=1e-5)
        close(found, info_nce(scale * texts @ images.T, right.T))


def text_tower(**options):
    sizes = dict(vocab_size=20, width=12, num_layers=2, num_heads=3, mlp_width=18, context_length=8)
    return randomise(TextTower(**(sizes | options)))


def test_text_tower_reads_up_to_the_length_and_no_further():
    tower, ids = text_tower(), torch.randint(20, (3, 7))
    lengths = torch.tensor([7, 4, 1])
    together = tower(ids, lengths)
    assert together.shape == (3, 12)
    for b, length in enumerate(lengths.tolist()):
        alone = tower(ids[b : b + 1, :length], lengths[b : b + 1])
        close(together[b : b + 1], alone)
        for t in range(7):
            changed = ids.clone()
            changed[b, t] = (changed[b, t] + 1) % 20
            moved = (tower(changed, lengths) - together)[b].abs().max().item()
            assert moved > 1e-5 if t < length else moved == 0


def contrastive_model():
    return randomise(ContrastiveModel(small_vit(class_token=False), 12, text_tower(), 12, joint_width=7), spread=0.1)


def test_embeddings_and_views():
    model = contrastive_model()
    pixels, ids, lengths = torch.randn(3, 3, 12, 12), torch.randint(20, (3, 5)), torch.tensor([5, 2, 3])
    images, texts = model.embed_images(pixels), model.embed_texts(ids, lengths)
    assert images.shape == texts.shape == (3, 7)
    for b in range(3):
        projected = model.vision(pixels)[b] @ model.project_image.weight.T  # patches, channels
        expected = torch.stack([max(column) for column in projected.T])
        close(images[b], expected / expected.square().sum().sqrt())
    expected = model.text(ids, lengths) @ model.project_text.weight.T
    close(texts, expected / expected.square().sum(1, keepdim=True).sqrt())
    assert model.project_image.bias is None and model.project_text.bias is None
    model = clip()
    expected = model.vision(pixels)[:, 0] @ model.project_image.weight.T  # of the class token
    close(model.embed_images(pixels), F.normalize(expected, dim=-1))
    model = contrastive_model()
    patches = model.vision(pixels) @ model.project_image.weight.T  # 2 N E
    close(model.views(pixels), patches / patches.norm(dim=-1, keepdim=True))
    assert model.views(pixels).shape[1] > 1
    for model in (clip(), siglip()):
        close(model.views(pixels), model.embed_images(pixels)[:, None])


@torch.no_grad()
def test_loss_finds_equal_captions():
    model = contrastive_model()
    pixels = torch.randn(5, 3, 12, 12)
    ids = torch.tensor([[3, 4, 5, 0], [3, 4, 0, 0], [3, 4, 5, 0], [3, 4, 0, 0], [3, 4, 5, 6]])
    lengths = torch.tensor([3, 2, 3, 3, 4])  # rows 1 and 3: the same ids, but in row 3 the 0 is a word
    images, texts = model.embed_images(pixels), model.embed_texts(ids, lengths)
    expected = naive_info_nce(images, texts, float(model.log_scale.exp()), same(0, 1, 0, 2, 3))
    assert model.loss(pixels, ids, lengths).item() == pytest.approx(expected, rel=1e-4)


def test_looks_see_a_whole_picture_or_the_patch_at_a_place():
    model = contrastive_model()
    pixels = torch.randn(2, 3, 12, 12)
    patches = model.project_image(model.vision(pixels))  # 3 x 3 patches of 4 pixels
    looks = torch.tensor([[0, 0.34, 0.99], [0, -1, -1], [1, 0.0, 0.0], [1, 0.7, 0.4]])
    expected = torch.stack([patches[0, 7], patches[0].amax(0), patches[1, 0], patches[1, 5]])
    rows = model.embed_images(pixels, looks).detach()
    close(rows, F.normalize(expected, dim=-1))
    ids, lengths, right = torch.randint(20, (4, 5)), torch.tensor([5, 2, 3, 4]), torch.eye(4, dtype=torch.bool)
    expected = naive_info_nce(rows, model.embed_texts(ids, lengths), model.log_scale.exp().item(), right)
    assert model.loss(pixels, ids, lengths, right, looks).item() == pytest.approx(expected, rel=1e-4)


def test_start():
    tower = TextTower(vocab_size=200, width=64, num_layers=1, num_heads=2, mlp_width=8, context_length=40)
    assert tower.positions.shape == (40, 64) and 0.0095 < tower.positions.std() < 0.0105
    assert tower.embedding.weight.shape == (200, 64) and 0.0195 < tower.embedding.weight.std() < 0.0205
    fresh = ContrastiveModel(small_vit(class_token=False), 12, tower, 64, 7)
    assert float(fresh.log_scale.detach().exp()) == pytest.approx(1 / 0.07, rel=1e-5)
    fresh = SigLIP(small_vit(class_token=False), tower, 64)
    assert float(fresh.log_scale.detach().exp()) == pytest.approx(10.0) and float(fresh.bias.detach()) == -10.0


def clip():
    return randomise(CLIP(small_vit(), 12, text_tower(activation="quick_gelu", norm_eps=1e-5), 12, joint_width=7), 0.1)


def siglip(**options):
    text = BidirectionalTextTower(20, 10, num_layers=2, num_heads=2, mlp_width=18, context_length=8, pad_id=1)
    return randomise(SigLIP(small_vit(class_token=False, activation="gelu_tanh", **options), text, 10), spread=0.1)


@pytest.mark.parametrize("make", [contrastive_model, clip, siglip])
def test_two_parts(make):
    model = make()
    parts = model.parts()
    assert set(parts) == {"vision", "text_tower"}
    assert all(name.startswith("vision.") for name in parts["vision"]) and "log_scale" in parts["text_tower"]
    assert sum(map(len, parts.values())) == len(list(model.parameters()))


def test_only_clip_s_scale_is_clamped():
    images, texts = unit(2, 7), unit(3, 7)
    for model, expected in ((contrastive_model(), 100.0), (clip(), 100.0), (siglip(), 117.0)):
        model.log_scale.data.fill_(math.log(117.0))  # where SigLIP's published one stands
        found = model.similarity(images, texts) - getattr(model, "bias", 0.0)
        close(found, expected * images @ texts.T, atol=1e-4, rtol=1e-4)


def test_siglip_reads_its_whole_context_in_both_directions():
    tower = siglip().text
    ids, lengths = torch.randint(2, 20, (3, 6)), torch.tensor([6, 3, 1])
    found = tower(ids, lengths)
    for row, length in enumerate(lengths.tolist()):
        caption = ids[row, :length].tolist() + [1] * (8 - length)
        close(tower(torch.tensor([caption]), torch.tensor([8]))[0], found[row], atol=1e-6, rtol=1e-5)
        changed = ids.clone()
        changed[row, length:] = 13  # what stands behind a caption has no effect
        assert torch.equal(tower(changed, lengths), found)
    hidden = tower.encode(torch.tensor([[5, 1, 1, 1, 1, 1, 1, 1]]), full(8, 8))
    close(tower(torch.tensor([[5]]), torch.tensor([1])), tower.norm(hidden[:, 7]))
    for tower in (tower, text_tower()):
        with pytest.raises(ValueError, match="a caption of 9 tokens, but the text tower reads 8"):
            tower(torch.zeros(1, 9, dtype=torch.long), torch.tensor([9]))


def test_siglip_s_loss_by_a_double_loop():
    model, pixels = siglip(), torch.randn(4, 3, 12, 12)
    ids = torch.tensor([[3, 4, 5, 0], [3, 4, 0, 0], [3, 4, 5, 0], [3, 4, 0, 0]])
    lengths, captions = torch.tensor([3, 2, 3, 3]), [0, 1, 0, 2]
    logits = model.similarity(model.embed_images(pixels), model.embed_texts(ids, lengths)).tolist()
    total = 0.0
    for i in range(4):
        for j in range(4):
            sign = 1 if captions[i] == captions[j] else -1
            total += math.log1p(math.exp(-sign * logits[i][j])) / 4
    assert model.loss(pixels, ids, lengths).item() == pytest.approx(total, rel=1e-5)
    certain = torch.full((3, 3), -1e4).fill_diagonal_(1e4)
    assert sigmoid_loss(certain, torch.eye(3).bool()) == 0 and sigmoid_loss(certain, torch.ones(3, 3).bool()) > 1e4


@pytest.mark.parametrize("options, message", [
    (dict(feature_layer=1), "feature_layer=1"), (dict(post_norm=False), "post_norm=False"),
    (dict(drop_class_token=True), "drop_class_token=True"), (dict(class_token=False), "set class_token=True"),
])  # fmt: skip
def test_towers_meet_behind_the_last_norm(options, message):
    with pytest.raises(ValueError, match=message):
        CLIP(small_vit(**options), 12, text_tower(), 12, 7)
    if "class" not in message:
        with pytest.raises(ValueError, match=message):
            siglip(**options)


@pytest.mark.parametrize("make, width", [(clip, 7), (siglip, 12)])
def test_masks_are_made_where_the_ids_are(make, width):
    with torch.device("meta"):
        model = make()
    ids, lengths = torch.zeros(3, 5, dtype=torch.long, device="meta"), torch.ones(3, dtype=torch.long, device="meta")
    assert model.embed_texts(ids, lengths).shape == (3, width)
