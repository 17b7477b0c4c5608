"""One pass over a data set: what can be counted, and random samples of what is measured afterwards.

Memory holds the samples and the counters, whatever the length of the file: at most `Options.instructions` of each task,
`responses` x `draws` responses, and `kept` samples for encoder and judge.
"""

import random
import time
from collections import Counter
from dataclasses import dataclass, field

from tqdm import tqdm

from nanovlm.vlit import tagging
from nanovlm.vlit.complexity import LEXICON, elements, proxy
from nanovlm.vlit.diversity import Options
from nanovlm.vlit.linting import defects
from nanovlm.vlit.samples import Unreadable, picture, read

MOST_TASKS = 1000  # different ones; the samples' own field may hold anything
NAMED = 1000  # unreadable records and defects named one by one in a report; all are counted


class Reservoir:
    """A random sample of fixed size from a stream, all members equally likely (Vitter, ACM TOMS 11 (1985), algorithm
    R).

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
    """A running mean with its 95% interval (Welford, Technometrics 4 (1962))."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, value):
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
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
    instructions: {task: Reservoir of str}. responses: Reservoir of str. pairs: Reservoir of (Sample, place of the
      pair).
    words: Counter of response lengths, in words. seconds: {step: float}.
    """

    records: int = 0
    unreadable: int = 0
    defective: int = 0
    num_pairs: int = 0
    tasks: Counter = field(default_factory=Counter)
    defects: Counter = field(default_factory=Counter)
    problems: list = field(default_factory=list)
    instructions: dict = field(default_factory=dict)
    responses: Reservoir = None
    pairs: Reservoir = None
    elements: Mean = field(default_factory=Mean)
    proxies: Mean = field(default_factory=Mean)
    words: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)

    def problem(self, where, words):
        if len(self.problems) < NAMED:
            self.problems.append((where, words))


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
        if isinstance(value, Unreadable):
            yield where, value
            continue
        if rng.random() * left < wanted:
            wanted -= 1
            yield where, value
        left -= 1


def survey(path, root=None, size=None, seed=0, kept=2000, options=Options(), task_field=False, lexicon=LEXICON):
    """Read a data set once (twice, if only `size` of its samples are wanted).

    Args:
      path: the file. root: Path where image paths start; None = pictures are not looked for.
      size: samples drawn at random; None = all. seed: int. kept: pairs kept for encoder and judge.
      options: diversity.Options. task_field: whether the samples' own `task` is taken, where there is one.
      lexicon: names of things, for elements_lexical.
    Returns: Survey.
    Raises: ValueError if the file holds fewer than `size` samples.
    """
    stream = read(path)
    if size is not None:
        total = count_records(path)
        if total < size:
            raise ValueError(f"{path} holds {total} readable samples; {size} were asked for")
        stream = chosen(stream, total, size, seed)
    found = Survey(responses=Reservoir(options.responses * options.draws, seed), pairs=Reservoir(kept, seed))
    for where, sample in tqdm(stream, desc=f"read {path}", unit="record", total=size, disable=None):
        if isinstance(sample, Unreadable):
            found.unreadable += 1
            found.problem(where, f"unreadable: {sample}")
            continue
        found.records += 1
        _lint(found, where, sample, root)
        _count(found, sample, seed, options, task_field, lexicon)
    if not found.num_pairs:
        raise ValueError(f"{path}: no instruction with a response in {found.records} readable samples")
    return found


def _lint(found, where, sample, root):
    start = time.perf_counter()
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
    found.seconds["lint"] += time.perf_counter() - start


def _count(found, sample, seed, options, task_field, lexicon):
    pairs = sample.pairs
    for place, (instruction, response) in enumerate(pairs):
        found.num_pairs += 1
        clock = [time.perf_counter()]
        task = sample.task if task_field and sample.task else tagging.tag(instruction)
        found.tasks[task] += 1
        if task not in found.instructions:
            if len(found.tasks) > MOST_TASKS:
                raise ValueError(f"more than {MOST_TASKS} different tasks, the last {task!r}; leave out --task-field")
            found.instructions[task] = Reservoir(options.instructions, f"{seed}/{task}")
        found.instructions[task].add(instruction)
        clock.append(time.perf_counter())
        found.elements.add(elements(instruction, lexicon))
        clock.append(time.perf_counter())
        found.proxies.add(proxy(instruction, len(pairs)))
        clock.append(time.perf_counter())
        found.responses.add(response)
        found.pairs.add((sample, place))
        found.words[len(response.split())] += 1
        for step, begin, end in zip(("tasks", "elements", "proxy"), clock, clock[1:]):
            found.seconds[step] += end - begin
