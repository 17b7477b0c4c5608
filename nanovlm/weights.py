"""Rename the tensors of a published checkpoint to ours and back, every one of them consumed or named.

A table (weight_tables.py) says which tensor becomes which; `plan` decides from names and shapes alone what happens to
each, so that nothing is read before everything fits; `to_ours` and `to_published` then do it.
"""

from dataclasses import dataclass, field

import torch

from nanovlm.weight_errors import WeightsError, explain, grouped
from nanovlm.weight_tables import (
    Alias, Computed, Fused, Reshaped, Same, Tied, Unused, as_entry, expression, prefixed,
)  # fmt: skip

__all__ = ["Alias", "Computed", "Fused", "Plan", "Reshaped", "Same", "Tied", "Unused", "WeightsError", "placed", "plan",
           "prefixed", "published_name", "to_ours", "to_published"]


@dataclass
class Plan:
    """What happens to every tensor of a checkpoint, before any is read.

    consumed: {published name: (entry, our names)}; None among the names for zeros.
    twice: {published name: (entry, our names)} whose target another tensor already fills: must be equal.
    computed, unused: {published name: reason}. missing: {our name: published name}. unexpected: published names.
    misshaped: {published name: (found, expected)} shapes. resized: {our name: (found, expected)} position tables.
    """

    consumed: dict = field(default_factory=dict)
    twice: dict = field(default_factory=dict)
    computed: dict = field(default_factory=dict)
    unused: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)
    unexpected: list = field(default_factory=list)
    misshaped: dict = field(default_factory=dict)
    resized: dict = field(default_factory=dict)

    @property
    def fits(self):
        """bool, nothing missing, unexpected or mis-shaped."""
        return not (self.missing or self.unexpected or self.misshaped)


def find_entry(table, name, ours):
    """The first entry that a published name fits: (entry, our names), or None.

    Args:
      table: list of entries. name: str. ours: container of the model's tensor names.
    """
    for entry in table:
        found = None if isinstance(entry, Alias) else expression(entry.published).fullmatch(name)
        if found is None:
            continue
        if isinstance(entry, Computed):
            return entry, ()
        names = tuple(None if part is None else part.format(**found.groupdict()) for part in entry.parts)
        if all(part is None or part in ours for part in names):
            return entry, names
    return None


def match(table, names, ours):
    """The entry of every published name: {name: (entry, our names)}, (None, ()) where there is none.

    Args:
      table: list of entries. names: iterable of str. ours: container of the model's tensor names.
    """
    found = {name: find_entry(table, name, ours) for name in names}
    direct = [name for name, match in found.items() if match and not isinstance(match[0], Computed)]
    for alias in table:
        if not isinstance(alias, Alias):
            continue
        if any(expression(alias.whole or alias.canonical).fullmatch(name) for name in direct):
            continue  # a file spells all its names one way: this one was renamed by mistake
        for name in [name for name, match in found.items() if match is None]:
            spelled = expression(alias.published).fullmatch(name)
            if spelled:
                found[name] = find_entry(table, alias.canonical.format(**spelled.groupdict()), ours)
    return {name: match or (None, ()) for name, match in found.items()}


def published_name(table, name, ours):
    """Where one of our tensors is published: (published name, entry, our names); None if the table has no place.

    Args:
      table: list of entries. name: str, ours. ours: container of the model's tensor names.
    """
    for entry in table:
        if isinstance(entry, (Computed, Alias, Tied)):
            continue
        for pattern in entry.parts:
            found = None if pattern is None else expression(pattern).fullmatch(name)
            if found is None:
                continue
            names = tuple(None if part is None else part.format(**found.groupdict()) for part in entry.parts)
            if all(part is None or part in ours for part in names):
                return entry.published.format(**found.groupdict()), entry, names
    return None


def plan(table, found, ours, resizable=()):
    """Decide what happens to every tensor.

    Args:
      table: tuple of entries. found: {published name: shape}. ours: {our name: shape}.
      resizable: our names of tables that may have another number of rows.
    Returns: Plan.
    """
    table, result, filled = [as_entry(entry) for entry in table], Plan(), set()
    matches = match(table, found, ours)
    for name in sorted(found, key=lambda name: isinstance(matches[name][0], Tied)):  # the second names behind the first
        entry, names = matches[name]
        if entry is None:
            result.unexpected.append(name)
        elif isinstance(entry, Computed):
            (result.unused if isinstance(entry, Unused) else result.computed)[name] = entry.reason
        else:
            real = [part for part in names if part is not None]
            expected = entry.published_shape([ours[part] for part in real])
            if tuple(found[name]) != expected:
                if real[0] in resizable and resizes(found[name], expected):
                    result.resized[real[0]] = (tuple(found[name]), expected)
                else:
                    result.misshaped[name] = (tuple(found[name]), expected)
            (result.twice if filled & set(real) else result.consumed)[name] = (entry, names)
            filled |= set(real)
    for name in ours:
        if name not in filled:
            result.missing[name] = (published_name(table, name, ours) or (name,))[0]
    return result


def resizes(found, expected):
    """bool, whether two shapes differ in their rows alone; behind the leading ones of a published table, maybe."""
    rows = max(len(expected) - 2, 0)  # the axis of the rows: [R, W], [1, R, W] or, of a bias, [R]
    others = [(*shape[:rows], *shape[rows + 1 :]) for shape in (found, expected)]
    return len(found) == len(expected) and others[0] == others[1]


def to_ours(table, tensors, ours, where="the checkpoint"):
    """Rename published tensors.

    Args:
      table: tuple of entries. tensors: {published name: Tensor}.
      ours: {our name: Tensor or shape}, what the model needs: its state_dict().
      where: str, named in errors.
    Returns: {our name: Tensor}, every one that the model needs.
    Raises: WeightsError naming what is missing, unexpected, mis-shaped, or there twice with different values.
    """
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in ours.items()}
    found = plan(table, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes)
    if not found.fits:
        raise WeightsError(explain(found, where))
    renamed = {}
    for name, (entry, names) in (found.consumed | found.twice).items():
        for part, tensor in zip(names, entry.split(tensors[name])):
            if part in renamed and not torch.equal(renamed[part], tensor):
                raise WeightsError(differs(where, name, part))
            if part is not None:
                renamed[part] = tensor
    return renamed


def to_published(table, state):
    """Rename our tensors back: the inverse of `to_ours`, without what is computed, unused or tied.

    Args:
      table: tuple of entries. state: {our name: Tensor}, a state_dict().
    Returns: {published name: Tensor}.
    Raises: WeightsError naming the tensors for which the layout has no place.
    """
    return {name: entry.join([None if part is None else state[part] for part in names])
            for name, (entry, names) in placed(table, state).items()}


def placed(table, state):
    """Where our tensors go: {published name: (entry, our names)}; raises WeightsError as `to_published` does."""
    table = [as_entry(entry) for entry in table]
    homeless, result = [], {}
    for name in state:
        found = published_name(table, name, state)
        if found is None:
            homeless.append(name)
        else:
            result[found[0]] = found[1:]
    if homeless:
        raise WeightsError(f"the published layout has no place for {len(homeless)} tensors: "
                           f"{'; '.join(grouped(homeless))}; merge or remove what the paper's model does not have")
    return result


def differs(where, name, part):
    """The message for a tensor that a file holds twice with different values."""
    return f"{where}: {name} is a second copy of our {part}, but its values differ; the file is damaged or not tied"
