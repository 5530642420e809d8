"""From labels to numbers: how many units every group keeps at every width, and which integers follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimmable._widths import kept_units
from slimmable.analysis._integers import Attribute, Constraint
from slimmable.analysis._labels import Ids
from slimmable.analysis._trace import Trace


@dataclass
class Solution:
    """The groups, which units each width keeps, and the values of the integer attributes at each width."""

    groups: list[Ids]
    kept: list[NDArray[np.bool_]]  # for each width: is the class of this id kept?
    values: list[dict[Attribute, int]]

    def count(self, width: int, ids: Ids) -> int:
        """Return how many units of an axis width number `width` keeps."""
        return int(self.kept[width][ids].sum())


@dataclass
class _Failure:
    constraint: Constraint
    rivals: list[Constraint]  # constraints that gave its attributes their values


def solve(trace: Trace, widths: tuple[float, ...], round_to: int) -> Solution:
    """Find the largest set of groups for which every constraint holds at every width.

    Where rounding makes constraints disagree, axes are coupled first; what still disagrees is pinned.
    """
    coupled: set[int] = set()
    while True:
        solution = _count(trace, widths, round_to)
        failures = _fit(trace, solution)
        if not failures:
            return solution
        changed = False
        for failure in failures:
            key = id(failure.constraint)
            couples = key not in coupled and _couple(trace, failure)
            coupled.add(key)
            changed |= couples or _pin(trace, failure)
        if not changed:  # nothing is left to shrink in what disagrees: it did not depend on a width
            lost = {id(failure.constraint) for failure in failures}
            trace.context.constraints = [c for c in trace.context.constraints if id(c) not in lost]


def _count(trace: Trace, widths: tuple[float, ...], round_to: int) -> Solution:
    labels = trace.context.labels
    roots = labels.find(np.arange(len(labels)))
    groups = labels.groups()
    kept = []
    for width in widths:
        mask = np.ones(len(labels), bool)
        for group in groups:
            mask[group[kept_units(len(group), width, round_to) :]] = False
        kept.append(mask[roots])
    return Solution(groups, kept, [{} for _ in widths])


def _fit(trace: Trace, solution: Solution) -> list[_Failure]:
    """Give attributes the values that the constraints ask for; return the constraints that cannot hold."""
    constraints = [c for c in trace.context.constraints if any(True for _ in c.expression.attributes()) or _sized(c)]
    sources: dict[Attribute, Constraint] = {}
    failures: dict[int, _Failure] = {}
    for width in range(len(solution.kept)):
        values = solution.values[width]

        def count(ids: Ids, width: int = width) -> int:
            return solution.count(width, ids)

        waiting = constraints
        while waiting:
            later, progress = [], False
            for constraint in waiting:
                unknown = _unknown(constraint, values)
                if len(unknown) == 1:
                    _assign(trace, constraint, unknown.pop(), values, count, sources)
                    progress = True
                elif unknown:
                    later.append(constraint)
            if later and not progress:  # two unknowns: the smaller one stays
                least = min(_unknown(later[0], values), key=lambda key: trace.attributes[key])
                values[least] = trace.attributes[least]
            waiting = later
        for constraint in constraints:
            if id(constraint) not in failures and not _holds(constraint, values, count):
                keys = list(_attributes(constraint))
                rivals = [sources[key] for key in keys if key in sources and sources[key] is not constraint]
                failures[id(constraint)] = _Failure(constraint, rivals)
    return list(failures.values())


def _sized(constraint: Constraint) -> bool:
    return any(True for _ in _sizes(constraint))


def _attributes(constraint: Constraint) -> Iterator[Attribute]:
    yield from constraint.expression.attributes()
    if constraint.other is not None:
        yield from constraint.other.attributes()


def _sizes(constraint: Constraint) -> Iterator[Ids]:
    yield from constraint.expression.sizes()
    if constraint.other is not None:
        yield from constraint.other.sizes()


def _unknown(constraint: Constraint, values: dict[Attribute, int]) -> set[Attribute]:
    return {key for key in _attributes(constraint) if key not in values}


def _required(constraint: Constraint, values: dict[Attribute, int], count: Callable[[Ids], int]) -> int:
    if constraint.other is not None:
        return constraint.other.evaluate(values, count)
    return constraint.full if constraint.ids is None else count(constraint.ids)


def _holds(constraint: Constraint, values: dict[Attribute, int], count: Callable[[Ids], int]) -> bool:
    try:
        return constraint.expression.evaluate(values, count) == _required(constraint, values, count)
    except ZeroDivisionError:
        return False


def _assign(
    trace: Trace,
    constraint: Constraint,
    key: Attribute,
    values: dict[Attribute, int],
    count: Callable[[Ids], int],
    sources: dict[Attribute, Constraint],
) -> None:
    """Give the one unknown attribute of a constraint the value under which it holds, else its full value."""
    full = trace.attributes[key]
    sources.setdefault(key, constraint)

    def fits(value: int) -> bool:
        return _holds(constraint, {**values, key: value}, count)

    target = None
    if constraint.expression.kind == "attribute" and constraint.other is None:
        target = _required(constraint, values, count)
    elif not fits(full) and full > 0:
        whole = constraint.full or full
        ratio = count(constraint.ids) / whole if constraint.ids is not None else 1.0
        near = sorted(range(1, full), key=lambda value: abs(value - full * ratio))
        target = next((value for value in near if fits(value)), None)
    values[key] = full if target is None else target


def _couple(trace: Trace, failure: _Failure) -> bool:
    """Try to make the axes of a constraint shrink alike: `a == b` unit by unit, `a // k == b` block by block."""
    labels, mine = trace.context.labels, failure.constraint
    axes = [ids for ids in (mine.ids, *_sizes(mine)) if ids is not None]
    axes += [rival.ids for rival in failure.rivals if rival.ids is not None]
    if mine.ids is None and mine.other is None:
        return False
    done = False
    for first in axes:
        for second in axes:
            if first is second or len(first) < len(second) or len(first) % len(second):
                continue
            tiled = np.tile(second, len(first) // len(second))
            if labels.pinned(first).any() == labels.pinned(second).any() and not labels.same(first, tiled):
                labels.merge(first, tiled)
                done = True
    return done


def _pin(trace: Trace, failure: _Failure) -> bool:
    """Keep the axes of a constraint, and of those it disagrees with, at full width; say whether any was slim."""
    labels = trace.context.labels
    before = len(labels.reasons)
    for constraint in (failure.constraint, *failure.rivals):
        for ids in (constraint.ids, *_sizes(constraint)):
            if ids is not None:
                labels.pin(ids, f"{constraint.where}: no value of {constraint.expression} fits every width")
    return len(labels.reasons) > before
