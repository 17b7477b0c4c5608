"""A folder's own processor and chat template: pictures equal to transformers', templates known by their words, never run."""

import json

import numpy
import pytest
import torch
from PIL import Image

from nanovlm.data import images, templates
from nanovlm.published.processor import pictures_of, template_of

CASES = {
    "CLIPImageProcessor": [
        {}, {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, {"resample": 2, "image_mean": [0.5, 0.4, 0.3]},
        {"image_std": [0.5, 0.5, 0.5], "resample": 1}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5},
    ],
    "BlipImageProcessor": [{"size": {"height": 32, "width": 32}}, {"size": {"height": 32, "width": 32}, "do_rescale": False}],
    "SiglipImageProcessor": [{"size": {"height": 32, "width": 32}}],
    "LlavaImageProcessor": [{"do_pad": True}, {"do_pad": False}],
}  # fmt: skip
OURS = {"image_fit": "crop", "tiles": None, "preprocessing": images.CLIP}
SQUARE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(("kind", "values"), [(kind, values) for kind, several in CASES.items() for values in several])
@pytest.mark.parametrize("nested", [False, True])
def test_pixels_are_those_of_the_folders_processor(kind, values, nested, tmp_path):
    """In both places where transformers writes its values, for pictures of any shape."""
    transformers = pytest.importorskip("transformers")
    plain = SQUARE if kind.startswith(("CLIP", "Llava")) else {}
    theirs = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    theirs = theirs(**plain | values)
    told = json.loads(theirs.to_json_string())
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": told} if nested else told))
    shown, notes = pictures_of(tmp_path, OURS | {"image_fit": "squash"}, False)
    assert not notes
    for size in ((50, 37), (31, 64), (32, 32), (200, 33)):
        picture = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8))
        expected = torch.as_tensor(numpy.asarray(theirs(picture)["pixel_values"][0]))
        found = images.to_pixels(picture, 32, shown["image_fit"], shown["preprocessing"])
        assert found.shape == expected.shape and float((found - expected).abs().max()) < 2e-5 * max(1, float(expected.abs().max()))


def test_older_spellings_and_no_file(tmp_path):
    padded, cropped = OURS | {"image_fit": "pad"}, OURS | {"image_fit": "crop"}
    assert pictures_of(tmp_path, padded, False) == (padded, [])
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": 336, "do_center_crop": true, "size": 336}')
    assert pictures_of(tmp_path, padded, False) == (cropped, [])
    (tmp_path / "processor_config.json").write_text('{"patch_size": 14, "processor_class": "LlavaProcessor"}')
    assert pictures_of(tmp_path, padded, False) == (cropped, [])


def test_tiles_are_those_of_the_folders_processor_and_what_differs_on_purpose_is_one_line(tmp_path):
    told = {"do_image_splitting": True, "do_pad": True, "size": {"longest_edge": 1024}, "max_image_size": {"longest_edge": 512}}
    for splits, tiles in ((True, 2), (False, 0)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(told | {"do_image_splitting": splits}))
        assert pictures_of(tmp_path, OURS | {"tiles": 4.0}, False)[0]["tiles"] == tiles
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": 448, "do_center_crop": true, "size": 448}')
    shown, notes = pictures_of(tmp_path, OURS | {"image_fit": "squash"}, True)
    assert shown["image_fit"] == "squash" and len(notes) == 1 and "crop" in notes[0]
    assert pictures_of(tmp_path, OURS | {"image_fit": "crop"}, True)[1] == []


LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
EVIL = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% if add_generation_prompt %}{{ raise_exception('run') }}{% endif %}"


@pytest.mark.parametrize(("text", "template"), [
    (LLAVA_HF, templates.LLAVA), ("{{ '<|im_start|>' + role }}{% if add_generation_prompt %}…", templates.CHATML),
    ("You are Qwen <|im_start|>", templates.CHATML_QWEN), ("Instruct: {{ text }}\nOutput:", templates.PHI),
])  # fmt: skip
def test_chat_templates_are_known_by_their_words(text, template, tmp_path):
    places = (("chat_template.jinja", text), ("chat_template.json", json.dumps({"chat_template": text})),
              ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": text}]})))
    for name, content in places:
        (tmp_path / name).write_text(content)
        assert template_of(tmp_path, templates.VICUNA) == (template, [])
        (tmp_path / name).unlink()


def test_a_template_that_is_none_of_ours_is_named_and_not_run(tmp_path):
    assert template_of(tmp_path, templates.BLIP2) == (templates.BLIP2, [])
    (tmp_path / "chat_template.jinja").write_text(EVIL)
    found, notes = template_of(tmp_path, templates.BLIP2)
    assert found == templates.BLIP2 and len(notes) == 1 and str(tmp_path) in notes[0]
    assert template_of(tmp_path)[0].user_prefix == ""
