import pytest
import torch

from nanovlm.generation.logits_processors import (
    forbid, min_p, no_repeat_ngram, process, repetition_penalty, seen_tokens, top_k, top_p, truncate,
)
from nanovlm.generation.sampler import Decoding

NEVER = float("-inf")


def kept(scores):
    """Ids of each row that may still be chosen."""
    return [torch.isfinite(row).nonzero().flatten().tolist() for row in scores]


def logs(*rows):
    return torch.tensor(rows).log()


def test_seen_tokens_ignores_padding_and_images():
    seen = seen_tokens(torch.tensor([[-2, -1, 3], [0, 0, 4]]), 5)
    assert seen.shape == (2, 5)
    assert [row.nonzero().flatten().tolist() for row in seen] == [[3], [0, 4]]
    scores = torch.tensor([[0.5, -1.0, 2.0, 0.0], [3.0, -2.0, -4.0, 5.0]])
    tokens = torch.tensor([[0, 1, 1, 0], [-1, 3, 2, 2]])
    want = torch.tensor([[0.25, -2.0, 2.0, 0.0], [3.0, -2.0, -8.0, 2.5]])
    assert torch.equal(repetition_penalty(scores, tokens, 2.0), want)


@pytest.mark.parametrize("size, allowed", [
    (1, [[0, 4, 5], [0, 1, 2, 3]]),  # every id of the row is forbidden
    (2, [[0, 1, 2, 4, 5], [0, 1, 2, 3]]),  # 2 was followed by 3; 5 by 5 and by 4
    (3, [[0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5]]),  # 1 2 was followed by 3; 4 5 by nothing
    (4, [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
    (6, [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
    (7, [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),  # the rows are shorter than that
])
def test_no_repeat_ngram(size, allowed):
    tokens = torch.tensor([[1, 2, 3, 3, 1, 2], [-2, -1, 5, 5, 4, 5]])
    assert kept(no_repeat_ngram(torch.zeros(2, 6), tokens, size)) == allowed


def test_no_repeat_ngram_does_not_depend_on_padding():
    row = [4, 1, 4]
    assert kept(no_repeat_ngram(torch.zeros(1, 4), torch.tensor([[2, 2]]), 2)) == [[0, 1, 3]]
    for size in (1, 2, 3):
        plain = no_repeat_ngram(torch.zeros(1, 6), torch.tensor([row]), size)
        padded = no_repeat_ngram(torch.zeros(1, 6), torch.tensor([[-2, -2, -2, *row]]), size)
        assert torch.equal(plain, padded)


def test_top_k_keeps_ties_top_p_the_smallest_set_and_min_p_a_share_of_the_best():
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert kept(top_k(scores, 2)) == [[1, 2, 3], [0, 1]]
    assert kept(top_k(scores, 1)) == [[1], [0]]
    assert kept(top_k(scores, 1, min_keep=4)) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(top_k(scores, 99)) == [[0, 1, 2, 3, 4]] * 2
    assert torch.equal(top_k(scores, 5), scores)
    scores = logs((0.5, 0.12, 0.3, 0.08), (0.05, 0.8, 0.1, 0.05))
    assert kept(top_p(scores, 0.7)) == [[0, 2], [1]]
    assert kept(top_p(scores, 0.85)) == [[0, 1, 2], [1, 2]]
    assert kept(top_p(scores, 0.01)) == [[0], [1]]
    assert kept(top_p(scores, 0.01, min_keep=2)) == [[0, 2], [1, 2]]
    assert torch.equal(top_p(scores, 1.0)[:, 0], scores[:, 0])
    quarters = torch.zeros(1, 4)  # the tail of exactly 1 - p falls
    assert len(kept(top_p(quarters, 0.5))[0]) == 2
    left = top_p(scores, 0.7)
    assert torch.equal(left[left > NEVER], scores[left > NEVER])
    scores = logs((0.5, 0.2, 0.26, 0.04), (0.9, 0.02, 0.04, 0.04))
    assert kept(min_p(scores, 0.5)) == [[0, 2], [0]]
    assert kept(min_p(scores, 0.3)) == [[0, 1, 2], [0]]
    assert kept(min_p(scores, 0.5, min_keep=3))[0] == [0, 1, 2]
    assert kept(min_p(torch.zeros(1, 3), 1.0)) == [[0, 1, 2]]  # as probable as the best one is enough


SCORES = torch.tensor([[2.0, 1.5, -1.0, 0.5, 0.0, 1.0]])
TOKENS = torch.tensor([[0, 3, 0]])


def applied(num_new=5, **options):
    return process(SCORES, TOKENS, num_new, Decoding(max_new_tokens=9, **options))


def test_process_applies_each_option_in_the_order_of_transformers():
    assert torch.equal(applied(), SCORES) and torch.equal(applied(do_sample=True, eos_ids=(1,)), SCORES)
    assert torch.equal(applied(temperature=0.5, top_k=1, top_p=0.1, min_p=0.9), SCORES), "greedy: no truncation"
    assert torch.equal(applied(repetition_penalty=2.0), repetition_penalty(SCORES, TOKENS, 2.0))
    assert torch.equal(applied(repetition_penalty=0.5), repetition_penalty(SCORES, TOKENS, 0.5))
    assert torch.equal(applied(no_repeat_ngram_size=1), no_repeat_ngram(SCORES, TOKENS, 1))
    assert torch.equal(applied(do_sample=True, temperature=2.0), SCORES / 2.0)
    assert kept(applied(do_sample=True, top_k=1)) == [[0]]
    assert kept(applied(do_sample=True, top_p=0.01)) == [[0]]
    assert kept(applied(do_sample=True, min_p=0.99)) == [[0]]
    assert kept(process(SCORES, TOKENS, 5, Decoding(do_sample=True, top_k=1))) == [[0]]
    for option in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 0.99}):
        assert kept(truncate(SCORES, Decoding(**option), min_keep=3)) == [[0, 1, 5]]
    assert torch.equal(applied(renormalize=True), SCORES.log_softmax(-1))
    options = {"min_new_tokens": 2, "eos_ids": (0, 5)}
    assert kept(applied(num_new=0, **options)) == kept(applied(num_new=1, **options)) == [[1, 2, 3, 4]]
    assert kept(applied(num_new=2, **options)) == [[0, 1, 2, 3, 4, 5]]
    options = {
        "repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "min_new_tokens": 9, "eos_ids": (5,),
        "do_sample": True, "temperature": 0.7, "top_k": 4, "top_p": 0.8, "min_p": 0.3, "renormalize": True,
    }  # fmt: skip
    want = repetition_penalty(SCORES, TOKENS, 3.0)
    want = forbid(no_repeat_ngram(want, TOKENS, 2), (5,))
    want = min_p(top_p(top_k(want / 0.7, 4), 0.8), 0.3).log_softmax(-1)
    assert torch.equal(applied(**options), want)
