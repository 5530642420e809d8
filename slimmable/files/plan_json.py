"""Plans as JSON data for files, with one array for the units of all axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimmable._widths import check_widths
from slimmable.analysis.channels import Channels, Grouping, Output, Requirements, SubNetwork
from slimmable.analysis.integers import OPERATIONS, Attribute, Constraint, Expression
from slimmable.analysis.labels import Ids
from slimmable.analysis.plan import Pin, Plan
from slimmable.errors import CheckpointError

Units = NDArray[np.int64]


def encode(plan: Plan) -> tuple[dict[str, Any], Units]:
    """Return a plan as JSON data, and the units of all its axes in one array."""
    channels = plan.channels
    axes = _Axes()
    data = {
        "widths": list(plan.widths),
        "round_to": plan.round_to,
        "universal": plan.universal,
        "counts": [list(column.counts) for column in plan.columns],
        "pins": [[*pin.axis, pin.size, pin.reason] for pin in plan.pins],
        "caches": [[path, name] for path, at in plan.caches.items() for name in at],
        "units": list(channels.units),
        "tensors": [[*key, axes.numbers(ids)] for key, ids in channels.tensors.items()],
        "constraints": [
            [_write(c.expression, axes), axes.number(c.ids), c.full, c.where, c.other and _write(c.other, axes)]
            for c in channels.needed.constraints
        ],
        "attributes": [[*key[:2], list(key[2]), value] for key, value in channels.needed.attributes.items()],
        "originals": [[*key, _write_value(value)] for key, value in channels.attributes.items()],
        "scales": [[path, name, axes.number(ids)] for path, name, ids in channels.scales],
        "outputs": [[o.name, list(o.shape), axes.numbers(o.units), o.why] for o in channels.outputs],
        "makers": [list(paths) for paths in channels.makers],
        "ordered": list(channels.ordered),
        "products": [[macs, axes.numbers(ids)] for macs, ids in channels.products],
        "sizes": [[*key, list(shape)] for key, shape in channels.sizes.items()],
    }
    data["lengths"] = [len(ids) for ids in axes.found]
    return data, np.concatenate([*axes.found, np.zeros(0, np.int64)])


def decode(data: dict[str, Any], units: Units) -> Plan:
    """Return the plan that `encode` wrote, with None for empty caches, whose values are the model's.

    Raises: CheckpointError, or the error that reading some part raises, if the data is not a plan.
    """
    sizes = tuple(int(n) for n in data["units"])
    total = sum(sizes)
    if min(sizes, default=1) < 1 or total > len(units) or (len(units) and not 0 <= units.min() <= units.max() <= total):
        raise CheckpointError("its channel groups do not fit its axes")
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    rank = np.concatenate([*map(np.arange, sizes), np.zeros(1, np.int64)])
    grouping = Grouping(sizes, np.append(group_of, -1), rank)
    found = np.split(units.astype(np.int64), np.cumsum(data["lengths"])[:-1])

    def axis(number: int) -> Ids:
        return found[_natural(number)]

    def axes(numbers: Sequence[int | None]) -> tuple[Ids | None, ...]:
        return tuple(None if number is None else axis(number) for number in numbers)

    def read(parts: list[Any]) -> Expression:
        kind, *rest = parts
        if kind == "constant":
            return Expression(kind, int(rest[0]))
        if kind == "attribute":
            return Expression(kind, _attribute(*rest))
        if kind == "size":
            return Expression(kind, axis(rest[0]))
        if kind not in OPERATIONS:
            raise CheckpointError(f"it has an unknown operation {kind!r}")
        return Expression(kind, tuple(map(read, rest)))

    constraints = [
        Constraint(read(expression), axes([ids])[0], int(full), str(where), None if other is None else read(other))
        for expression, ids, full, where, other in data["constraints"]
    ]
    attributes = {_attribute(path, name, position): int(value) for path, name, position, value in data["attributes"]}
    plan = Plan(
        check_widths(data["widths"]),
        caches={},
        pins=[
            Pin((str(path), str(name), int(i)), int(size), str(reason)) for path, name, i, size, reason in data["pins"]
        ],
        round_to=int(data["round_to"]),
        universal=bool(data["universal"]),
    )
    for path, name in data["caches"]:
        plan.caches.setdefault(str(path), {})[str(name)] = None
    plan.channels = Channels(
        Requirements(grouping, constraints, attributes),
        {(str(path), str(name)): axes(numbers) for path, name, numbers in data["tensors"]},
        {(str(path), str(name)): _read_value(value) for path, name, value in data["originals"]},
        [(str(path), str(name), axis(number)) for path, name, number in data["scales"]],
        [
            Output(str(name), tuple(map(int, shape)), axes(numbers), str(why))
            for name, shape, numbers, why in data["outputs"]
        ],
        tuple(tuple(map(str, paths)) for paths in data["makers"]),
        tuple(map(bool, data["ordered"])),
        [(int(macs), tuple(map(axis, numbers))) for macs, numbers in data["products"]],
        {(str(path), str(name)): tuple(map(int, shape)) for path, name, shape in data["sizes"]},
    )
    for counts in data["counts"]:
        plan.columns.append(_column(plan, counts))
    if plan.columns and plan.columns[0].counts != sizes:
        raise CheckpointError("its full width is not the full network")
    if len(plan.columns) != len(plan.widths):
        raise CheckpointError(f"it has {len(plan.columns)} lists of counts for {len(plan.widths)} widths")
    return plan


def _column(plan: Plan, counts: list[int]) -> SubNetwork:
    kept = np.array([*map(_natural, counts), 1])
    if len(counts) != len(plan.channels.units) or (kept[:-1] < 1).any() or (kept[:-1] > plan.channels.units).any():
        raise CheckpointError("its counts do not fit its channel groups")
    values, failures = plan.channels.needed.fit(kept)
    if failures:
        raise CheckpointError(f"its counts do not satisfy {failures[0].constraint.expression}")
    return plan.channels.sub_network(kept, values)


class _Axes:
    """Numbers the distinct arrays of units."""

    def __init__(self) -> None:
        self.found: list[Ids] = []
        self._known: dict[int, int] = {}

    def number(self, ids: Ids | None) -> int | None:
        if ids is None:
            return None
        if id(ids) not in self._known:
            self._known[id(ids)] = len(self.found)
            self.found.append(ids)
        return self._known[id(ids)]

    def numbers(self, axes: Sequence[Ids | None]) -> list[int | None]:
        return [self.number(ids) for ids in axes]


def _write(expression: Expression, axes: _Axes) -> list[Any]:
    if expression.kind == "constant":
        return ["constant", expression.value]
    if expression.kind == "attribute":
        path, name, position = expression.value
        return ["attribute", path, name, list(position)]
    if expression.kind == "size":
        return ["size", axes.number(expression.value)]
    return [expression.kind, *(_write(part, axes) for part in expression.value)]


def _attribute(path: str, name: str, position: list[int]) -> Attribute:
    return str(path), str(name), tuple(map(_natural, position))


def _natural(number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise CheckpointError(f"it has {number!r} where a count should be")
    return number


def _write_value(value: Any) -> Any:
    """Mark tuples and lists, which JSON does not tell apart."""
    if isinstance(value, (tuple, list)):
        return ["tuple" if isinstance(value, tuple) else "list", *map(_write_value, value)]
    return value


def _read_value(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, *parts = value
    return (tuple if kind == "tuple" else list)(map(_read_value, parts))
