import itertools

import pytest
import torch

from nanovlm.attention import causal_rows
from nanovlm.beam_search import beam_search
from nanovlm.beams import EXCLUDED, Hypothesis
from nanovlm.decoder import DecoderConfig, LayerOptions
from nanovlm.prefill import Rows
from nanovlm.sampler import Decoding, generate
from tiny import recorded_llama, vision_language_model

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


def test_one_step_of_few_beams_is_the_top_of_the_first_token(model):
    decoding = Decoding(max_new_tokens=1, num_beams=2, num_return_sequences=2)
    scores = log_probabilities(model, PROMPT, [[token] for token in range(VOCABULARY)])[:, 0].tolist()
    order = sorted(range(VOCABULARY), key=lambda token: -scores[token])
    (found,) = search(model, [PROMPT], decoding)
    assert [hypothesis.tokens for hypothesis in found] == [[order[0]], [order[1]]]
    assert found[0].score == pytest.approx(scores[order[0]], abs=1e-5)


def test_scores_are_sums_over_length_to_the_penalty():
    llama = recorded_llama()
    decoding = Decoding(
        max_new_tokens=8, num_beams=4, num_return_sequences=4, length_penalty=1.7, eos_ids=tuple(range(1, 128, 4))
    )
    lengths = set()
    for prompt, found in zip([[5, 9], [31]], search(llama, [[5, 9], [31]], decoding)):
        for hypothesis in found:
            ends = [[]] if len(hypothesis.tokens) == 8 else [[end] for end in decoding.eos_ids]
            sums = log_probabilities(llama, prompt, [hypothesis.tokens + end for end in ends])
            scores = sums[:, -1] / sums.shape[1] ** 1.7
            assert (scores - hypothesis.score).abs().min() < 1e-4
            lengths.add(len(hypothesis.tokens))
        scores = [hypothesis.score for hypothesis in found]
        assert scores == sorted(scores, reverse=True)
    assert len(lengths) > 1


def test_generate_returns_the_best_of_each_prompt_in_order(model):
    decoding = Decoding(max_new_tokens=4, num_beams=3, num_return_sequences=2, eos_ids=(1,))
    prompts = [PROMPT, [2], [0, 1]]
    want = [hypothesis.tokens for found in search(model, prompts, decoding) for hypothesis in found]
    assert generate(model, prompts, decoding) == want and len(want) == 6


def test_more_beams_than_texts_leave_excluded_places(model):
    """With one new token there are four texts for six beams: the other places are not taken for real."""
    (found,) = search(model, [PROMPT], Decoding(max_new_tokens=1, num_beams=6, num_return_sequences=6))
    assert sorted(hypothesis.tokens for hypothesis in found[:4]) == [[0], [1], [2], [3]]
    assert [hypothesis.score for hypothesis in found[4:]] == [EXCLUDED] * 2


def test_drawn_beams_follow_the_model(model):
    """Beam sampling from one step: how often each first token is drawn first."""
    decoding = Decoding(max_new_tokens=1, num_beams=2, do_sample=True, num_return_sequences=1, eos_ids=())
    generator, counts, draws = torch.Generator().manual_seed(0), torch.zeros(VOCABULARY), 400
    both = torch.zeros(VOCABULARY)
    probabilities = log_probabilities(model, PROMPT, [[token] for token in range(VOCABULARY)])[:, 0].exp()
    for found in search(model, [PROMPT] * draws, decoding, generator):
        counts[found[0].tokens[0]] += 1
    # two of four are drawn without replacement, the likelier of the two comes first
    for i, j in itertools.permutations(range(VOCABULARY), 2):
        chance = probabilities[i] * probabilities[j] / (1 - probabilities[i])
        both[i if probabilities[i] > probabilities[j] else j] += chance
    expected = both * draws
    likely = expected > 0
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_square < 16.3, "0.1% of honest draws lie beyond"
