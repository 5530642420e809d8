"""Channel groups of a model, the constraints on how many units each keeps, and the resulting sub-networks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimmable._widths import Kept, kept_of
from slimmable.analysis.integers import Attribute, Constraint
from slimmable.analysis.labels import Ids, Mask

NESTED = "use_nested_tensor"

TensorName = tuple[str, str]  # module path, name of a parameter or buffer
Counts = NDArray[np.int64]  # kept units of each group, then a 1 for what stays full
Values = dict[Attribute, int]
Count = Callable[[Ids], int]  # how many units of an axis are kept


@dataclass(frozen=True, eq=False)
class Grouping:
    """For each id, its group, or -1 if it stays full, and its rank among the units of the group."""

    units: tuple[int, ...]
    group_of: NDArray[np.int64]
    rank: NDArray[np.int64]

    @classmethod
    def of(cls, units: tuple[int, ...]) -> "Grouping":
        """Return that of ids which number the units of all groups; the one after the last stands for what is full."""
        group_of, ranks = np.repeat(np.arange(len(units)), units), map(np.arange, units)
        return cls(units, np.append(group_of, -1), np.concatenate([*ranks, np.zeros(1, np.int64)]))

    def mask(self, counts: Counts, ids: Ids) -> Mask:
        """Return which units of an axis are kept."""
        return self.rank[ids] < counts[self.group_of[ids]]

    def count(self, counts: Counts, ids: Ids) -> int:
        """Return how many units of an axis are kept."""
        return int(self.mask(counts, ids).sum())

    def groups_in(self, axes: Sequence[Ids | None]) -> list[int]:
        """Return the numbers of the groups that have units on these axes."""
        labelled = (ids for ids in axes if ids is not None)
        return sorted({int(group) for ids in labelled for group in np.unique(self.group_of[ids]) if group >= 0})


@dataclass
class Failure:
    """A constraint that cannot hold, and those that determined its attributes."""

    constraint: Constraint
    rivals: list[Constraint]

    def axes(self) -> list[Ids]:
        """Return the labelled axes that disagree."""
        return [ids for constraint in (self.constraint, *self.rivals) for ids in constraint.axes()]


@dataclass(frozen=True)
class Requirements:
    """The constraints on a model's counts, and the full values of the attributes in them."""

    grouping: Grouping
    constraints: Sequence[Constraint]
    attributes: Mapping[Attribute, int]

    def fit(self, counts: Counts) -> tuple[Values, list[Failure]]:
        """Return the values of attributes that the constraints require, and the constraints that cannot hold."""
        values: Values = {}
        sources: dict[Attribute, Constraint] = {}
        known: dict[int, int] = {}

        def count(ids: Ids) -> int:
            if id(ids) not in known:
                known[id(ids)] = self.grouping.count(counts, ids)
            return known[id(ids)]

        waiting = [(constraint, set(constraint.attributes())) for constraint in self.constraints]
        while waiting := [(each, unknown) for each, keys in waiting if (unknown := keys - values.keys())]:
            ready: dict[Attribute, list[Constraint]] = {}
            for constraint, unknown in waiting:
                if len(unknown) == 1:
                    ready.setdefault(next(iter(unknown)), []).append(constraint)
            for key, asking in ready.items():
                values[key], sources[key] = _value(asking, key, self.attributes[key], values, count)
            if not ready:  # several unknowns: the smallest attribute stays full
                least = min((k for k in waiting[0][0].attributes() if k not in values), key=self.attributes.__getitem__)
                values[least] = self.attributes[least]
        failures = []
        for constraint in self.constraints:
            if not constraint.holds(values, count):
                rivals = [sources[key] for key in constraint.attributes() if key in sources]
                failures.append(Failure(constraint, [rival for rival in rivals if rival is not constraint]))
        return values, failures

    def adjust(self, counts: Counts) -> tuple[Values, list[Failure]]:
        """Change the counts of groups that disagree by a unit or two, in place, while that leaves fewer failures."""
        start = counts.copy()
        values, failures = self.fit(counts)
        while failures:
            tried = []
            for group in self.grouping.groups_in(failures[0].axes()):
                units = self.grouping.units[group]
                for count in (counts[group] + delta for delta in (1, -1, 2, -2)):
                    if 1 <= count <= units and abs(count - start[group]) <= max(1, units // 8):
                        changed = counts.copy()
                        changed[group] = count
                        tried.append((changed, *self.fit(changed)))
            best = min(tried, key=lambda each: len(each[2]), default=(counts, values, failures))
            if len(best[2]) >= len(failures):
                break
            counts[:], values, failures = best
        return values, failures


def _value(asking: list[Constraint], key: Attribute, full: int, values: Values, count: Count) -> tuple[int, Constraint]:
    """Return the value of an attribute with which most of its constraints hold, and the first that asked for it."""
    first_to_ask: dict[int, Constraint] = {}
    for constraint in asking:
        first_to_ask.setdefault(_fitting(constraint, key, full, values, count), constraint)
    best = max(first_to_ask, key=lambda value: sum(each.holds({**values, key: value}, count) for each in asking))
    return best, first_to_ask[best]


def _fitting(constraint: Constraint, key: Attribute, full: int, values: Values, count: Count) -> int:
    """Return the value of the one unknown attribute with which a constraint holds, or its full value if none does."""
    required = constraint.required
    if constraint.expression.kind == "attribute" and required.kind in ("constant", "size"):
        return required.evaluate(values, count)

    def fits(value: int) -> bool:
        return constraint.holds({**values, key: value}, count)

    if fits(full):
        return full
    ratio = count(required.value) / len(required.value) if required.kind == "size" else 1.0
    near = sorted(range(1, full), key=lambda value: abs(value - full * ratio))
    return next((value for value in near if fits(value)), full)


@dataclass(frozen=True, eq=False)
class SubNetwork:
    """What one sub-network keeps.

    Attributes:
        counts: number of units of each group.
        tensors: (module path, parameter or buffer name) -> what is kept of each axis.
        values: module path -> attribute name -> its value, if that differs from the full network's.
        output_shapes: shapes of the model's output tensors.
        macs: multiply-adds of all convolutions and matrix products, for the whole batch of the example.
        parameters: elements of all parameters.
    """

    counts: tuple[int, ...]
    tensors: Mapping[TensorName, list[Kept]]
    values: Mapping[str, Mapping[str, Any]]
    output_shapes: list[tuple[int, ...]]
    macs: int
    parameters: int


@dataclass(frozen=True, eq=False)
class Output:
    """An output tensor of the model: its full shape, the units of its axes, and why it gets thinner or stays full."""

    name: str
    shape: tuple[int, ...]
    units: tuple[Ids | None, ...]
    why: str


@dataclass(frozen=True, eq=False)
class Channels:
    """The channel groups of a model and what they size; pure data, in which units are numbered as by `Grouping.of`."""

    needed: Requirements  # the groups, and the constraints on how many units they keep
    tensors: Mapping[TensorName, tuple[Ids | None, ...]]  # units of each axis
    attributes: Mapping[tuple[str, str], Any]  # module path, name -> full value: an integer, or several in a tuple
    scales: Sequence[tuple[str, str, Ids]]  # module path, name, units of attributes that are `len(units) ** -0.5`
    outputs: Sequence[Output]
    makers: tuple[tuple[str, ...], ...]  # for each group, the modules with weights that make it
    ordered: tuple[bool, ...]  # for each group, whether the order of its units matters
    products: Sequence[tuple[int, tuple[Ids, ...]]]  # full multiply-adds, and the units that they are proportional to
    sizes: Mapping[TensorName, tuple[int, ...]]  # full shape of each parameter, shared ones only once

    @property
    def units(self) -> tuple[int, ...]:
        """The number of units of each group."""
        return self.needed.grouping.units

    def sub_network(self, counts: Counts, values: Values, starts: Counts | None = None) -> SubNetwork:
        """Return the sub-network of these counts and values, which keeps units from `starts` on, or the first ones."""
        grouping = self.needed.grouping
        if starts is not None:  # of each group the unit at its start comes first, and those before it last
            sizes = np.array([*grouping.units, 1])[grouping.group_of]
            grouping = replace(grouping, rank=(grouping.rank - starts[grouping.group_of]) % sizes)
        found: dict[int, Kept] = {}

        def kept(ids: Ids) -> Kept:
            if id(ids) not in found:
                units = np.flatnonzero(grouping.mask(counts, ids))
                first = len(units) if units[-1] == len(units) - 1 else tuple(units.tolist())
                found[id(ids)] = None if len(units) == len(ids) else first
            return found[id(ids)]

        def count(ids: Ids) -> int:
            return kept_of(len(ids), kept(ids))

        def narrow(shape: tuple[int, ...], axes: Sequence[Ids | None]) -> tuple[int, ...]:
            return tuple(n if ids is None else count(ids) for n, ids in zip(shape, axes, strict=True))

        tensors = {key: [None if ids is None else kept(ids) for ids in axes] for key, axes in self.tensors.items()}
        changed: dict[str, dict[str, Any]] = {}
        for (path, name, position), value in values.items():
            if value != self.needed.attributes[path, name, position]:
                entry = changed.setdefault(path, {})
                entry[name] = _replaced(entry.get(name, self.attributes[path, name]), position, value)
        for path, name, ids in self.scales:
            if count(ids) < len(ids):
                changed.setdefault(path, {})[name] = count(ids) ** -0.5
        for path, name in self.attributes:
            attention = f"{path}.layers.0.self_attn".lstrip(".")
            if name == NESTED and changed.get(attention, {}).get("num_heads", 0) % 2:  # as torch's constructor does
                changed.setdefault(path, {})[name] = False
        shapes = [narrow(output.shape, output.units) for output in self.outputs]
        macs = sum(full // math.prod(map(len, axes)) * math.prod(map(count, axes)) for full, axes in self.products)
        parameters = sum(math.prod(narrow(shape, self.tensors[key])) for key, shape in self.sizes.items())
        return SubNetwork(tuple(map(int, counts[:-1])), tensors, changed, shapes, macs, parameters)


def _replaced(value: Any, position: tuple[int, ...], new: int) -> Any:
    if not position:
        return new
    parts = list(value)
    parts[position[0]] = _replaced(parts[position[0]], position[1:], new)
    return type(value)(parts)
