"""What a beam search carries from step to step, and the small operations on it.

B prompts, N beams, K candidates, V vocabulary, M new tokens at most
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EXCLUDED = -1e9  # added to what may not be chosen


@dataclass(frozen=True)
class Hypothesis:
    """A finished text: new ids without the end token, and its score, higher is better."""

    tokens: list[int]
    score: float


@dataclass
class Beams:
    """State of the search; the first dimension of every field is the prompt."""

    running: Tensor  # int64[B, N, M], new ids of the beams that go on
    running_scores: Tensor  # float32[B, N], summed log-probabilities, best first
    ended: Tensor  # int64[B, N, M], new ids of the hypotheses, the end token included
    ended_scores: Tensor  # float32[B, N], best first
    ended_lengths: Tensor  # int64[B, N], tokens
    is_ended: Tensor  # bool[B, N], False = the slot is still empty

    def select(self, prompts):
        """Keep some prompts, int64[n]: Beams."""
        return Beams(*(getattr(self, field.name)[prompts] for field in dataclasses.fields(self)))

    def keep_best(self, texts, scores, length, may_end):
        """The best hypotheses among those so far and new ones.

        Args:
          texts: int64[B, K, M], of `length` tokens. scores: float32[B, K], final ones.
          may_end: bool[B, K], which of them are hypotheses.
        Returns: Beams.
        """
        num_beams = self.ended_scores.shape[1]
        ended_scores, best = torch.cat([self.ended_scores, scores + ~may_end * EXCLUDED], dim=1).topk(num_beams)
        lengths = torch.full_like(may_end, length, dtype=torch.long)
        return dataclasses.replace(
            self,
            ended=pick(torch.cat([self.ended, texts], dim=1), best),
            ended_scores=ended_scores,
            ended_lengths=torch.cat([self.ended_lengths, lengths], dim=1).gather(1, best),
            is_ended=torch.cat([self.is_ended, may_end], dim=1).gather(1, best),
        )

    def hypotheses(self, place, decoding):
        """The best hypotheses of one prompt: list of Hypothesis."""
        texts, lengths, scores = (x[place].tolist() for x in (self.ended, self.ended_lengths, self.ended_scores))
        texts = [text[:length] for text, length in zip(texts, lengths)][: decoding.num_return_sequences]
        texts = [text[:-1] if text and text[-1] in decoding.eos_ids else text for text in texts]
        return [Hypothesis(text, score) for text, score in zip(texts, scores)]


@dataclass(frozen=True)
class Rules:
    """The four choices in which beam searches differ; see beam_search.py for what each does."""

    start: Callable
    propose: Callable
    advance: Callable
    is_done: Callable


def empty(num_prompts, decoding, device):
    """Beams before the first step, all with score 0."""
    shape = (num_prompts, decoding.num_beams)
    ids = torch.zeros(*shape, decoding.max_new_tokens, dtype=torch.long, device=device)
    return Beams(
        running=ids,
        running_scores=torch.zeros(shape, device=device),
        ended=ids,
        ended_scores=torch.full(shape, EXCLUDED, device=device),
        ended_lengths=torch.zeros(shape, dtype=torch.long, device=device),
        is_ended=torch.zeros(shape, dtype=torch.bool, device=device),
    )


def draw(totals, number, active, num_prompts, generator):
    """Draw candidates without replacement, in the order drawn.

    Args:
      totals: float32[b, N * V] of the prompts still active. active: their numbers among the first `num_prompts`.
      number: K. generator: as in sampler.generate.
    Returns: int64[b, K].
    """
    probabilities = totals.softmax(dim=-1)
    if isinstance(generator, list):
        draws = [torch.multinomial(p, number, generator=generator[i]) for i, p in zip(active, probabilities)]
        return torch.stack(draws)
    everyone = torch.ones(num_prompts, totals.shape[1], device=totals.device)  # transformers draws for ended prompts too
    everyone[active] = probabilities
    return torch.multinomial(everyone, number, generator=generator)[active]


def ends_text(token, decoding):
    """Which candidates end their text by an end token: int64[B, K] -> bool[B, K]."""
    return torch.isin(token, torch.tensor(decoding.eos_ids, dtype=torch.long, device=token.device))


def pick(texts, places):
    """Texts int64[B, K, M] at places int64[B, N] -> int64[B, N, M]."""
    return texts.gather(1, places[..., None].expand(-1, -1, texts.shape[2]))
