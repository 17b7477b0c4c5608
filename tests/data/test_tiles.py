"""Tiles: the grid, pixels and text of SmolVLM's official processor, as recorded and as transformers makes them here."""

import hashlib
import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from nanovlm.data import tiles
from nanovlm.data.batching import Report, build_batch, pixels_of
from nanovlm.data.images import SIGLIP
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data.templates import SMOLVLM, picture_ids, prompt, segments, write
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.published.tokenizers import load_tokenizer
from nanovlm.vlm import IMAGE_TOKEN

CASES = json.loads((Path(__file__).parents[1] / "golden/smolvlm_processor_cases.json").read_text())
S = 512
TOKENS = 64  # of a tile


def drawn(width, height):
    """The recorded cases' picture."""
    x, y = numpy.meshgrid(numpy.arange(width), numpy.arange(height))
    channels = x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (7 * x + 13 * y) % 256
    return Image.fromarray(numpy.stack(channels, -1).astype(numpy.uint8))


def asked(options):
    """tiles.cut's num_tiles for the official processor's options."""
    return options.get("size", {"longest_edge": 2048})["longest_edge"] / S if options.get("do_image_splitting", True) else 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small tokenizer with the marks, in which two line breaks are one token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_tokenizer(["What is in this image? Can you describe this?"] * 9, 320)
    trained.backend.add_tokens(["\n\n"])
    trained.save(folder / "tokenizer.json")
    return load_tokenizer(folder, SMOLVLM.specials)


def text_of(row, tokenizer):
    """A row as the official processor writes it: str."""
    names = [tokenizer.special_names.get(id) for id in row]
    pieces = ["<image>" if id == IMAGE_TOKEN else name or tokenizer.decode([id]) for id, name in zip(row, names)]
    return "".join(pieces)


def ids_of(visual, tokenizer):
    """What a visual input becomes."""
    return picture_ids(visual, SMOLVLM, tokenizer, TOKENS * len(visual.frames))


@pytest.mark.parametrize("case", CASES["images"], ids=lambda case: f"{case['width']}x{case['height']} {case['options']}")
def test_every_recorded_picture(case, tokenizer):
    visual = Visual("drawn", (drawn(case["width"], case["height"]),))
    found = tiles.cut(visual, S, asked(case["options"]))
    assert found.grid == (case["rows"], case["cols"]) and len(found.frames) == case["tiles"]
    assert case["tiles"] <= tiles.most(asked(case["options"]))
    pixels = pixels_of([found], S, "stretch", SIGLIP)
    torch.testing.assert_close(pixels.mean((2, 3)), torch.tensor(case["tile_mean_rgb"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.flatten(1).std(1, correction=0), torch.tensor(case["tile_std"]), atol=1e-5, rtol=0)
    for tile, sample in ((pixels[0], case["sample_first_tile"]), (pixels[-1], case["sample_last_tile"])):
        seen = [tile[c, y, x] for c, y, x in ((0, 100, 7), (1, 400, 300), (2, 33, 500), (2, 256, 256))]
        torch.testing.assert_close(torch.stack(seen), torch.tensor(sample), atol=1e-6, rtol=0)
    ids = ids_of(found, tokenizer) + [tokenizer.special_id(SMOLVLM.image_suffix)]
    assert hashlib.sha256(text_of(ids, tokenizer).encode()).hexdigest() == case["text_sha256"]
    assert ids.count(IMAGE_TOKEN) == case["image_tokens"]
    assert ids.count(tokenizer.special_id("<fake_token_around_image>")) == case["fake_tokens"]


@pytest.mark.parametrize("chat", CASES["prompts"], ids=lambda chat: chat["name"])
def test_every_recorded_chat(chat, tokenizer):
    visuals = [tiles.cut(Visual(f"{n}", (drawn(*size),)), S, asked(chat["options"])) for n, size in enumerate(chat["sizes_wh"])]
    assert sum(len(visual.frames) for visual in visuals) == chat["tiles"]
    system, turns, numbers = SMOLVLM.system, [], iter(range(len(visuals)))
    for message in chat["messages"]:
        if message["role"] == "system":
            system += f"System: {message['content'][0]['text']}<end_of_utterance>\n"
        else:
            turns.append(Turn(message["role"], tuple(part["text"] if part["type"] == "text" else next(numbers)
                                                     for part in message["content"])))
    template = SMOLVLM.__class__(**vars(SMOLVLM) | {"system": system})
    render = prompt if chat["add_generation_prompt"] else segments
    row = write(render(turns, template), tokenizer, [ids_of(visual, tokenizer) for visual in visuals])
    end = "" if chat["add_generation_prompt"] else "\n"  # which nothing is trained to write
    assert text_of(row.ids, tokenizer) + end == chat["expanded"].replace("<image>*64", "<image>" * TOKENS)
    assert len(row.images) == len(visuals)


def test_a_line_break_is_its_own_token_and_two_are_one(tokenizer):
    """As in the published vocabulary, where an image block has 66 r c + r + 67 ids."""
    newline, two = tokenizer.encode("\n"), tokenizer.encode("\n\n")
    assert len(newline) == len(two) == 1
    ids = ids_of(tiles.cut(Visual("a", (drawn(640, 480),)), S, 4), tokenizer)
    assert (ids.count(newline[0]), ids.count(two[0]), len(ids) + 1) == (2, 1, 862)
    for mark in ("", *SMOLVLM.specials):
        row = write(prompt([Turn("user", (f"a {mark}b",))], SMOLVLM), tokenizer, [])
        special = [tokenizer.special_names[id] for id in row.ids if id in tokenizer.special_names]
        assert special == ["<|im_start|>", "<end_of_utterance>"] and f"a {mark}b" in tokenizer.decode(row.ids)


def test_any_picture_as_transformers_has_it():
    """Sizes drawn at random, and the narrowest."""
    official = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    options = dict(resample=1, image_mean=[0.5] * 3, image_std=[0.5] * 3, max_image_size={"longest_edge": 64})
    generator = numpy.random.default_rng(0)
    sizes = [(1, 900), (900, 1), (64, 64), *generator.integers(2, 400, (20, 2)).tolist()]
    for place, (width, height) in enumerate(sizes):
        longest, split = ((256, True), (150, True), (64, True), (256, False))[place % 4]
        processor = official.Idefics3ImageProcessorPil(**options, size={"longest_edge": longest}, do_image_splitting=split)
        picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), numpy.uint8))
        expected = torch.as_tensor(processor(picture, return_tensors="np")["pixel_values"][0])
        found = tiles.cut(Visual("a", (picture,)), 64, longest / 64 if split else 0)
        torch.testing.assert_close(pixels_of([found], 64, "stretch", SIGLIP), expected, atol=1e-6, rtol=0)


def test_a_clip_is_a_square_a_frame_nothing_is_cut_twice_or_beyond_its_marks(tokenizer):
    frames = tuple(drawn(30 + n, 20) for n in range(3))
    found = tiles.cut(Visual("clip", frames), 16, 4)
    assert found.grid == (0, 0) and len(found.frames) == 3
    for frame, square in zip(frames, found.frames):
        assert square.tobytes() == tiles.cut(Visual("one", (frame,)), 16, 0).frames[0].tobytes()
    ids = picture_ids(found, SMOLVLM, tokenizer, 3)
    assert ids.count(tokenizer.special_id("<global-img>")) == ids.count(IMAGE_TOKEN) == 3
    visual = Visual("a", (drawn(30, 20),))
    cut = tiles.cut(visual, 16, 4)
    assert tiles.cut(cut, 16, 4) is cut and tiles.cut(visual, 16, None) is visual
    with pytest.raises(ValueError, match="augmentation"):
        tiles.cut(Visual("a", visual.frames, view=object()), 16, 4)
    visual = tiles.cut(Visual("a", (drawn(70, 70),)), 16, 7)
    with pytest.raises(ValueError, match="a: cut into 7 x 7 tiles"):
        picture_ids(visual, SMOLVLM, tokenizer, 50)


def test_batches_of_tiles(tokenizer):
    """Two pictures of different grids, one of them shown twice; image tokens train nothing."""
    wide, tall = Visual("wide", (drawn(64, 16),)), Visual("tall", (drawn(30, 60),))
    talk = (Turn("user", (0, "\nWhat is in this?", 1)), Turn("assistant", ("this image",)))
    record = Record("r", (wide, tall), (talk, (Turn("user", ("this?", 0)), talk[1])))
    batch = build_batch([record], SMOLVLM, tokenizer, lambda size, frames: 2 * frames, 16, "stretch", 400, Report(),
                        SIGLIP, num_tiles=4)
    assert batch.frames.tolist() == [5, 9] and batch.pixels.shape == (14, 3, 16, 16) and batch.shown.tolist() == [0, 1, 0]
    assert (batch.ids == IMAGE_TOKEN).sum(1).tolist() == [28, 10] and not (batch.labels[batch.ids == IMAGE_TOKEN] >= 0).any()
    row = text_of(batch.ids[0, batch.segments[0] >= 0].tolist(), tokenizer)
    assert row.startswith("<|im_start|>User:<fake_token_around_image><row_1_col_1><image><image>")
    assert "<fake_token_around_image>What is in this?<fake_token_around_image><row_1_col_1>" in row
    assert row.endswith("<end_of_utterance>\nAssistant: this image<end_of_utterance>")
