"""From labels to numbers: how many units every group keeps at every width, and which integers follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from slimmable._widths import kept_units
from slimmable.analysis._integers import Attribute, Constraint
from slimmable.analysis._labels import Ids, Labels
from slimmable.analysis._trace import Trace

_STEPS = 24  # of the local search for counts that satisfy all constraints


@dataclass
class Solution:
    """The groups, how many units of each every width keeps, and the integer attributes at each width."""

    groups: list[Ids]
    group_of: NDArray[np.int64]  # of an id; -1 where it stays full
    rank: NDArray[np.int64]  # of an id's unit in its group
    counts: list[NDArray[np.int64]]  # for each width: kept units a group, and one more entry for "all"
    values: list[dict[Attribute, int]]
    disagreed: list[Ids] = field(default_factory=list)  # axes that had to be coupled or pinned

    def mask(self, width: int, ids: Ids) -> NDArray[np.bool_]:
        """Return which units of an axis width number `width` keeps."""
        return self.rank[ids] < self.counts[width][self.group_of[ids]]

    def count(self, width: int, ids: Ids) -> int:
        """Return how many units of an axis width number `width` keeps."""
        return int(self.mask(width, ids).sum())

    def parameters(self, trace: Trace, width: int) -> int:
        """Return how many numbers in parameters and buffers width number `width` keeps."""
        total = 0
        for axes in trace.tensors.values():
            total += int(np.prod([self.count(width, ids) for ids in axes if ids is not None] or [1]))
        return total


@dataclass
class _Failure:
    constraint: Constraint
    rivals: list[Constraint]  # constraints that gave its attributes their values

    def axes(self) -> list[Ids]:
        """Return the labelled axes that disagree."""
        return [ids for c in (self.constraint, *self.rivals) for ids in (c.ids, *_sizes(c)) if ids is not None]


def solve(trace: Trace, widths: tuple[float, ...], round_to: int) -> Solution:
    """Find groups and counts for which every constraint holds at every width.

    Where rounding makes constraints disagree, counts are moved by a few units; where that does not help, axes are
    coupled or pinned, whichever keeps fewer parameters.
    """
    labels = trace.context.labels
    coupled: set[int] = set()
    disagreed: list[Ids] = []
    while True:
        solution = _count(labels, widths, round_to)
        failures: dict[int, _Failure] = {}
        for width in range(len(widths)):
            found = _fit(trace, solution, width)
            for failure in _adjust(trace, solution, width, found) if found else ():
                failures.setdefault(id(failure.constraint), failure)
        if not failures:
            solution.disagreed = disagreed
            return solution
        disagreed += [ids for failure in failures.values() for ids in failure.axes()]
        failure = next(iter(failures.values()))
        start = labels.snapshot()
        smallest = None
        for mend in (_couple, _pin) if id(failure.constraint) not in coupled else (_pin,):
            labels.restore(start)
            if mend(labels, failure):
                size = _count(labels, widths, round_to).parameters(trace, len(widths) - 1)
                if smallest is None or size < smallest[0]:
                    smallest = size, labels.snapshot()
        coupled.add(id(failure.constraint))
        if smallest is not None:
            labels.restore(smallest[1])
        else:  # nothing is left to shrink in what disagrees: it did not depend on a width
            labels.restore(start)
            trace.context.constraints = [c for c in trace.context.constraints if c is not failure.constraint]


def _count(labels: Labels, widths: tuple[float, ...], round_to: int) -> Solution:
    roots = labels.find(np.arange(len(labels)))
    groups = labels.groups()
    group_of, rank = np.full(len(labels), -1), np.zeros(len(labels), np.int64)
    for number, group in enumerate(groups):
        group_of[group], rank[group] = number, np.arange(len(group))
    counts = [np.array([*(kept_units(len(group), width, round_to) for group in groups), 1]) for width in widths]
    return Solution(groups, group_of[roots], rank[roots], counts, [{} for _ in widths])


def _fit(trace: Trace, solution: Solution, width: int) -> list[_Failure]:
    """Give attributes the values that the constraints ask for; return the constraints that cannot hold."""
    values = solution.values[width] = {}
    sources: dict[Attribute, Constraint] = {}

    def count(ids: Ids) -> int:
        return solution.count(width, ids)

    waiting = constraints = trace.context.constraints
    while waiting:
        later: list[Constraint] = []
        ready: dict[Attribute, list[Constraint]] = {}
        for constraint in waiting:
            unknown = {key for key in _attributes(constraint) if key not in values}
            if len(unknown) == 1:
                ready.setdefault(unknown.pop(), []).append(constraint)
            elif unknown:
                later.append(constraint)
        for key, asking in ready.items():
            values[key], sources[key] = _value(asking, key, trace.attributes[key], values, count)
        if later and not ready:  # several unknowns: the smallest one stays
            least = min((k for k in _attributes(later[0]) if k not in values), key=lambda k: trace.attributes[k])
            values[least] = trace.attributes[least]
        waiting = later
    failures = []
    for constraint in constraints:
        if not _holds(constraint, values, count):
            rivals = [sources[key] for key in _attributes(constraint) if key in sources]
            failures.append(_Failure(constraint, [rival for rival in rivals if rival is not constraint]))
    return failures


def _adjust(trace: Trace, solution: Solution, width: int, failures: list[_Failure]) -> list[_Failure]:
    """Move the counts of groups that disagree by a unit or two while that leaves fewer failures."""
    if width == 0:
        return failures
    counts = solution.counts[width]
    start = counts.copy()
    for _ in range(_STEPS):
        if not failures:
            break
        best = None
        for group in sorted({int(g) for ids in failures[0].axes() for g in solution.group_of[ids] if g >= 0}):
            units = len(solution.groups[group])
            for count in (counts[group] + delta for delta in (1, -1, 2, -2)):
                if not 1 <= count <= units or abs(count - start[group]) > max(1, units // 8):
                    continue
                before, counts[group] = counts[group], count
                left = _fit(trace, solution, width)
                counts[group] = before
                if len(left) < len(failures) and (best is None or len(left) < len(best[2])):
                    best = group, count, left
        if best is None:
            break
        counts[best[0]], failures = best[1], best[2]
    return _fit(trace, solution, width)


def _attributes(constraint: Constraint) -> Iterator[Attribute]:
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


def _couple(labels: Labels, failure: _Failure) -> bool:
    """Make the axes of a constraint shrink alike: `a == b` unit by unit, `a // k == b` block by block."""
    axes, done = failure.axes(), False
    for first in axes:
        for second in axes:
            if first is second or len(first) < len(second) or len(first) % len(second):
                continue
            tiled = np.tile(second, len(first) // len(second))
            if not labels.same(first, tiled):
                labels.merge(first, tiled)
                done = True
    return done


def _pin(labels: Labels, failure: _Failure) -> bool:
    """Keep the axes of a constraint, and of those it disagrees with, at full width; say whether any was slim."""
    before = len(labels.reasons)
    constraint = failure.constraint
    for ids in failure.axes():
        labels.pin(ids, f"{constraint.where}: no value of {constraint.expression} fits every width")
    return len(labels.reasons) > before
