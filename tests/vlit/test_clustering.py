"""Ego-Splitting, DBSCAN and the Vendi score against slow definitions, small cases by hand, and real texts."""

import json
import math
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import networkx
import numpy
import pytest

from nanovlm.vlit.clustering import WIDTH, cooccurrence, dbscan, distinct_2, ego_splitting, tfidf_vectors, vendi
from nanovlm.vlit.indicators import Helpers, Reservoir, Settings, instruction_diversity, measure, response_diversity

SHARED = os.environ.get("NANOVLM_SHARED")


def naive_ego_splitting(graph):
    """The paper's two steps with networkx's components."""
    personas = networkx.Graph()
    owner = {}
    for node in graph:
        parts = list(networkx.connected_components(graph.subgraph(graph[node])))
        for part in parts or [set()]:
            owner[node, frozenset(part)] = node
            personas.add_node((node, frozenset(part)))
    for one, other in graph.edges:
        mine = next(p for p in personas if p[0] == one and other in p[1])
        theirs = next(p for p in personas if p[0] == other and one in p[1])
        personas.add_edge(mine, theirs)
    return sorted(sorted(owner[p] for p in part) for part in networkx.connected_components(personas))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", (0.05, 0.15, 0.5))
def test_ego_splitting_is_the_papers(seed, share):
    made = networkx.gnp_random_graph(24, share, seed=seed)
    assert sorted(map(sorted, ego_splitting({node: set(made[node]) for node in made}))) == naive_ego_splitting(made)


def test_a_word_between_two_circles_belongs_to_both():
    texts = ["cat", "dog", "pet", "dog"], ["bank", "cat", "money"]  # "cat" stands between two triangles
    assert sorted(map(sorted, ego_splitting(cooccurrence(texts)))) == [["bank", "cat", "money"], ["cat", "dog", "pet"]]


def test_dbscan_finds_chains_copies_and_noise():
    angles = numpy.array([0.0, 0.1, 0.2, 1.0, 1.0, 2.0, 0.3])
    points = numpy.stack([numpy.cos(angles), numpy.sin(angles)], 1).astype(numpy.float32)
    eps = 1 - math.cos(0.105)
    assert dbscan(points, eps, 1).tolist() == [0, 0, 0, 1, 1, 2, 0]
    assert dbscan(points, eps, 2).tolist() == [0, 0, 0, 1, 1, -1, 0]  # a copy is a neighbour
    assert dbscan(points, eps, 3).tolist() == [0, 0, 0, -1, -1, -1, 0]  # the chain's ends belong to a core
    assert dbscan(points[[5, 0, 5]], 0, 1).tolist() == [0, 1, 0]  # only copies


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        measure("before the file is looked at")


def test_vendi_counts_different_things():
    assert vendi(numpy.eye(7)) == pytest.approx(7)
    assert vendi(numpy.repeat(numpy.eye(3), 5, axis=0)) == pytest.approx(3)
    points = numpy.random.default_rng(1).standard_normal((12, 5))
    points /= numpy.linalg.norm(points, axis=1, keepdims=True)
    values = numpy.linalg.eigvalsh(points @ points.T / 12)[-5:]
    assert vendi(points) == pytest.approx(math.exp(-(values * numpy.log(values)).sum()))
    assert distinct_2(["a b a b", "b a"]) == 2 / 4  # ab ba ab | ba
    assert distinct_2(["yes", ""]) == 0


def test_vectors_of_texts():
    texts = ["A red car stands here.", "a RED car stands here", "Two dogs are asleep.", "", "?!"]
    points = tfidf_vectors(texts)
    assert points.shape == (5, WIDTH) and numpy.allclose(numpy.linalg.norm(points, axis=1), 1, atol=1e-5)
    assert points[0] @ points[1] == pytest.approx(1, abs=1e-5)
    for one, other in ((0, 2), (3, 4), (0, 3)):
        assert abs(points[one] @ points[other]) < 0.3
    rare = tfidf_vectors(["the the zebra", "the the horse", "the the cow", "the zebra"])
    assert rare[0] @ rare[3] > rare[1] @ rare[3]  # the rare word decides


def diversity(texts):
    """The response diversity of one draw of texts: (value, what stands beside it)."""
    responses = Reservoir(len(texts), 0)
    responses.kept = texts
    found = response_diversity(SimpleNamespace(settings=Settings(), helpers=Helpers(), responses=responses))
    return found.value, found.beside


def test_good_answers_are_noise_to_the_literal_form():
    rng, words = random.Random(0), [f"word{n}" for n in range(4000)]
    value, good = diversity([" ".join(rng.sample(words, 20)) for _ in range(60)])
    assert (value, good["literal"], good["noise"]) == (pytest.approx(math.log(60)), None, 1)
    value, bad = diversity(["yes", "no"] * 30)
    assert (value, bad["literal"], bad["noise"]) == (pytest.approx(math.log(2)), pytest.approx(math.log(2)), 0)
    assert good["vendi"] > 20 * bad["vendi"] and bad["vendi"] == pytest.approx(2, abs=0.01)


def test_instruction_clusters_are_a_mean_over_tasks():
    one = ["paint cat dog pet fur tail", "bank cat money loan cash vault"]  # two large clusters, "cat" in both
    for by_task, smallest, value, beside in (
        ({"a": one, "b": ["red"]}, 5, 1, {"literal": 1.5, "a": 2, "b": 0}), ({"a": one}, 7, 0, {"literal": 2, "a": 0}),
    ):  # fmt: skip
        found = instruction_diversity(SimpleNamespace(settings=Settings(smallest=smallest), by_task=by_task))
        assert (found.value, found.beside) == (value, beside)


@pytest.mark.skipif(not SHARED, reason="the real texts are in the folder that NANOVLM_SHARED names")
def test_on_real_answers_the_literal_form_finds_nothing():
    path = Path(SHARED, "data", "llava_eval", "playground", "coco2014_val_qa_eval", "qa90_gpt4_answer.jsonl")
    answers = [json.loads(line)["text"] for line in path.read_text().split("\n") if line][:80]
    _, found = diversity(answers)
    assert (found["literal clusters"], found["clusters"]) == (0, 80) and found["vendi"] > 50
