import dataclasses

import pytest
import torch
from PIL import Image

from nanovlm.data.templates import Row
from nanovlm.evaluation import attention_maps
from nanovlm.evaluation.attention_maps import answer_heat, draw
from nanovlm.projector import LinearProjector, PixelShuffleProjector
from nanovlm.resampler import Resampler
from nanovlm.vit import ViT
from nanovlm.vlm import Batch, VLM
from random_models import randomise, small_decoder, small_vit, small_vlm

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
    yield "projector, class token", VLM(classy, randomise(LinearProjector(12, 16)), small_decoder())


MODELS = dict(bridges())


def row_for(model, pictures):
    n = model.num_image_tokens(12)
    ids, images = [4], []
    for number in range(pictures):
        images.append((number, len(ids), len(ids) + n))
        ids += [-1] * n + [5 + number]
    return Row(ids=[*ids, 7, 8], images=images)


@pytest.mark.parametrize("name", MODELS)
def test_heat_is_the_product_of_what_every_layer_and_head_looked_at(name):
    model = MODELS[name]
    pixels = [torch.randn(1, 3, 12, 12) for _ in range(2)]
    row = row_for(model, 2)
    got = answer_heat(model, row, ANSWER, pixels)
    ids, out = torch.tensor([row.ids + ANSWER]), {}
    batch = Batch(
        ids=ids, labels=ids, segments=torch.zeros_like(ids), positions=torch.arange(ids.shape[1])[None],
        pixels=torch.cat(pixels), frames=torch.ones(2).long(), shown=torch.arange(2), owner=torch.zeros(2).long(),
    )  # fmt: skip
    with torch.no_grad():
        model.hidden(batch, out)
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


def test_cells_add_up_to_the_share_of_attention_on_the_picture():
    heat = answer_heat(MODELS["resampler"], row_for(MODELS["resampler"], 1), ANSWER, [torch.randn(1, 3, 12, 12)])[0]
    shares = heat.sum(dim=(1, 2))
    assert ((shares > 0) & (shares < 1)).all()


def test_nothing_to_draw_is_an_error():
    model = MODELS["resampler"]
    picture = torch.zeros(1, 3, 12, 12)
    with pytest.raises(ValueError, match="the answer has no token"):
        answer_heat(model, row_for(model, 1), [], [picture])
    for inputs in ([], [torch.zeros(2, 3, 12, 12)]):
        with pytest.raises(ValueError, match="still images"):
            answer_heat(model, row_for(model, 1), ANSWER, inputs)


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


def test_panels_say_what_they_show(tmp_path, monkeypatch):
    figures = []

    class Kept(attention_maps.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(attention_maps, "Figure", Kept)
    heat = torch.zeros(2, 2, 2)
    heat[0, 0, 1], heat[0, 1, 1] = 0.25, 0.125
    draw(tmp_path / "a.png", [Image.new("RGB", (12, 12), "blue")], [heat], [" red", " "], 12, "stretch", "where? $")
    (figure,) = figures
    one, other, bar = figure.axes
    assert figure.get_suptitle() == "where? $"
    assert one.get_title() == "red\n38% on the picture" and other.get_title() == "' '\n0% on the picture"
    assert one.get_xlabel() == "x, pixels" and one.get_ylabel() == "y, pixels" and "per cell" in bar.get_ylabel()
    picture, cells = one.images
    assert tuple(picture.get_extent()) == tuple(cells.get_extent()) == (0, 12, 12, 0)
    assert cells.get_array().tolist() == heat[0].tolist() and cells.get_clim() == (0, 0.25)
