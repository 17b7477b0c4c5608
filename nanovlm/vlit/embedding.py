"""Texts as vectors, without a trained model: hashed 1- and 2-grams, TF-IDF, and a random projection.

Two texts are close if they share rare words. Paraphrases are not found; simcse.py trains an encoder for that.
Source of the projection: Johnson & Lindenstrauss; Achlioptas, J. Comput. Syst. Sci. 66 (2003).
"""

import zlib

import numpy

from nanovlm.vlit.words import tokens

BUCKETS, WIDTH = 1 << 14, 256
SEED = 0  # of the projection, which is the same for all data sets


def grams(text):
    """Words and pairs of neighbouring words: list of str."""
    words = tokens(text)
    return words + [f"{one} {other}" for one, other in zip(words, words[1:])]


def bucket(gram):
    """int in [0, BUCKETS), the same in every run."""
    return zlib.crc32(gram.encode("utf-8", "replace")) % BUCKETS


def tfidf_vectors(texts):
    """Vectors of a sample of texts; how rare a gram is, the sample itself says.

    Args:
      texts: list of N str.
    Returns: float32[N, WIDTH], each of length 1; a text without words is a vector of its own direction, so that it is
      like no other but itself.
    """
    projection = numpy.random.default_rng(SEED).standard_normal((BUCKETS, WIDTH), dtype=numpy.float32)
    rows = [numpy.unique([bucket(gram) for gram in grams(text) or [repr(text)]], return_counts=True) for text in texts]
    holding = numpy.zeros(BUCKETS)
    for places, _ in rows:
        holding[places] += 1
    idf = numpy.log((1 + len(texts)) / (1 + holding)) + 1
    vectors = numpy.stack(
        [(idf[places] * counts).astype(numpy.float32) @ projection[places] for places, counts in rows]
    )
    return vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)


def distinct_2(texts):
    """Different pairs of neighbouring words among all pairs: float, 0 if there is no pair.

    Source: Li et al., arXiv:1510.03055.
    """
    pairs = [pair for text in texts for pair in zip(tokens(text), tokens(text)[1:])]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
