"""The feed of a stage: the records of update after update, made ready ahead of the training.

    plan    which records an update takes: drawn from the mixture, perhaps sorted by modality and length
    read    worker processes read, decode and tokenise them, in torch's DataLoader, which keeps their order
    next    the trainer takes the records of its next update

What an update takes is a function of the mixture and the update's number. The number of workers, how far they are ahead
and on how many processes an update is spread change nothing of it, and a resumed run goes on with the next update.
"""

import itertools
import math
import signal
import time
import weakref
from collections import deque
from fractions import Fraction

import numpy
import torch
from torch.utils.data import DataLoader

from nanovlm.files import JsonLines


class Mixture:
    """Several sources read together, each in an exact share.

    The next record comes from the source that is furthest behind its share, so that after n records every source has
    given its share of n to within a record or so, in every run, without a random draw. A source has `name`, `__len__`
    and `record(n)`; all that a resume needs of it is `drawn`, the number of records drawn.
    """

    def __init__(self, sources, weights):
        """sources: dict name -> source; weights: dict name -> positive number, relative, of those that are read."""
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

    def resume(self, drawn):
        """Go on where `drawn` was {name: records}. Raises: ValueError if the names are not this mixture's."""
        if set(drawn) != set(self.drawn):
            raise ValueError(f"the saved mixture reads {sorted(drawn)}, not {sorted(self.drawn)}; resume with the same")
        self.drawn = {name: drawn[name] for name in self.drawn}  # order decides ties


# Damaged records: counted, named in a file, and too many of them stop the run. A record that cannot be used is replaced
# by the next of its source, never by a random other, so that what a run trains on stays a function of the data alone:
# not of the number of workers, nor of where it was interrupted.

MAX_IN_A_ROW = 100  # damaged records one behind the other; then something else is wrong than a record
FEW = 100  # records; the share of damaged ones is taken of at least so many
AHEAD = 2  # updates that the workers are ahead


class Reader(torch.utils.data.Dataset):
    """From (source name, n) to (Record made ready, list of what was damaged); what the workers run.

    The record is the first from n on that can be used, or None after MAX_IN_A_ROW that cannot. Damaged: a dict each,
    {"source", "record": n, "id": its own name if it could be read, "error", "replaced_by": n + 1}.
    """

    def __init__(self, sources, prepare):
        self.sources, self.prepare = sources, prepare

    def __getitem__(self, slot):
        (name, first), damaged = slot, []
        for n in range(first, first + MAX_IN_A_ROW):
            record = None
            try:
                record = self.sources[name].record(n)
                return self.prepare(record), damaged
            except (ValueError, OSError) as error:
                damaged.append({"source": name, "record": n, "id": record and record.id, "error": str(error),
                                "replaced_by": n + 1})
        return None, damaged


class DamageReport:
    """The file of a run's damaged records, {"stage", "step"} and what Reader says, and their count in a stage."""

    def __init__(self, path, stage, step, limit):
        """limit: share of damaged records allowed. Lines of later steps, or cut short by a kill, are forgotten."""
        self.path, self.lines, self.stage, self.limit, self.count = path, JsonLines(path), stage, limit, 0
        for place, entry in self.lines.places():
            if entry["step"] > step:
                self.lines.cut(place)
                break
            self.count += entry["stage"] == stage
        if path.exists():
            self.lines.add()  # removes the line that a kill cut short

    def add(self, step, damaged, read):
        """Write down what was damaged in a step; ValueError if it is too much of the `read` records so far."""
        if not damaged:
            return
        self.lines.add(*({"stage": self.stage, "step": step} | one for one in damaged))
        self.count += len(damaged)
        if self.count > self.limit * max(read, FEW):
            raise ValueError(f"{self.count} of {read} records are damaged, more than max_damaged {self.limit:g} allows "
                             f"(all are listed in {self.path}); the last: {damaged[-1]['error']}")


class Feed:
    """The records of one stage, update by update.

    Records are drawn for `group` updates at once. Grouped, they are sorted by modality (text alone, or with pictures)
    and length and cut into the updates' batches, whose order is then shuffled: a batch holds records alike, and after
    every group each source has given its exact share.

    waited: seconds that the last `next` took. damaged: list of what was damaged in it, see Reader.
    """

    def __init__(self, mixture, prepare, batch_size, steps, group=1, length=None, seed=0, rank=0, world=1, workers=0):
        """
        Args:
          mixture: Mixture. prepare: function(Record) -> Record, see batching.Preparation.
          batch_size: records per update. steps: updates of the stage.
          group: updates whose records are drawn and sorted together; 1 = as drawn.
          length: function(Record) -> int, needed with group > 1. seed: int, of the shuffling.
          rank, world: this process and how many there are: it gets records rank, rank + world, ... of each update.
          workers: processes that read ahead; 0 = the trainer's own reads when it needs the records.
        """
        self.mixture, self.batch_size, self.steps = mixture, batch_size, steps
        self.group, self.length, self.seed = group, length, seed
        self.rank, self.world = rank, world
        self.reader, self.workers = Reader(mixture.sources, prepare), workers
        self.position = {"update": 0, "drawn": dict(mixture.drawn)}  # behind the last update that was taken
        self.planned = deque()  # positions behind the updates that are planned and not yet taken
        self.items = self.end = None  # what the DataLoader gives, and how its workers end
        self.waited, self.damaged = 0.0, []

    def next(self):
        """This process's records of the next update: list of Record. Raises: whatever a source raises."""
        began, self.damaged, records = time.monotonic(), [], []
        share = len(range(self.rank, self.batch_size, self.world))
        if self.items is None:
            ahead = {}
            if self.workers:
                per_worker = max(1, -(-AHEAD * share // self.workers))
                ahead = dict(prefetch_factor=per_worker, multiprocessing_context="fork", worker_init_fn=leave_signals)
            self.items = iter(DataLoader(
                self.reader, batch_size=None, sampler=self._plan(), num_workers=self.workers,
                collate_fn=tuple,  # what a worker hands over stays as it is
                generator=torch.Generator(), **ahead,  # a generator of its own: torch's own is the training's
            ))  # fmt: skip
            if self.workers:
                self.end = weakref.finalize(self, end_workers, self.items)  # also at the program's exit
        for record, damaged in itertools.islice(self.items, share):
            self.damaged += damaged
            if record is None:
                raise ValueError(f"source {damaged[-1]['source']!r}: {MAX_IN_A_ROW} records in a row are damaged; "
                                 f"the last: {damaged[-1]['error']}")
            records.append(record)
        self.position = self.planned.popleft()
        self.waited = time.monotonic() - began
        return records

    def _plan(self):
        """(source name, n) of every record that this process reads, from the position on."""
        update = self.position["update"]
        while update < self.steps:
            first = update - update % self.group  # of the group
            begin = dict(self.mixture.drawn)
            size = min(self.group, self.steps - first) * self.batch_size
            drawn = [self.mixture.draw() for _ in range(size)]
            order = range(size // self.batch_size)
            if self.group > 1:
                alike = {slot: self._sort_key(*slot) for slot in drawn}
                drawn.sort(key=alike.get)  # equals stay as drawn
                order = numpy.random.default_rng([self.seed, first]).permutation(len(order)).tolist()
            for n in order[update - first :]:
                update += 1
                whole = update - first == len(order)
                self.planned.append({"update": update, "drawn": dict(self.mixture.drawn) if whole else begin})
                yield from drawn[n * self.batch_size : (n + 1) * self.batch_size][self.rank :: self.world]

    def _sort_key(self, name, n):
        try:
            record = self.mixture.sources[name].record(n)
        except (ValueError, OSError):
            return False, 0  # the worker that reads it says what is wrong
        return bool(record.visuals), self.length(record)

    def state(self):
        """{"update": int, "drawn": {name: records given when the update's group began}}: all that a resume needs.

        It stands behind the last update that was taken, and is the same in every process.
        """
        return self.position

    def load_state(self, state):
        """Go on where `state()` was taken; before the first `next`. Raises: ValueError as Mixture.resume."""
        self.mixture.resume(state["drawn"])
        self.position = state

    def close(self):
        """End the workers."""
        if self.end is not None:
            self.end()
        self.items = None


def leave_signals(worker):
    """In a worker: Ctrl-C and SIGTERM, which reach all processes of a group, are the trainer's to answer."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers(items):
    """Ask the workers of a DataLoader's iterator to end; kill who does not: torch would wait, or send a SIGTERM."""
    items._shutdown_workers()
    for worker in items._workers:
        if worker.is_alive():
            worker.kill()
