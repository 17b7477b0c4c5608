"""The feed of a stage: the records of update after update, made ready ahead of the training.

    plan    which records an update takes: drawn from the mixture, perhaps sorted by modality and length
    read    worker processes read, decode and tokenise them, in torch's DataLoader, which keeps their order
    next    the trainer takes the records of its next update

What an update takes is a function of the mixture and the update's number. The number of workers, how far they are ahead
and on how many processes an update is spread change nothing of it, and a resumed run goes on with the next update.
"""

import itertools
import json
import math
import os
import signal
import time
import weakref
from collections import deque
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy
import torch
from torch.utils.data import DataLoader

from nanovlm.names import nearest


# Mixture: several sources read together, each in an exact share.
#
# The next record comes from the source that is furthest behind its share, so that after n records every source has
# given its share of n to within a record or so, in every run, without a random draw.


class Course:
    """One source after another: the first `lengths[0]` records from the first, and so on; the last has no end.

    Args:
      sources: list of sources, easy ones first. lengths: list of int, one fewer.
    """

    def __init__(self, sources, lengths):
        if len(lengths) != len(sources) - 1 or min(lengths, default=1) < 1:
            raise ValueError(f"{len(sources)} sources and lengths {lengths}; every source but the last needs a length from 1")
        self.name, self.sources, self.lengths = sources[-1].name, sources, lengths

    def __len__(self):
        return sum(self.lengths) + len(self.sources[-1])

    def record(self, n):
        """Record n of the whole course."""
        for source, length in zip(self.sources, self.lengths):
            if n < length:
                return source.record(n)
            n -= length
        return self.sources[-1].record(n)


class Mixture:
    """Reads sources in proportion to their weights.

    A source has `name`, `__len__` and `record(n)`; its cursor is the number of records drawn from it.
    """

    def __init__(self, sources, weights):
        """
        Args:
          sources: dict name -> source.
          weights: dict name -> positive number, relative; only the sources named here are read.
        Raises: ValueError for a name without a source, no weights, or a weight that is not positive and finite.
        """
        if not weights:
            raise ValueError("a mixture needs at least one weight: {name: weight}")
        for name, weight in weights.items():
            if name not in sources:
                raise ValueError(f"no source is called {name!r}.{nearest(name, sources)}")
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"source {name!r} has weight {weight}; it must be positive, or the source left out")
        exact = {name: Fraction(str(float(weight))) for name, weight in weights.items()}  # as written, not as stored
        denominator = math.lcm(*(weight.denominator for weight in exact.values()))
        self.sources = {name: sources[name] for name in weights}
        self.shares = {name: int(weight * denominator) for name, weight in exact.items()}
        self.drawn = dict.fromkeys(weights, 0)

    def draw(self):
        """(name, n): which record comes next, of the source furthest behind; ties go to the one named first."""
        count, total = sum(self.drawn.values()) + 1, sum(self.shares.values())
        behind = {name: count * share - self.drawn[name] * total for name, share in self.shares.items()}
        name = max(behind, key=behind.get)
        self.drawn[name] += 1
        return name, self.drawn[name] - 1

    def next(self):
        """(name, record): the record that `draw` names."""
        name, n = self.draw()
        return name, self.sources[name].record(n)

    def state(self):
        """dict name -> int, records drawn: all that a resume needs."""
        return dict(self.drawn)

    def load_state(self, state):
        """Continue where `state()` was taken.

        Raises: ValueError if the names are not this mixture's or a count is no whole number >= 0.
        """
        if set(state) != set(self.drawn):
            both = f"the saved mixture reads {sorted(state)}, this one {sorted(self.drawn)}"
            raise ValueError(f"{both}; resume with the same sources")
        for name, drawn in state.items():
            if not isinstance(drawn, int) or drawn < 0:
                raise ValueError(f"source {name!r}: {drawn!r} records drawn; a whole number >= 0 was expected")
        self.drawn = {name: state[name] for name in self.drawn}  # order decides ties


# Damaged records: counted, named in a file, and too many of them stop the run.
#
#     damaged.jsonl, one JSON object a line:
#     {"stage", "step", "source", "record": n, "id": its own name if it could be read, "error", "replaced_by": n}
#
# A record that cannot be used is replaced by the next of its source, never by a random other, so that what a run trains
# on stays a function of the data alone: not of the number of workers, nor of where it was interrupted.


MAX_IN_A_ROW = 100  # damaged records one behind the other; then something else is wrong than a record
FEW = 100  # records; the share of damaged ones is taken of at least so many


@dataclass(frozen=True)
class Damage:
    """One record that could not be used. record, replaced_by: its number and the next one's, in its source."""

    source: str
    record: int
    id: str | None
    error: str
    replaced_by: int


def usable(source, name, n, prepare):
    """Record n of a source made ready, or the next one that can be.

    Args:
      source: with record(n). name: str. n: int.
      prepare: function(Record) -> Record that raises ValueError or OSError for what cannot be used.
    Returns: (Record, or None if MAX_IN_A_ROW in a row are damaged; tuple of Damage).
    """
    damaged = []
    for place in range(n, n + MAX_IN_A_ROW):
        record = None
        try:
            record = source.record(place)
            return prepare(record), tuple(damaged)
        except (ValueError, OSError) as error:
            damaged.append(Damage(name, place, record and record.id, str(error), place + 1))
    return None, tuple(damaged)


class DamageReport:
    """The file of a run's damaged records, and their count in a stage."""

    def __init__(self, path, stage, step, limit):
        """
        Args:
          path: Path of the file; lines of steps after `step` are forgotten, and one that a kill cut short.
          stage: str. step: int, optimizer steps of the whole run that are done.
          limit: share of the records that may be damaged.
        """
        self.path, self.stage, self.limit, self.count = path, stage, limit, 0
        if path.exists():
            self._cut(step)

    def _cut(self, step):
        kept = 0
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else {"step": step + 1}
                except ValueError:
                    break
                if entry["step"] > step:
                    break
                kept += len(line)
                self.count += entry["stage"] == self.stage
        os.truncate(self.path, kept)

    def add(self, step, damaged, read):
        """Write down what was damaged in a step.

        Args:
          step: int, of the whole run. damaged: list of Damage. read: int, records of the stage so far.
        Raises: ValueError if they are too many now.
        """
        if not damaged:
            return
        with open(self.path, "a") as file:
            file.writelines(json.dumps({"stage": self.stage, "step": step} | asdict(one)) + "\n" for one in damaged)
        self.count += len(damaged)
        if self.count > self.limit * max(read, FEW):
            raise ValueError(
                f"{self.count} of {read} records are damaged, more than max_damaged {self.limit:g} allows (all are listed in "
                f"{self.path}); the last: {damaged[-1].error}"
            )


class Plan:
    """Which records the updates of a stage take.

    Records are drawn for `group` updates at once. Grouped, they are sorted by modality (text alone, or with pictures)
    and length and cut into the updates' batches, whose order is then shuffled: a batch holds records alike, and after
    every group each source has given its exact share.
    """

    def __init__(self, mixture, batch_size, steps, group=1, length=None, seed=0):
        """
        Args:
          mixture: Mixture. batch_size: records per update. steps: updates of the stage.
          group: updates whose records are drawn and sorted together; 1 = as drawn.
          length: function(Record) -> int, needed with group > 1. seed: int, of the shuffling.
        """
        self.mixture, self.batch_size, self.steps = mixture, batch_size, steps
        self.group, self.length, self.seed = group, length, seed
        self.update = 0  # updates that are planned
        self.begin, self.batches = mixture.state(), []  # of the group of the next update

    def next(self):
        """The next update: list of batch_size (source name, n)."""
        place = self.update % self.group
        if place == 0 or not self.batches:
            first = self.update - place
            number = min(self.group, self.steps - first) * self.batch_size
            self.begin = self.mixture.state()
            self.batches = self._arrange([self.mixture.draw() for _ in range(number)], first)
        self.update += 1
        return self.batches[place]

    def _arrange(self, drawn, first):
        batches = [drawn[start : start + self.batch_size] for start in range(0, len(drawn), self.batch_size)]
        if self.group == 1:
            return batches
        alike = {slot: self._sort_key(*slot) for slot in drawn}
        drawn = sorted(drawn, key=alike.get)  # equals stay as drawn
        order = numpy.random.default_rng([self.seed, first]).permutation(len(batches))
        return [drawn[n * self.batch_size : (n + 1) * self.batch_size] for n in order]

    def _sort_key(self, name, n):
        try:
            record = self.mixture.sources[name].record(n)
        except (ValueError, OSError):
            return False, 0  # the worker that reads it says what is wrong
        return bool(record.visuals), self.length(record)

    def state(self):
        """{"update": int, "drawn": records that each source had given when the group began}: all that a resume needs."""
        whole = self.update % self.group == 0 or self.update == self.steps
        return {"update": self.update, "drawn": self.mixture.state() if whole else dict(self.begin)}

    def load_state(self, state):
        """Go on where `state()` was taken. Raises: ValueError as Mixture.load_state."""
        self.mixture.load_state(state["drawn"])
        self.update, self.begin, self.batches = state["update"], dict(state["drawn"]), []


class Reader(torch.utils.data.Dataset):
    """From (source name, n) to (Record made ready, tuple of Damage); what the workers run."""

    def __init__(self, sources, prepare):
        self.sources, self.prepare = sources, prepare

    def __getitem__(self, slot):
        name, n = slot
        return usable(self.sources[name], name, n, self.prepare)


class Feed:
    """The records of one stage, update by update.

    waited: seconds that the last `next` took. damaged: list of Damage found in it.
    """

    def __init__(self, plan, prepare, rank=0, world=1, workers=0, prefetch=2):
        """
        Args:
          plan: Plan. prepare: function(Record) -> Record, see prepare.Preparation.
          rank, world: this process and how many there are: it gets records rank, rank + world, ... of each update.
          workers: processes that read ahead; 0 = the trainer's own reads when it needs the records.
          prefetch: updates that the workers are ahead.
        Raises: ValueError if an update has less records than there are processes.
        """
        if plan.batch_size < world:
            raise ValueError(f"batch_size {plan.batch_size} is less than the {world} processes that share it")
        self.plan, self.rank, self.world = plan, rank, world
        self.share = len(range(rank, plan.batch_size, world))  # records of this process per update
        self.reader, self.workers, self.prefetch = Reader(plan.mixture.sources, prepare), workers, prefetch
        self.planned = deque()  # states behind the updates that are planned and not yet taken
        self.after = plan.state()
        self.items = self.end = None  # what the DataLoader gives, and how its workers end
        self.waited, self.damaged = 0.0, []

    def next(self):
        """This process's records of the next update: list of Record.

        Raises: ValueError if a source gives nothing but damaged records; whatever else a source raises, from a worker
          with the worker's traceback.
        """
        began, self.damaged, records = time.monotonic(), [], []
        if self.items is None:
            self.items = iter(self._loader())
            if self.workers:
                self.end = weakref.finalize(self, end_workers, self.items)  # also at the program's exit
        for record, damaged in itertools.islice(self.items, self.share):
            self.damaged += damaged
            if record is None:
                last = damaged[-1]
                row = f"{MAX_IN_A_ROW} records in a row are damaged"
                raise ValueError(f"source {last.source!r}: {row}; the last: {last.error}")
            records.append(record)
        self.after = self.planned.popleft()
        self.waited = time.monotonic() - began
        return records

    def _loader(self):
        ahead = {}
        if self.workers:
            per_worker = max(1, -(-self.prefetch * self.share // self.workers))
            ahead = dict(prefetch_factor=per_worker, multiprocessing_context="fork", worker_init_fn=leave_signals)
        return DataLoader(
            self.reader, batch_size=None, sampler=self._slots(), num_workers=self.workers, collate_fn=unchanged,
            generator=torch.Generator(), **ahead,  # a generator of its own: torch's own is the training's
        )  # fmt: skip

    def _slots(self):
        while self.plan.update < self.plan.steps:
            update = self.plan.next()
            self.planned.append(self.plan.state())
            yield from update[self.rank :: self.world]

    def state(self):
        """The position behind the last update that was taken, for a checkpoint; the same in every process."""
        return self.after

    def load_state(self, state):
        """Go on where `state()` was taken; before the first `next`. Raises: ValueError as Mixture.load_state."""
        self.plan.load_state(state)
        self.after = self.plan.state()

    def close(self):
        """End the workers."""
        if self.end is not None:
            self.end()
        self.items = None


def unchanged(item):
    """For the DataLoader: no tensors are made of what a worker hands over."""
    return item


def leave_signals(worker):
    """In a worker: Ctrl-C and SIGTERM, which reach all processes of a group, are the trainer's to answer."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers(items):
    """End the workers of a DataLoader's iterator: they are asked, and killed if they do not listen within seconds.

    torch itself would wait for them, or send a SIGTERM, which they leave to the trainer.
    """
    items._shutdown_workers()
    for worker in items._workers:
        if worker.is_alive():
            worker.kill()
