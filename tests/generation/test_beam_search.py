import dataclasses
import itertools
import random

import pytest
import torch

from nanovlm.attention import causal_rows
from nanovlm.generation.beam_search import EXCLUDED, Hypothesis, beam_search
from nanovlm.cache import KeyValueCache
from nanovlm.decoder import DecoderConfig, LayerOptions
from nanovlm.generation.prefill import Rows
from nanovlm.generation.sampler import Decoding, generate
from tiny import vision_language_model

PROMPT = [1, 3, 0]
VOCABULARY, DEPTH = 4, 4


@pytest.fixture(scope="module")
def model():
    return vision_language_model(DecoderConfig(VOCABULARY, 16, 2, 1, 16, 32, (LayerOptions(),) * 2))


def search(model, prompts, decoding, generator=None):
    with torch.no_grad():
        return beam_search(Rows(model, prompts, [], [], decoding.max_new_tokens), decoding, generator)


def log_probabilities(model, prompt, texts):
    """Of every beginning of every text after a prompt, computed without a cache: float32[len(texts), length]."""
    new = torch.tensor(texts)
    ids = torch.cat([torch.tensor([prompt]).expand(len(new), -1), new], dim=1)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        hidden = model.decoder(model.decoder.embedding(ids), positions, causal_rows(*ids.shape), torch.zeros_like(ids))
        scores = model.decoder.logits(hidden).log_softmax(-1)[:, len(prompt) - 1 : -1]
    return scores.gather(2, new[..., None])[..., 0].cumsum(dim=1)


def exhaustive(model, prompt, end, length_penalty):
    """Every possible text with its score, best first."""
    texts = list(itertools.product(range(VOCABULARY), repeat=DEPTH))
    found = {}
    for text, sums in zip(texts, log_probabilities(model, prompt, texts).tolist()):
        length = text.index(end) + 1 if end in text else DEPTH
        words = text[: length - 1] if end in text else text
        found[words] = sums[length - 1] / length**length_penalty
    return sorted((Hypothesis(list(words), score) for words, score in found.items()), key=lambda one: -one.score)


@pytest.mark.parametrize("end", [None, 0, 1, 2])
@pytest.mark.parametrize("length_penalty, early_stopping", [(0.0, False), (1.0, "never"), (2.0, "never"), (0.5, "never")])
def test_enough_beams_find_what_exhaustive_search_finds(model, end, length_penalty, early_stopping):
    decoding = Decoding(
        max_new_tokens=DEPTH, num_beams=VOCABULARY ** (DEPTH - 1), num_return_sequences=10, length_penalty=length_penalty,
        early_stopping=early_stopping, eos_ids=() if end is None else (end,),
    )  # fmt: skip
    prompts = [PROMPT, [2]]
    for prompt, found in zip(prompts, search(model, prompts, decoding)):
        want = exhaustive(model, prompt, end, length_penalty)[:10]
        assert [hypothesis.tokens for hypothesis in found] == [hypothesis.tokens for hypothesis in want]
        torch.testing.assert_close([x.score for x in found], [x.score for x in want], atol=1e-4, rtol=1e-4)


def test_generate_returns_the_best_of_each_prompt_in_order(model):
    decoding = Decoding(max_new_tokens=4, num_beams=3, num_return_sequences=2, eos_ids=(1,))
    prompts = [PROMPT, [2], [0, 1]]
    want = [hypothesis.tokens for found in search(model, prompts, decoding) for hypothesis in found]
    assert generate(model, prompts, decoding) == want and len(want) == 6
    (found,) = search(model, [PROMPT], Decoding(max_new_tokens=1, num_beams=6, num_return_sequences=6))
    assert sorted(hypothesis.tokens for hypothesis in found[:4]) == [[0], [1], [2], [3]]
    assert [hypothesis.score for hypothesis in found[4:]] == [EXCLUDED] * 2


@torch.no_grad()
def test_beams_that_go_on_by_themselves_copy_nothing(model, monkeypatch):
    """Only rows that take another's history are written, and only behind the prompt."""
    copied = []
    copy_rows = KeyValueCache.copy_rows
    monkeypatch.setattr(KeyValueCache, "copy_rows", lambda self, *args: copied.append(args) or copy_rows(self, *args))
    rows = Rows(model, [[1, 2], [0]], [], [], 4)
    rows.select([0, 0, 0, 1, 1, 1])
    rows.step(torch.tensor([0, 1, 2, 0, 1, 2]))
    before = [buffer.clone() for buffer in rows.cache.layers]
    rows.reorder([0, 1, 2, 3, 4, 5])
    assert copied == []
    rows.reorder([0, 0, 2, 4, 4, 5])
    ((moved, sources, first_column),) = copied
    assert moved.tolist() == [1, 3] and sources.tolist() == [0, 4] and first_column == 2
    for buffer, old in zip(rows.cache.layers, before):
        assert torch.equal(buffer[:, :, :, :2], old[:, :, :, :2])
        assert torch.equal(buffer[:, [1, 3], :, 2], old[:, [0, 4], :, 2])


class Bigrams:
    """In place of prefill.Rows: the next id's probability depends on the last id alone, so sums can be made by hand."""

    def __init__(self, begin, table):
        self.table = torch.tensor(table).log()
        self.logits = torch.tensor([begin]).log()
        self.tokens, self.num_new = torch.zeros(1, 0, dtype=torch.long), 0

    def select(self, rows):
        self.logits, self.tokens = self.logits[rows], self.tokens[rows]

    def reorder(self, rows):
        self.select(rows)

    def seen(self, decoding):
        return self.tokens

    def step(self, tokens):
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        self.logits, self.num_new = self.table[tokens], self.num_new + 1


def test_the_dummy_token_of_transformers_4_28_by_hand():
    """a, b and the end, two new tokens, length penalty -2: a sum is multiplied by the length squared.

    a a    log(0.6 * 0.5) = -1.204, cut off: today * 2 * 2 = -4.816; with the dummy * 3 * 3 = -10.836
    a end  log(0.6 * 0.3) = -1.715, ended:   both  * 2 * 2 = -6.859
    """
    rows = ([0.6, 0.3, 0.1], [[0.5, 0.2, 0.3], [0.3, 0.4, 0.3], [1.0, 1.0, 1.0]])
    options = dict(max_new_tokens=2, num_beams=2, num_return_sequences=2, length_penalty=-2.0, eos_ids=(2,))
    today = beam_search(Bigrams(*rows), Decoding(**options))[0]
    then = beam_search(Bigrams(*rows), Decoding(**options, counts_dummy_token=True))[0]
    assert [hypothesis.tokens for hypothesis in today] == [[0, 0], [0]]
    assert [hypothesis.score for hypothesis in today] == pytest.approx([-4.816, -6.859], abs=1e-3)
    assert [hypothesis.tokens for hypothesis in then] == [[0], [0, 0]]
    assert [hypothesis.score for hypothesis in then] == pytest.approx([-6.859, -10.836], abs=1e-3)


def naive_4_28(model, prompt, decoding, generator):
    """The bookkeeping of transformers 4.28 in lists, one prompt, without a cache: list of (tokens, score), best first."""
    number, penalty, limit = decoding.num_beams, decoding.length_penalty, decoding.max_new_tokens
    beams = [([], 0.0 if decoding.do_sample or beam == 0 else -1e9) for beam in range(number)]
    ended = []

    def add(tokens, score):
        ended.append((tokens, score))
        ended.sort(key=lambda one: -one[1])
        del ended[number:]

    for step in range(limit):
        totals = []
        for tokens, score in beams:
            every = log_probabilities(model, prompt, [[*tokens, token] for token in range(VOCABULARY)])
            last = every[:, -1] - (every[:, -2] if tokens else 0)
            seen = set(zip(tokens, tokens[1:]))
            for token in range(VOCABULARY):
                if decoding.no_repeat_ngram_size == 2 and tokens and (tokens[-1], token) in seen:
                    last[token] = float("-inf")
            if step < decoding.min_new_tokens:
                last[list(decoding.eos_ids)] = float("-inf")
            last = last + score
            if decoding.do_sample:
                last = last / decoding.temperature
                last[last < last.sort(descending=True).values[max(decoding.top_k, 2) - 1]] = float("-inf")
            totals.append(last)
        totals = torch.cat(totals)
        if decoding.do_sample:
            drawn = torch.multinomial(totals.softmax(-1), 2 * number, generator=generator).tolist()
            candidates = sorted(drawn, key=lambda one: -float(totals[one]))
        else:
            candidates = totals.argsort(descending=True)[: 2 * number].tolist()
        going = []
        for rank, one in enumerate(candidates):
            tokens, score = [*beams[one // VOCABULARY][0], one % VOCABULARY], float(totals[one])
            if tokens[-1] not in decoding.eos_ids:
                going.append((tokens, score))
            elif rank < number:
                add(tokens[:-1], score / len(tokens) ** penalty)  # the dummy counts, the end token does not
        beams, best = going[:number], max(float(totals[one]) for one in candidates)
        longest = limit + 1 if decoding.early_stopping == "never" and penalty > 0 else step + 1
        if len(ended) == number and (decoding.early_stopping is True or ended[-1][1] >= best / longest**penalty):
            return ended
    for tokens, score in beams:
        add(tokens, score / (1 + len(tokens)) ** penalty)
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_rules_of_transformers_4_28(model, do_sample):
    chance = random.Random(do_sample)
    other, cut = 0, 0
    for number in range(60):
        options = dict(
            max_new_tokens=chance.randint(1, 6), num_beams=chance.choice([2, 3]), length_penalty=chance.choice([-2.0, -1.0, 0.0, 1.0]),
            early_stopping=chance.choice([False, False, True, "never"]), eos_ids=(chance.randrange(VOCABULARY),), do_sample=do_sample,
        )  # fmt: skip
        options["num_return_sequences"] = options["num_beams"]
        if do_sample:
            options |= dict(temperature=chance.choice([1.0, 1.7]), top_k=chance.choice([0, 1, 3]))
        else:
            options |= dict(no_repeat_ngram_size=chance.choice([0, 2]))
        if options["max_new_tokens"] > 1:
            options["min_new_tokens"] = chance.choice([0, 1])
        decoding = Decoding(**options, counts_dummy_token=True)
        prompts = [[1, 3, 1], [2]]  # the first repeats itself: n-grams must not see it
        seeds = [torch.Generator().manual_seed(100 * number + row) for row in range(2)]
        found = search(model, prompts, decoding, seeds)
        plain = dataclasses.replace(decoding, top_k=decoding.top_k or VOCABULARY)
        for row, prompt in enumerate(prompts):
            want = naive_4_28(model, prompt, plain, torch.Generator().manual_seed(100 * number + row))
            got = [(hypothesis.tokens, hypothesis.score) for hypothesis in found[row]]
            want = [(tokens, score) for tokens, score in want if score > -1e6]
            got = got[: len(want)]
            assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want], (decoding, prompt)
            torch.testing.assert_close([score for _, score in got], [score for _, score in want], atol=1e-3, rtol=1e-4)
            cut += len(want[0][0]) == decoding.max_new_tokens
        today = dataclasses.replace(decoding, counts_dummy_token=False)
        other += search(model, prompts, today, [torch.Generator().manual_seed(100 * number + row) for row in range(2)]) != found
    assert cut > 5 and other > 20, "the two rules must differ for this test to mean something"


def test_sampling_behind_a_dummy_token_forgets_the_prompt(model):
    """One beam: the n-grams that may not come again are those of the answer alone."""
    options = dict(max_new_tokens=3, no_repeat_ngram_size=1)
    assert sorted(generate(model, [[0, 1, 2]], Decoding(**options | {"max_new_tokens": 1}))[0]) == [3]
    answer = generate(model, [[0, 1, 2]], Decoding(**options, counts_dummy_token=True))[0]
    assert len(set(answer)) == 3 and set(answer) & {0, 1, 2}
