"""Samples that say the same, exactly or nearly, in a million of them.

Near: the share of common word triples (Jaccard) of two texts, estimated by MinHash: of many hash functions, how often
both texts have the same least hash (Broder, SEQUENCES 1997). Only texts that agree in a whole band of hashes are
compared (banding: Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, Sec. 3.4). Memory: 136 bytes a sample.
"""

import hashlib
from array import array

import numpy

from nanovlm.vlit.words import tokens

HASHES, BAND = 32, 4  # hash functions; rows of a band: pairs above a Jaccard of (4/32)^(1/4) = 0.6 mostly meet in one
PRIME = (1 << 31) - 1
_rng = numpy.random.default_rng(0)
FACTORS, OFFSETS = (_rng.integers(1, PRIME, HASHES, dtype=numpy.uint64) for _ in range(2))


def text_of(sample):
    """What makes a sample what it is: str, its pictures and all that is said, lower-case words alone."""
    return " ".join([*sample.images, "|", *(word for role, text in sample.turns for word in (role, *tokens(text)))])


def digest(text):
    """int of 64 bits."""
    return int.from_bytes(hashlib.blake2s(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def signature(words):
    """MinHash of the word triples of a text: uint32[HASHES]. words: list of str."""
    triples = {" ".join(words[place : place + 3]) for place in range(max(1, len(words) - 2))}
    hashes = numpy.array([digest(triple) % PRIME for triple in triples], dtype=numpy.uint64)
    return ((hashes[:, None] * FACTORS + OFFSETS) % PRIME).min(0).astype(numpy.uint32)


class Index:
    """All samples offered to it. near: least estimated Jaccard of two that count as one; None = exact ones only."""

    def __init__(self, near=0.9):
        if near is not None and not 0 < near <= 1:
            raise ValueError(f"near duplicates share between 0 and 1 of their word triples, not {near}")
        self.near, self.exact, self.pictures, self.signatures = near, array("Q"), array("Q"), array("I")

    def add(self, sample):
        """Note a sample. Two can only be near duplicates if they show the same pictures."""
        self.exact.append(digest(text_of(sample)))
        if self.near is not None:
            self.pictures.append(digest("|".join(sample.images)))
            self.signatures.frombytes(signature(tokens(" ".join(text for _, text in sample.turns))).tobytes())

    def duplicates(self):
        """{number of a sample: (number of the earliest one that it repeats, "exact duplicate" or "near duplicate")}."""
        exact, pictures, table = map(numpy.asarray, (self.exact, self.pictures, self.signatures))
        found = {later: (first, "exact duplicate") for first, later in _groups(exact)}
        table = table.reshape(-1, HASHES)
        for band in range(0, HASHES if self.near else 0, BAND):
            keys = pictures.copy()
            for column in table[:, band : band + BAND].T:
                keys = keys * numpy.uint64(0x9E3779B97F4A7C15) + column  # wraps around, as hashes may
            for first, later in _groups(keys):
                same = pictures[first] == pictures[later] and (table[first] == table[later]).mean() >= self.near
                if later not in found and same:
                    found[later] = (found.get(first, (first,))[0], "near duplicate")
        return found


def _groups(keys):
    """(first, later) of every member but the first of each group of equal keys, as int."""
    _, places, group = numpy.unique(keys, return_index=True, return_inverse=True)
    return ((first, later) for later, first in enumerate(places[group].tolist()) if first < later)
