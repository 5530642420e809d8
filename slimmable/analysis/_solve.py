"""The solution of a trace: channel groups from its labels, and how many units each keeps at every width."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from operator import itemgetter

import numpy as np
from torch import nn

from slimmable.analysis.channels import NESTED, Channels, Counts, Failure, Grouping, Output, Requirements
from slimmable.analysis.integers import Constraint, Expression
from slimmable.analysis.labels import Ids, Labels
from slimmable.analysis.plan import Plan
from slimmable.analysis.trace import Trace


@dataclass
class Solution:
    """The groups and, for each width, the units kept of each group."""

    grouping: Grouping
    roots: list[Ids]  # of each group
    counts: list[Counts]
    disagreed: list[Ids] = field(default_factory=list)  # axes that had to be coupled or pinned

    def parameters(self, trace: Trace) -> int:
        """Return how many elements of parameters and buffers the narrowest width keeps."""
        labelled = ([ids for ids in axes if ids is not None] for axes in trace.tensors.values())
        return sum(math.prod(self.grouping.count(self.counts[-1], ids) for ids in axes) for axes in labelled)


def solve(trace: Trace, rules: Plan) -> Solution:
    """Find groups and counts, by the rules of an empty plan, for which every constraint holds at every width.

    Where rounding makes constraints disagree, counts are changed by a few units; if that does not help, axes are
    coupled or pinned, whichever keeps fewer parameters.
    """
    context = trace.context
    labels = context.labels
    coupled: set[int] = set()
    disagreed: list[Ids] = []
    while True:
        solution = _count(labels, rules)
        needed = Requirements(solution.grouping, context.constraints, trace.attributes)
        failures: dict[int, Failure] = {}
        for width, counts in enumerate(solution.counts):
            _, found = needed.adjust(counts) if width else needed.fit(counts)
            for failure in found:
                failures.setdefault(id(failure.constraint), failure)
        if not failures:
            solution.disagreed = disagreed
            return solution
        disagreed += [ids for failure in failures.values() for ids in failure.axes()]
        failure = next(iter(failures.values()))
        mended = []
        for mend in (_couple, _pin) if id(failure.constraint) not in coupled else (_pin,):
            tried = copy.deepcopy(labels)
            if mend(tried, failure):
                mended.append((_count(tried, rules).parameters(trace), tried))
        coupled.add(id(failure.constraint))
        if mended:
            labels = context.labels = min(mended, key=itemgetter(0))[1]
        else:  # nothing in it can shrink: it does not depend on the width
            context.constraints = [c for c in context.constraints if c is not failure.constraint]


def _count(labels: Labels, rules: Plan) -> Solution:
    """Return the groups and the units that they keep, ignoring constraints."""
    roots = labels.find(np.arange(len(labels)))
    groups = labels.groups()
    group_of, rank = np.full(len(labels), -1), np.zeros(len(labels), np.int64)
    for number, group in enumerate(groups):
        group_of[group], rank[group] = number, np.arange(len(group))
    grouping = Grouping(tuple(map(len, groups)), group_of[roots], rank[roots])
    counts = [np.array([*(rules.kept(n, width) for n in grouping.units), 1]) for width in rules.widths]
    return Solution(grouping, groups, counts)


def _couple(labels: Labels, failure: Failure) -> bool:
    """Make axes of a constraint shrink alike: `a == b` unit by unit, `a // k == b` block by block; True if changed."""
    done = False
    for first, second in permutations(failure.axes(), 2):
        if len(first) % len(second) == 0:
            tiled = np.tile(second, len(first) // len(second))
            if not labels.same(first, tiled):
                labels.merge(first, tiled)
                done = True
    return done


def _pin(labels: Labels, failure: Failure) -> bool:
    """Pin the axes of a constraint and of those that it disagrees with; True if changed."""
    before = len(labels.reasons)
    for ids in failure.axes():
        labels.pin(ids, f"{failure.constraint.where}: no value of {failure.constraint.expression} fits every width")
    return len(labels.reasons) > before


def channels_of(model: nn.Module, trace: Trace, solution: Solution) -> Channels:
    """Reduce a trace and its solution to what sub-networks depend on."""
    pack = _Packing(solution.grouping)
    constraints = [pack.constraint(constraint) for constraint in trace.context.constraints]
    used = dict.fromkeys(key for constraint in constraints for key in constraint.attributes())
    scales = list(_scales(model, trace, pack))
    # torch's encoders may skip padding by nested tensors, which need an even number of heads
    nested = [(path, NESTED) for path, module in model.named_modules() if vars(module).get(NESTED) is True]
    names = dict.fromkeys([*((path, name) for path, name, _ in (*used, *scales)), *nested])
    makers: list[set[str]] = [set() for _ in solution.roots]
    for path, ids in trace.context.producers:
        for group in solution.grouping.groups_in([ids]):
            makers[group].add(path)
    return Channels(
        Requirements(pack.grouping, constraints, {key: trace.attributes[key] for key in used}),
        {key: pack.axes(axes) for key, axes in trace.tensors.items()},
        {(path, name): model.get_submodule(path).__dict__[name] for path, name in names},
        scales,
        [_output(output, trace.context.labels, pack) for output in trace.outputs],
        tuple(tuple(sorted(paths)) for paths in makers),
        tuple(bool(trace.context.labels.ordered(roots).any()) for roots in solution.roots),
        [(macs, tuple(map(pack.ids, axes))) for macs, axes, _ in trace.context.products],
        {name.rpartition(".")[::2]: tuple(tensor.shape) for name, tensor in model.named_parameters()},
    )


def _output(output: Output, labels: Labels, pack: "_Packing") -> Output:
    """Return an output with the units of its axes, and the reason if it stays full."""
    units, why = pack.axes(output.units), output.why
    made = [ids for ids in output.units if ids is not None and labels.produced(ids).any()]
    if not pack.grouping.groups_in(units):
        reasons = dict.fromkeys(labels.reason(ids) for ids in made)
        why = ", ".join(reason.rpartition(": ")[2] if reason.startswith("output") else reason for reason in reasons)
        why = why or "no units that could get thinner reach it"
    return replace(output, units=units, why=why)


def _scales(model: nn.Module, trace: Trace, pack: "_Packing") -> Iterator[tuple[str, str, Ids]]:
    """Find attributes that are `head_dim ** -0.5`, in modules that multiply queries and keys.

    Attention kernels derive the scale from the size that they see; a scale stored as an attribute must agree.
    """
    for path, ids in trace.context.contractions:
        units = pack.ids(ids)
        shrinks = bool(pack.grouping.groups_in([units]))
        for name, value in vars(model.get_submodule(path)).items():
            if shrinks and type(value) is float and abs(value - len(ids) ** -0.5) < 1e-9:
                yield path, name, units


class _Packing:
    """Renumbers the ids of all axes as units of groups; equal axes become one shared array."""

    def __init__(self, grouping: Grouping) -> None:
        starts = np.cumsum([0, *grouping.units])
        total = int(starts[-1])
        slim = grouping.group_of >= 0
        self._unit = np.full(len(slim), total)
        self._unit[slim] = starts[grouping.group_of[slim]] + grouping.rank[slim]
        group_of = np.repeat(np.arange(len(grouping.units)), grouping.units)
        rank = np.arange(total) - np.repeat(starts[:-1], grouping.units)
        self.grouping = Grouping(grouping.units, np.append(group_of, -1), np.append(rank, 0))
        self._known: dict[bytes, Ids] = {}

    def ids(self, ids: Ids) -> Ids:
        units: Ids = self._unit[ids]
        return self._known.setdefault(units.tobytes(), units)

    def axes(self, axes: Sequence[Ids | None]) -> tuple[Ids | None, ...]:
        return tuple(None if ids is None else self.ids(ids) for ids in axes)

    def constraint(self, constraint: Constraint) -> Constraint:
        own, required = map(self._expression, (constraint.expression, constraint.required))
        return Constraint(own, required, constraint.where)

    def _expression(self, expression: Expression) -> Expression:
        if expression.kind == "size":
            return Expression("size", self.ids(expression.value))
        if expression.kind in ("constant", "attribute"):
            return expression
        return Expression(expression.kind, tuple(map(self._expression, expression.value)))
