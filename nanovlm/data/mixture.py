"""Mixture: several sources read together, each in an exact share.

The next record comes from the source that is furthest behind its share, so that after n records every source has
given its share of n to within a record or so, in every run, without a random draw.
"""

import math
from fractions import Fraction

from nanovlm.names import nearest


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
