"""Attention over the picture and layer by layer: `sample.py --attention`, `python -m nanovlm.evaluation attention`."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from random_models import randomise, small_decoder, small_vit, small_vlm
from tiny import random_vlm

from nanovlm.abstractor import Abstractor
from nanovlm.data.templates import NANO, Row
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.evaluation import __main__ as cli
from nanovlm.evaluation.attention_maps import answer_attention, answer_heat, draw, look, Looks
from nanovlm.generation.answer import Prompt
from nanovlm.generation.chat import Assistant
from nanovlm.generation.sampler import Decoding
from nanovlm.projector import LinearProjector, PixelShuffleProjector
from nanovlm.qformer import QFormer
from nanovlm.resampler import Resampler
from nanovlm.vit import ViT
from nanovlm.vlm import Batch, VLM

ANSWER = [9, 3, 14]


def bridges():
    torch.manual_seed(0)
    plain, classy = small_vit(class_token=False), small_vit(class_token=True)
    latents = dict(num_latents=3, num_layers=2, num_heads=2, head_width=5, ffn_width=18)
    among = randomise(Resampler(16, 16, **latents, attend_to_latents=True))
    wide = randomise(ViT(dataclasses.replace(plain.config, width=16, num_heads=4)))
    yield "resampler", small_vlm()
    yield "resampler, class token", VLM(classy, randomise(Resampler(12, 16, **latents)), small_decoder())
    yield "resampler among its latents", VLM(wide, among, small_decoder())
    yield "merged patches", VLM(plain, randomise(PixelShuffleProjector(12, 16, merge=3)), small_decoder())
    yield "projector", small_vlm("projector")
    sizes = dict(num_queries=3, num_heads=2, ffn_width=18)
    yield "abstractor", VLM(classy, randomise(Abstractor(12, 16, num_layers=2, **sizes)), small_decoder())
    yield "qformer", VLM(classy, randomise(QFormer(12, 16, 8, **sizes, cross_attention=(True, False, True))), small_decoder())
    yield "projector, class token", VLM(classy, randomise(LinearProjector(12, 16)), small_decoder())


MODELS = dict(bridges())


def row_for(model, pictures):
    n = model.num_image_tokens(12)
    ids, images = [4], []
    for number in range(pictures):
        images.append((number, len(ids), len(ids) + n))
        ids += [-1] * n + [5 + number]
    return Row(ids=[*ids, 7, 8], images=images)


def own_maps(model, ids, pixels):
    """What the model itself leaves of its attention."""
    ids, shown, out = torch.tensor([ids]), torch.arange(len(pixels)), {}
    places = torch.arange(ids.shape[1])[None]
    seen = torch.cat(pixels) if pixels else None
    batch = Batch(ids, ids, torch.zeros_like(ids), places, seen, torch.ones_like(shown), shown, torch.zeros_like(shown))
    with torch.no_grad():
        model.hidden(batch, out)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_heat_is_the_product_of_what_every_layer_and_head_looked_at(name):
    model = MODELS[name]
    pixels = [torch.randn(1, 3, 12, 12) for _ in range(2)]
    row = row_for(model, 2)
    got = answer_heat(model, Prompt(row, pixels), ANSWER)
    out = own_maps(model, row.ids + ANSWER, pixels)
    side = 1 if name == "merged patches" else 3
    first = model.vision.num_tokens(12) - 9
    for picture, (_, start, stop) in enumerate(row.images):
        assert got[picture].shape == (3, side, side) and not got[picture].requires_grad
        for token in range(3):
            query = len(row.ids) - 1 + token  # where this token was predicted
            weights = torch.stack([layer[0, head, query] for layer in out["attention"] for head in range(4)]).mean(0)
            want = weights[start:stop]
            if "latents" in out:
                looks = [layer[picture, head] for layer in out["latents"] for head in range(2)]
                want = sum(want[i] * torch.stack(looks).mean(0)[i] for i in range(3))
            want = want[first : first + side**2].reshape(side, side)
            torch.testing.assert_close(got[picture][token], want, atol=1e-5, rtol=1e-4)


def test_nothing_to_draw_is_an_error(loaded):
    model = MODELS["resampler"]
    picture = torch.zeros(1, 3, 12, 12)
    with pytest.raises(ValueError, match="the answer has no token"):
        answer_heat(model, Prompt(row_for(model, 1), [picture]), [])
    for inputs in ([], [torch.zeros(2, 3, 12, 12)]):
        with pytest.raises(ValueError, match="still images"):
            answer_heat(model, Prompt(row_for(model, 1), inputs), ANSWER)
    alone = dataclasses.replace(loaded, model=loaded.model.vision)
    with pytest.raises(ValueError, match="ViT alone"):
        look("m", alone, "what?", [])
    crossing = SimpleNamespace(media_token=3)
    with pytest.raises(ValueError, match="cross-attention"):
        answer_attention(crossing, Prompt(Row([1], []), []), [2])


def test_one_panel_per_token_and_picture(tmp_path):
    path = tmp_path / "attention"
    cold, hot = torch.zeros(3, 3, 3), torch.zeros(3, 3, 3)
    hot[0, 0, 0], hot[2, 2, 2] = 0.5, 0.25
    pictures = [Image.new("RGB", (40, 20), "red"), Image.new("RGB", (12, 12), "blue")]
    draw(path, pictures, [cold, hot], [" red", "$", ""], 12, "stretch", "where? $")
    with Image.open(path) as image:
        assert image.format == "PNG"
        colors = {color: count for count, color in image.convert("RGB").getcolors(1 << 20)}
        wide, high = image.size
    panel = colors[255, 0, 0] / 3  # nobody looked at the first picture, which is shown as it is in three panels
    assert colors[0, 0, 255] == pytest.approx((3 - 2 / 9) * panel, rel=0.03), "heat covers two cells of the second"
    draw(path, pictures[1:], [hot[:1]], [" red"], 12, "stretch", "where?")
    with Image.open(path) as image:
        assert image.width < wide and image.height < high


# shares by layer


@pytest.fixture(scope="module")
def loaded():
    tokenizer = train_tokenizer(["user: what color is this? yes no\nbot: red blue"] * 3, 300)
    decodings = {"default": Decoding(max_new_tokens=5, min_new_tokens=3)}
    return Assistant(random_vlm(tokenizer.vocab_size, context_length=200), tokenizer, NANO, 8, decodings=decodings)


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
    model, pixels = loaded.model, torch.randn(1, 3, 8, 8)
    row = Row([4, -1, -1, -1, -1, 5], [(0, 1, 5)])
    as_written, as_text = (answer_attention(model, Prompt(row, [pixels]), [7, 8], as_text=flag) for flag in (False, True))
    assert not torch.allclose(as_written, as_text, atol=1e-3)
    one = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if ".text." in name:
            tensor.copy_(torch.full_like(tensor, 0.5) if tensor.ndim == 1 else tensor * 2)
            model.state_dict()[name.replace(".text.", ".vision.")].copy_(tensor)
    both = [answer_attention(model, Prompt(row, [pixels]), [7, 8], as_text=flag) for flag in (False, True)]
    torch.testing.assert_close(*both)  # with equal copies the switch changes nothing
    model.load_state_dict(one)


def test_attention_is_that_of_the_model_itself_also_without_a_picture():
    model, pixels = small_vlm("projector"), torch.randn(1, 3, 12, 12)
    n = model.num_image_tokens(12)
    for row, shown in ((Row([4, *[-1] * n, 5], [(0, 1, 1 + n)]), [pixels]), (Row([4, 6, 5], []), [])):
        out = own_maps(model, [*row.ids, 9, 3], shown)
        expected = torch.stack(out["attention"])[:, 0, :, len(row.ids) - 1 : -1, :-1]
        torch.testing.assert_close(answer_attention(model, Prompt(row, shown), [9, 3]), expected)


def test_the_command_line(loaded, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli.recipes, "load_by_flags", lambda folder, args: loaded)
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "a.png")
    arguments = ["attention", "one/model", "other/model", "--ask", "what?", "--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "o.png")]
    assert cli.main([*arguments, "--as-text"]) == 0
    told = capsys.readouterr().out
    assert told.count("evenly") == 4 and told.count("image tokens as words") == 2
    with Image.open(tmp_path / "o.png") as drawn:
        assert drawn.size[0] == 1200
    assert cli.main([*arguments[:-2], "--image", "nowhere.png"]) == 2 and "nowhere.png" in capsys.readouterr().err
    for wrong, words in ((["attention", "m", "--ask", "q"], "--image or --draw"), ([*arguments, "--as-txt"], "Did you mean '--as-text'")):
        with pytest.raises(SystemExit):
            cli.main(wrong)
        assert words in capsys.readouterr().err
