"""How many kinds of text there are: texts as vectors, DBSCAN over them, Ego-Splitting over words, the Vendi score.

  TF-IDF          of hashed words and pairs of words, made short by a random projection (Johnson & Lindenstrauss). Two
                  texts are close if they share rare words; paraphrases are not found, SimCSE does that
  SimCSE          arXiv:2104.08821: a sentence encoder that learns from the sentences alone, see SentenceEncoder
  DBSCAN          Ester et al., KDD 1996; as reviewed by Schubert et al., TODS 42 (2017)
  Ego-Splitting   Epasto et al., KDD 2017, with components at both levels, as the VLIT review says
  Vendi score     Friedman & Dieng, arXiv:2210.02410: how many different things, without a threshold

TF-IDF and DBSCAN are scikit-learn's (optional: pip install scikit-learn).

    N points, D width, B sentences, T words, W width of a sentence
"""

import importlib
import zlib

import numpy
import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.vlit.words import tokens

BUCKETS, WIDTH = 1 << 14, 256  # of the hashed grams; of the projection
MEMORY = 64  # MiB of distances at once
ROUNDING = 1e-6  # of a cosine; it must not part a point from its copy
TEMPERATURE, DROPOUT = 0.05, 0.1  # the paper's
ROWS, CHANNELS, LONGEST = 4096, 64, 48  # rows of the embedding; channels; words of a sentence, the rest is cut
STEPS, BATCH, RATE = 60, 64, 1e-3  # optimizer steps, sentences, Adam's


def sklearn_module(name):
    """A module of scikit-learn. Raises: ImportError that says how to install it."""
    try:
        return importlib.import_module(f"sklearn{name}")
    except ImportError as error:
        raise ImportError("the diversity of texts needs the package scikit-learn: pip install scikit-learn") from error


def pairs_of(words):
    """Pairs of neighbouring words: list of str."""
    return list(map(" ".join, zip(words, words[1:])))


def grams(text):
    """Words and pairs of neighbouring words: list of str; a text without words is one gram of its own."""
    words = tokens(text)
    return words + pairs_of(words) or [repr(text)]


def tfidf_vectors(texts):
    """Texts as float32[N, WIDTH] of length 1; how rare a gram is, the texts themselves say."""
    text, projection = sklearn_module(".feature_extraction.text"), sklearn_module(".random_projection")
    hashing = text.HashingVectorizer(analyzer=grams, n_features=BUCKETS, alternate_sign=False, norm=None)
    weighted = text.TfidfTransformer().fit_transform(hashing.transform(texts))
    vectors = projection.GaussianRandomProjection(WIDTH, random_state=0).fit_transform(weighted)
    return (vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)).astype(numpy.float32)


def word_ids(texts):
    """int[B, T], right padded with 0; a text without words is one word of its own."""
    words = [(tokens(text) or [repr(text)])[:LONGEST] for text in texts]
    rows = [[1 + zlib.crc32(word.encode("utf-8", "replace")) % (ROWS - 1) for word in row] for row in words]
    return nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)


class SentenceEncoder(nn.Module):
    """One transformer block over hashed words, all of which see one another; the mean over words is the sentence.

    Every sentence goes through the same encoder twice; dropout makes two different vectors of it, which are to find
    each other among all second vectors of the batch:

        l_i = -log  exp(sim(h_i, h_i') / τ) / Σ_j exp(sim(h_i, h_j') / τ)         SimCSE, arXiv:2104.08821, Eq. 2

    (The VLIT review prints the same vector on both sides of the numerator in its Eq. 2, and i for j below the sum.)
    Differs from the paper: a small encoder, trained here on the data set's own responses, instead of BERT; words become
    numbers by hashing, so that no tokenizer is needed; the mean over words, not [CLS].
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(ROWS, CHANNELS)
        self.positions = nn.Parameter(torch.randn(LONGEST, CHANNELS) * 0.02)
        self.block = nn.TransformerEncoderLayer(CHANNELS, 4, 2 * CHANNELS, DROPOUT, batch_first=True, norm_first=True)
        self.dropout = nn.Dropout(DROPOUT)
        self.project = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, ids):
        """int[B, T] -> float[B, W] of length 1."""
        inside = ids > 0  # B T
        x = self.dropout(self.embedding(ids) + self.positions[: ids.shape[1]])
        x = self.block(x, src_key_padding_mask=~inside) * inside[..., None]
        return F.normalize(self.project(x.sum(1) / inside.sum(1, keepdim=True)), dim=-1)


def simcse_loss(first, second):
    """Eq. 2 as a mean over the batch: float[B, W] twice, of length 1 -> float[]."""
    return F.cross_entropy(first @ second.T / TEMPERATURE, torch.arange(len(first)))


def train_encoder(texts, steps=STEPS):
    """An encoder of these texts: SentenceEncoder in evaluation mode. Equal texts never meet in a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        different = list(dict.fromkeys(texts))
        model = SentenceEncoder()
        optimizer = torch.optim.Adam(model.parameters(), RATE)
        for _ in range(steps if len(different) > 1 else 0):
            chosen = torch.randperm(len(different))[:BATCH].tolist()
            ids = word_ids([different[place] for place in chosen])
            optimizer.zero_grad()
            simcse_loss(model(ids), model(ids)).backward()
            optimizer.step()
    return model.eval()


def simcse_vectors(texts):
    """Vectors by an encoder trained on the texts themselves: list of N str -> float32[N, CHANNELS] of length 1."""
    model = train_encoder(texts)
    with torch.no_grad():
        found = [model(word_ids(texts[begin : begin + 256])) for begin in range(0, len(texts), 256)]
    return torch.cat(found).numpy()


def distinct_2(texts):
    """Share of different pairs of neighbouring words among all pairs (Li et al., arXiv:1510.03055); 0 without any."""
    pairs = [pair for text in texts for pair in pairs_of(tokens(text))]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def dbscan(points, eps, min_samples):
    """Clusters of float32[N, D] of length 1, by 1 - cosine: int64[N], from 0 in order; -1 = noise."""
    cluster = sklearn_module(".cluster").DBSCAN(eps=eps + ROUNDING, min_samples=min_samples, metric="cosine")
    _, first, places, counts = numpy.unique(points, axis=0, return_index=True, return_inverse=True, return_counts=True)
    order = numpy.argsort(first)  # copies are one point with a weight; the points keep their order
    with sklearn_module("").config_context(working_memory=MEMORY):
        labels = cluster.fit(points[first[order]], sample_weight=counts[order]).labels_
    return labels[numpy.argsort(order)[places.reshape(-1)]]


def vendi(points):
    """exp of the entropy of the eigenvalues of K / N, K the cosine similarities: float from 1 (all equal) to N.

    points: float32[N, D], each of length 1, N at least 1. K's eigenvalues but zeros are those of points' D x D product.
    """
    values = numpy.linalg.eigvalsh(points.T.astype(numpy.float64) @ points / len(points))
    values = values[values > 1e-12]
    return float(numpy.exp(-(values * numpy.log(values)).sum()))


def cooccurrence(texts):
    """The graph of words that stand together in a text (a list of words): {word: set of neighbours}."""
    graph = {}
    for words in map(set, texts):
        for word in words:
            graph.setdefault(word, set()).update(words - {word})
    return graph


def components(nodes, neighbours):
    """Connected components among some nodes; others in {node: set of neighbours} are left out: list of sets."""
    waiting, found = set(nodes), []
    while waiting:
        edge = [waiting.pop()]
        found.append(set(edge))
        while edge:
            new = neighbours[edge.pop()] & waiting  # looks at the smaller: a dense neighbourhood leaves few waiting
            waiting -= new
            found[-1] |= new
            edge += new
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
    persona_of, owners = {}, []  # (node, neighbour) -> the persona of node that sees it; persona -> node
    for node, near in graph.items():
        for part in components(near, graph) or [()]:
            persona_of |= dict.fromkeys(((node, other) for other in part), len(owners))
            owners.append(node)
    joined = [set() for _ in owners]
    for (node, other), persona in persona_of.items():
        joined[persona].add(persona_of[other, node])
    return [[owners[persona] for persona in cluster] for cluster in components(range(len(owners)), joined)]
