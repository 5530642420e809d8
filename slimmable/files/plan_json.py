"""Plans as JSON data for files, with one array for the units of all axes."""

import json
from collections.abc import Callable, Sequence
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimmable._widths import check_widths
from slimmable.analysis.channels import Channels, Grouping, Output, Requirements, SubNetwork
from slimmable.analysis.integers import OPERATIONS, Attribute, Constraint, Expression, size_of
from slimmable.analysis.labels import Ids
from slimmable.analysis.plan import Pin, Plan
from slimmable.errors import CheckpointError

Units = NDArray[np.int64]


def encode(plan: Plan) -> tuple[dict[str, Any], Units]:
    """Return a plan as JSON data, and the units of all its axes in one array."""
    channels = plan.channels
    arrays: dict[int, tuple[int, Ids]] = {}  # number and units of each axis, by the id of the array

    def write(part: Any) -> Any:
        """Write what JSON does not know: an axis as its number, an expression and other dataclasses as lists."""
        if isinstance(part, np.ndarray):
            return arrays.setdefault(id(part), (len(arrays), part))[0]
        if isinstance(part, Expression):
            return [part.kind, *(part.value if isinstance(part.value, tuple) else [part.value])]
        return list(vars(part).values())

    data = {
        "widths": plan.widths,
        "round_to": plan.round_to,
        "universal": plan.universal,
        "counts": [column.counts for column in plan.columns],
        "pins": [[*pin.axis, pin.size, pin.reason] for pin in plan.pins],
        "caches": [[path, name] for path, at in plan.caches.items() for name in at],
        "units": channels.units,
        "tensors": [[*key, ids] for key, ids in channels.tensors.items()],
        # between them, as in files of earlier versions, the axis or number that `expression` equals
        "constraints": [[each.expression, None, 0, each.where, each.required] for each in channels.needed.constraints],
        "attributes": [[*key, value] for key, value in channels.needed.attributes.items()],
        "originals": [[*key, _write_value(value)] for key, value in channels.attributes.items()],
        "scales": channels.scales,
        "outputs": channels.outputs,
        "makers": channels.makers,
        "ordered": channels.ordered,
        "products": channels.products,
        "sizes": [[*key, shape] for key, shape in channels.sizes.items()],
    }
    written: dict[str, Any] = json.loads(json.dumps(data, default=write))
    units = [ids for _, ids in arrays.values()]
    return {**written, "lengths": [len(ids) for ids in units]}, np.concatenate([*units, np.zeros(0, np.int64)])


def decode(data: dict[str, Any], units: Units, check: Callable[[Plan], object]) -> Plan:
    """Return the plan that `encode` wrote, with None for empty caches, whose values are the model's.

    `check` raises if the plan does not belong to the model; it is called before anything is computed with its numbers.

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

    leaves: dict[str, Callable[..., Any]] = {"constant": int, "attribute": _attribute, "size": axis}

    def expression(parts: list[Any]) -> Expression:
        kind, *rest = parts
        if kind in leaves:
            return Expression(kind, leaves[kind](*rest))
        if kind not in OPERATIONS:
            raise CheckpointError(f"it has an unknown operation {kind!r}")
        return Expression(kind, tuple(map(expression, rest)))

    def rows(name: str, *kinds: Callable[[Any], Any]) -> list[Any]:
        return [tuple(kind(cell) for kind, cell in zip(kinds, row, strict=True)) for row in data[name]]

    constraints = [
        Constraint(expression(own), expression(other) if other else size_of(axes([ids])[0], int(full)), str(where))
        for own, ids, full, where, other in data["constraints"]
    ]
    attributes = {_attribute(path, name, position): int(value) for path, name, position, value in data["attributes"]}
    plan = Plan(
        check_widths(data["widths"]),
        caches={},
        pins=[Pin(row[:3], *row[3:]) for row in rows("pins", str, str, int, int, str)],
        round_to=int(data["round_to"]),
        universal=bool(data["universal"]),
    )
    for path, name in rows("caches", str, str):
        plan.caches.setdefault(path, {})[name] = None
    plan.channels = Channels(
        Requirements(grouping, constraints, attributes),
        {(path, name): units_of for path, name, units_of in rows("tensors", str, str, axes)},
        {(path, name): value for path, name, value in rows("originals", str, str, _read_value)},
        rows("scales", str, str, axis),
        [Output(*row) for row in rows("outputs", str, _numbers, axes, str)],
        tuple(tuple(map(str, paths)) for paths in data["makers"]),
        tuple(map(bool, data["ordered"])),
        [(int(macs), tuple(map(axis, numbers))) for macs, numbers in data["products"]],
        {(path, name): shape for path, name, shape in rows("sizes", str, str, _numbers)},
    )
    for (path, name, position), value in attributes.items():
        full = reduce(getitem, position, plan.channels.attributes[path, name])
        if value != full:
            raise CheckpointError(f"it has two values of {path}.{name}, {value!r} and {full!r}")
    check(plan)
    plan.columns += [_column(plan, counts) for counts in data["counts"]]
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


def _attribute(path: str, name: str, position: list[int]) -> Attribute:
    return str(path), str(name), tuple(map(_natural, position))


def _numbers(values: list[Any]) -> tuple[int, ...]:
    return tuple(map(int, values))


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
