"""The channel groups of a model, where they lie and what follows them: all that is needed for any sub-network of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from slimmable._widths import Kept
from slimmable.analysis._solve import Solution
from slimmable.analysis.fit import Counts, Grouping, Requirements, Values, attributes_of
from slimmable.analysis.integers import Constraint, Expression
from slimmable.analysis.labels import Ids
from slimmable.analysis.trace import Trace

TensorName = tuple[str, str]  # module path, name of a parameter or buffer
_NESTED = "use_nested_tensor"


@dataclass(frozen=True, eq=False)
class SubNetwork:
    """What one sub-network keeps.

    Attributes:
        counts: how many units of each group.
        tensors: (module path, parameter or buffer name) -> for each axis what is kept.
        values: module path -> attribute name -> its value, where it is not that of the full network.
        output_shapes: the shapes of the model's output tensors.
        macs: multiply-adds of all convolutions and matrix products, for the whole batch of the example.
        parameters: numbers in all parameters.
    """

    counts: tuple[int, ...]
    tensors: Mapping[TensorName, list[Kept]]
    values: Mapping[str, Mapping[str, Any]]
    output_shapes: list[tuple[int, ...]]
    macs: int
    parameters: int


@dataclass(frozen=True, eq=False)
class Channels:
    """The groups and what is sized by them; pure data, which copies of a model share.

    Units are numbered through all groups; the number behind the last unit stands for whatever stays full.

    Attributes:
        needed: the groups, and the constraints on how many units they keep.
        tensors: (module path, parameter or buffer name) -> for each axis its units, or None.
        attributes: (module path, attribute name) -> full value, which may be a tuple or list of integers.
        scales: module path, attribute name and units of attributes that are `len(units) ** -0.5`.
        outputs: full shapes and units of the model's output tensors.
        makers: for each group the modules with weights that make it.
        ordered: for each group whether the order of its units matters.
        products: full multiply-adds, and the units that they are in proportion to.
        sizes: full shape of each parameter, once.
    """

    needed: Requirements
    tensors: Mapping[TensorName, tuple[Ids | None, ...]]
    attributes: Mapping[tuple[str, str], Any]
    scales: Sequence[tuple[str, str, Ids]]
    outputs: Sequence[tuple[tuple[int, ...], tuple[Ids | None, ...]]]
    makers: tuple[tuple[str, ...], ...]
    ordered: tuple[bool, ...]
    products: Sequence[tuple[int, tuple[Ids, ...]]]
    sizes: Mapping[TensorName, tuple[int, ...]]

    def __deepcopy__(self, memo: Any) -> Channels:
        return self

    @property
    def units(self) -> tuple[int, ...]:
        """The number of units of each group."""
        return self.needed.grouping.units

    def sub_network(self, counts: Counts, values: Values) -> SubNetwork:
        """Return what is kept with these counts, which give the attributes these values."""
        found: dict[int, Kept] = {}

        def kept(ids: Ids) -> Kept:
            if id(ids) not in found:
                found[id(ids)] = _kept(self.needed.grouping.mask(counts, ids))
            return found[id(ids)]

        def count(ids: Ids) -> int:
            part = kept(ids)
            return len(ids) if part is None else part if isinstance(part, int) else len(part)

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
            if name == _NESTED and changed.get(attention, {}).get("num_heads", 0) % 2:  # as torch's constructor does
                changed.setdefault(path, {})[name] = False
        shapes = [
            tuple(n if ids is None else count(ids) for n, ids in zip(shape, axes, strict=True))
            for shape, axes in self.outputs
        ]
        macs = sum(
            full // math.prod(map(len, axes)) * math.prod(count(ids) for ids in axes) for full, axes in self.products
        )
        parameters = sum(
            math.prod(n if ids is None else count(ids) for n, ids in zip(shape, self.tensors[key], strict=True))
            for key, shape in self.sizes.items()
        )
        return SubNetwork(tuple(map(int, counts[:-1])), tensors, changed, shapes, macs, parameters)


def channels_of(model: nn.Module, trace: Trace, solution: Solution) -> Channels:
    """Reduce a trace and its solution to what sub-networks need."""
    pack = _Packing(solution.grouping)
    constraints = [pack.constraint(constraint) for constraint in trace.context.constraints]
    used = {key for constraint in constraints for key in attributes_of(constraint)}
    scales = list(_scales(model, trace, pack))
    parts = {(path, name) for path, name, _ in (*used, *scales)}
    makers: list[set[str]] = [set() for _ in solution.roots]
    for path, ids in trace.context.producers:
        for group in solution.grouping.groups_in([ids]):
            makers[group].add(path)
    return Channels(
        Requirements(pack.grouping, constraints, {key: trace.attributes[key] for key in used}),
        {key: pack.axes(axes) for key, axes in trace.tensors.items()},
        {(path, name): model.get_submodule(path).__dict__[name] for path, name in parts | _nested(model)},
        scales,
        [(shape, pack.axes(axes)) for shape, axes in trace.outputs],
        tuple(tuple(sorted(paths)) for paths in makers),
        tuple(bool(trace.context.labels.ordered(roots).any()) for roots in solution.roots),
        _summed((macs, tuple(map(pack.ids, axes))) for macs, axes, _ in trace.context.products),
        {_split(name): tuple(tensor.shape) for name, tensor in model.named_parameters()},
    )


def _nested(model: nn.Module) -> set[tuple[str, str]]:
    """Find torch's encoders that drop padding by nested tensors, for which they need an even number of heads."""
    encoders = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.TransformerEncoder)]
    return {(path, _NESTED) for path, encoder in encoders if encoder.__dict__.get(_NESTED) is True}


def _split(name: str) -> TensorName:
    path, _, own = name.rpartition(".")
    return path, own


def _summed(products: Iterable[tuple[int, tuple[Ids, ...]]]) -> list[tuple[int, tuple[Ids, ...]]]:
    """Add up multiply-adds that go with the same axes."""
    found: dict[tuple[int, ...], tuple[int, tuple[Ids, ...]]] = {}
    for macs, axes in products:
        key = tuple(map(id, axes))
        found[key] = (found.get(key, (0, ()))[0] + macs, axes)
    return list(found.values())


def _scales(model: nn.Module, trace: Trace, pack: _Packing) -> Iterator[tuple[str, str, Ids]]:
    """Find attributes that are `head_dim ** -0.5`, in modules that multiply queries and keys.

    Attention kernels take the scale from the size they see; a scale kept as an attribute must say the same.
    """
    for path, ids in trace.context.contractions:
        units = pack.ids(ids)
        if not pack.grouping.groups_in([units]):
            continue
        for name, value in vars(model.get_submodule(path)).items():
            if type(value) is float and abs(value - len(ids) ** -0.5) < 1e-9:
                yield path, name, units


class _Packing:
    """Renumbers ids, of which there is one a unit of every axis, as units of groups; the same axes become one array."""

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
        return replace(
            constraint,
            expression=self._expression(constraint.expression),
            ids=None if constraint.ids is None else self.ids(constraint.ids),
            other=None if constraint.other is None else self._expression(constraint.other),
        )

    def _expression(self, expression: Expression) -> Expression:
        if expression.kind == "size":
            return Expression("size", self.ids(expression.value))
        if expression.kind in ("constant", "attribute"):
            return expression
        return Expression(expression.kind, tuple(map(self._expression, expression.value)))


def _kept(mask: NDArray[np.bool_]) -> Kept:
    kept = np.flatnonzero(mask)
    if len(kept) == len(mask):
        return None
    return len(kept) if kept[-1] == len(kept) - 1 else tuple(kept.tolist())


def _replaced(value: Any, position: tuple[int, ...], new: int) -> Any:
    if not position:
        return new
    parts = list(value)
    parts[position[0]] = _replaced(parts[position[0]], position[1:], new)
    return type(value)(parts)
