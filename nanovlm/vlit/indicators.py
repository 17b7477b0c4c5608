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

from nanovlm.evaluation.protocols import parse_verdict
from nanovlm.recipes.nano_tests import wilson
from nanovlm.vlit import tagging
from nanovlm.vlit.clustering import cooccurrence, dbscan, distinct_2, ego_splitting, sklearn_module
from nanovlm.vlit.clustering import tfidf_vectors, vendi
from nanovlm.vlit.correctness import known, verify
from nanovlm.vlit.matching import BATCH
from nanovlm.vlit.replies import prompt
from nanovlm.vlit.samples import Unreadable, defects, picture, read
from nanovlm.vlit.words import COLORS, LEXICON, RELATIONS, content, named, number, tokens

PROPOSED = 200  # instructions from which a language model proposes task labels
FLAGS = {  # of Settings: whole numbers from 1 on
    "kept": "pairs that encoder and judge see, at most",
    "instructions": "instructions drawn of each task",
    "smallest": "personas of the smallest cluster that counts",
    "responses": "responses of a draw",
    "draws": "draws of responses, where there are enough of them",
    "min_samples": "of DBSCAN: responses within eps that make a core, itself counted",
}
MOST_TASKS = 1000  # different ones; the samples' own field may hold anything
NAMED = 1000  # unreadable records and defects named one by one in a report; all are counted
BOX = re.compile(r"\[\s*[\d.]+(?:\s*,\s*[\d.]+)+\s*\]|<box>.*?</box>")  # coordinates
MARKED = re.compile(r"\b(?:boxed|circled|marked|highlighted|outlined)\b", re.IGNORECASE)
RELATION = re.compile(rf"\b(?:{'|'.join(sorted(RELATIONS, key=len, reverse=True))})\b")
REASONING = re.compile(r"\b(?:why|how|explain|reason|compare|infer|imply|suggest|might|[cw]ould|if|because|purpose)\b")
CLAUSE = re.compile(r"[,;:]|\b(?:and|or|but|while|which|that|because|if|when|who|where)\b")
NUMBER = re.compile(r"(?<![\d.])\d+(?![\d]|\.\d)")


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
    """What measuring needs beside the data set, as far as there is any.

    facts: as of correctness.facts_of. encoder: matching.Encoder. judge: replies.Judge.
    embed: list of N str -> float32[N, D] of length 1. lexicon: names of things.
    describe: function Sample -> str, for a judge that sees no pictures.
    """

    facts: dict | None = None
    encoder: Any = None
    judge: Any = None
    embed: Callable = tfidf_vectors
    lexicon: frozenset = LEXICON
    describe: Callable = lambda sample: ""


@dataclass(frozen=True)
class Indicator:
    """One number.

    key: column of the review's Table 4. value: None = not measured. computation: what was done, in words. measured: on
    how many. interval: of 95%, or None. beside: {name: number}. better: "higher" | "lower". seconds: wall time. tokens:
    that judge or tagger read and wrote.
    """

    key: str
    name: str
    value: float | None
    computation: str
    measured: int = 0
    interval: tuple | None = None
    beside: dict = field(default_factory=dict)
    better: str = "higher"
    seconds: float = 0.0
    tokens: int = 0


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


class Mean:
    """A running mean with its 95% interval (Welford, Technometrics 4 (1962)); mean: None before the first value."""

    def __init__(self, values=()):
        self.count, self.mean, self.squares = 0, None, 0.0
        for value in values:
            self.add(value)

    def add(self, value):
        self.count += 1
        before = self.mean or 0.0
        self.mean = before + (value - before) / self.count
        self.squares += (value - before) * (value - self.mean)

    def interval(self):
        """(low, high), or None for fewer than two values."""
        if self.count < 2:
            return None
        reach = 1.96 * (self.squares / (self.count - 1) / self.count) ** 0.5
        return self.mean - reach, self.mean + reach


def count_records(path):
    """How many samples of a file can be read: int."""
    stream = tqdm(read(path), desc=f"count {path}", unit="record", disable=None)
    return sum(not isinstance(value, Unreadable) for _, value in stream)


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


class Survey:
    """What one pass over a file finds (two, if only settings.size of its samples are wanted). Args: as of `measure`.

    records, unreadable, defective, num_pairs: counts; pairs are instructions with their responses.
    tasks: {task: pairs}. labels: the same, and by_task: {task: some of its instructions}; by a judge if there is one.
    defects: {rule: samples that break it}. problems: (where, words) of the first NAMED unreadable or defective samples.
    pairs: list of (Sample, instruction, response), responses: Reservoir of str, both drawn at random.
    words: Counter of response lengths, in words. elements, proxies: Mean. seconds: {key of an indicator: float}.
    """

    def __init__(self, path, settings=Settings(), root=None, helpers=Helpers()):
        self.settings, self.root, self.helpers, seed = settings, root, helpers, settings.seed
        self.records = self.unreadable = self.defective = 0
        self.tasks, self.defects, self.words, self.seconds = (Counter() for _ in range(4))
        self.elements, self.proxies, self.problems, drawn = Mean(), Mean(), [], {}
        self.responses, pairs = Reservoir(settings.responses * settings.draws, seed), Reservoir(settings.kept, seed)
        stream = read(path)
        if settings.size is not None:
            total = count_records(path)
            if total < settings.size:
                raise ValueError(f"{path} holds {total} readable samples; {settings.size} were asked for")
            stream = chosen(stream, total, settings.size, seed)
        for where, sample in tqdm(stream, desc=f"read {path}", unit="record", total=settings.size, disable=None):
            if isinstance(sample, Unreadable):
                self.unreadable += 1
                self.note(where, [("unreadable", str(sample))])
                continue
            broken = defects(sample, root, decode=False)
            self.note(where, broken)
            self.records += 1
            self.defective += bool(broken)
            self.defects.update({rule for rule, _ in broken})
            for instruction, response in sample.pairs:
                task = self.timed("T", tagging.task_of, sample, instruction, settings.task_field)
                self.elements.add(self.timed("O/G", elements, instruction, helpers.lexicon))
                self.proxies.add(self.timed("IC", proxy, instruction, len(sample.pairs)))
                self.tasks[task] += 1
                if len(self.tasks) > MOST_TASKS:
                    raise ValueError(f"more than {MOST_TASKS} different tasks, the last {task!r}; leave out --task-field")
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

    def note(self, where, broken):
        self.problems += [(where, f"{rule}: {words}") for rule, words in broken][: NAMED - len(self.problems)]

    def timed(self, key, function, *args):
        """Call a function on the account of an indicator."""
        start = time.perf_counter()
        found = function(*args)
        self.seconds[key] += time.perf_counter() - start
        return found


# The indicators: function Survey -> Indicator


def mean_of(key, name, how, told, beside={}):
    """The Indicator that is a Mean."""
    return Indicator(key, name, told.mean, how, told.count, told.interval(), beside)


def matching_degree(found):
    """MD: how near picture and response lie by an encoder of both."""
    encoder, scores = found.helpers.encoder, []
    if encoder is None:
        return Indicator("MD", "MD", None, "not measured: no --encoder FOLDER of a CLIP or of a model trained here")
    told = [(pictures_of(sample, found.root), response) for sample, _, response in found.pairs]
    seen = [pair for pair in told if all(pair)]
    for begin in tqdm(range(0, len(seen), BATCH), desc="matching degree", unit="batch", disable=None):
        scores += encoder.match(*map(list, zip(*seen[begin : begin + BATCH])))
    how = ("mean of 100 · cosine of picture and response; longer responses by sentences, averaged; of several pictures "
           "the closest")  # fmt: skip
    missing = sum(pictures is None for pictures, _ in told)
    return mean_of("MD", encoder.name, how, Mean(scores), {"pictures missing": missing})


def pictures_of(sample, root):
    """A sample's pictures, as of samples.picture: list; None if one is missing."""
    try:
        return [picture(name, root or ".") for name in sample.images]
    except FileNotFoundError:
        return None


def grounding(found):
    """Share of the names in a response that the picture's annotations hold; None without annotations."""
    if not found.helpers.facts:
        return None
    shares = [grounding_precision(response, facts) for sample, _, response in found.pairs
              if (facts := known(sample, found.helpers.facts))]  # fmt: skip
    how = "percent of the annotated names in a response that its picture's annotations hold; no matching degree"
    told = Mean(100 * share for share in shares if share is not None)
    return mean_of("grounding", "grounding precision", how, told, {"pairs that name nothing known": shares.count(None)})


def grounding_precision(response, facts):
    """Share of what a response names, of all that annotators looked for, that is there; None if it names none."""
    names = set(named(tokens(response), facts.names))
    there = {thing.name for thing in facts.things} | facts.crowds
    return len(names & there) / len(names) if names else None


def correctness(found):
    """C: share of right answers, by the votes of a judge, or without one by rules where annotations decide."""
    judge, settings, facts = found.helpers.judge, found.settings, found.helpers.facts or {}
    if not judge and not facts:
        return Indicator("C", "correctness", None, "not measured: neither --annotations nor --judge")
    told = [(question, answer, known(sample, facts)) for sample, question, answer in found.pairs]
    decided = [verdict for *pair, one in told if one and (verdict := verify(*pair, one)) is not None]
    how = "percent right of the pairs that rules can decide from annotations; coverage: their share of all pairs"
    beside = {"coverage": len(decided) / len(told)}
    if judge:
        ruled = {"by rule": 100 * sum(decided) / len(decided), "coverage of rules": beside["coverage"]} if decided else {}
        votes = judge_pairs(found.pairs, found.helpers, found.root, settings)
        missing, votes = votes.count(None), [vote for vote in votes if vote]
        decided = [right for right, _, _ in votes if right is not None]
        how = (f"percent of pairs that {judge.name} finds right: majority of {settings.votes} answers drawn at "
               f"temperature {settings.temperature}; of a random sample")  # fmt: skip
        beside = {
            "pictures missing": missing, "agreement": sum(share for _, share, _ in votes) / max(1, len(votes)),
            "undecided": len(votes) - len(decided), "unreadable votes": sum(number for _, _, number in votes),
        } | ruled  # fmt: skip
    right, total = sum(decided), len(decided)
    value, reach = (100 * right / total, tuple(100 * edge for edge in wilson(right, total))) if total else (None, None)
    return Indicator("C", "correctness", value, how, total, reach, beside)


def judge_pairs(pairs, helpers, root, settings):
    """What a judge thinks of (Sample, question, answer), asked several times: the majority decides.

    The review's way (Sec. 4.2.3): LLaVA-1.5 and examples written by hand there, any generator of generators.py here.
    One that sees no pictures is told `helpers.describe(sample)`.

    Returns: per pair (right: True, False, or None where the readable votes tie or are none; share of the readable votes
      that agree; number of unreadable votes), or None where the judge's picture is missing or no file (base64).
    """
    judge, found = helpers.judge, []
    chats = [_judged(one, helpers, root) for one in pairs]
    replies = iter(judge.ask(list(filter(None, chats)), settings.votes, settings.temperature, 8, settings.seed))
    for chat in chats:
        verdicts = list(map(parse_verdict, next(replies))) if chat else []
        yes, no = verdicts.count(True), verdicts.count(False)
        right, share = None if yes == no else yes > no, max(yes, no) / max(1, yes + no)
        found.append((right, share, verdicts.count(None)) if chat else None)
    return found


def _judged(pair, helpers, root):
    """What the judge is asked about (Sample, question, answer): replies.Chat, or None without its picture."""
    (sample, question, answer), image, told = pair, "", ""
    if not helpers.judge.accepts_images:
        told = helpers.describe(sample)
    elif sample.images:
        image, *_ = pictures_of(sample, root) or [None]
        if not isinstance(image, Path):
            return None
    told = f"About the picture: {told}\n" if told else ""
    return prompt("judge", str(image), instruction=question, response=answer, told=told)


def task_diversity(found):
    """T: how many different tasks the pairs belong to."""
    judge, settings = found.helpers.judge, found.settings
    if settings.task_field:
        how = "the samples' own field `task`, else rules"
    elif judge is None:
        how = f"rules over {len(tagging.TASKS)} task names (tagging.py)"
    else:
        asked = [instruction for _, instruction, _ in found.pairs]
        tags = tagging.propose(judge, asked[:PROPOSED], settings.seed)
        assigned = tagging.assign(judge, asked, tags, settings.seed)
        found.labels, found.by_task = tagging.covering(assigned), {}
        for instruction, task in zip(asked, assigned):
            drawn = found.by_task.setdefault(task if task in found.labels else tagging.OTHER, [])
            drawn += [instruction] if len(drawn) < settings.instructions else []
        how = (
            f"TagGPT: {judge.name} proposed {len(tags)} labels for {min(PROPOSED, len(asked))} instructions and "
            f"assigned them to {len(asked)}; kept with a share of {tagging.COVERAGE:.0%}, names alike by "
            f"{tagging.SIMILAR} merged"
        )
    how, beside = f"number of tasks, by {how}; {tagging.OTHER!r} is none", {"other": found.labels.get(tagging.OTHER, 0)}
    value = float(len(found.labels.keys() - {tagging.OTHER}))
    return Indicator("T", "task diversity", value, how, sum(found.labels.values()), beside=beside)


def balance(found):
    """B: how unequal the tasks' shares are."""
    told = tagging.balance(found.labels)
    how = "variance of the tasks' shares of all pairs, in percent squared (the review prints no unit)"
    return Indicator("B", "balance", told.pop("variance"), how, sum(found.labels.values()), beside=told, better="lower")


def instruction_clusters(by_task, settings=Settings()):
    """Instruction diversity of {task: list of str}.

    Returns: (mean over tasks of the clusters of at least settings.smallest personas, mean of all clusters, {task:
      clusters that count}).
    """
    large, literal = {}, []
    for task, texts in by_task.items():
        sizes = list(map(len, ego_splitting(cooccurrence(map(content, texts)))))
        large[task] = sum(size >= settings.smallest for size in sizes)
        literal.append(len(sizes))
    return sum(large.values()) / len(large), sum(literal) / len(large), large


def instruction_diversity(found):
    """How many clusters the instructions of each task fall into."""
    settings = found.settings
    value, literal, large = instruction_clusters(found.by_task, settings)
    how = (
        f"Ego-Splitting over the words of at most {settings.instructions} instructions of each task, joined by an "
        f"instruction in common; clusters of {settings.smallest} or more personas, mean over "
        "tasks. literal: all clusters, which grow with the sample"
    )
    measured = sum(map(len, found.by_task.values()))
    return Indicator("I", "instruction diversity", value, how, measured, beside={"literal": literal} | large)


def response_clusters(draws, settings=Settings(), embed=tfidf_vectors):
    """Response diversity of some draws, lists of str of equal length: means over them.

    Returns: {"value", "literal": logs, None for no cluster, "clusters", "literal clusters", "noise": share of the
      literal form, "vendi", "distinct-2"}.
    """
    rows = []
    for texts in draws:
        points = embed(texts)
        labels, literal = (dbscan(points, settings.eps, least)
                           for least in (settings.min_samples, settings.literal_min_samples))  # fmt: skip
        rows.append((labels.max() + 1, literal.max() + 1, (literal == -1).mean(), vendi(points), distinct_2(texts)))
    names = ("clusters", "literal clusters", "noise", "vendi", "distinct-2")
    means = dict(zip(names, numpy.mean(rows, axis=0).tolist()))
    value, literal = (math.log(means[name]) if means[name] else None for name in names[:2])
    return {"value": value, "literal": literal} | means


def response_diversity(found):
    """R: how many clusters random draws of responses fall into, as a logarithm."""
    settings, embed, texts = found.settings, found.helpers.embed, list(found.responses.kept)
    found.responses.rng.shuffle(texts)
    size = min(settings.responses, len(texts))
    draws = [texts[begin : begin + size] for begin in range(0, len(texts) - size + 1, size)]
    told = response_clusters(draws, settings, embed)
    how = (
        f"natural log of DBSCAN's clusters, eps {settings.eps} in 1 - cosine, min_samples {settings.min_samples}, "
        f"vectors by {embed.__name__}; mean of {len(draws)} draws of {size}. literal: min_samples "
        f"{settings.literal_min_samples}, noise = its share of answers in no cluster"
    )
    return Indicator("R", "response diversity", told.pop("value"), how, size * len(draws), beside=told)


def elements_lexical(found):
    """O/G: things, colours, numbers and relations in an instruction, by word lists."""
    how = (f"mean over instructions of different names of things (of a lexicon of {len(found.helpers.lexicon)}), "
           "colours, numbers, spatial relations and marked regions; not the review's dependency parse")  # fmt: skip
    return mean_of("O/G", "elements_lexical", how, found.elements)


def elements(instruction, lexicon=LEXICON):
    """The number of semantic elements, elements_lexical: int. lexicon: names of things that count, in the singular."""
    words = tokens(BOX.sub(" ", instruction))
    things, numbers, relations = named(words, lexicon), map(number, words), RELATION.findall(instruction.lower())
    different = set(things), set(numbers) - {None}, set(relations), COLORS & set(words)
    return sum(map(len, different)) + (len(BOX.findall(instruction)) or bool(MARKED.search(instruction)))


def proxy(instruction, turns=1):
    """A stand-in for a mark of complexity, from 1 to 10: float. turns: of the user in the whole conversation."""
    text = instruction.lower()
    told = len(tokens(text)) / 10 + len(CLAUSE.findall(text)) / 2 + 1.5 * len(REASONING.findall(text)) + (turns - 1) / 2
    return min(10.0, 1 + told)


def parse_mark(reply):
    """The first whole number from 1 to 10 in a reply: int, or None."""
    return next((mark for mark in map(int, NUMBER.findall(reply)) if 1 <= mark <= 10), None)


def complexity(found):
    """How hard the instructions are, by a judge's marks; without one, by what can be counted."""
    judge, proxies = found.helpers.judge, found.proxies
    if judge is None:
        how = (
            "declared proxy from 1 to 10, no judgement: words / 10 + clauses / 2 + 1.5 · reasoning words + further "
            "turns / 2, from 1 on; with a --generator a language model gives marks"
        )
        return mean_of("IC", "instruction complexity (proxy)", how, proxies)
    chats = [prompt("mark", instruction=asked, response=answer) for _, asked, answer in found.pairs]
    marks = [parse_mark(" ".join(several)) for several in judge.ask(chats, 1, 0.0, 8, found.settings.seed)]
    how = f"mean mark from 1 to 10 by {judge.name}, after three marked examples"
    beside = {"unreadable marks": marks.count(None), "proxy": proxies.mean}
    return mean_of("IC", "instruction complexity", how, Mean(mark for mark in marks if mark is not None), beside)
