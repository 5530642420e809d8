"""From labels to numbers: how many units every group keeps at every width, and which integers follow."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from slimmable._widths import kept_units
from slimmable.analysis.fit import Counts, Failure, Grouping, Requirements, Values
from slimmable.analysis.labels import Ids, Labels
from slimmable.analysis.trace import Trace


@dataclass
class Solution:
    """The groups, and for each width how many units of each are kept and what the integer attributes are."""

    grouping: Grouping
    roots: list[Ids]  # of each group
    counts: list[Counts]
    values: list[Values] = field(default_factory=list)
    disagreed: list[Ids] = field(default_factory=list)  # axes that had to be coupled or pinned

    def parameters(self, trace: Trace, width: int) -> int:
        """Return how many numbers in parameters and buffers width number `width` keeps."""
        total, counts = 0, self.counts[width]
        for axes in trace.tensors.values():
            total += int(np.prod([self.grouping.count(counts, ids) for ids in axes if ids is not None] or [1]))
        return total


def solve(trace: Trace, widths: tuple[float, ...], round_to: int) -> Solution:
    """Find groups and counts for which every constraint holds at every width.

    Where rounding makes constraints disagree, counts are moved by a few units; where that does not help, axes are
    coupled or pinned, whichever keeps fewer parameters.
    """
    context = trace.context
    labels = context.labels
    coupled: set[int] = set()
    disagreed: list[Ids] = []
    while True:
        solution = _count(labels, widths, round_to)
        needed = Requirements(solution.grouping, context.constraints, trace.attributes)
        failures: dict[int, Failure] = {}
        for width, counts in enumerate(solution.counts):
            values, found = needed.adjust(counts) if width else needed.fit(counts)
            solution.values.append(values)
            for failure in found:
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
            context.constraints = [c for c in context.constraints if c is not failure.constraint]


def _count(labels: Labels, widths: tuple[float, ...], round_to: int) -> Solution:
    roots = labels.find(np.arange(len(labels)))
    groups = labels.groups()
    group_of, rank = np.full(len(labels), -1), np.zeros(len(labels), np.int64)
    for number, group in enumerate(groups):
        group_of[group], rank[group] = number, np.arange(len(group))
    grouping = Grouping(tuple(map(len, groups)), group_of[roots], rank[roots])
    return Solution(grouping, groups, [counts_at(grouping.units, width, round_to) for width in widths])


def counts_at(units: tuple[int, ...], width: float, round_to: int) -> Counts:
    """Return what groups of these sizes keep at a width, before any constraint is looked at."""
    return np.array([*(kept_units(n, width, round_to) for n in units), 1])


def _couple(labels: Labels, failure: Failure) -> bool:
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


def _pin(labels: Labels, failure: Failure) -> bool:
    """Keep the axes of a constraint, and of those it disagrees with, at full width; say whether any was slim."""
    before = len(labels.reasons)
    constraint = failure.constraint
    for ids in failure.axes():
        labels.pin(ids, f"{constraint.where}: no value of {constraint.expression} fits every width")
    return len(labels.reasons) > before
