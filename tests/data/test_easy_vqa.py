"""easy-VQA: the official split and its counts, captions from the answers, and helpful errors."""

import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from nanovlm.data.easy_vqa import COLORS, EasyVQA, SHAPES, caption_of, centre_of, kind_of, reveal
from nanovlm.data.scene_questions import SHORT_CAPTION_PROMPTS

package = pytest.importorskip("easy_vqa")
RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "gray": (128, 128, 128),
       "teal": (0, 128, 128), "black": (0, 0, 0), "brown": (165, 42, 42)}  # as the package's README draws them


@pytest.fixture(scope="module")
def test_split():
    return EasyVQA("test")


@pytest.mark.parametrize("split, pictures, questions", [("train", 4000, 38575), ("test", 1000, 9673)])
def test_one_epoch_holds_the_official_split_exactly_once(split, pictures, questions):
    source, asked = EasyVQA(split, seed=1), Counter()
    assert len(source) == pictures and source.name == f"easy_vqa_{split}"
    seen = set()
    for n in range(pictures):
        record = source.record(n)
        (picture,) = record.visuals
        assert record.id == picture.key
        seen.add(picture.key)
        image_id = int(picture.key.removeprefix(f"easy_vqa_{split}/"))
        for kind, (user, assistant) in zip(record.kinds, record.conversations, strict=True):
            assert (user.role, assistant.role, user.parts[0]) == ("user", "assistant", 0)
            assert kind == ("yes_no" if assistant.text in ("yes", "no") else
                            "color" if assistant.text in RGB else "shape")
            asked[user.text, assistant.text, image_id] += 1
    official = getattr(package, f"get_{split}_questions")()
    assert len(seen) == pictures and asked.total() == questions and asked == Counter(zip(*official))


def test_pictures_are_the_files_and_are_kept():
    source = EasyVQA("test")
    paths = dict(source.paths)
    source.record(0)
    for n in range(5):
        picture = source.record(n).visuals[0]
        image_id = int(picture.key.split("/")[1])
        source.paths[image_id] = "gone"  # the file is not opened again
        (again,) = source.record(n).visuals[0].frames
        with Image.open(paths[image_id]) as image:
            assert image.convert("RGB").tobytes() == again.tobytes() == picture.frames[0].tobytes()


def test_a_sample_of_questions_changes_with_the_epoch(test_split):
    sampled, again = (EasyVQA("test", questions_per_picture=3) for _ in range(2))
    changed = 0
    for n in range(60):
        one, everything = sampled.record(n), test_split.record(n).conversations
        assert len(set(one.conversations) & set(everything)) == len(one.conversations) == min(3, len(everything))
        assert (one.conversations, one.kinds) == (again.record(n).conversations, again.record(n).kinds)
        later = next(r for r in map(sampled.record, range(1000, 2000)) if r.id == one.id) if n < 4 else one
        changed += later.conversations != one.conversations
    assert changed >= 3
    assert EasyVQA("test", questions_per_picture=1000).record(0).conversations == test_split.record(0).conversations


@pytest.mark.parametrize("asked, revealed", [
    ([("what color is the circle?", "blue")], ("blue", "circle")),
    ([("what is the color of the shape?", "teal")], ("teal", None)),
    ([("is there not a red shape?", "no")], ("red", None)),
    ([("does the image not contain a brown shape?", "no"), ("is a triangle present?", "yes")], ("brown", "triangle")),
    ([("is there a circle?", "no"), ("is there not a triangle in the image?", "yes")], (None, "rectangle")),
    ([(f"is a {color} shape present?", "no") for color in COLORS if color != "black"], ("black", None)),
    ([(f"is a {color} shape present?", "no") for color in COLORS[2:]], (None, None)),
])
def test_reveal_reads_questions_denials_and_exclusions(asked, revealed):
    assert reveal(asked) == revealed


def test_captions_say_what_is_known_and_names_are_their_words():
    assert [caption_of(*known) for known in (("blue", "circle"), ("blue", None), (None, "circle"), (None, None))] == [
        "blue circle", "blue shape", "circle", "shape"]
    source, captions = EasyVQA(kind="names"), EasyVQA(kind="captions")
    for n in range(300):
        names, caption = source.record(n), captions.record(n).conversations[0][-1].text
        said = [conversation[-1].text for conversation in names.conversations]
        known = [word for word in caption.split() if word != "shape"]
        assert said == ([caption, *known] if len(known) == 2 else known or ["shape"])
        assert names.kinds == ("name",) * len(said)


@pytest.mark.slow
def test_names_stand_where_the_object_is():
    pixels = np.full((40, 20, 3), 240, np.uint8)
    pixels[10:30, 5:7] = 90  # rows 10 to 29, columns 5 and 6
    assert centre_of(pixels) == (6 / 20, 20 / 40)
    for n in range(30):
        record = EasyVQA(kind="names").record(n)
        (x, y), *others = record.regions
        assert others == [(x, y)] * (len(record.conversations) - 1)
        picture = np.asarray(record.visuals[0].frames[0])
        assert picture[int(64 * y), int(64 * x)].tolist() != np.median(picture, axis=(0, 1)).tolist()
    assert EasyVQA().record(0).regions == ()


@pytest.mark.parametrize("split, complete", [("train", 4000 - 422), ("test", 1000 - 112)])
def test_captions_are_true_of_the_pictures(split, complete):
    source = EasyVQA(split, "captions")
    assert sum("shape" not in caption and caption.count(" ") == 1 for caption in source.captions.values()) == complete
    words, prompts = Counter(), Counter()
    for n in range(300):
        record = source.record(n)
        ((user, assistant),) = record.conversations
        assert record.kinds == ("short_caption",) and user.parts[0] == 0
        prompts[user.text] += 1
        pixels = np.asarray(record.visuals[0].frames[0]).reshape(-1, 3).astype(int)
        for word in assistant.text.split():
            words[word] += 1
            if word in COLORS:
                assert (np.abs(pixels - RGB[word]).max(1) < 60).sum() > 8, record.id
    assert set(words) == {*COLORS, *SHAPES, "shape"}
    assert set(prompts) == set(SHORT_CAPTION_PROMPTS) and min(prompts.values()) > 60


def test_texts_ask_the_same_questions_about_a_caption_that_tells_both():
    source, questions = EasyVQA("test", "texts"), EasyVQA("test")
    assert len(questions) - len(source) == 112
    for n in range(100):
        record = source.record(n)
        asked = questions.asked[int(record.id.split("/")[1])]
        color, shape = reveal(asked)
        assert record.visuals == () and record.id.startswith("easy_vqa_test/")
        assert [(user.parts, assistant.text) for user, assistant in record.conversations] == [
            ((f"{color} {shape}. ", question), answer) for question, answer in asked]
        assert record.kinds == tuple(kind_of(answer) for _, answer in asked)


def test_wrong_options_and_what_is_missing_are_said(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'tset'. Did you mean 'test'"):
        EasyVQA("tset")
    with pytest.raises(ValueError, match="unknown kind 'caption'. Did you mean 'captions'"):
        EasyVQA(kind="caption")
    monkeypatch.setattr("easy_vqa.easy_vqa.BASE_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pip install --force-rein"):
        EasyVQA()
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match="pip install --force-rein"):
        EasyVQA()


def test_denials_are_of_pictures_where_one_is_false():
    everything, source = EasyVQA("test"), EasyVQA("test", kind="denials", seed=3)
    expected = {}
    for n in range(len(everything)):
        record = everything.record(n)
        asked = {tuple(turn.text for turn in turns) for turns in record.conversations}
        denials = {one for one in asked if {"not", "no"} & set(one[0][:-1].split())}
        if any(answer == "no" for _, answer in denials):
            expected[record.id] = denials
    found = [source.record(n) for n in range(len(source))]
    assert {one.id: {tuple(turn.text for turn in turns) for turns in one.conversations} for one in found} == expected
    assert 0.3 < len(expected) / len(everything) < 0.6 and found[0].visuals and set(found[0].kinds) == {"yes_no"}


def test_balanced_asks_one_question_of_each_sort():
    everything, source = EasyVQA("test"), EasyVQA("test", kind="balanced", seed=3)
    questions = {record.id: {(turns[0].text, turns[1].text) for turns in record.conversations}
                 for record in map(everything.record, range(1000))}
    sort = lambda one: (kind_of(one[1]), one[1], bool({"not", "no"} & set(one[0][:-1].split())))
    for record in map(source.record, range(200)):
        asked = [(turns[0].text, turns[1].text) for turns in record.conversations]
        assert set(asked) <= questions[record.id] and record.kinds == tuple(kind_of(answer) for _, answer in asked)
        assert sorted(map(sort, asked)) == sorted(set(map(sort, questions[record.id])))
    few = EasyVQA("test", kind="balanced", questions_per_picture=2)
    assert max(len(few.record(n).conversations) for n in range(50)) == 2
