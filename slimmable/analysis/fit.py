"""Counts and constraints: which integers follow from the units that groups keep, and whether all of them can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimmable.analysis.integers import Attribute, Constraint
from slimmable.analysis.labels import Ids

_STEPS = 24  # of the local search for counts that satisfy all constraints

Counts = NDArray[np.int64]  # kept units of each group, and one more entry, 1, for what stays full
Values = dict[Attribute, int]


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which group an id belongs to, -1 if it stays full, and which of the group's units it is."""

    units: tuple[int, ...]
    group_of: NDArray[np.int64]
    rank: NDArray[np.int64]

    def mask(self, counts: Counts, ids: Ids) -> NDArray[np.bool_]:
        """Return which units of an axis are kept."""
        return self.rank[ids] < counts[self.group_of[ids]]

    def count(self, counts: Counts, ids: Ids) -> int:
        """Return how many units of an axis are kept."""
        return int(self.mask(counts, ids).sum())

    def groups_in(self, axes: Sequence[Ids]) -> list[int]:
        """Return the numbers of the groups that some axes have units of."""
        return sorted({int(group) for ids in axes for group in np.unique(self.group_of[ids]) if group >= 0})


@dataclass
class Failure:
    """A constraint that cannot hold, and those that gave its attributes their values."""

    constraint: Constraint
    rivals: list[Constraint]

    def axes(self) -> list[Ids]:
        """Return the labelled axes that disagree."""
        return [ids for c in (self.constraint, *self.rivals) for ids in (c.ids, *_sizes(c)) if ids is not None]


@dataclass(frozen=True)
class Requirements:
    """What the counts of a model must satisfy: constraints, over attributes with these full values."""

    grouping: Grouping
    constraints: Sequence[Constraint]
    attributes: Mapping[Attribute, int]

    def fit(self, counts: Counts) -> tuple[Values, list[Failure]]:
        """Give attributes the values that the constraints ask for; return the constraints that cannot hold."""
        values: Values = {}
        sources: dict[Attribute, Constraint] = {}
        known: dict[int, int] = {}

        def count(ids: Ids) -> int:
            if id(ids) not in known:
                known[id(ids)] = self.grouping.count(counts, ids)
            return known[id(ids)]

        waiting = self.constraints
        while waiting:
            later: list[Constraint] = []
            ready: dict[Attribute, list[Constraint]] = {}
            for constraint in waiting:
                unknown = {key for key in attributes_of(constraint) if key not in values}
                if len(unknown) == 1:
                    ready.setdefault(unknown.pop(), []).append(constraint)
                elif unknown:
                    later.append(constraint)
            for key, asking in ready.items():
                values[key], sources[key] = _value(asking, key, self.attributes[key], values, count)
            if later and not ready:  # several unknowns: the smallest one stays
                least = min((k for k in attributes_of(later[0]) if k not in values), key=lambda k: self.attributes[k])
                values[least] = self.attributes[least]
            waiting = later
        failures = []
        for constraint in self.constraints:
            if not _holds(constraint, values, count):
                rivals = [sources[key] for key in attributes_of(constraint) if key in sources]
                failures.append(Failure(constraint, [rival for rival in rivals if rival is not constraint]))
        return values, failures

    def adjust(self, counts: Counts) -> tuple[Values, list[Failure]]:
        """Move, in place, the counts of groups that disagree by a unit or two while that leaves fewer failures."""
        start = counts.copy()
        values, failures = self.fit(counts)
        for _ in range(_STEPS):
            if not failures:
                break
            best = None
            for group in self.grouping.groups_in(failures[0].axes()):
                units = self.grouping.units[group]
                for count in (counts[group] + delta for delta in (1, -1, 2, -2)):
                    if not 1 <= count <= units or abs(count - start[group]) > max(1, units // 8):
                        continue
                    before, counts[group] = counts[group], count
                    found = self.fit(counts)
                    counts[group] = before
                    if len(found[1]) < len(failures) and (best is None or len(found[1]) < len(best[1][1])):
                        best = (group, count), found
            if best is None:
                break
            (group, count), (values, failures) = best
            counts[group] = count
        return values, failures


def attributes_of(constraint: Constraint) -> Iterator[Attribute]:
    """Yield the attributes that a constraint reads."""
    yield from constraint.expression.attributes()
    if constraint.other is not None:
        yield from constraint.other.attributes()


def _sizes(constraint: Constraint) -> Iterator[Ids]:
    yield from constraint.expression.sizes()
    if constraint.other is not None:
        yield from constraint.other.sizes()


def _required(constraint: Constraint, values: dict[Attribute, int], count: Callable[[Ids], int]) -> int:
    if constraint.other is not None:
        return constraint.other.evaluate(values, count)
    return constraint.full if constraint.ids is None else count(constraint.ids)


def _holds(constraint: Constraint, values: dict[Attribute, int], count: Callable[[Ids], int]) -> bool:
    try:
        return constraint.expression.evaluate(values, count) == _required(constraint, values, count)
    except ZeroDivisionError:
        return False


def _value(
    asking: list[Constraint], key: Attribute, full: int, values: dict[Attribute, int], count: Callable[[Ids], int]
) -> tuple[int, Constraint]:
    """Return the value of an attribute under which most of the constraints on it hold, and one that asked for it."""

    def holding(value: int) -> int:
        return sum(_holds(constraint, {**values, key: value}, count) for constraint in asking)

    best: tuple[int, int, Constraint] | None = None
    tried: set[int] = set()
    for constraint in asking:
        value = _fitting(constraint, key, full, values, count)
        if value not in tried:
            tried.add(value)
            held = holding(value)
            if held == len(asking):
                return value, constraint
            if best is None or held > best[0]:
                best = held, value, constraint
    assert best is not None
    return best[1], best[2]


def _fitting(
    constraint: Constraint, key: Attribute, full: int, values: dict[Attribute, int], count: Callable[[Ids], int]
) -> int:
    """Return the value of the one unknown attribute under which a constraint holds, else its full value."""
    if constraint.expression.kind == "attribute" and constraint.other is None:
        return _required(constraint, values, count)

    def fits(value: int) -> bool:
        return _holds(constraint, {**values, key: value}, count)

    if fits(full):
        return full
    ratio = count(constraint.ids) / len(constraint.ids) if constraint.ids is not None else 1.0
    near = sorted(range(1, full), key=lambda value: abs(value - full * ratio))
    return next((value for value in near if fits(value)), full)
