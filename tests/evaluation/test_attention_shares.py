"""Attention on picture and words, layer by layer: `python -m nanovlm.evaluation attention`."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from random_models import small_vlm
from tiny import random_vlm

from nanovlm.data.images import CLIP
from nanovlm.data.templates import NANO, Row
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.evaluation import attention_maps
from nanovlm.evaluation.attention_maps import answer_attention
from nanovlm.evaluation.attention_maps import Looks, look
from nanovlm.generation.sampler import Decoding
from nanovlm.vlm import Batch


@pytest.fixture(scope="module")
def loaded():
    tokenizer = train_tokenizer(["user: what color is this? yes no\nbot: red blue"] * 3, 300)
    return SimpleNamespace(
        model=random_vlm(tokenizer.vocab_size, context_length=200), tokenizer=tokenizer, template=NANO, image_size=8,
        image_fit="crop", decodings={"default": Decoding(max_new_tokens=5, min_new_tokens=3)}, preprocessing=CLIP,
    )  # fmt: skip


def test_shares_of_a_map_by_hand():
    maps = torch.tensor([[[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]]])  # one layer, two answer tokens, four tokens
    looks = Looks("m", "a b", ["a", "b"], maps, torch.tensor([False, True, False, False]), num_prompt=3)
    shares = {name: share.item() for name, share in looks.shares().items()}
    assert shares == pytest.approx({"picture": 0.225, "prompt": 0.575, "answer": 0.2})
    assert looks.even() == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_every_token_of_the_answer_shares_out_all_of_its_attention(loaded):
    looks = look("m", loaded, "what color is this?", [Image.new("RGB", (8, 8), "red")])
    assert len(looks.maps) == 2 and 3 <= len(looks.words) <= 5 and int(looks.is_image.sum()) == 4
    torch.testing.assert_close(looks.maps.sum(-1), torch.ones(2, len(looks.words)))
    torch.testing.assert_close(sum(looks.shares().values()), torch.ones(2))
    ahead = torch.arange(looks.maps.shape[-1]) >= looks.num_prompt + torch.arange(len(looks.words))[:, None]
    assert not looks.maps[:, ahead].any()  # nothing looks at what comes after it


def test_attention_is_that_of_the_model_itself_also_without_a_picture():
    model, pixels = small_vlm("projector"), torch.randn(1, 3, 12, 12)
    n = model.num_image_tokens(12)
    for row, shown in ((Row([4, *[-1] * n, 5], [(0, 1, 1 + n)]), [pixels]), (Row([4, 6, 5], []), [])):
        ids, out = torch.tensor([row.ids + [9, 3]]), {}
        none = torch.zeros(0).long()
        batch = Batch(
            ids=ids, labels=ids, segments=torch.zeros_like(ids), positions=torch.arange(ids.shape[1])[None],
            pixels=pixels if shown else None, frames=torch.ones(len(shown)).long(), shown=none if not shown else torch.zeros(1).long(),
            owner=torch.zeros(len(shown)).long(),
        )  # fmt: skip
        with torch.no_grad():
            model.hidden(batch, out)
        expected = torch.stack(out["attention"])[:, 0, :, len(row.ids) - 1 : -1, :-1]
        torch.testing.assert_close(answer_attention(model, row, [9, 3], shown), expected)


def test_image_tokens_as_words_meet_the_texts_own_norms_and_keys(loaded):
    model, pixels = loaded.model, torch.randn(1, 3, 8, 8)
    row = Row([4, -1, -1, -1, -1, 5], [(0, 1, 5)])
    as_written, as_text = (answer_attention(model, row, [7, 8], [pixels], as_text=flag) for flag in (False, True))
    assert not torch.allclose(as_written, as_text, atol=1e-3)
    one = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if ".text." in name:
            tensor.copy_(torch.full_like(tensor, 0.5) if tensor.ndim == 1 else tensor * 2)
            model.state_dict()[name.replace(".text.", ".vision.")].copy_(tensor)
    both = [answer_attention(model, row, [7, 8], [pixels], as_text=flag) for flag in (False, True)]
    torch.testing.assert_close(*both)  # with equal copies the switch changes nothing
    model.load_state_dict(one)


def test_the_command_line(loaded, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(attention_maps.recipes, "load", lambda folder, device: loaded)
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "a.png")
    arguments = ["one/model", "other/model", "--ask", "what?", "--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "o.png")]
    assert attention_maps.main([*arguments, "--as-text"]) == 0
    told = capsys.readouterr().out
    assert told.count("evenly") == 4 and told.count("image tokens as words") == 2
    with Image.open(tmp_path / "o.png") as drawn:
        assert drawn.size[0] == 1200
    assert attention_maps.main([*arguments[:-2], "--image", "nowhere.png"]) == 2 and "nowhere.png" in capsys.readouterr().err
    for wrong, words in ((["m", "--ask", "q"], "--image or --draw"), ([*arguments, "--as-txt"], "Did you mean '--as-text'")):
        with pytest.raises(SystemExit):
            attention_maps.main(wrong)
        assert words in capsys.readouterr().err


def test_models_without_rows_of_image_tokens_are_refused(loaded):
    alone = SimpleNamespace(**{**vars(loaded), "model": loaded.model.decoder})
    with pytest.raises(ValueError, match="Decoder alone"):
        look("m", alone, "what?", [])
    crossing = SimpleNamespace(media_token=3)
    with pytest.raises(ValueError, match="cross-attention"):
        answer_attention(crossing, Row([1], []), [2], [])
