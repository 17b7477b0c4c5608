"""Mixture: exact shares, exact resume."""

import json

import pytest

from nanovlm.data.feed import Mixture


class Counter:
    """A source whose n-th record is (name, n)."""

    def __init__(self, name):
        self.name = name

    def __len__(self):
        return 5

    def record(self, n):
        return self.name, n


SOURCES = {name: Counter(name) for name in "abc"}


def draw(mixture, number):
    return [mixture.draw() for _ in range(number)]


def test_shares_are_exact_at_every_moment():
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    mixture = Mixture(SOURCES, weights)
    drawn = {name: 0 for name in weights}
    for n in range(1, 301):
        name, place = mixture.draw()
        assert place == drawn[name]  # every source is read in its own order, nothing left out
        drawn[name] += 1
        for source, weight in weights.items():
            assert abs(drawn[source] - n * weight) < 1
    assert drawn == {"a": 210, "b": 60, "c": 30} == mixture.drawn


def test_weights_are_relative():
    for weights in ({"a": 3, "b": 1}, {"a": 0.3, "b": 0.1}, {"a": 3e-7, "b": 1e-7}):
        assert [name for name, _ in draw(Mixture(SOURCES, weights), 8)] == list("aabaaaba")


def test_ties_go_to_the_one_named_first():
    assert [name for name, _ in draw(Mixture(SOURCES, {"b": 1, "a": 1}), 4)] == list("baba")
    # 0.1 + 0.2 is not 0.3 in floating point; as written it is
    names = [name for name, _ in draw(Mixture(SOURCES, {"a": 0.1, "b": 0.2, "c": 0.3}), 6)]
    assert names == [name for name, _ in draw(Mixture(SOURCES, {"a": 1, "b": 2, "c": 3}), 6)]


def test_only_named_sources_are_read():
    assert {name for name, _ in draw(Mixture(SOURCES, {"c": 2}), 5)} == {"c"}


def test_resume_is_exact_from_any_moment_and_through_sorted_json():
    weights = {"c": 0.5, "a": 0.3, "b": 0.2}
    whole = draw(Mixture(SOURCES, weights), 40)
    for cut in (0, 1, 7, 23):
        first = Mixture(SOURCES, weights)
        draw(first, cut)
        second = Mixture(SOURCES, weights)
        second.resume(json.loads(json.dumps(first.drawn, sort_keys=True)))
        assert draw(second, 40 - cut) == whole[cut:]


def test_what_it_resumes_from_stays():
    drawn, mixture = {"a": 0}, Mixture(SOURCES, {"a": 1})
    mixture.resume(drawn)
    mixture.draw()
    assert drawn == {"a": 0} and mixture.drawn == {"a": 1}


@pytest.mark.parametrize(
    "state, message",
    [
        ({"a": 1}, r"reads \['a'\], not \['a', 'b'\]"),
        ({"a": 1, "c": 1}, r"reads \['a', 'c'\]"),
    ],
)
def test_bad_states(state, message):
    mixture = Mixture(SOURCES, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=message):
        mixture.resume(state)
    assert mixture.drawn == {"a": 0, "b": 0}
