"""What is said about scenes: a slow independent reader of the words works every answer out again."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

from nanovlm.data.scene_questions import (
    CAPTIONS, CAPTION_PROMPTS, NAME_PROMPT, QUESTIONS, READING_PROMPTS, REGIONS, SHORT_CAPTION_PROMPTS, TEXT_TYPES,
    TYPES, Scenes, SceneTexts, ask, parse_scene,
)
from nanovlm.data.scenes import ALPHABET, COLORS, HELD_OUT, SHAPES, Scene, SceneObject, in_held_out_fifth

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


def test_training_never_shows_or_names_what_is_held_out_and_other_splits_nothing_else(drawn):
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
    for scene, asked in drawn["unseen_pairs"]:
        assert {(thing.color, thing.shape) for thing in scene.objects} <= set(HELD_OUT)
        for _, question, answer in asked:
            for pair in re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b", f"{question} {answer}"):
                assert pair in HELD_OUT
    for scene, asked in drawn["reading"]:
        assert in_held_out_fifth(scene.string) and [kind for kind, _, _ in asked] == ["reading"]


def test_answers_are_balanced_and_questions_differ_and_come_in_every_form(drawn):
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
    forms, totals = Counter(), Counter()
    for kind, question, _ in (one for _, asked in drawn["train"] for one in asked):
        form = re.sub(rf"\b({'|'.join(COLORS)})\b", "C", question.replace(" an ", " a "))
        forms[kind, re.sub(rf"\b({'|'.join(SHAPES)})(s|es)?\b", "S", form)] += 1
        totals[kind] += 1
    shares = {(kind, form): count / totals[kind] for (kind, form), count in forms.items()}
    assert Counter(kind for kind, _ in forms) == {
        "color": 2, "shape": 2, "count": 3, "existence": 3, "place": 2, "relation": 8, "size": 2, "reading": 3,
        "caption": 4, "short_caption": 3}
    for most, kinds in ((0.6, ("color", "shape")), (0.7, ("place", "size", "existence")), (0.4, ("caption",)),
                        (0.45, ("count", "reading", "short_caption"))):
        assert all(share < most for (kind, _), share in shares.items() if kind in kinds), kinds
    numbers = Counter()
    for _, asked in drawn["train"]:
        assert len({question for _, question, _ in asked}) == len(asked)
        kinds = Counter(kind for kind, _, _ in asked)
        assert kinds["reading"] <= 1 and sum(kinds[name] for name in CAPTIONS) == 1 and asked[0][0] in CAPTIONS
        numbers[len(asked)] += 1
    assert max(numbers) == 7 and numbers[7] > 0.95 * NUMBER


def test_absent_pairs_share_color_or_shape_with_what_is_there_more_often_than_chance():
    scene = Scene(64, (SceneObject("red", "circle", "big", 32.0, 32.0, 9.0),))
    absent = []
    for n in range(1500):
        ((_, question, answer),) = ask(scene, np.random.default_rng(n), 1, {"existence": 1.0})
        if answer == "no" and "object" not in question and len(words := question.rstrip("?").split()) == 5:
            absent.append(words[3] == "red" or words[4] == "circle")
    # 10 of the 43 absent pairs share something: 0.4 / 0.6 of the time one of those is taken, else any
    assert np.mean(absent) == pytest.approx(2 / 3 + 10 / 43 / 3, abs=0.06)


# ---- the source of drawn scenes ----


def test_a_record_depends_on_seed_and_number_alone():
    def content(source, n):
        record = source.record(n)
        return record.visuals[0].key, record.visuals[0].frames[0].tobytes(), record.conversations, record.kinds

    for split in ("train", "new", "unseen_pairs", "reading"):
        one, other = Scenes(split, "both", seed=3, length=5), Scenes(split, "both", seed=3, length=5)
        backwards = [content(other, n) for n in reversed(range(8))]
        assert [content(one, n) for n in range(8)] == backwards[::-1] and len(one) == 5
        assert len({pixels for _, pixels, _, _ in backwards}) == 8  # goes on beyond its length with new pictures
        assert content(Scenes(split, "both", seed=4), 0)[:2] != content(one, 0)[:2]
    asked_otherwise = content(Scenes("train", "captions", seed=3), 0)
    assert asked_otherwise[:2] == content(Scenes("train", "questions", seed=3), 0)[:2]  # same key, same picture
    changes = {"seed": 1, "canvas": 48, "max_objects": 3, "min_objects": 2, "string_share": 0.1, "split": "new"}
    keys = {content(Scenes(**{option: value}), 1)[0] for option, value in changes.items()}
    assert len(keys | {content(Scenes(), 1)[0]}) == 7


def test_names_say_all_of_a_picture():
    source, with_string = Scenes(kind="names", seed=3, string_share=0.5), 0
    for n in range(40):
        scene, record = source.scene(n), source.record(n)
        said = [conversation[-1].text for conversation in record.conversations]
        expected, places, third = set(), {}, scene.canvas / 3
        for thing in scene.objects:
            expected |= {f"{thing.color} {thing.shape}", thing.shape, thing.color, f"{thing.size} {thing.shape}"}
            expected.add(f"{thing.shape} at the {REGIONS[int(thing.y // third)][int(thing.x // third)]}")
            places.setdefault(f"{thing.color} {thing.shape}", []).append((thing.x / 64, thing.y / 64))
        if scene.string:
            with_string += 1
            ranked = [f"{rank} {symbol}" for rank, symbol in zip(("first", "second", "third"), scene.string)]
            expected |= {*scene.string, *ranked}
            left, top, right, bottom = (side / 64 for side in scene.string_box)
            xs, ys = zip(*(region for name, region in zip(said, record.regions) if name in ranked))
            assert left < xs[0] and list(xs) == sorted(xs) and xs[-1] < right
            assert ys == pytest.approx([(top + bottom) / 2] * len(ranked))
        assert set(said) == expected and record.kinds == ("name",) * len(said) == ("name",) * len(record.regions)
        assert all(region in places[name] for name, region in zip(said, record.regions) if name in places)
        assert all(conversation[0].parts == (0, NAME_PROMPT) for conversation in record.conversations)
    assert with_string > 5


def test_options_shape_the_pictures_and_weights_the_kinds():
    source = Scenes("train", "captions", min_objects=2, max_objects=2, canvas=80, string_share=1.0)
    for n in range(20):
        record, scene = source.record(n), source.scene(n)
        assert record.visuals[0].frames[0].size == (80, 80) and len(scene.objects) == 2 and scene.string
        assert len(record.kinds) == 1 and record.kinds[0] in CAPTIONS
    shares = [sum(bool(Scenes(string_share=share).scene(n).string) for n in range(400)) / 400 for share in (0, 0.3)]
    assert shares[0] == 0 and 0.24 < shares[1] < 0.36
    assert all(len(Scenes(questions_per_picture=2).record(n).kinds) == 2 for n in range(20))
    source = Scenes(weights={"color": 3, "size": 1, "count": 0}, questions_per_picture=1)
    kinds = Counter(source.record(n).kinds[0] for n in range(500))
    assert set(kinds) == {"color", "size"} and 0.6 < kinds["color"] / 500 < 0.8
    plain = Counter(kind for n in range(500) for kind in Scenes(string_share=1.0).record(n).kinds)
    assert set(plain) == set(QUESTIONS) and plain["relation"] > 0.05 * plain.total()
    source = Scenes(weights={"relation": 1.0}, seed=2)
    keys = [source.record(n).visuals[0].key for n in range(60)]
    assert {source.record(n).kinds[0] for n in range(60)} == {"relation"}
    assert any(not key.endswith(".0") for key in keys)
    with pytest.raises(ValueError, match="none of 100 pictures of up to 1 objects gave a question of .* relation"):
        Scenes(weights={"relation": 1.0}, max_objects=1).record(0)


@pytest.mark.parametrize("source, options, message", [
    (Scenes, {"split": "trian"}, "unknown split 'trian'. Did you mean 'train'"),
    (SceneTexts, {"split": "reading"}, "unknown split 'reading'"),
    (Scenes, {"kind": "question"}, "unknown kind 'question'. Did you mean 'questions'"),
    (Scenes, {"weights": {"red": 1}}, "unknown type 'red'"),
    (SceneTexts, {"weights": {"red": 1}}, "unknown type 'red'"),
    (Scenes, {"weights": {"color": -1}}, "none of the types .'color', 'shape'"),
    (Scenes, {"kind": "both", "weights": {"color": 1}}, "none of the types .'caption', 'short_caption'"),
    (SceneTexts, {"split": "new", "weights": {"opposite": 1}}, "a weight above 0"),
])
def test_wrong_options_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        source(**options)


# ---- texts without pictures ----

TEXTS = 3000
OPPOSITES = {"left": "right", "above": "below", "big": "small", "top": "bottom", "yes": "no", "hot": "cold",
             "light": "dark", "up": "down", "day": "night", "old": "new"}
OPPOSITES |= {opposite: word for word, opposite in OPPOSITES.items()}
TURNED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OBJECT = re.compile(rf"a (big|small) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) at the ([a-z ]+)")
LISTED = re.compile(rf"()({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")
RELATED = re.compile(r"an? (\w+ \w+) is (left of|right of|above|below) an? (\w+ \w+)")


@pytest.fixture(scope="module")
def made():
    """{split: list of (kind, texts of the turns)}."""
    found = {}
    for split in ("train", "new"):
        source = SceneTexts(split)
        found[split] = [source.record(n) for n in range(TEXTS)]
        assert all(not record.visuals and len(record.conversations) == 1 for record in found[split])
        found[split] = [(record.kinds[0], [turn.text for turn in record.conversations[0]]) for record in found[split]]
    return found


def scene_of(text):
    """A scene as a caption tells it, each object in the middle of its ninth."""
    things = []
    for size, color, shape, place in OBJECT.findall(text) or [(*found, "center") for found in LISTED.findall(text)]:
        (row, column), = ((row, names.index(place)) for row, names in enumerate(REGIONS) if place in names)
        things.append(SceneObject(color, shape, size, 64 * (2 * column + 1) / 6, 64 * (2 * row + 1) / 6, 7.0))
    string = re.search('text "?([A-Z0-9]+)"?', text)
    return Scene(64, tuple(things), string and string[1])


def solve_text(kind, text):
    """(text that must or must not be held out, answer)."""
    if kind == "opposite":
        return None, OPPOSITES[re.fullmatch(r"what is the opposite of (\w+)\?", text)[1]]
    if kind == "addition":
        one, other = sorted(map(int, re.fullmatch(r"what is (\d) plus (\d)\?", text).groups()))
        return f"{one} plus {other}", str(one + other)
    if kind == "spelling":
        string = re.fullmatch(r"spell (\w+)\.", text)[1]
        return f"spell {string}", " ".join(string)
    if kind == "next_letter":
        return None, chr(ord(re.fullmatch(r"which letter comes after ([A-Y])\?", text)[1]) + 1)
    if kind == "word_of_phrase":
        end, phrase = re.fullmatch(r"what is the (first|last) word of: ([a-z ]+)", text).groups()
        return phrase, phrase.split()[0 if end == "first" else -1]
    if kind == "repeat":
        return (phrase := re.fullmatch(r"repeat: ([A-Za-z ]+)", text)[1]), phrase
    sentence, question = text.split(". ")
    if kind != "described_relation":
        about, answer = solve(question, scene_of(sentence))
        assert kind == f"{'described' if OBJECT.search(sentence) else 'listed'}_{about}"
        return sentence, answer
    one, relation, other = RELATED.fullmatch(sentence).groups()
    assert one != other
    facts = {(one, relation, other), (other, TURNED[relation], one)}
    if found := re.fullmatch(r"what is (left of|right of|above|below) the (.+)\?", question):
        (answer,) = [thing for thing, *rest in facts if rest == [found[1], found[2]]]
        return sentence, answer
    asked = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", question).groups()
    assert {asked[0], asked[2]} == {one, other}
    return sentence, "yes" if asked in facts else "no"


@pytest.mark.parametrize("split", ["train", "new"])
def test_every_answer_is_right_and_in_its_split(made, split):
    kinds = Counter()
    for kind, turns in made[split]:
        kinds[kind if kind in TEXT_TYPES else kind.split("_")[0]] += 1
        if kind == "plain_caption":
            (key,) = turns
        else:
            text, answer = turns
            key, right = solve_text(kind, text)
            assert answer == right, (kind, text, answer)
        assert key is None or in_held_out_fifth(key) == (split == "new")
    expected = set(TEXT_TYPES) - ({"opposite", "next_letter"} if split == "new" else set())
    assert set(kinds) == expected and min(kinds.values()) > 0.75 * TEXTS / len(expected)


def test_held_out_pairs_and_strings_never_occur(made):
    pairs = re.compile("|".join(f"{color} {shape}" for color, shape in HELD_OUT))
    for _, turns in made["train"] + made["new"]:
        assert not any(pairs.search(text) for text in turns)
        for word in re.findall(rf"\b[{ALPHABET}]{{2,3}}\b", " ".join(turns)):
            assert not in_held_out_fifth(word)


def test_all_facts_occur_evenly(made):
    said = {}
    for kind, turns in made["train"]:
        said.setdefault(kind, []).append((turns[0], turns[-1]))
    assert len({text for text, _ in said["opposite"]}) == 20
    assert len({text[-2] for text, _ in said["next_letter"]}) == 25
    assert {len(text.split(": ")[1].split()) for text, _ in said["word_of_phrase"]} == {2, 3, 4}
    assert {len(OBJECT.findall(text)) for text, _ in said["described_size"]} == {1, 2, 3, 4}
    related, plain = said["described_relation"], [text for text, _ in said["plain_caption"]]
    halves = {
        "the first word": ["first word" in text for text, _ in said["word_of_phrase"]],
        "open": [". what" in text for text, _ in related],
        "yes": [answer == "yes" for text, answer in related if ". is" in text],
        "the first object": [answer in text.split(" is ")[0] for text, answer in related if ". what" in text],
        "turned": [answer in ("right", "below", "small", "bottom", "no", "cold", "dark", "down", "night", "new")
                   for _, answer in said["opposite"]],
    }
    assert all(0.38 < np.mean(half) < 0.62 for half in halves.values()), halves
    assert min(np.mean(["at the" in text for text in plain]), np.mean([" is " in text for text in plain])) > 0.25
    assert np.mean(["at the" in text or " is " in text for text in plain]) < 0.75
    listed = {"color", "shape", "count", "existence", "reading"}
    assert {kind.removeprefix("listed_") for kind in said if kind.startswith("listed")} == listed
    assert {kind.removeprefix("described_") for kind in said if kind.startswith("described")} == {
        *listed, "place", "size", "relation"}


def test_options_and_determinism():
    one, other = SceneTexts(seed=5, length=7), SceneTexts(seed=5)
    assert [one.record(n) for n in range(40)] == [other.record(n) for n in reversed(range(40))][::-1]
    assert one.record(0) != SceneTexts(seed=6).record(0) and len(one) == 7
    assert len({one.record(n).id for n in range(10)} | {SceneTexts("new", seed=5).record(0).id}) == 11
    assert {SceneTexts(weights={"addition": 1, "spelling": 0}).record(n).kinds for n in range(20)} == {("addition",)}
    described = SceneTexts(weights={"described": 1}, max_objects=2, string_share=1)
    texts = [described.record(n).conversations[0][0].text for n in range(60)]
    assert all('text "' in text for text in texts) and {len(OBJECT.findall(text)) for text in texts} == {1, 2}
    plain = SceneTexts(weights={"plain_caption": 1}, string_share=0)
    assert not any("text" in plain.record(n).conversations[0][0].text for n in range(60))
    assert {turn.role for turn in plain.record(0).conversations[0]} == {"assistant"}
    source = SceneTexts(weights={"described": 1, "listed": 1}, questions_per_text=4)
    lengths = Counter()
    for n in range(100):
        (turns,) = source.record(n).conversations
        sentence, first = turns[0].text.split(". ")  # the text is told once
        questions = [first, *(turn.text for turn in turns[2::2])]
        assert len(set(questions)) == len(questions) and not any(". " in question for question in questions)
        assert [turn.role for turn in turns] == ["user", "assistant"] * len(questions)
        for question, answer in zip(questions, turns[1::2]):
            assert solve(question, scene_of(sentence))[1] == answer.text
        lengths[len(questions)] += 1
    assert max(lengths) == 4 and lengths[4] > 80


# ---- scenes from words ----


def test_poses_and_relates_what_is_said_on_any_canvas():
    for n in range(40):
        scene = parse_scene('A Red circle is left of the big blue STAR above small pink cross / teal ring, text "a7k"',
                            np.random.default_rng(n))
        red, blue, pink, teal = scene.objects
        assert [thing.pair for thing in scene.objects] == ["red circle", "blue star", "pink cross", "teal ring"]
        assert blue.size == "big" and pink.size == "small" and scene.string == "A7K" and scene.canvas == 64
        assert blue.x - red.x >= 6 and pink.y - blue.y >= 6
        for one, other in itertools.combinations(scene.objects, 2):
            assert math.dist((one.x, one.y), (other.x, other.y)) >= one.radius + other.radius + 1.5
        left, top, right, bottom = scene.string_box
        assert 0 < left < right < 64 and 0 < top < bottom < 64
    assert {parse_scene("red circle", np.random.default_rng(n)).objects[0].size for n in range(20)} == {"small", "big"}
    distances = []
    for n in range(150):
        one, two, three, four = parse_scene(
            "small red circle right of small blue ring below small teal star and small green ring",
            np.random.default_rng(n), 96,
        ).objects
        distances += [one.x - two.x, two.y - three.y]
    assert 6 <= min(distances) < 7
    row = parse_scene("red ring left of blue ring left of teal ring left of pink ring left of red cross",
                      np.random.default_rng(0))
    assert [thing.color for thing in row.from_left] == ["red", "blue", "teal", "pink", "red"]
    assert row.string is None and row.string_box is None
    assert parse_scene("red circle and and", np.random.default_rng(0), 40).canvas == 40
    with pytest.raises(ValueError, match="39 px is too small"):
        parse_scene("red circle", np.random.default_rng(0), 39)


@pytest.mark.parametrize("text, message", [
    ("red circel", "unknown word 'circel'. Did you mean 'circle'"),
    ("red circle left blue star", "unknown word 'left'. Did you mean 'left of'"),
    *((text, "is not one object")
      for text in ("red", "circle", "red blue circle", "red circle ring", "small big red circle")),
    *((text, "needs an object on both sides")
      for text in ("red circle text A7K above", "above red circle", "red circle, above blue ring")),
    ("", "no object is described"), ("text A7K", "no object is described"),
    ("red circle text A", "the text 'A' cannot be drawn"), ("red circle text ACEF", "the text 'ACEF' cannot be drawn"),
    ("red circle reading A0K", "the text 'A0K' cannot be drawn"), ("red circle text", "the text '' cannot be drawn"),
    ("red circle text AC text AE", "holds one string, found 2: AC, AE"),
    (" and ".join(["big red circle"] * 12), "found no room on 64 x 64 px for the 12 objects"),
])
def test_says_what_is_wrong(text, message):
    with pytest.raises(ValueError) as error:
        parse_scene(text, np.random.default_rng(0))
    assert message in str(error.value)
