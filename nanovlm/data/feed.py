"""The feed of a stage: the records of update after update, made ready ahead of the training.

    plan    which records an update takes: drawn from the mixture, perhaps sorted by modality and length
    read    worker processes read, decode and tokenise them, in torch's DataLoader, which keeps their order
    next    the trainer takes the records of its next update

What an update takes is a function of the mixture and the update's number. The number of workers, how far they are ahead
and on how many processes an update is spread change nothing of it, and a resumed run goes on with the next update.
"""

import itertools
import signal
import time
import weakref
from collections import deque

import numpy
import torch
from torch.utils.data import DataLoader

from nanovlm.data.damage import MAX_IN_A_ROW, usable


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
