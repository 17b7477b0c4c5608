"""What can be scored on nano's tests without looking."""

from nanovlm.data.records import Record, Turn
from nanovlm.data.scene_questions import Scenes
from nanovlm.recipes.nano_tests import majority_baseline


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


def test_no_blind_model_scores_much_on_new_pictures():
    new, training = ([Scenes(split).record(n) for n in range(600)] for split in ("new", "train"))
    limits = {"color": 0.25, "shape": 0.3, "count": 0.55, "existence": 0.58, "place": 0.25, "relation": 0.45,
              "size": 0.58, "reading": 0.03}
    for shares in (majority_baseline(new, training), majority_baseline(new)):
        assert set(shares) == set(limits)
        assert all(shares[kind] < limit for kind, limit in limits.items()), shares
