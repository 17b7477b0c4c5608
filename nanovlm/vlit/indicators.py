"""The eight indicators of the VLIT review (Sec. 4.2.3 and Table 4), each with its exact computation and its cost.

A file is read once, in memory that does not grow with it; encoder and judge see a random sample. What has no encoder,
annotations or judge is listed as not measured, never left out.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovlm.recipes.nano_tests import wilson
from nanovlm.vlit import tagging
from nanovlm.vlit.complexity import LEXICON, marks
from nanovlm.vlit.correctness import known, verify
from nanovlm.vlit.diversity import Options, instruction_clusters, response_clusters
from nanovlm.vlit.embedding import tfidf_vectors
from nanovlm.vlit.matching import BATCH, grounding
from nanovlm.vlit.recorded import Recorded
from nanovlm.vlit.samples import picture
from nanovlm.vlit.survey import Mean, survey
from nanovlm.vlit.votes import judge_chat, vote

PROPOSED = 200  # instructions from which a language model proposes task labels


@dataclass(frozen=True)
class Settings:
    """How a data set is measured; all of it stands in the report."""

    size: int | None = None  # samples drawn at random; None = all
    seed: int = 0
    kept: int = 2000  # pairs that encoder and judge see, at most
    votes: int = 5  # of the judge on each pair, odd
    temperature: float = 0.8  # of the votes
    task_field: bool = False  # the samples' own `task` is taken
    diversity: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Indicator:
    """One number.

    key: column of the review's Table 4. value: None = not measured. better: "higher" | "lower".
    computation: what was done, in words. measured: on how many. interval: of 95%, or None. beside: {name: number}.
    seconds: wall time. tokens: that judge or tagger read and wrote.
    """

    key: str
    name: str
    value: float | None
    better: str
    computation: str
    measured: int
    interval: tuple | None = None
    beside: dict = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Helpers:
    """What measuring needs beside the data set, as far as there is any.

    facts: as of correctness.facts_of. encoder: matching.Encoder. judge: generator as in generators.py.
    embed: list of N str -> float32[N, D] of length 1. lexicon: names of things.
    describe: function Sample -> str, for a judge that sees no pictures.
    replies: replies.Replies, where the judge's answers are written down; None = nowhere.
    """

    facts: dict | None = None
    encoder: Any = None
    judge: Any = None
    embed: Callable = tfidf_vectors
    lexicon: frozenset = LEXICON
    describe: Callable = lambda sample: ""
    replies: Any = None


def measure(path, settings=Settings(), root=None, helpers=Helpers()):
    """All indicators of a data set.

    Args:
      path: .json or .jsonl of samples. settings: Settings.
      root: folder where image paths start; None = pictures are not looked at.
      helpers: Helpers.
    Returns: (list of Indicator, survey.Survey).
    """
    found = survey(
        path, root, settings.size, settings.seed, settings.kept, settings.diversity, settings.task_field, helpers.lexicon
    )  # fmt: skip
    pairs = [(sample, *sample.pairs[place]) for sample, place in found.pairs.kept]
    facts, judge = helpers.facts, helpers.judge and Recorded(helpers.judge, helpers.replies)
    tasks, by_task, tagged = _tasks(found, pairs, judge, settings)
    return [
        _matching(pairs, helpers.encoder, root),
        *([_grounding(pairs, facts)] if facts else []),
        _correctness(pairs, facts, judge, settings, root, helpers.describe),
        *_task_indicators(tasks, tagged, settings),
        _timed(partial(_instructions, by_task, settings)),
        _timed(partial(_responses, found.responses, settings, helpers.embed)),
        Indicator(
            "O/G", "elements_lexical", found.elements.mean, "higher",
            "mean over instructions of different names of things (of a lexicon of "
            f"{len(helpers.lexicon)}), colours, numbers, spatial relations and marked regions; not the review's dependency parse",
            found.elements.count, found.elements.interval(), seconds=found.seconds["elements"],
        ),
        _timed(partial(_complexity, pairs, judge, found, settings), found.seconds["proxy"]),
        _balance(tasks, tagged, found),
    ], found  # fmt: skip


def _mean(values):
    """(mean, 95% interval) of some values; None where there are too few."""
    told = Mean()
    for value in values:
        told.add(value)
    return told.mean if told.count else None, told.interval()


def _timed(make, before=0.0):
    """The Indicator that `make()` gives, with the seconds that it took, added to those before."""
    start = time.perf_counter()
    made = make()
    return dataclasses.replace(made, seconds=time.perf_counter() - start + before)


def _tasks(found, pairs, judge, settings):
    """({task: pairs}, {task: instructions drawn}, (how, seconds, tokens)): by rule, by field or by a language model."""
    if judge is None or settings.task_field:
        how = "the samples' own field `task`, else rules" if settings.task_field else "rules over 17 task names (tagging.py)"
        drawn = {task: one.kept for task, one in found.instructions.items()}
        return dict(found.tasks), drawn, (how, found.seconds["tasks"], 0)
    start, before, asked = time.perf_counter(), judge.tokens, [instruction for _, instruction, _ in pairs]
    tags = tagging.propose(judge, asked[:PROPOSED], settings.seed)
    assigned = tagging.assign(judge, asked, tags, settings.seed)
    kept = tagging.covering(assigned)
    by_task = {}
    for instruction, task in zip(asked, assigned):
        by_task.setdefault(task if task in kept else tagging.OTHER, []).append(instruction)
    by_task = {task: texts[: settings.diversity.instructions] for task, texts in by_task.items()}
    how = (
        f"TagGPT: {judge.name} proposed {len(tags)} labels for {min(PROPOSED, len(asked))} instructions and assigned them to "
        f"{len(asked)}; kept with a share of {tagging.COVERAGE:.0%}, names alike by {tagging.SIMILAR} merged"
    )
    return kept, by_task, (how, time.perf_counter() - start, judge.tokens - before)


def _task_indicators(tasks, tagged, settings):
    how, seconds, tokens = tagged
    named = [task for task in tasks if task != tagging.OTHER]
    yield Indicator("T", "task diversity", float(len(named)), "higher", f"number of tasks, by {how}; {tagging.OTHER!r} is none",
                    sum(tasks.values()), beside={"other": tasks.get(tagging.OTHER, 0)}, seconds=seconds, tokens=tokens)  # fmt: skip


def _balance(tasks, tagged, found):
    told = tagging.balance(tasks)
    return Indicator("B", "balance", told["variance"], "lower",
                     "variance of the tasks' shares of all pairs, in percent squared (the review prints no unit)",
                     sum(tasks.values()), beside={name: value for name, value in told.items() if name != "variance"})  # fmt: skip


def _instructions(by_task, settings):
    told, options = instruction_clusters(by_task, settings.diversity), settings.diversity
    return Indicator(
        "I", "instruction diversity", told["value"], "higher",
        f"Ego-Splitting over the words of at most {options.instructions} instructions of each task, joined by {options.min_count} "
        f"instruction in common; clusters of {options.smallest} or more personas, mean over tasks. literal: all clusters, which "
        "grow with the sample",
        sum(number for number, _, _ in told["tasks"].values()),
        beside={"literal": told["literal"]} | {task: large for task, (_, large, _) in told["tasks"].items()},
    )  # fmt: skip


def _responses(sample, settings, embed):
    options, texts = settings.diversity, list(sample.kept)
    sample.rng.shuffle(texts)
    size = min(options.responses, len(texts))
    draws = [texts[begin : begin + size] for begin in range(0, size * (len(texts) // size), size)]
    told = response_clusters(draws, options, embed)
    return Indicator(
        "R", "response diversity", told["value"], "higher",
        f"natural log of DBSCAN's clusters, eps {options.eps} in 1 - cosine, min_samples {options.min_samples}, vectors by "
        f"{embed.__name__}; mean of {len(draws)} draws of {size}. literal: min_samples {options.literal_min_samples}, noise = its "
        "share of answers in no cluster",
        size * len(draws), beside={name: value for name, value in told.items() if name != "value"},
    )  # fmt: skip


def _matching(pairs, encoder, root):
    how = "mean of 100 · cosine of picture and response; longer responses by sentences, averaged; of several pictures the closest"
    if encoder is None:
        return Indicator(
            "MD", "MD", None, "higher", "not measured: no --encoder FOLDER of a CLIP or of a model trained here", 0
        )
    start, scores, missing, seen = time.perf_counter(), [], 0, []
    for sample, _, response in pairs:
        try:
            pictures = [picture(name, root or Path(".")) for name in sample.images]
        except FileNotFoundError:
            missing += 1
            continue
        if pictures and response:
            seen.append((pictures, response))
    for begin in tqdm(range(0, len(seen), BATCH), desc="matching degree", unit="batch", disable=None):
        pictures, responses = zip(*seen[begin : begin + BATCH])
        scores += encoder.match(pictures, responses)
    mean, reach = _mean(scores)
    return Indicator("MD", encoder.name, mean, "higher", how, len(scores), reach, {"pictures missing": missing},
                     time.perf_counter() - start)  # fmt: skip


def _grounding(pairs, facts):
    start = time.perf_counter()
    told = [known(sample, facts) for sample, _, _ in pairs]
    shares = [grounding(response, one) for (_, _, response), one in zip(pairs, told) if one]
    mean, reach = _mean([100 * share for share in shares if share is not None])
    return Indicator(
        "grounding", "grounding precision", mean, "higher",
        "percent of the annotated names in a response that its picture's annotations hold; no matching degree",
        sum(share is not None for share in shares), reach, {"pairs that name nothing known": shares.count(None)},
        time.perf_counter() - start,
    )  # fmt: skip


def _correctness(pairs, facts, judge, settings, root, describe):
    start, before, beside, verdicts = time.perf_counter(), judge.tokens if judge else 0, {}, []
    if facts:
        verdicts = [
            verify(question, answer, one) if (one := known(sample, facts)) else None
            for sample, question, answer in pairs
        ]
    ruled = [one for one in verdicts if one is not None]
    if judge is None:
        if not facts:
            return Indicator("C", "correctness", None, "higher", "not measured: neither --annotations nor --judge", 0)
        how = (
            "percent right of the pairs that rules can decide from the annotations; coverage: their share of all pairs"
        )
        beside["coverage"] = len(ruled) / len(verdicts) if verdicts else 0.0
        right, total = sum(ruled), len(ruled)
    else:
        seen = [(*pair, shown(pair[0], root, judge)) for pair in pairs]
        chats = [
            judge_chat(question, answer, image, "" if judge.accepts_images else describe(sample))
            for sample, question, answer, image in seen if image is not None
        ]  # fmt: skip
        beside["pictures missing"] = len(seen) - len(chats)
        votes = vote(judge, chats, settings.votes, settings.temperature, settings.seed)
        decided = [one for one, _, _ in votes if one is not None]
        how = (
            f"percent of pairs that {judge.name} finds right: majority of {settings.votes} answers drawn at temperature "
            f"{settings.temperature}; of a random sample"
        )
        beside |= {"agreement": sum(share for _, share, _ in votes) / max(1, len(votes)), "undecided": len(votes) - len(decided),
                   "unreadable votes": sum(number for _, _, number in votes)}  # fmt: skip
        if ruled:
            beside |= {"by rule": 100 * sum(ruled) / len(ruled), "coverage of rules": len(ruled) / len(verdicts)}
        right, total = sum(decided), len(decided)
    reach = tuple(100 * edge for edge in wilson(right, total)) if total else None
    return Indicator("C", "correctness", 100 * right / total if total else None, "higher", how, total, reach, beside,
                     time.perf_counter() - start, judge.tokens - before if judge else 0)  # fmt: skip


def shown(sample, root, judge):
    """The picture that a judge is shown: its path as str, "" for none, None for one that is missing or no file
    (base64)."""
    if not judge.accepts_images or not sample.images:
        return ""
    try:
        found = picture(sample.images[0], root or Path("."))
    except FileNotFoundError:
        return None
    return str(found) if isinstance(found, Path) else None


def _complexity(pairs, judge, found, settings):
    if judge is None:
        return Indicator(
            "IC", "instruction complexity (proxy)", found.proxies.mean, "higher",
            "declared proxy from 1 to 10, no judgement: words / 10 + clauses / 2 + 1.5 · reasoning words + further turns / 2, from 1 on; "
            "with --judge a language model gives marks", found.proxies.count, found.proxies.interval(),
        )  # fmt: skip
    before = judge.tokens
    given = marks(judge, [(question, answer) for _, question, answer in pairs], settings.seed)
    mean, reach = _mean([mark for mark in given if mark is not None])
    return Indicator(
        "IC", "instruction complexity", mean, "higher", f"mean mark from 1 to 10 by {judge.name}, after three marked examples",
        len(given) - given.count(None), reach, {"unreadable marks": given.count(None), "proxy": found.proxies.mean},
        tokens=judge.tokens - before,
    )  # fmt: skip
