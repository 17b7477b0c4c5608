"""Captions and questions about scenes: a slow independent reader of the words works every answer out again."""

import re
from collections import Counter

import numpy as np
import pytest

from nanovlm.data.scene_questions import CAPTIONS, CAPTION_PROMPTS, QUESTIONS, READING_PROMPTS, SHORT_CAPTION_PROMPTS, TYPES, ask, offset, pick_weighted
from nanovlm.data.scene_questions import Scenes
from nanovlm.data.scenes import ALPHABET, COLORS, HELD_OUT, SHAPES, Scene, SceneObject, in_held_out_fifth, sample_scene

NUMBER = 600  # records per source


def matching(words, scene):
    """The objects that a phrase such as "red circle", "star", "red object" or "circles" fits."""
    words = [word for word in words.split() if word not in ("object", "objects", "shape", "a", "an", "the")]
    words = [{"crosses": "cross"}.get(word, word.removesuffix("s") if word != "cross" else word) for word in words]
    assert all(word in COLORS or word in SHAPES for word in words), words
    return [thing for thing in scene.objects if all(word in (thing.color, thing.shape) for word in words)]


def only(words, scene):
    things = matching(words, scene)
    assert len(things) == 1, f"{words!r} is ambiguous"
    return things[0]


def place(thing, canvas, margin):
    """The ninth, by its distance from the borders; must be clear by the margin."""
    words = []
    for value, low, high in ((thing.y, "top", "bottom"), (thing.x, "left", "right")):
        assert min(abs(value - canvas / 3), abs(value - canvas * 2 / 3)) >= margin
        words += [low] if value < canvas / 3 else [high] if value > canvas * 2 / 3 else []
    return " ".join(words) or "center"


def beyond(thing, relation, anchor):
    return {"left of": anchor.x - thing.x, "right of": thing.x - anchor.x,
            "above": anchor.y - thing.y, "below": thing.y - anchor.y}[relation]


def solve(question, scene):
    """(type, answer) of a question, from the scene alone; asserts that there is exactly one answer."""
    if question in READING_PROMPTS:
        return "reading", scene.string
    if found := re.fullmatch(r"what (?:color is|is the color of) the (\w+)\?", question):
        return "color", only(found[1], scene).color
    if found := re.fullmatch(r"what shape is the (\w+) object\?|what is the (\w+) shape\?", question):
        return "shape", only(found[1] or found[2], scene).shape
    if found := re.fullmatch(r"how many (.+) are there\?", question):
        return "count", str(len(matching(found[1], scene)))
    if found := re.fullmatch(r"is there (a|an) (.+)\?", question):
        assert (found[1] == "an") == (found[2][0] in "aeiou")
        return "existence", "yes" if matching(found[2], scene) else "no"
    if found := re.fullmatch(r"where is the (.+)\?", question):
        return "place", place(only(found[1], scene), scene.canvas, 2)
    if found := re.fullmatch(r"is the (.+) big or small\?", question):
        return "size", only(found[1], scene).size
    if found := re.fullmatch(r"what is (left of|right of|above|below) the (.+)\?", question):
        anchor = only(found[2], scene)
        others = [thing for thing in scene.objects if thing != anchor]
        assert all(abs(beyond(thing, found[1], anchor)) >= 4 for thing in others)
        (there,) = [thing for thing in others if beyond(thing, found[1], anchor) > 0]
        return "relation", f"{there.color} {there.shape}"
    found = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", question)
    distance = beyond(only(found[1], scene), found[2], only(found[3], scene))
    assert abs(distance) >= 4
    return "relation", "yes" if distance > 0 else "no"


def long_caption(scene):
    words = []
    for thing in sorted(scene.objects, key=lambda thing: thing.x):
        words.append(f"a {thing.size} {thing.color} {thing.shape} at the {place(thing, scene.canvas, 0)}")
    return ", ".join(words) + (f', text "{scene.string}"' if scene.string else "")


def short_caption(scene):
    words = [f"{thing.color} {thing.shape}" for thing in sorted(scene.objects, key=lambda thing: thing.x)]
    return ", ".join(words + [f"text {scene.string}"] * bool(scene.string))


def texts(record):
    """(kind, question, answer) of every conversation."""
    for kind, conversation in zip(record.kinds, record.conversations, strict=True):
        user, assistant = conversation
        assert (user.role, assistant.role) == ("user", "assistant")
        picture, question = user.parts
        assert picture == 0
        yield kind, question, assistant.text


@pytest.fixture(scope="module")
def drawn():
    """{split: list of (scene, list of (kind, question, answer))}."""
    found = {}
    for split in ("train", "new", "unseen_pairs", "reading"):
        source = Scenes(split, "both", string_share=0.4)
        found[split] = [(source.scene(n), list(texts(source.record(n)))) for n in range(NUMBER)]
    return found


@pytest.mark.parametrize("split", ["train", "new", "unseen_pairs", "reading"])
def test_every_answer_is_the_one_right_answer(drawn, split):
    kinds = set()
    for scene, asked in drawn[split]:
        for kind, question, answer in asked:
            if kind == "caption":
                assert question in CAPTION_PROMPTS and answer == long_caption(scene)
            elif kind == "short_caption":
                assert question in SHORT_CAPTION_PROMPTS and answer == short_caption(scene)
            else:
                assert solve(question, scene) == (kind, answer)
            assert f"{question} {answer}".replace(scene.string or "-", "").islower()
            kinds.add(kind)
    assert kinds == ({"reading"} if split == "reading" else set(TYPES))


def test_training_never_shows_or_names_a_held_out_pair_or_string(drawn):
    pairs = re.compile("|".join(f"{color} {shape}" for color, shape in HELD_OUT))
    for scene, _ in drawn["train"] + drawn["new"]:
        assert not {(thing.color, thing.shape) for thing in scene.objects} & set(HELD_OUT)
        assert scene.string is None or not in_held_out_fifth(scene.string)
    for source in (Scenes("train", "both"), Scenes("new", "both"), Scenes("train", "captions", string_share=1.0)):
        for n in range(2000 if source.split == "train" else 200):
            for _, question, answer in texts(source.record(n)):
                assert not pairs.search(question) and not pairs.search(answer)
                for word in re.findall(rf"\b[{ALPHABET}]{{2,3}}\b", f"{question} {answer}"):
                    assert not in_held_out_fifth(word)


def test_other_splits_hold_only_what_is_held_out(drawn):
    for scene, asked in drawn["unseen_pairs"]:
        assert {(thing.color, thing.shape) for thing in scene.objects} <= set(HELD_OUT)
        for _, question, answer in asked:
            for pair in re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b", f"{question} {answer}"):
                assert pair in HELD_OUT
    for scene, asked in drawn["reading"]:
        assert in_held_out_fifth(scene.string) and [kind for kind, _, _ in asked] == ["reading"]


def test_yes_and_no_and_the_other_answers_are_balanced(drawn):
    answers = {}
    for _, asked in drawn["train"] + drawn["new"]:
        for kind, question, answer in asked:
            form = "open" if question.startswith("what is") else "closed"
            answers.setdefault((kind, form if kind == "relation" else ""), Counter())[answer] += 1
    yes_no = answers["existence", ""], answers["relation", "closed"]
    assert all(0.45 < counts["yes"] / counts.total() < 0.55 for counts in yes_no)
    assert 0.42 < answers["relation", "open"].total() / (answers["relation", "open"] + yes_no[1]).total() < 0.58
    assert 0.45 < answers["size", ""]["big"] / answers["size", ""].total() < 0.55
    assert set(answers["count", ""]) == set("01234")
    assert 0.08 < answers["count", ""]["0"] / answers["count", ""].total() < 0.2
    assert len(answers["place", ""]) == 9 and min(answers["place", ""].values()) > 0.06 * answers["place", ""].total()
    assert len(answers["color", ""]) == 8 and len(answers["shape", ""]) == 6


def test_questions_are_asked_in_every_form(drawn):
    forms = Counter()
    for _, asked in drawn["train"]:
        for kind, question, _ in asked:
            form = re.sub(rf"\b({'|'.join(COLORS)})\b", "C", question.replace(" an ", " a "))
            form = re.sub(rf"\b({'|'.join(SHAPES)})(s|es)?\b", "S", form)
            forms[kind, form] += 1
    totals = Counter()
    for (kind, _), count in forms.items():
        totals[kind] += count
    shares = {(kind, form): count / totals[kind] for (kind, form), count in forms.items()}
    assert sum(kind == "relation" for kind, _ in forms) == 8 and sum(kind == "count" for kind, _ in forms) == 3
    for form in ("is there a S?", "is there a C object?"):
        assert 0.12 < shares["existence", form] < 0.28
    by_thing = [shares["count", f"how many {words} are there?"] for words in ("C objects", "S")]
    assert 0.2 < shares["count", "how many objects are there?"] < 0.37 and abs(by_thing[0] - by_thing[1]) < 0.08
    for kind, prompts in (("caption", CAPTION_PROMPTS), ("short_caption", SHORT_CAPTION_PROMPTS),
                          ("reading", READING_PROMPTS)):
        assert min(shares[kind, prompt] for prompt in prompts) > 0.6 / len(prompts)
    for one, other in (("what color is the S?", "what is the color of the S?"),
                       ("what shape is the C object?", "what is the C shape?")):
        kind = "color" if "color" in one else "shape"
        assert 0.4 < shares[kind, one] < 0.6 and shares[kind, one] + shares[kind, other] == pytest.approx(1)
    for kind, question in (("place", "where is the {}?"), ("size", "is the {} big or small?")):
        assert min(shares[kind, question.format("S")], shares[kind, question.format("C S")]) > 0.3


def test_absent_pairs_share_color_or_shape_with_what_is_there_more_often_than_chance():
    scene = Scene(64, (SceneObject("red", "circle", "big", 32.0, 32.0, 9.0),))
    absent = []
    for n in range(1500):
        ((_, question, answer),) = ask(scene, np.random.default_rng(n), 1, {"existence": 1.0})
        if answer == "no" and "object" not in question and len(words := question.rstrip("?").split()) == 5:
            absent.append(words[3] == "red" or words[4] == "circle")
    # 10 of the 43 absent pairs share something: 0.4 / 0.6 of the time one of those is taken, else any
    assert np.mean(absent) == pytest.approx(2 / 3 + 10 / 43 / 3, abs=0.06)


def test_margins_are_used_up_and_no_more():
    regions, relations = [], []
    for n in range(2500):
        rng = np.random.default_rng(n)
        scene = sample_scene(rng, 4, "train", False)
        for kind, question, _ in ask(scene, rng, 2, {"place": 1.0, "relation": 1.0}):
            if kind == "place":
                thing = only(question[13:-1], scene)
                regions.append(min(abs(v - b) for v in (thing.x, thing.y) for b in (64 / 3, 128 / 3)))
            elif found := re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", question):
                relations.append(abs(beyond(only(found[1], scene), found[2], only(found[3], scene))))
    assert 2 <= min(regions) < 2.1 and 4 <= min(relations) < 4.3


def test_offset_has_the_sign_of_the_words():
    one, other = SceneObject("red", "ring", "big", 10.0, 40.0, 9.0), SceneObject("red", "star", "big", 30.0, 45.0, 9.0)
    assert [offset(one, name, other) for name in ("left of", "right of", "above", "below")] == [20, -20, 5, -5]


def test_questions_differ_and_a_text_is_read_once(drawn):
    numbers = Counter()
    for _, asked in drawn["train"]:
        assert len({question for _, question, _ in asked}) == len(asked)
        kinds = Counter(kind for kind, _, _ in asked)
        assert kinds["reading"] <= 1 and sum(kinds[name] for name in CAPTIONS) == 1 and asked[0][0] in CAPTIONS
        numbers[len(asked)] += 1
    assert max(numbers) == 7 and numbers[7] > 0.95 * NUMBER


def test_types_are_asked_as_often_as_weighted():
    rng = np.random.default_rng(0)
    drawn = Counter(pick_weighted(rng, {"a": 1.0, "b": 2.0, "c": 1.0}) for _ in range(4000))
    assert drawn["b"] / 4000 == pytest.approx(0.5, abs=0.03) and drawn["a"] / 4000 == pytest.approx(0.25, abs=0.03)
    source = Scenes(weights={"color": 3, "size": 1, "count": 0}, questions_per_picture=1)
    kinds = Counter(source.record(n).kinds[0] for n in range(500))
    assert set(kinds) == {"color", "size"} and 0.6 < kinds["color"] / 500 < 0.8
    plain = Counter(kind for n in range(500) for kind in Scenes(string_share=1.0).record(n).kinds)
    assert set(plain) == set(QUESTIONS) and plain["relation"] > 0.05 * plain.total()
