"""Damaged records: counted, named in a file, and too many of them stop the run.

    damaged.jsonl, one JSON object a line:
    {"stage", "step", "source", "record": n, "id": its own name if it could be read, "error", "replaced_by": n}

A record that cannot be used is replaced by the next of its source, never by a random other, so that what a run trains
on stays a function of the data alone: not of the number of workers, nor of where it was interrupted.
"""

import json
import os
from dataclasses import asdict, dataclass

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
