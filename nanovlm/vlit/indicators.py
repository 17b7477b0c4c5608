"""The eight indicators of the VLIT review (Sec. 4.2.3 and Table 4), each with its exact computation and its cost.

    MD    matching degree of picture and response (matching.py)     R    kinds of responses (clustering.py)
    C     share of correct responses                                O/G  semantic elements of an instruction
    T     number of tasks (tagging.py)                              IC   complexity of an instruction
    I     kinds of instructions (clustering.py)                     B    balance of the tasks

A file is read once, in memory that does not grow with it: counters, and random samples of what is measured afterwards.
What has no encoder, annotations or judge is listed as not measured, never left out.

Differs from the paper:
- As printed, I and R reward bad data: Ego-Splitting counts more the more it is given, and DBSCAN calls answers that all
  differ noise. Here I draws equally many instructions of every task and counts clusters of some size alone, and a
  response may be its own cluster. The form as printed stands beside it ("literal"), with the share of noise, distinct-2
  and the Vendi score. The paper states no threshold, radius, neighbour count or base of the logarithm: see Settings.
- O/G takes a dependency tool (HanLP) there; here the different names of things, marked regions, numbers and spatial
  relations are counted, under the name elements_lexical.
- Without a judge, IC is a proxy, declared as such; C is decided by rules where annotations can (correctness.py), and
  grounding precision needs no model: of the things that a response names, the share that annotators saw in the picture.
"""

import itertools
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
from tqdm import tqdm

from nanovlm.data.images import ImageError
from nanovlm.evaluation.protocols import parse_verdict, whole_number
from nanovlm.recipes.nano_tests import wilson
from nanovlm.vlit import tagging
from nanovlm.vlit.clustering import cooccurrence, dbscan, distinct_2, ego_splitting, sklearn_module
from nanovlm.vlit.clustering import tfidf_vectors, vendi
from nanovlm.vlit.correctness import known, verify
from nanovlm.vlit.matching import BATCH
from nanovlm.vlit.replies import prompt
from nanovlm.vlit.samples import Unreadable, defects, picture, read
from nanovlm.vlit.words import COLORS, LEXICON, RELATIONS, content, load_table, named, number, tokens

HOW = load_table("indicators.json")  # in words, for the report
FLAGS = HOW["flags"]  # of Settings, whole numbers from 1 on: what they mean
PROPOSED = 200  # instructions from which a language model proposes task labels
MOST_TASKS = 1000  # different ones; the samples' own field may hold anything
NAMED = 1000  # unreadable records and defects named one by one in a report; all are counted
BOX = re.compile(r"\[\s*[\d.]+(?:\s*,\s*[\d.]+)+\s*\]|<box>.*?</box>")  # coordinates
MARKED = re.compile(r"\b(?:boxed|circled|marked|highlighted|outlined)\b", re.IGNORECASE)
RELATION = re.compile(rf"\b(?:{'|'.join(sorted(RELATIONS, key=len, reverse=True))})\b")
REASONING = re.compile(r"\b(?:why|how|explain|reason|compare|infer|imply|suggest|might|[cw]ould|if|because|purpose)\b")
CLAUSE = re.compile(r"[,;:]|\b(?:and|or|but|while|which|that|because|if|when|who|where)\b")


@dataclass(frozen=True)
class Settings:
    """How a data set is measured; all of it stands in the report. FLAGS says what the flags among them mean."""

    size: int | None = None  # samples drawn at random; None = all
    seed: int = 0
    kept: int = 2000
    votes: int = 5  # of the judge on each pair, odd
    temperature: float = 0.8  # of the votes
    task_field: bool = False  # the samples' own `task` is taken
    instructions: int = 1000
    smallest: int = 5
    responses: int = 10_000
    draws: int = 5
    eps: float = 0.3  # of DBSCAN: cosine distance, 1 - cosine
    min_samples: int = 1
    literal_min_samples: int = 3  # of the form as printed

    def __post_init__(self):
        for name in FLAGS:
            if vars(self)[name] < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {vars(self)[name]}; it must be 1 or more")
        if not 0 <= self.eps <= 2:
            raise ValueError(f"eps {self.eps}, a cosine distance, lies from 0 to 2")
        if self.votes < 1 or self.votes % 2 == 0:
            raise ValueError(f"{self.votes} votes can tie; use an odd number")


@dataclass(frozen=True)
class Helpers:
    """What measuring needs beside the data set, as far as there is any."""

    facts: dict | None = None  # as of correctness.facts_of
    encoder: Any = None  # matching.Encoder
    judge: Any = None  # replies.Recorded
    embed: Callable = tfidf_vectors  # list of N str -> float32[N, D] of length 1
    lexicon: frozenset = LEXICON  # names of things
    describe: Callable = lambda sample: ""  # Sample -> str, for a judge that sees no pictures


@dataclass(frozen=True)
class Indicator:
    """One number."""

    key: str  # column of the review's Table 4
    name: str
    value: float | None  # None = not measured
    computation: str  # what was done, in words
    measured: int = 0  # on how many
    interval: tuple | None = None  # of 95%
    beside: dict = field(default_factory=dict)  # {name: number}
    better: str = "higher"  # or "lower"
    seconds: float = 0.0  # wall time
    tokens: int = 0  # that judge or tagger read and wrote


def measure(path, settings=Settings(), root=None, helpers=Helpers()):
    """All indicators of a data set.

    Args:
      path: .json or .jsonl of samples. settings: Settings. helpers: Helpers.
      root: folder where image paths start; None = pictures are not looked at.
    Returns: (list of Indicator, Survey).
    Raises: ValueError if the file holds no pair, or fewer samples than settings.size.
    """
    judge, indicators = helpers.judge, []
    sklearn_module("")  # if it is missing, that is said before the file is read
    found = Survey(path, settings, root, helpers)
    for make in (matching_degree, grounding, correctness, task_diversity, instruction_diversity, response_diversity,
                 elements_lexical, complexity, balance):  # fmt: skip
        start, before = time.perf_counter(), judge.tokens if judge else 0
        if one := make(found):
            seconds = found.seconds[one.key] + time.perf_counter() - start
            indicators.append(replace(one, seconds=seconds, tokens=judge.tokens - before if judge else 0))
    return indicators, found


# The one pass over the file


class Reservoir:
    """A random sample of fixed size from a stream, all members equally likely (Vitter, ACM TOMS 11, 1985)."""

    def __init__(self, size, seed):
        self.size, self.rng, self.kept, self.seen = size, random.Random(seed), [], 0

    def add(self, one):
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(one)
        elif (place := self.rng.randrange(self.seen)) < self.size:
            self.kept[place] = one


def count_records(path):
    """How many samples of a file can be read: int."""
    return sum(not isinstance(value, Unreadable) for _, value in read(path, "count"))


def chosen(stream, total, size, seed):
    """A random choice of `size` out of `total` samples, in their order; what cannot be read passes through."""
    drawn, number = set(random.Random(seed).sample(range(total), size)), itertools.count()
    return ((where, one) for where, one in stream if isinstance(one, Unreadable) or next(number) in drawn)


class Survey:
    """What one pass over a file finds (two, if only settings.size of its samples are wanted). Args: as of `measure`.

    records, unreadable, defective, num_pairs: counts; pairs are instructions with their responses.
    tasks: {task: pairs}. labels: the same, and by_task: {task: some of its instructions}; by a judge if there is one.
    defects: {rule: samples that break it}. problems: (where, words) of the first NAMED unreadable or defective samples.
    pairs: list of (Sample, instruction, response), responses: Reservoir of str, both drawn at random.
    words: {words of a response: responses}. elements, proxies: {value: instructions}, of which there are few different.
    seconds: {key of an indicator: float}.
    """

    def __init__(self, path, settings=Settings(), root=None, helpers=Helpers()):
        self.settings, self.root, self.helpers, seed = settings, root, helpers, settings.seed
        self.records = self.unreadable = self.defective = 0
        self.tasks, self.defects, self.words, self.elements, self.proxies, self.seconds = (Counter() for _ in range(6))
        self.responses, pairs = Reservoir(settings.responses * settings.draws, seed), Reservoir(settings.kept, seed)
        self.problems, drawn = [], {}
        stream = read(path, "read")
        if settings.size is not None:
            total = count_records(path)
            if total < settings.size:
                raise ValueError(f"{path} holds {total} readable samples; {settings.size} were asked for")
            stream = chosen(stream, total, settings.size, seed)
        for where, sample in stream:
            broken = defects(sample, root, decode=False)
            self.problems += [(where, f"{rule}: {words}") for rule, words in broken][: NAMED - len(self.problems)]
            if isinstance(sample, Unreadable):
                self.unreadable += 1
                continue
            self.records += 1
            self.defective += bool(broken)
            self.defects.update({rule for rule, _ in broken})
            for instruction, response in sample.pairs:
                task = self.timed("T", tagging.task_of, sample, instruction, settings.task_field)
                self.elements[self.timed("O/G", elements, instruction, helpers.lexicon)] += 1
                self.proxies[self.timed("IC", proxy, instruction, len(sample.pairs))] += 1
                self.tasks[task] += 1
                if len(self.tasks) > MOST_TASKS:
                    raise ValueError(f"more than {MOST_TASKS} tasks, the last {task!r}; leave out --task-field")
                if task not in drawn:
                    drawn[task] = Reservoir(settings.instructions, f"{seed}/{task}")
                drawn[task].add(instruction)
                pairs.add((sample, instruction, response))
                self.responses.add(response)
                self.words[len(response.split())] += 1
        self.num_pairs = self.tasks.total()
        if not self.num_pairs:
            first = "; the first problem: {}: {}".format(*self.problems[0]) if self.problems else ""
            raise ValueError(f"{path}: no instruction with a response in {self.records} readable samples{first}")
        self.pairs, self.labels, self.by_task = pairs.kept, self.tasks, {task: one.kept for task, one in drawn.items()}

    def timed(self, key, function, *args):
        """Call a function on the account of an indicator."""
        start = time.perf_counter()
        found = function(*args)
        self.seconds[key] += time.perf_counter() - start
        return found


# The indicators: function Survey -> Indicator


def mean_of(key, name, how, values, beside={}):
    """The Indicator that is a mean, with its interval. values: some, or {value: how often}."""
    counts = Counter(values)
    number = counts.total()
    if not number:
        return Indicator(key, name, None, how, beside=beside)
    mean = sum(value * count for value, count in counts.items()) / number
    squares = sum(count * (value - mean) ** 2 for value, count in counts.items())
    reach = 1.96 * (squares / (number - 1) / number) ** 0.5 if number > 1 else math.nan
    return Indicator(key, name, mean, how, number, (mean - reach, mean + reach) if number > 1 else None, beside)


def matching_degree(found):
    """MD: how near picture and response lie by an encoder of both."""
    encoder, scores = found.helpers.encoder, []
    if encoder is None:
        return Indicator("MD", "MD", None, HOW["MD absent"])
    told = [(pictures_of(sample, found.root), response) for sample, _, response in found.pairs]
    seen = [pair for pair in told if all(pair)]
    for begin in tqdm(range(0, len(seen), BATCH), desc="matching degree", unit="batch", disable=None):
        scores += encoder.match(*map(list, zip(*seen[begin : begin + BATCH])))
    missing = sum(pictures is None for pictures, _ in told)
    return mean_of("MD", encoder.name, HOW["MD"], scores, {"pictures missing": missing})


def pictures_of(sample, root):
    """A sample's pictures, as of samples.picture: list; None if one is missing, or no base64."""
    try:
        return [picture(name, root or ".") for name in sample.images]
    except (FileNotFoundError, ImageError):
        return None


def grounding(found):
    """Share of the names in a response that the picture's annotations hold; None without annotations."""
    if not found.helpers.facts:
        return None
    told = [(response, known(sample, found.helpers.facts)) for sample, _, response in found.pairs]
    shares = [grounding_precision(response, facts) for response, facts in told if facts]
    values = [100 * share for share in shares if share is not None]
    beside = {"pairs that name nothing known": shares.count(None)}
    return mean_of("grounding", "grounding precision", HOW["grounding"], values, beside)


def grounding_precision(response, facts):
    """Share of what a response names, of all that annotators looked for, that is there; None if it names none."""
    names = set(named(tokens(response), facts.names))
    there = {thing.name for thing in facts.things} | facts.crowds
    return len(names & there) / len(names) if names else None


def correctness(found):
    """C: share of right answers, by the votes of a judge, or without one by rules where annotations decide."""
    judge, facts, how = found.helpers.judge, found.helpers.facts or {}, HOW["C"]
    if not judge and not facts:
        return Indicator("C", "correctness", None, HOW["C absent"])
    told = [(question, answer, known(sample, facts)) for sample, question, answer in found.pairs]
    decided = [verdict for *pair, one in told if one and (verdict := verify(*pair, one)) is not None]
    beside = {"coverage": len(decided) / len(told)}
    if judge:
        ruled = {"by rule": 100 * sum(decided) / max(1, len(decided)), "coverage of rules": beside["coverage"]}
        asked = judge_pairs(found.pairs, found.helpers, found.root, found.settings)
        votes = [several for several in asked if several is not None]
        decided = [right for right in map(majority, votes) if right is not None]
        agreement = [max(map(one.count, (True, False))) / max(1, len(one) - one.count(None)) for one in votes]
        how = HOW["C judged"].format(judge=judge.name, **vars(found.settings))
        beside = {
            "pictures missing": asked.count(None), "agreement": sum(agreement) / max(1, len(votes)),
            "undecided": len(votes) - len(decided), "unreadable votes": sum(several.count(None) for several in votes),
        } | (ruled if ruled["coverage of rules"] else {})  # fmt: skip
    right, total = sum(decided), len(decided)
    value, reach = (100 * right / total, tuple(100 * edge for edge in wilson(right, total))) if total else (None, None)
    return Indicator("C", "correctness", value, how, total, reach, beside)


def judge_pairs(pairs, helpers, root, settings):
    """What a judge thinks of (Sample, question, answer), asked several times.

    The review's way (Sec. 4.2.3): LLaVA-1.5 and examples written by hand there, any generator of generators.py here.
    One that sees no pictures is told `helpers.describe(sample)`.

    Returns: per pair the votes, list of True, False or None = unreadable; or None where the judge's picture is missing
      or no file (base64).
    """
    chats = []
    for sample, instruction, response in pairs:
        image, told = "", ""
        if not helpers.judge.accepts_images:
            told = helpers.describe(sample)
        elif sample.images:
            image = (pictures_of(sample, root) or [None])[0]
        words = {"instruction": instruction, "response": response, "told": told and f"About the picture: {told}\n"}
        chats.append(prompt("judge", str(image), **words) if isinstance(image, (str, Path)) else None)
    asked = list(filter(None, chats))
    replies = iter(helpers.judge.ask(asked, settings.votes, settings.temperature, 8, settings.seed))
    return [list(map(parse_verdict, next(replies))) if chat else None for chat in chats]


def majority(votes):
    """What most readable votes say: True, False, or None where they tie or are none."""
    yes, no = votes.count(True), votes.count(False)
    return None if yes == no else yes > no


def task_diversity(found):
    """T: how many different tasks the pairs belong to."""
    judge, settings = found.helpers.judge, found.settings
    by = HOW["T field"] if settings.task_field else HOW["T rules"].format(number=len(tagging.TASKS))
    if judge and not settings.task_field:
        asked = [instruction for _, instruction, _ in found.pairs]
        labels = tagging.propose(judge, asked[:PROPOSED], settings.seed)
        assigned = tagging.assign(judge, asked, labels, settings.seed)
        found.labels, found.by_task = tagging.covering(assigned), {}
        for instruction, task in zip(asked, assigned):
            drawn = found.by_task.setdefault(task if task in found.labels else tagging.OTHER, [])
            drawn += [instruction] if len(drawn) < settings.instructions else []
        by = HOW["T judged"].format(
            judge=judge.name, labels=len(labels), proposed=min(PROPOSED, len(asked)), number=len(asked),
            coverage=tagging.COVERAGE, similar=tagging.SIMILAR,
        )  # fmt: skip
    value, other = float(len(found.labels.keys() - {tagging.OTHER})), {"other": found.labels.get(tagging.OTHER, 0)}
    return Indicator("T", "task diversity", value, HOW["T"].format(by=by), sum(found.labels.values()), beside=other)


def balance(found):
    """B: how unequal the tasks' shares are."""
    told, number = tagging.balance(found.labels), sum(found.labels.values())
    return Indicator("B", "balance", told.pop("variance"), HOW["B"], number, beside=told, better="lower")


def instruction_diversity(found):
    """I: how many clusters of some size the instructions of each task fall into; beside it those of each task."""
    settings, large, literal = found.settings, {}, []
    for task, texts in found.by_task.items():
        sizes = list(map(len, ego_splitting(cooccurrence(map(content, texts)))))
        large[task] = sum(size >= settings.smallest for size in sizes)
        literal.append(len(sizes))
    measured, beside = sum(map(len, found.by_task.values())), {"literal": sum(literal) / len(large)} | large
    how = HOW["I"].format(**vars(settings))
    return Indicator("I", "instruction diversity", sum(large.values()) / len(large), how, measured, beside=beside)


def response_diversity(found):
    """R: how many clusters random draws of responses fall into, as a logarithm; None for no cluster.

    beside: means over the draws of "clusters", "literal clusters", "noise" (share of the literal form), "vendi" and
    "distinct-2"; "literal": the logarithm of the literal clusters.
    """
    settings, embed, texts, rows = found.settings, found.helpers.embed, list(found.responses.kept), []
    found.responses.rng.shuffle(texts)
    size = min(settings.responses, len(texts))
    for begin in range(0, len(texts) - size + 1, size):
        draw = texts[begin : begin + size]
        points = embed(draw)
        labels, literal = (dbscan(points, settings.eps, least)
                           for least in (settings.min_samples, settings.literal_min_samples))  # fmt: skip
        rows.append((labels.max() + 1, literal.max() + 1, (literal == -1).mean(), vendi(points), distinct_2(draw)))
    names = ("clusters", "literal clusters", "noise", "vendi", "distinct-2")
    means = dict(zip(names, numpy.mean(rows, axis=0).tolist()))
    value, literal = (math.log(means[name]) if means[name] else None for name in names[:2])
    how = HOW["R"].format(vectors=embed.__name__, number=len(rows), **vars(settings) | {"size": size})
    return Indicator("R", "response diversity", value, how, size * len(rows), beside={"literal": literal} | means)


def elements_lexical(found):
    """O/G: things, colours, numbers and relations in an instruction, by word lists."""
    return mean_of("O/G", "elements_lexical", HOW["O/G"].format(number=len(found.helpers.lexicon)), found.elements)


def elements(instruction, lexicon=LEXICON):
    """The number of semantic elements, elements_lexical: int. lexicon: names of things that count, in the singular."""
    words = tokens(BOX.sub(" ", instruction))
    things, numbers, relations = named(words, lexicon), map(number, words), RELATION.findall(instruction.lower())
    different = set(things), set(numbers) - {None}, set(relations), COLORS & set(words)
    return sum(map(len, different)) + (len(BOX.findall(instruction)) or bool(MARKED.search(instruction)))


def complexity(found):
    """IC: how hard the instructions are, by a judge's marks; without one, by what can be counted."""
    judge = found.helpers.judge
    counted = mean_of("IC", "instruction complexity (proxy)", HOW["IC"], found.proxies)
    if judge is None:
        return counted
    chats = [prompt("mark", instruction=asked, response=answer) for _, asked, answer in found.pairs]
    replies = judge.ask(chats, 1, 0.0, 8, found.settings.seed)
    marks = [whole_number(" ".join(several), 1, 10) for several in replies]
    beside, given = {"unreadable marks": marks.count(None), "proxy": counted.value}, [mark for mark in marks if mark]
    return mean_of("IC", "instruction complexity", HOW["IC judged"].format(judge=judge.name), given, beside)


def proxy(instruction, turns=1):
    """A stand-in for a mark of complexity, from 1 to 10: float. turns: of the user in the whole conversation."""
    text = instruction.lower()
    told = len(tokens(text)) / 10 + len(CLAUSE.findall(text)) / 2 + 1.5 * len(REASONING.findall(text)) + (turns - 1) / 2
    return min(10.0, 1 + told)
