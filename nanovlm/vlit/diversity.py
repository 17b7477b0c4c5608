"""How many kinds of instruction and of response a data set holds: the review's indicators, as printed and mended.

    I   instructions of a task, as a graph of words that stand together; clusters by Ego-Splitting; mean over tasks
    R   log of the number of clusters that DBSCAN finds among the responses' vectors

As printed both reward bad data (see clustering.py). Mended: I draws the same number of instructions of every task and
counts clusters of some size alone; R lets a response be its own cluster. The report holds both forms, R with the share
of noise, distinct-2 and the Vendi score beside it. The paper states no threshold, radius, neighbour count or base of
the logarithm: those of `Options` are this project's.
"""

import math
from dataclasses import dataclass

import numpy

from nanovlm.vlit.clustering import cooccurrence, dbscan, ego_splitting, vendi
from nanovlm.vlit.embedding import distinct_2, tfidf_vectors
from nanovlm.vlit.words import content


@dataclass(frozen=True)
class Options:
    """What the paper leaves open."""

    instructions: int = 1000  # drawn of each task
    min_count: int = 1  # instructions that two words must share to be joined
    smallest: int = 5  # personas of the smallest cluster that counts
    responses: int = 10_000  # of one draw
    draws: int = 5  # of responses, where there are enough of them
    eps: float = 0.3  # cosine distance, 1 - cosine
    min_samples: int = 1  # responses within eps that make a core, itself counted
    literal_min_samples: int = 3  # of the form as printed


def instruction_clusters(by_task, options=Options()):
    """Instruction diversity.

    Args:
      by_task: {task: list of str}, a random sample of at most options.instructions each.
    Returns: {"value": mean over tasks of the clusters of at least options.smallest personas, "literal": of all
      clusters, "tasks": {task: (number of instructions, clusters that count, all clusters)}}.
    """
    tasks = {}
    for task, texts in by_task.items():
        clusters = ego_splitting(cooccurrence(map(content, texts), options.min_count))
        large = sum(len(cluster) >= options.smallest for cluster in clusters)
        tasks[task] = (len(texts), large, len(clusters))
    mean = [sum(column) / len(tasks) for column in zip(*tasks.values())] if tasks else [0, None, None]
    return {"value": mean[1], "literal": mean[2], "tasks": tasks}


def response_clusters(draws, options=Options(), embed=tfidf_vectors):
    """Response diversity.

    Args:
      draws: list of lists of str, random samples of equal size. embed: list of N str -> float32[N, D] of length 1.
    Returns: {"value", "clusters", "literal", "literal clusters", "noise": share of the literal form, "vendi",
      "distinct-2"}, means over the draws; "value" and "literal" are logs, None for no cluster.
    """
    rows = []
    for texts in draws:
        points = embed(texts)
        literal = dbscan(points, options.eps, options.literal_min_samples)
        counts = [labels.max(initial=-1) + 1 for labels in (dbscan(points, options.eps, options.min_samples), literal)]
        rows.append((*counts, (literal == -1).mean(), vendi(points), distinct_2(texts)))
    names = ("clusters", "literal clusters", "noise", "vendi", "distinct-2")
    means = dict(zip(names, numpy.mean(rows, axis=0).tolist())) if rows else dict.fromkeys(names)
    logs = {"value": means["clusters"], "literal": means["literal clusters"]}
    return {name: math.log(count) if count else None for name, count in logs.items()} | means
