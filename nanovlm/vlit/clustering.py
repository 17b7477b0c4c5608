"""Two ways to count what kinds of text a data set holds: Ego-Splitting over words, DBSCAN over vectors.

Both are connected components in the end: of the persona graph, and of the points with many neighbours.

  Ego-Splitting   Epasto et al., KDD 2017, with components at both levels, as the VLIT review says
  DBSCAN          Ester et al., KDD 1996; as reviewed by Schubert et al., TODS 42 (2017)
  Vendi score     Friedman & Dieng, arXiv:2210.02410: how many different things, without a threshold

Taken literally, as indicators, the first two reward bad data: Ego-Splitting counts more the more it is given, and
DBSCAN calls answers that all differ noise, so that it finds no cluster in them. Hence `instruction_clusters` and
`response_clusters` in diversity.py fix the sample size and let a point be a cluster of its own.

    N points, D width, V different words
"""

from itertools import combinations

import numpy

BLOCK = 512  # points whose distances to all others are in memory at once
ROUNDING = 1e-6  # of a cosine; it must not part a point from its copy


def cooccurrence(texts, min_count=1):
    """The graph of words that stand in one text.

    Args:
      texts: iterable of lists of words. min_count: texts that two words must share to be joined.
    Returns: {word: set of its neighbours}; a word without a neighbour is there too.
    """
    graph, counts = {}, {}
    for words in texts:
        unique = sorted(set(words))
        for word in unique:
            graph.setdefault(word, set())
        for pair in combinations(unique, 2):
            counts[pair] = counts.get(pair, 0) + 1
    for (one, other), count in counts.items():
        if count >= min_count:
            graph[one].add(other)
            graph[other].add(one)
    return graph


def components(nodes, neighbours):
    """Connected components among some nodes.

    Args:
      nodes: iterable of the nodes that take part. neighbours: {node: set}; others than `nodes` in it are left out.
    Returns: list of sets, in the order of the first node of each.
    """
    waiting, found = dict.fromkeys(nodes), []
    for start in list(waiting):
        if start not in waiting:
            continue
        del waiting[start]
        members, edge = {start}, [start]
        while edge:
            near = neighbours[edge.pop()]
            # through the smaller of the two: in a dense neighbourhood the first few nodes leave almost none waiting
            new = [n for n in near if n in waiting] if len(near) < len(waiting) else [n for n in waiting if n in near]
            for node in new:
                del waiting[node]
            members.update(new)
            edge += new
        found.append(members)
    return found


def ego_splitting(graph):
    """Overlapping clusters: a word belongs to as many as its neighbourhood falls apart into.

    1. Every node's ego-net, its neighbours without itself, falls into components; each gives the node one persona.
    2. Of an edge u-v, the persona of u that sees v is joined with the persona of v that sees u.
    3. The components of the persona graph are the clusters.

    Args:
      graph: {node: set of its neighbours}, both ways.
    Returns: list of lists of nodes, one node per persona; a node without neighbours is a cluster of its own.
    """
    persona_of = {}  # (node, neighbour) -> the persona of node that sees this neighbour
    owners = []  # persona -> node
    for node, near in graph.items():
        parts = components(near, graph) if near else [()]
        for part in parts:
            for other in part:
                persona_of[node, other] = len(owners)
            owners.append(node)
    joined = {persona: set() for persona in range(len(owners))}
    for (node, other), persona in persona_of.items():
        joined[persona].add(persona_of[other, node])
    return [[owners[persona] for persona in cluster] for cluster in components(joined, joined)]


def dbscan(points, eps, min_samples):
    """Density-based clusters by cosine distance, blockwise: exact, O(N² D) time, O(N) memory beside a block.

    A point with at least min_samples points within eps, itself counted, is a core; cores within eps of one another are
    of one cluster; another point belongs to the cluster of a core within eps (of several, to the one that begins with
    the earliest point), or is noise.

    Args:
      points: float32[N, D], each of length 1. eps: largest 1 - cosine. min_samples: int, at least 1.
    Returns: int64[N]: number of the cluster from 0, in order of its first core; -1 = noise.
    Raises: ValueError for options out of range.
    """
    if min_samples < 1 or not 0 <= eps <= 2:
        raise ValueError(f"eps {eps} and min_samples {min_samples}; eps lies in [0, 2], min_samples is 1 or more")
    near = [
        (points[begin : begin + BLOCK] @ points.T >= 1 - eps - ROUNDING).sum(1)
        for begin in range(0, len(points), BLOCK)
    ]
    degree = numpy.concatenate(near or [numpy.zeros(0, int)])
    core = degree >= min_samples
    root = numpy.arange(len(points))  # of a core: the earliest core known to be of its cluster
    for row, others in _neighbours(points, eps, core & (degree > 1)):
        roots = root[others[core[others]]]
        if roots.min() < roots.max():
            root[numpy.isin(root, roots) & core] = roots.min()
    for row, others in _neighbours(points, eps, ~core & (degree > 1)):
        root[row] = root[others[core[others]]].min(initial=len(points))
    names = {first: place for place, first in enumerate(numpy.unique(root[core]).tolist())}
    return numpy.array([names.get(one, -1) for one in root.tolist()], dtype=numpy.int64)


def _neighbours(points, eps, wanted):
    """(point, int64[n] all points within eps) of every wanted point, bool[N]; a block without one costs nothing."""
    for begin in range(0, len(points), BLOCK):
        rows = begin + numpy.flatnonzero(wanted[begin : begin + BLOCK])
        if len(rows):
            near = points[rows] @ points.T >= 1 - eps - ROUNDING
            yield from ((row, numpy.flatnonzero(near[place])) for place, row in enumerate(rows))


def vendi(points):
    """exp of the entropy of the eigenvalues of K / N, K the cosine similarities: float from 1 (all equal) to N.

    points: float32[N, D], each of length 1, N at least 1. K's eigenvalues but zeros are those of points' D x D product.
    """
    values = numpy.linalg.eigvalsh(points.T.astype(numpy.float64) @ points / len(points))
    values = values[values > 1e-12]
    return float(numpy.exp(-(values * numpy.log(values)).sum()))
