"""How text comes out: greedy decoding, sampling and beam search behind one call; and how likely a given text is.

The prompts are run through the decoder once and leave their keys and values in a cache; after that every step feeds
one token per row. Rows that have ended leave the batch. A row's tokens depend neither on its neighbours nor on its
padding, and equal those of `transformers.generate`.

B prompts, R rows (num_return_sequences per prompt when sampling), V vocabulary
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanovlm.generation.beam_search import beam_search
from nanovlm.generation.logits_processors import draw, process
from nanovlm.generation.prefill import Workspace, check_prompts, prefill
from nanovlm.vlm import IGNORE

# option: (allowed, what is allowed in words)
RANGES = {
    "max_new_tokens": (lambda x: x >= 1, "1 or more"),
    "num_beams": (lambda x: x >= 1, "1 or more"),
    "temperature": (lambda x: x >= 0, "0 (the most probable token) or more"),
    "top_k": (lambda x: x >= 0, "1 or more, or 0 for no limit"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "no_repeat_ngram_size": (lambda x: x >= 0, "1 or more, or 0 for no limit"),
    "repetition_penalty": (lambda x: x > 0, "above 0"),
    "min_new_tokens": (lambda x: x >= 0, "0 or more"),
    "num_return_sequences": (lambda x: x >= 1, "1 or more"),
    "early_stopping": (lambda x: isinstance(x, bool) or x == "never", 'False, True or "never"'),
}


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and when to stop. Names and meaning are those of `transformers`.

    The defaults decode greedily. temperature, top_k, top_p and min_p count only with do_sample, length_penalty and
    early_stopping only with num_beams > 1. Unlike in transformers, top_k is off unless asked for.
    """

    max_new_tokens: int = 20  # tokens, the end token included
    num_beams: int = 1  # 1 = no beam search
    temperature: float = 1.0  # 0 = the most probable token, as without do_sample
    top_k: int = 0  # ids; 0 = all
    top_p: float = 1.0  # probability of the nucleus, see logits_processors.top_p
    length_penalty: float = 1.0  # a beam's score is divided by its new tokens to this power; > 0 favours long ones
    no_repeat_ngram_size: int = 0  # tokens; 0 = repeats are allowed
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0  # tokens
    do_sample: bool = False
    early_stopping: bool | str = False  # True: stop at num_beams ended beams; "never": only when none can improve
    min_p: float = 0.0  # share of the best id's probability
    num_return_sequences: int = 1  # rows per prompt
    eos_ids: tuple[int, ...] = ()  # ids that end a row
    renormalize: bool = False  # make log-probabilities of the scores again after truncation
    counts_dummy_token: bool = False  # as transformers 4.28 behind prompts of embeddings, so Lynx: beam_search.py

    def __post_init__(self):
        if self.temperature == 0:
            vars(self).update(temperature=1.0, do_sample=False)
        for name, (allowed, words) in RANGES.items():
            value = vars(self)[name]
            if not allowed(value):
                raise ValueError(f"{name} is {value!r}; it must be {words}")
        if len(set(self.eos_ids)) < len(self.eos_ids) or min(self.eos_ids, default=0) < 0:
            raise ValueError(f"eos_ids {self.eos_ids} must be different ids, 0 or more")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(f"num_return_sequences {self.num_return_sequences} exceeds num_beams {self.num_beams}")
        if self.num_return_sequences > 1 and self.num_beams == 1 and not self.do_sample:
            raise ValueError(f"num_return_sequences {self.num_return_sequences} with do_sample=False and num_beams=1: "
                             "greedy decoding has one answer; sample, or raise num_beams")


@torch.no_grad()
def generate(model, prompts, decoding, visual_inputs=None, generator=None, batch_size=None, workspace=None):
    """Continue prompts.

    Args:
      model: vlm.VLM.
      prompts: list of B lists of ids; vlm.IMAGE_TOKEN (-1) where an image token stands.
      decoding: Decoding.
      visual_inputs: per prompt a list of its images or clips, float[f, 3, H, W] each, in order; None = no pictures.
        A tensor that occurs several times, also in several prompts, is encoded once.
      generator: randomness of sampling: one torch.Generator on the model's device, which draws in transformers'
        order (the rows then depend on one another's number); or a list of them, one per row (sampling) or
        per prompt (beam sampling); None = torch's global one.
      batch_size: prompts that run together; None = all of them.
      workspace: prefill.Workspace, which remembers pictures from call to call, takes the time, and may hold a
        fast_decode.FastDecoder for the steps.
    Returns: list of B * num_return_sequences lists of new ids, without the end token; a prompt's sequences side by
      side, the best first in a beam search.
    Raises: ValueError for prompts that are empty, too long (saying how many tokens are free), hold unknown ids or
      other image-token ids than their pictures need; for an end token outside the vocabulary.
    """
    visual_inputs = [[]] * len(prompts) if visual_inputs is None else visual_inputs
    batch_size = max(len(prompts), 1) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more prompts")
    check_prompts(model, prompts, visual_inputs, decoding)
    per_prompt = decoding.num_return_sequences if decoding.num_beams == 1 else 1
    check_generator(generator, len(prompts) * per_prompt)
    keeps, workspace = workspace is not None, workspace or Workspace()
    last_use = {id(pixels): place for place, inputs in enumerate(visual_inputs) for pixels in inputs}
    answers = []
    for start in range(0, len(prompts), batch_size):
        stop = start + batch_size
        if not keeps:
            workspace.pictures = {key: one for key, one in workspace.pictures.items() if last_use[key] >= start}
        rows = prefill(model, prompts[start:stop], visual_inputs[start:stop], decoding.max_new_tokens, workspace)
        chosen = generator[start * per_prompt : stop * per_prompt] if isinstance(generator, list) else generator
        if decoding.num_beams > 1:
            with workspace.timed("decoding"):
                found = beam_search(rows, decoding, chosen)
            answers += [hypothesis.tokens for hypotheses in found for hypothesis in hypotheses]
            workspace.num_new_tokens += len(found) * (rows.num_new + 1)
        else:
            if per_prompt > 1:
                rows.select([prompt for prompt in range(len(rows.logits)) for _ in range(per_prompt)])
            texts = [[] for _ in rows.logits]
            for places, tokens in sample_steps(rows, decoding, chosen, workspace):
                for place, token in zip(places, tokens):
                    texts[place].append(token)
            answers += texts
    return answers


def stream(model, prompt, decoding, visual_inputs=(), generator=None, workspace=None):
    """Continue one prompt, handing out every new id as soon as it is chosen.

    Args: as in `generate`, for one prompt: a list of ids, and the list of its visual inputs.
    Returns: iterator of int, without the end token.
    Raises: ValueError as `generate` does, and for options that make more than one sequence, before the first id.
    """
    for name in ("num_beams", "num_return_sequences"):
        if vars(decoding)[name] > 1:
            raise ValueError(f"streaming and {name}={vars(decoding)[name]} contradict: use {name}=1, or generate()")
    check_prompts(model, [prompt], [visual_inputs], decoding)
    check_generator(generator, 1)
    workspace = workspace or Workspace()

    @torch.no_grad()
    def steps():
        rows = prefill(model, [prompt], [visual_inputs], decoding.max_new_tokens, workspace)
        for _, tokens in sample_steps(rows, decoding, generator, workspace):
            yield from tokens

    return steps()


def check_generator(generator, num_rows):
    """Raise ValueError for a list of generators of another length than the rows they draw for."""
    if isinstance(generator, list) and len(generator) != num_rows:
        raise ValueError(f"{len(generator)} generators for {num_rows} rows; give one per row, or a single one for all")


def sample_steps(rows, decoding, generator, workspace):
    """Choose token after token, dropping rows as they end: yields numbers of those that go on, and their new ids."""
    num_rows = len(rows.logits)
    active = list(range(num_rows))
    for step in range(decoding.max_new_tokens):
        with workspace.timed("decoding"):
            scores = process(rows.logits, rows.seen(decoding), step, decoding)
            chosen = draw(scores, active, num_rows, generator)[:, 0] if decoding.do_sample else scores.argmax(dim=-1)
            values = chosen.tolist()  # the one wait for the device in a step: the stop test
        workspace.num_new_tokens += len(values)
        going = close_gaps([place for place, value in enumerate(values) if value not in decoding.eos_ids])
        active = [active[place] for place in going]
        yield active, [values[place] for place in going]
        if not active or step + 1 == decoding.max_new_tokens:
            return
        with workspace.timed("decoding"):
            if len(going) < len(values):
                rows.select(going)
                chosen = chosen[going]
            rows.step(chosen)


def close_gaps(going):
    """The same rows, ascending, in an order in which few change their number: the last take the places of the ended."""
    kept, movers = set(going), [row for row in going if row >= len(going)]
    return [row if row in kept else movers.pop() for row in range(len(going))]


@torch.no_grad()
def score_choices(model, prompts, choices, visual_inputs):
    """How unlikely a model finds each choice after its prompt. Prompt and pictures pass through the decoder once.

    likelihood   argmin over choices of - Σ log p(token | question, tokens before it)     SEED-Bench, arXiv:2307.16125

    Args:
      model: vlm.VLM.
      prompts: list of B lists of ids; vlm.IMAGE_TOKEN where an image token stands.
      choices: per prompt a list of choices, each a list of at least one id; the context has room for the longest.
      visual_inputs: per prompt a list of float[f, 3, H, W], in order.
    Returns: per prompt a list of (float, int): negative log-likelihood of each choice's tokens in nats, their number.
    """
    flat = [ids for several in choices for ids in several]
    longest = max(map(len, flat))
    rows = prefill(model, prompts, visual_inputs, longest, Workspace())
    rows.select([place for place, several in enumerate(choices) for _ in several])
    padded = [ids + [IGNORE] * (longest - len(ids)) for ids in flat]
    targets = torch.tensor(padded, device=rows.logits.device)  # R T
    scores = rows.logits[:, None]  # what the prompt's last token says of the first
    if longest > 1:
        scores = torch.cat([scores, rows.score(targets[:, :-1].clamp(min=0))], 1)
    losses = F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none").sum(1)
    pairs = zip(losses.tolist(), map(len, flat))
    return [[next(pairs) for _ in several] for several in choices]
