"""The source of drawn scenes: determinism, options, errors; and the majority baseline."""

import pytest

from nanovlm.data.records import Record, Turn
from nanovlm.data.scene_questions import CAPTIONS, NAME_PROMPT, REGIONS
from nanovlm.data.scene_questions import Scenes, majority_baseline
from nanovlm.data.scenes import COLORS


def test_a_record_depends_on_seed_and_number_alone():
    def content(source, n):
        record = source.record(n)
        return record.visuals[0].key, record.visuals[0].frames[0].tobytes(), record.conversations, record.kinds

    for split in ("train", "new", "unseen_pairs", "reading"):
        one, other = Scenes(split, "both", seed=3, length=5), Scenes(split, "both", seed=3, length=5)
        backwards = [content(other, n) for n in reversed(range(8))]
        assert [content(one, n) for n in range(8)] == backwards[::-1]
        assert len({pixels for _, pixels, _, _ in backwards}) == 8  # goes on beyond its length with new pictures
        assert content(Scenes(split, "both", seed=4), 0)[:2] != content(one, 0)[:2] and len(one) == 5
    assert content(Scenes("new"), 0)[1] != content(Scenes("train"), 0)[1]
    asked_otherwise = content(Scenes("train", "captions", seed=3), 0)
    assert asked_otherwise[:2] == content(Scenes("train", "questions", seed=3), 0)[:2]  # same key, same picture
    changes = {"seed": 1, "canvas": 48, "max_objects": 3, "min_objects": 2, "string_share": 0.1, "split": "new"}
    keys = {content(Scenes(**{option: value}), 1)[0] for option, value in changes.items()}
    assert len(keys | {content(Scenes(), 1)[0]}) == 7 and Scenes("unseen_pairs").name == "scenes_unseen_pairs"


def test_names_say_all_of_a_picture():
    source = Scenes(kind="names", seed=3, string_share=0.5)
    with_string = 0
    for n in range(40):
        scene, record = source.scene(n), source.record(n)
        said = [conversation[-1].text for conversation in record.conversations]
        expected, places = set(), {}
        for thing in scene.objects:
            third = scene.canvas / 3
            place = REGIONS[int(thing.y // third)][int(thing.x // third)]
            expected |= {f"{thing.color} {thing.shape}", thing.shape, thing.color, f"{thing.size} {thing.shape}"}
            expected.add(f"{thing.shape} at the {place}")
            places[f"{thing.color} {thing.shape}", thing.x / 64, thing.y / 64] = 5
        if scene.string:
            with_string += 1
            ranked = [f"{rank} {symbol}" for rank, symbol in zip(("first", "second", "third"), scene.string)]
            expected |= {*scene.string, *ranked}
            left, top, right, bottom = (side / 64 for side in scene.string_box)
            regions = [region for name, region in zip(said, record.regions) if name in ranked]
            assert all(left < x < right and y == pytest.approx((top + bottom) / 2) for x, y in regions)
            assert [x for x, _ in regions] == sorted(x for x, _ in regions)
        assert set(said) == expected and len(record.regions) == len(said)
        assert all((name, x, y) in places for name, (x, y) in zip(said, record.regions) if name.count(" ") == 1
                   and name.split()[0] in COLORS)
        assert record.kinds == ("name",) * len(said)
        assert all(conversation[0].parts == (0, NAME_PROMPT) for conversation in record.conversations)
    assert with_string > 5


def test_options_shape_the_pictures_and_the_kinds():
    source = Scenes("train", "captions", min_objects=2, max_objects=2, canvas=80, string_share=1.0)
    for n in range(20):
        record, scene = source.record(n), source.scene(n)
        assert record.visuals[0].frames[0].size == (80, 80) and len(scene.objects) == 2 and scene.string
        assert len(record.kinds) == 1 and record.kinds[0] in CAPTIONS
    shares = [sum(bool(Scenes(string_share=share).scene(n).string) for n in range(400)) / 400 for share in (0, 0.3)]
    assert shares[0] == 0 and 0.24 < shares[1] < 0.36
    assert all(len(Scenes(questions_per_picture=2).record(n).kinds) == 2 for n in range(20))
    assert {Scenes("train", "captions", weights={"short_caption": 1}).record(n).kinds for n in range(9)} == {
        ("short_caption",)}
    assert not any("caption" in kind for n in range(50) for kind in Scenes().record(n).kinds)


def test_a_picture_without_the_wanted_question_is_replaced():
    source = Scenes(weights={"relation": 1.0}, seed=2)
    keys = [source.record(n).visuals[0].key for n in range(60)]
    assert {source.record(n).kinds[0] for n in range(60)} == {"relation"}
    assert any(not key.endswith(".0") for key in keys)
    with pytest.raises(ValueError, match="none of 100 pictures of up to 1 objects gave a question of .* relation"):
        Scenes(weights={"relation": 1.0}, max_objects=1).record(0)


@pytest.mark.parametrize("options, message", [
    ({"split": "trian"}, "unknown split 'trian'. Did you mean 'train'"),
    ({"kind": "question"}, "unknown kind 'question'. Did you mean 'questions'"),
    ({"weights": {"colour": 1}}, "unknown type 'colour'. Did you mean 'color'"),
    ({"weights": {"color": -1}}, "the weight of 'color' is -1"),
    ({"weights": {"caption": 1}}, "none of color, shape"),
    ({"kind": "both", "weights": {"color": 1}}, "none of caption, short_caption"),
    ({"questions_per_picture": 0}, "questions_per_picture is 0"),
    ({"string_share": 1.1}, "string_share is 1.1"),
    ({"string_share": -0.1}, "string_share is -0.1"),
    ({"seed": -1}, "seed -1"),
    ({"length": 0}, "length 0"),
])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        Scenes(**options)
    assert message in str(error.value)
    assert len(Scenes()) == 10_000
    assert len(Scenes(length=1, questions_per_picture=1, string_share=1)) == 1


def records(*asked):
    return [Record("r", (), ((Turn("user", (question,)), Turn("assistant", (answer,))),), (kind,))
            for kind, question, answer in asked]


def test_majority_baseline():
    by_question = [("k", "q1", "a")] * 3 + [("k", "q2", "b")] * 3 + [("k", "q2", "a")]
    assert majority_baseline(records(*by_question)) == {"k": 6 / 7}
    by_type = [("k", f"q{n}", "yes" if n < 6 else "no") for n in range(10)]
    assert majority_baseline(records(*by_type, ("other", "q", "x"))) == {"k": 0.6, "other": 1.0}
    training = records(("k", "q1", "b"), ("k", "q1", "b"), ("k", "q2", "a"))
    assert majority_baseline(records(("k", "q1", "b"), ("k", "q2", "b"), ("k", "q3", "a")), training) == {"k": 2 / 3}
    asked = records(("k", "q1", "b"), ("k", "q2", "a"), ("k", "q3", "b"), ("k", "q3", "b"))
    assert majority_baseline(asked, training) == {"k": 1.0}
    with pytest.raises(ValueError, match="no question of the type 'k'"):
        majority_baseline(asked, records(("kk", "q", "a")))


def test_no_blind_model_scores_much_on_new_pictures():
    new, training = ([Scenes(split).record(n) for n in range(600)] for split in ("new", "train"))
    limits = {"color": 0.25, "shape": 0.3, "count": 0.55, "existence": 0.58, "place": 0.25, "relation": 0.45,
              "size": 0.58, "reading": 0.03}
    for shares in (majority_baseline(new, training), majority_baseline(new)):
        assert set(shares) == set(limits)
        assert all(shares[kind] < limit for kind, limit in limits.items()), shares
