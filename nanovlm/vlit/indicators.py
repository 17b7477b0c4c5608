"""The eight indicators of the VLIT review (Sec. 4.2.3 and Table 4), each with its exact computation and its cost.

    MD    matching degree of picture and response (matching.py)     R    kinds of responses (clustering.py)
    C     share of correct responses                                O/G  semantic elements of an instruction
    T     number of tasks (tagging.py)                              IC   complexity of an instruction
    I     kinds of instructions (clustering.py)                     B    balance of the tasks

A file is read once, in memory that does not grow with it: counters, and random samples of what is measured afterwards. What
has no encoder, annotations or judge is listed as not measured, never left out.

Differs from the paper:
- As printed, I and R reward bad data: Ego-Splitting counts more the more it is given, and DBSCAN calls answers that all
  differ noise. Here I draws equally many instructions of every task and counts clusters of some size alone, and a response
  may be its own cluster. The form as printed stands beside it ("literal"), with the share of noise, distinct-2 and the Vendi
  score. The paper states no threshold, radius, neighbour count or base of the logarithm: those of Settings are ours.
- O/G takes a dependency tool (HanLP) there; here the different names of things, marked regions, numbers and spatial
  relations are counted, under the name elements_lexical.
- Without a judge, IC is a proxy, declared as such; C is decided by rules where annotations can (correctness.py), and
  grounding precision needs no model: of the things that a response names, the share that annotators saw in the picture.
"""

import contextlib
import dataclasses
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from tqdm import tqdm

from nanovlm.evaluation.protocols import parse_verdict
from nanovlm.recipes.nano_tests import wilson
from nanovlm.vlit import tagging
from nanovlm.vlit.clustering import cooccurrence, dbscan, distinct_2, ego_splitting, tfidf_vectors, vendi
from nanovlm.vlit.correctness import known, verify
from nanovlm.vlit.matching import BATCH
from nanovlm.vlit.replies import Chat, Recorded
from nanovlm.vlit.samples import Unreadable, defects, picture, read
from nanovlm.vlit.words import COLORS, LEXICON, RELATIONS, content, load_table, named, number, tokens

PROPOSED = 200  # instructions from which a language model proposes task labels
MOST_TASKS = 1000  # different ones; the samples' own field may hold anything
NAMED = 1000  # unreadable records and defects named one by one in a report; all are counted
BOX = re.compile(r"\[\s*[\d.]+(?:\s*,\s*[\d.]+)+\s*\]|<box>.*?</box>")  # coordinates
MARKED = re.compile(r"\b(?:boxed|circled|marked|highlighted|outlined)\b", re.IGNORECASE)
RELATION = re.compile(rf"\b(?:{'|'.join(sorted(RELATIONS, key=len, reverse=True))})\b")
REASONING = re.compile(r"\b(?:why|how|explain|reason|compare|infer|imply|suggest|might|could|would|if|because|purpose)\b")
CLAUSE = re.compile(r"[,;:]|\b(?:and|or|but|while|which|that|because|if|when|who|where)\b")
_prompts = load_table("prompts.json")


@dataclass(frozen=True)
class Settings:
    """How a data set is measured; all of it stands in the report."""

    size: int | None = None  # samples drawn at random; None = all
    seed: int = 0
    kept: int = 2000  # pairs that encoder and judge see, at most
    votes: int = 5  # of the judge on each pair, odd
    temperature: float = 0.8  # of the votes
    task_field: bool = False  # the samples' own `task` is taken
    instructions: int = 1000  # drawn of each task
    min_count: int = 1  # instructions that two words must share to be joined
    smallest: int = 5  # personas of the smallest cluster that counts
    responses: int = 10_000  # of one draw
    draws: int = 5  # of responses, where there are enough of them
    eps: float = 0.3  # of DBSCAN: cosine distance, 1 - cosine
    min_samples: int = 1  # responses within eps that make a core, itself counted
    literal_min_samples: int = 3  # of the form as printed

    def __post_init__(self):
        for name in ("kept", "instructions", "smallest", "responses", "draws", "min_samples"):
            if vars(self)[name] < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {vars(self)[name]}; it must be 1 or more")
        if not 0 <= self.eps <= 2:
            raise ValueError(f"eps {self.eps}, a cosine distance, lies from 0 to 2")
        if self.votes < 1 or self.votes % 2 == 0:
            raise ValueError(f"{self.votes} votes can tie; use an odd number")


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


def measure(path, settings=Settings(), root=None, helpers=Helpers()):
    """All indicators of a data set.

    Args:
      path: .json or .jsonl of samples. settings: Settings.
      root: folder where image paths start; None = pictures are not looked at.
      helpers: Helpers.
    Returns: (list of Indicator, Survey).
    """
    found = survey(path, root, settings, helpers.lexicon)
    helpers = dataclasses.replace(helpers, judge=helpers.judge and Recorded(helpers.judge, helpers.replies))
    data, indicators = Data(found, root or Path("."), settings, helpers), []
    for make in (matching_degree, grounding, correctness, task_diversity, instruction_diversity, response_diversity,
                 elements_lexical, complexity, balance):  # fmt: skip
        start, before = time.perf_counter(), helpers.judge.tokens if helpers.judge else 0
        if one := make(data):
            seconds = one.seconds + time.perf_counter() - start
            spent = helpers.judge.tokens - before if helpers.judge else 0
            indicators.append(dataclasses.replace(one, seconds=seconds, tokens=spent))
    return indicators, found


# The one pass over the file


class Reservoir:
    """A random sample of fixed size from a stream, all members equally likely (Vitter, ACM TOMS 11 (1985), algorithm R).

    size: of the sample. seed: of the draws. kept: list, the sample. seen: how many were offered.
    """

    def __init__(self, size, seed):
        self.size, self.rng, self.kept, self.seen = size, random.Random(seed), [], 0

    def add(self, one):
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(one)
        elif (place := self.rng.randrange(self.seen)) < self.size:
            self.kept[place] = one


class Mean:
    """A running mean with its 95% interval (Welford, Technometrics 4 (1962)); mean: None before the first value."""

    def __init__(self, values=()):
        self.count, self.mean, self.squares = 0, None, 0.0
        for value in values:
            self.add(value)

    def add(self, value):
        self.count += 1
        step = value - (self.mean or 0.0)
        self.mean = (self.mean or 0.0) + step / self.count
        self.squares += step * (value - self.mean)

    def interval(self):
        """(low, high), or None for fewer than two values."""
        if self.count < 2:
            return None
        reach = 1.96 * (self.squares / (self.count - 1) / self.count) ** 0.5
        return self.mean - reach, self.mean + reach


@dataclass
class Survey:
    """What one pass finds. Pairs are instructions with their responses.

    tasks: {task: pairs}. defects: {rule: samples that break it}. problems: (where, words) of the first NAMED of both.
    instructions: {task: Reservoir of str}. responses: Reservoir of str. pairs: Reservoir of (Sample, instruction, response).
    words: Counter of response lengths, in words. seconds: {step: float}.
    """

    responses: Reservoir
    pairs: Reservoir
    records: int = 0
    unreadable: int = 0
    defective: int = 0
    num_pairs: int = 0
    tasks: Counter = field(default_factory=Counter)
    defects: Counter = field(default_factory=Counter)
    problems: list = field(default_factory=list)
    instructions: dict = field(default_factory=dict)
    elements: Mean = field(default_factory=Mean)
    proxies: Mean = field(default_factory=Mean)
    words: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)

    def problem(self, where, words):
        if len(self.problems) < NAMED:
            self.problems.append((where, words))

    @contextlib.contextmanager
    def timed(self, step):
        """Add the wall time of a block to a step's."""
        start = time.perf_counter()
        yield
        self.seconds[step] += time.perf_counter() - start


def count_records(path):
    """How many samples of a file can be read: int."""
    bar = tqdm(read(path), desc=f"count {path}", unit="record", disable=None)
    return sum(not isinstance(value, Unreadable) for _, value in bar)


def chosen(stream, total, size, seed):
    """A random choice of `size` out of `total` samples, in their order; what cannot be read passes through.

    Source: selection sampling, Knuth, The Art of Computer Programming 2, Sec. 3.4.2, algorithm S.
    """
    rng, left, wanted = random.Random(seed), total, size
    for where, value in stream:
        readable = not isinstance(value, Unreadable)
        if not readable or rng.random() * left < wanted:
            wanted -= readable
            yield where, value
        left -= readable


def survey(path, root=None, settings=Settings(), lexicon=LEXICON):
    """Read a data set once (twice, if only `size` of its samples are wanted).

    Args:
      path: the file. root: Path where image paths start; None = pictures are not looked for.
      settings: Settings. lexicon: names of things, for elements_lexical.
    Returns: Survey.
    Raises: ValueError if the file holds fewer than `size` samples, or no pair.
    """
    stream, size, seed = read(path), settings.size, settings.seed
    if size is not None:
        total = count_records(path)
        if total < size:
            raise ValueError(f"{path} holds {total} readable samples; {size} were asked for")
        stream = chosen(stream, total, size, seed)
    found = Survey(Reservoir(settings.responses * settings.draws, seed), Reservoir(settings.kept, seed))
    for where, sample in tqdm(stream, desc=f"read {path}", unit="record", total=size, disable=None):
        if isinstance(sample, Unreadable):
            found.unreadable += 1
            found.problem(where, f"unreadable: {sample}")
            continue
        found.records += 1
        with found.timed("lint"):
            _lint(found, where, sample, root)
        for instruction, response in sample.pairs:
            _count(found, sample, instruction, response, settings, lexicon)
    if not found.num_pairs:
        first = "; the first problem: {}: {}".format(*found.problems[0]) if found.problems else ""
        raise ValueError(f"{path}: no instruction with a response in {found.records} readable samples{first}")
    return found


def _lint(found, where, sample, root):
    broken = defects(sample)
    for name in sample.images if root is not None else ():
        try:
            picture(name, root)
        except FileNotFoundError as error:
            broken.append(("image", str(error)))
    found.defective += bool(broken)
    found.defects.update({rule for rule, _ in broken})
    for rule, words in broken:
        found.problem(where, f"{rule}: {words}")


def _count(found, sample, instruction, response, settings, lexicon):
    found.num_pairs += 1
    with found.timed("tasks"):
        task = sample.task if settings.task_field and sample.task else tagging.tag(instruction)
        found.tasks[task] += 1
        if len(found.tasks) > MOST_TASKS:
            raise ValueError(f"more than {MOST_TASKS} different tasks, the last {task!r}; leave out --task-field")
        if task not in found.instructions:
            found.instructions[task] = Reservoir(settings.instructions, f"{settings.seed}/{task}")
        found.instructions[task].add(instruction)
    with found.timed("elements"):
        found.elements.add(elements(instruction, lexicon))
    with found.timed("proxy"):
        found.proxies.add(proxy(instruction, len(sample.pairs)))
    found.responses.add(response)
    found.pairs.add((sample, instruction, response))
    found.words[len(response.split())] += 1


# The indicators: function Data -> Indicator


class Data:
    """What the indicators are computed from.

    found: Survey. pairs: list of (Sample, instruction, response), a random sample. root, settings, helpers: as of `measure`.
    tasks: {task: pairs}, by_task: {task: list of instructions}, how: where the tasks come from; by a language model if there
    is a judge (`task_diversity`).
    """

    def __init__(self, found, root, settings, helpers):
        self.found, self.root, self.settings, self.helpers, self.pairs = found, root, settings, helpers, found.pairs.kept
        self.tasks, self.by_task = dict(found.tasks), {task: one.kept for task, one in found.instructions.items()}
        field = "the samples' own field `task`, else rules"
        self.how = field if settings.task_field else f"rules over {len(tagging.TASKS)} task names (tagging.py)"


def matching_degree(data):
    encoder, scores, seen = data.helpers.encoder, [], []
    if encoder is None:
        return Indicator("MD", "MD", None, "higher", "not measured: no --encoder FOLDER of a CLIP or of a model trained here", 0)
    missing = 0
    for sample, _, response in data.pairs:
        pictures = pictures_of(sample, data.root)
        missing += pictures is None
        if pictures and response:
            seen.append((pictures, response))
    for begin in tqdm(range(0, len(seen), BATCH), desc="matching degree", unit="batch", disable=None):
        scores += encoder.match(*map(list, zip(*seen[begin : begin + BATCH])))
    told = Mean(scores)
    how = "mean of 100 · cosine of picture and response; longer responses by sentences, averaged; of several pictures the closest"
    return Indicator("MD", encoder.name, told.mean, "higher", how, len(scores), told.interval(), {"pictures missing": missing})


def pictures_of(sample, root):
    """A sample's pictures, as of samples.picture: list; None if one is missing."""
    try:
        return [picture(name, root) for name in sample.images]
    except FileNotFoundError:
        return None


def grounding(data):
    if not data.helpers.facts:
        return None
    seen = [(response, facts) for sample, _, response in data.pairs if (facts := known(sample, data.helpers.facts))]
    shares = [grounding_precision(response, facts) for response, facts in seen]
    told = Mean(100 * share for share in shares if share is not None)
    how = "percent of the annotated names in a response that its picture's annotations hold; no matching degree"
    beside = {"pairs that name nothing known": shares.count(None)}
    return Indicator("grounding", "grounding precision", told.mean, "higher", how, told.count, told.interval(), beside)


def grounding_precision(response, facts):
    """Share of the things named in a response that are in the picture: float, or None if it names none.

    facts: correctness.Facts. Only names that annotators looked for are counted.
    """
    names = set(named(tokens(response), facts.names))
    there = {thing.name for thing in facts.things} | facts.crowds
    return len(names & there) / len(names) if names else None


def correctness(data):
    judge, settings, facts, beside = data.helpers.judge, data.settings, data.helpers.facts or {}, {}
    told = [(question, answer, known(sample, facts)) for sample, question, answer in data.pairs]
    ruled = [verdict for question, answer, one in told if one and (verdict := verify(question, answer, one)) is not None]
    coverage = len(ruled) / max(1, len(data.pairs))
    if judge:
        votes = judge_pairs(data.pairs, data.helpers, data.root, settings)
        decided = [one[0] for one in votes if one and one[0] is not None]
        votes = [one for one in votes if one]
        how = (f"percent of pairs that {judge.name} finds right: majority of {settings.votes} answers drawn at temperature "
               f"{settings.temperature}; of a random sample")  # fmt: skip
        beside = {
            "pictures missing": len(data.pairs) - len(votes), "agreement": sum(share for _, share, _ in votes) / max(1, len(votes)),
            "undecided": len(votes) - len(decided), "unreadable votes": sum(unreadable for _, _, unreadable in votes),
        }  # fmt: skip
        beside |= {"by rule": 100 * sum(ruled) / len(ruled), "coverage of rules": coverage} if ruled else {}
    elif facts:
        how = "percent right of the pairs that rules can decide from the annotations; coverage: their share of all pairs"
        decided, beside = ruled, {"coverage": coverage}
    else:
        return Indicator("C", "correctness", None, "higher", "not measured: neither --annotations nor --judge", 0)
    right, total = sum(decided), len(decided)
    reach = tuple(100 * edge for edge in wilson(right, total)) if total else None
    return Indicator("C", "correctness", 100 * right / total if total else None, "higher", how, total, reach, beside)


def judge_pairs(pairs, helpers, root, settings):
    """What a judge thinks of pairs, asked several times: the majority decides.

    The review's way (Sec. 4.2.3): LLaVA-1.5 and examples written by hand there, any generator of generators.py here.

    Args:
      pairs: list of (Sample, question, answer). helpers: Helpers with a judge; one that sees no pictures is told
        `helpers.describe(sample)`. root: where image paths start. settings: Settings.
    Returns: per pair (right: True, False, or None where the readable votes tie or are none; share of the readable votes that
      agree with the majority; number of unreadable votes), or None where the judge's picture is missing or no file (base64).
    """
    judge, chats = helpers.judge, []
    for sample, question, answer in pairs:
        image, told = "", "" if judge.accepts_images else helpers.describe(sample)
        if judge.accepts_images and sample.images:
            places = pictures_of(sample, root)
            image = str(places[0]) if places and isinstance(places[0], Path) else None
        told = f"About the picture: {told}\n" if told else ""
        words = "\n".join(_prompts["judge"]).format(instruction=question, response=answer, told=told)
        chats.append(None if image is None else Chat((("user", words),), image))
    asked = [chat for chat in chats if chat]
    replies = judge.generate(asked, n=settings.votes, temperature=settings.temperature, max_tokens=8, seed=settings.seed, stop=())
    votes = map(majority, replies)
    return [chat and next(votes) for chat in chats]


def majority(replies):
    """(right or None, share that agrees, number of unreadable votes) of a judge's replies to one question."""
    verdicts = [verdict for text in replies if (verdict := parse_verdict(text)) is not None]
    yes, no = verdicts.count(True), verdicts.count(False)
    return yes > no if yes != no else None, max(yes, no) / max(1, yes + no), len(replies) - len(verdicts)


def task_diversity(data):
    judge, settings = data.helpers.judge, data.settings
    if judge and not settings.task_field:
        asked = [instruction for _, instruction, _ in data.pairs]
        tags = tagging.propose(judge, asked[:PROPOSED], settings.seed)
        assigned = tagging.assign(judge, asked, tags, settings.seed)
        data.tasks, data.by_task = tagging.covering(assigned), {}
        for instruction, task in zip(asked, assigned):
            data.by_task.setdefault(task if task in data.tasks else tagging.OTHER, []).append(instruction)
        data.by_task = {task: texts[: settings.instructions] for task, texts in data.by_task.items()}
        data.how = (
            f"TagGPT: {judge.name} proposed {len(tags)} labels for {min(PROPOSED, len(asked))} instructions and assigned them to "
            f"{len(asked)}; kept with a share of {tagging.COVERAGE:.0%}, names alike by {tagging.SIMILAR} merged"
        )
        data.found.seconds["tasks"] = 0
    value, how = len(data.tasks.keys() - {tagging.OTHER}), f"number of tasks, by {data.how}; {tagging.OTHER!r} is none"
    beside = {"other": data.tasks.get(tagging.OTHER, 0)}
    return Indicator("T", "task diversity", float(value), "higher", how, sum(data.tasks.values()), None, beside,
                     data.found.seconds["tasks"])  # fmt: skip


def balance(data):
    told = tagging.balance(data.tasks)
    how = "variance of the tasks' shares of all pairs, in percent squared (the review prints no unit)"
    return Indicator("B", "balance", told.pop("variance"), "lower", how, sum(data.tasks.values()), beside=told)


def instruction_clusters(by_task, settings=Settings()):
    """Instruction diversity.

    Args:
      by_task: {task: list of str}, a random sample of at most settings.instructions each.
    Returns: {"value": mean over tasks of the clusters of at least settings.smallest personas, "literal": of all
      clusters, "tasks": {task: (number of instructions, clusters that count, all clusters)}}.
    """
    told = {}
    for task, texts in by_task.items():
        clusters = ego_splitting(cooccurrence(map(content, texts), settings.min_count))
        told[task] = len(texts), sum(len(cluster) >= settings.smallest for cluster in clusters), len(clusters)
    _, value, literal = (sum(column) / len(told) for column in zip(*told.values())) if told else (0, None, None)
    return {"value": value, "literal": literal, "tasks": told}


def instruction_diversity(data):
    told, settings = instruction_clusters(data.by_task, data.settings), data.settings
    how = (
        f"Ego-Splitting over the words of at most {settings.instructions} instructions of each task, joined by {settings.min_count} "
        f"instruction in common; clusters of {settings.smallest} or more personas, mean over tasks. literal: all clusters, which "
        "grow with the sample"
    )
    beside = {"literal": told["literal"]} | {task: large for task, (_, large, _) in told["tasks"].items()}
    measured = sum(number for number, _, _ in told["tasks"].values())
    return Indicator("I", "instruction diversity", told["value"], "higher", how, measured, beside=beside)


def response_clusters(draws, settings=Settings(), embed=tfidf_vectors):
    """Response diversity.

    Args:
      draws: list of lists of str, random samples of equal size. embed: list of N str -> float32[N, D] of length 1.
    Returns: {"value", "clusters", "literal", "literal clusters", "noise": share of the literal form, "vendi",
      "distinct-2"}, means over the draws; "value" and "literal" are logs, None for no cluster.
    """
    rows = []
    for texts in draws:
        points = embed(texts)
        labels, literal = (dbscan(points, settings.eps, least) for least in (settings.min_samples, settings.literal_min_samples))
        rows.append((labels.max() + 1, literal.max() + 1, (literal == -1).mean(), vendi(points), distinct_2(texts)))
    names = ("clusters", "literal clusters", "noise", "vendi", "distinct-2")
    means = dict(zip(names, numpy.mean(rows, axis=0).tolist())) if rows else dict.fromkeys(names)
    logs = {"value": means["clusters"], "literal": means["literal clusters"]}
    return {name: math.log(count) if count else None for name, count in logs.items()} | means


def response_diversity(data):
    settings, embed, sample = data.settings, data.helpers.embed, data.found.responses
    texts = list(sample.kept)
    sample.rng.shuffle(texts)
    size = min(settings.responses, len(texts))
    draws = [texts[begin : begin + size] for begin in range(0, size * (len(texts) // size), size)]
    told = response_clusters(draws, settings, embed)
    how = (
        f"natural log of DBSCAN's clusters, eps {settings.eps} in 1 - cosine, min_samples {settings.min_samples}, vectors by "
        f"{embed.__name__}; mean of {len(draws)} draws of {size}. literal: min_samples {settings.literal_min_samples}, noise = its "
        "share of answers in no cluster"
    )
    return Indicator("R", "response diversity", told.pop("value"), "higher", how, size * len(draws), beside=told)


def elements_lexical(data):
    told = data.found.elements
    how = (f"mean over instructions of different names of things (of a lexicon of {len(data.helpers.lexicon)}), colours, numbers, "
           "spatial relations and marked regions; not the review's dependency parse")  # fmt: skip
    return Indicator("O/G", "elements_lexical", told.mean, "higher", how, told.count, told.interval(),
                     seconds=data.found.seconds["elements"])  # fmt: skip


def elements(instruction, lexicon=LEXICON):
    """The number of semantic elements, elements_lexical: int.

    lexicon: names of things that count, in the singular.
    """
    regions = len(BOX.findall(instruction)) or bool(MARKED.search(instruction))
    words = tokens(BOX.sub(" ", instruction))
    numbers = {value for word in words if (value := number(word)) is not None}
    return regions + sum(map(len, (set(named(words, lexicon)), numbers, set(RELATION.findall(instruction.lower())), COLORS & set(words))))


def proxy(instruction, turns=1):
    """A stand-in for a mark of complexity, from 1 to 10: float. Hard-wired weights, no judgement.

    turns: of the user in the whole conversation.
    """
    text = instruction.lower()
    told = len(tokens(text)) / 10 + len(CLAUSE.findall(text)) / 2 + 1.5 * len(REASONING.findall(text)) + (turns - 1) / 2
    return min(10.0, 1 + told)


def parse_mark(reply):
    """The first whole number from 1 to 10 in a reply: int, or None."""
    numbers = map(int, re.findall(r"(?<![\d.])\d+(?![\d]|\.\d)", reply))
    return next((number for number in numbers if 1 <= number <= 10), None)


def complexity(data):
    judge, proxies, seconds = data.helpers.judge, data.found.proxies, data.found.seconds["proxy"]
    if judge is None:
        how = (
            "declared proxy from 1 to 10, no judgement: words / 10 + clauses / 2 + 1.5 · reasoning words + further turns / 2, from 1 on; "
            "with --judge a language model gives marks"
        )
        return Indicator("IC", "instruction complexity (proxy)", proxies.mean, "higher", how, proxies.count, proxies.interval(),
                         seconds=seconds)  # fmt: skip
    asked = "\n".join(_prompts["mark"])
    chats = [Chat((("user", asked.format(instruction=one, response=other)),)) for _, one, other in data.pairs]
    replies = judge.generate(chats, n=1, temperature=0.0, max_tokens=8, seed=data.settings.seed, stop=())
    marks = [parse_mark(" ".join(several)) for several in replies]
    told, how = Mean(mark for mark in marks if mark is not None), f"mean mark from 1 to 10 by {judge.name}, after three marked examples"
    beside = {"unreadable marks": marks.count(None), "proxy": proxies.mean}
    return Indicator("IC", "instruction complexity", told.mean, "higher", how, told.count, told.interval(), beside, seconds)
