"""Caption metrics: BLEU, ROUGE-L and CIDEr-D over Penn-Treebank tokens, from scratch.

    BLEU     how many of the caption's n-grams some reference holds       Papineni et al., ACL 2002
    ROUGE-L  the longest common subsequence with a reference              Lin, ACL 2004 workshop
    CIDEr-D  cosine of n-gram counts, rare n-grams weighing more          Vedantam et al., arXiv:1411.5726, Sec. 4 and 8

They agree with the COCO caption evaluation (arXiv:1504.00325); METEOR and SPICE need Java programs and are left out.
Captions are lists of tokens here; `tokenize` makes them from text.
"""

import functools
import math
import re
import unicodedata
from collections import Counter

ORDERS = (1, 2, 3, 4)  # n of the n-grams, in BLEU and CIDEr
TINY, SMALL = 1e-15, 1e-9  # the official BLEU's guards against a division by zero
BETA = 1.2  # ROUGE-L: how much more recall weighs than precision
SIGMA = 6.0  # CIDEr-D: bigrams of difference in length that still count as similar

# Stanford's PTBTokenizer (3.4.1, as in the COCO evaluation), as far as captions need it: alternatives in order of rank.
# Abbreviations keep their period, clitics part from their word, everything else that is joined without space stays.
ABBREVIATIONS = "mr|mrs|ms|dr|st|ave|blvd|rd|mt|ft|jr|sr|vs|etc|co|inc|ltd|corp|prof|gen|sen|rep|gov|capt|lt|sgt"
PIECES = re.compile(
    rf"""
    https?://\S+ | [\w.+-]+@[\w-]+(?:\.\w+)+          # addresses
    | \.{{2,}} | -{{2,}} | [!?]{{2,}}                 # ellipsis, dash, exclamations
    | [#@][a-z]\w*                                    # hash tags, names
    | (?:[a-z]\.)+[a-z]\.(?!\w)                       # a.m., u.s.
    | (?:{ABBREVIATIONS})\.(?!\w) | no\.(?=\s*\d)     # mr., no. 5
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:lem|gim)(?=me\b) | 't(?=is\b|was\b)
    | \d+\ \d+/\d+ | \d+(?:[.,:/]\d+)+ | '\d\d\b      # 22 3/4  3,000  10:30  1/2  '90
    | 'n' | n't\b | '(?:s|re|ve|ll|d|m)\b             # clitics
    | 'cause\b | y'(?=all\b) | \w+?(?=n't\b)
    | (?:o'clock|ma'am)\b
    | \w&\w\b                                         # a&w
    | \w+(?:(?:[-/]+|\.)\w+)*                        # two-story, black/white, end.start
    | \S
    """,
    re.VERBOSE,
)
QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "—": "--"})
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# The official list spells brackets in capitals, after everything was lower-cased: they survive, and so they do here.
REMOVED = frozenset(["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"])


def tokenize(text):
    """Penn-Treebank tokens of a caption, in lower case and without punctuation: list of str."""
    pieces = PIECES.findall(unicodedata.normalize("NFC", text).translate(QUOTES).lower())
    pieces = (BRACKETS.get(piece) or ("..." if piece.startswith("..") else piece) for piece in pieces)
    return [piece for piece in pieces if piece not in REMOVED and piece.strip("-")]


@functools.lru_cache(maxsize=16384)  # BLEU and CIDEr count the same references
def ngrams(tokens):
    """Counts of all n-grams of a tuple, n = 1 to 4: Counter of tuples; do not change it."""
    return Counter(tokens[i : i + n] for n in ORDERS for i in range(len(tokens) - n + 1))


def bleu(candidates, references):
    """Corpus BLEU-1 to BLEU-4.

    Args:
      candidates: list of captions, one per picture, each a list of tokens.
      references: list of lists of captions, the references of each picture, one at least.
    Returns: list of 4 float between 0 and 1.
    """
    right, guessed = Counter(), Counter()
    candidate_length = reference_length = 0
    for candidate, several in zip(candidates, references, strict=True):
        counted = [ngrams(tuple(reference)) for reference in several]
        for gram, count in ngrams(tuple(candidate)).items():
            right[len(gram)] += min(count, max(reference[gram] for reference in counted))  # no reference alone has more
            guessed[len(gram)] += count
        candidate_length += len(candidate)
        # the closest reference length; of two as close, the shorter
        reference_length += min((abs(len(r) - len(candidate)), len(r)) for r in several)[1]
    ratio = (candidate_length + TINY) / (reference_length + SMALL)
    brevity = math.exp(min(0.0, 1 - 1 / ratio))
    scores, product = [], 1.0
    for n in ORDERS:
        product *= (right[n] + TINY) / (guessed[n] + SMALL)
        scores.append(product ** (1 / n) * brevity)
    return scores


def common_subsequence(one, other):
    """Length of the longest common subsequence of two lists: int.

    Bit-parallel: bit i of `row` is 0 where the table of the usual recursion grows at token i of `one`, so that a whole
    row of it takes three operations. Hyyrö, Australasian Workshop on Combinatorial Algorithms 2004.
    """
    places = {}
    for place, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << place
    row = full = (1 << len(one)) - 1
    for token in other:
        found = row & places.get(token, 0)
        row = (row + found | row - found) & full
    return len(one) - row.bit_count()


def rouge_l(candidates, references):
    """ROUGE-L of every caption.

        P = max over references of LCS / |caption|,  R = max of LCS / |reference|,  F = (1 + β²) P R / (R + β² P)

    Precision and recall may stem from different references, as in the official program.
    Args: as in `bleu`.
    Returns: list of float between 0 and 1; their mean is the score of the corpus.
    """
    scores = []
    for candidate, several in zip(candidates, references):
        common = [common_subsequence(candidate, reference) for reference in several]
        precision = max(common) / max(len(candidate), 1)
        recall = max(c / max(len(reference), 1) for c, reference in zip(common, several))
        total = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / total if precision and recall else 0.0)
    return scores


def cider(candidates, references):
    """CIDEr-D of every caption against the references of the corpus, whose pictures decide how rare an n-gram is.

        g(c)  = count in c · (ln N - ln max(1, df))         df: pictures whose references hold the n-gram, of N
        s_n   = Σ min(g(c), g(r)) g(r) / (|g(c)| |g(r)|)     over the n-grams of one length n
        CIDEr = 10 · mean over n and references of s_n · exp(-Δ² / 2σ²),   Δ: difference in bigrams

    In a corpus of one picture every weight, and so every score, is 0.
    Args: as in `bleu`.
    Returns: list of float between 0 and 10; their mean is the score of the corpus.
    """
    grams = [set().union(*(ngrams(tuple(reference)) for reference in several)) for several in references]
    pictures_with = Counter(gram for several in grams for gram in several)
    log_pictures = math.log(len(references))

    def vector(caption):
        """(weights {n-gram: float}, squared length for each n, bigrams)."""
        weights, squares = {}, [0.0] * 5
        for gram, count in ngrams(tuple(caption)).items():
            weights[gram] = count * (log_pictures - math.log(max(1, pictures_with[gram])))
            squares[len(gram)] += weights[gram] * weights[gram]
        return weights, squares, max(len(caption) - 1, 0)

    def similarity(candidate, reference):
        """Mean over n of s_n, times the penalty of unequal lengths."""
        (weights, squares, bigrams), (other, other_squares, other_bigrams) = candidate, reference
        dots = [0.0] * 5
        for gram in weights.keys() & other.keys():
            dots[len(gram)] += min(weights[gram], other[gram]) * other[gram]
        lengths = [math.sqrt(one * two) if one and two else math.inf for one, two in zip(squares, other_squares)]
        cosines = [dots[n] / lengths[n] for n in ORDERS]
        return sum(cosines) / len(ORDERS) * math.exp(-((bigrams - other_bigrams) ** 2) / (2 * SIGMA**2))

    scores = []
    for candidate, several in zip(map(vector, candidates), references, strict=True):
        scores.append(sum(similarity(candidate, vector(reference)) for reference in several) * 10 / len(several))
    return scores


def caption_scores(candidates, references):
    """All metrics of a corpus.

    Args:
      candidates: list of str, one caption per picture.
      references: list of lists of str, one at least per picture.
    Returns: {"BLEU-1": …, "BLEU-4", "ROUGE-L", "CIDEr": float}.
    """
    candidates, references = [*map(tokenize, candidates)], [[*map(tokenize, several)] for several in references]
    scores = {f"BLEU-{n}": score for n, score in zip(ORDERS, bleu(candidates, references))}
    means = {"ROUGE-L": rouge_l(candidates, references), "CIDEr": cider(candidates, references)}
    return scores | {name: sum(each) / len(each) for name, each in means.items()}
