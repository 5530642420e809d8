"""Plans as JSON data for files, with one array for the units of all axes."""

import json
from collections.abc import Callable, Sequence
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from slimmable._checks import check_rounding
from slimmable._convert import misfits
from slimmable._widths import check_widths
from slimmable.analysis.channels import Channels, Grouping, Output, Requirements
from slimmable.analysis.integers import Attribute, Constraint, Expression
from slimmable.analysis.labels import Ids
from slimmable.analysis.plan import Pin, Plan
from slimmable.errors import CheckpointError
from slimmable.files.description import written


def encode(plan: Plan) -> tuple[dict[str, Any], NDArray[np.int64]]:
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
        **plan.rules(),
        "counts": [column.counts for column in plan.columns],
        "pins": [[*pin.axis, pin.size, pin.reason] for pin in plan.pins],
        "caches": [[path, name] for path, at in plan.caches.items() for name in at],
        "units": channels.units,
        "tensors": [[*key, ids] for key, ids in channels.tensors.items()],
        "constraints": channels.needed.constraints,
        "attributes": list(channels.needed.attributes),
        "originals": [[*key, value] for key, value in channels.attributes.items()],
        "scales": channels.scales,
        "outputs": channels.outputs,
        "makers": channels.makers,
        "ordered": channels.ordered,
        "products": channels.products,
        "sizes": [[*key, shape] for key, shape in channels.sizes.items()],
    }
    encoded: dict[str, Any] = json.loads(json.dumps(data, default=write))
    units = [ids for _, ids in arrays.values()]
    return {**encoded, "lengths": [len(ids) for ids in units]}, np.concatenate([*units, np.zeros(0, np.int64)])


def decode(data: dict[str, Any], units: NDArray[np.int64], network: nn.Module) -> Plan:
    """Return the plan of a plain network that `encode` wrote; attributes and empty caches are those of the network.

    Raises: CheckpointError, or the error that reading some part raises, if the data is not a plan of this network.
    """
    sizes = tuple(int(n) for n in data["units"])
    total = sum(sizes)
    if min(sizes, default=1) < 1 or total > len(units) or (len(units) and not 0 <= units.min() <= units.max() <= total):
        raise CheckpointError("its channel groups do not fit its axes")
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    grouping = Grouping(sizes, np.append(group_of, -1), np.concatenate([*map(np.arange, sizes), np.zeros(1, np.int64)]))
    axis = np.split(units.astype(np.int64), np.cumsum(data["lengths"])[:-1]).__getitem__
    leaves: dict[str, Callable[..., Any]] = {"constant": int, "attribute": _attribute, "size": axis}

    def axes(numbers: Sequence[int | None]) -> tuple[Ids | None, ...]:
        return tuple(None if number is None else axis(number) for number in numbers)

    def expression(parts: list[Any]) -> Expression:
        kind, *rest = parts
        return Expression(kind, leaves[kind](*rest) if kind in leaves else tuple(map(expression, rest)))

    def rows(name: str, *kinds: Callable[[Any], Any]) -> list[Any]:
        return [tuple(kind(cell) for kind, cell in zip(kinds, row, strict=True)) for row in data[name]]

    modules = dict(network.named_modules())
    originals = dict[tuple[str, str], Any]()
    for path, name, value in data["originals"]:
        own = originals[path, name] = vars(modules[path])[name]
        if written(own) != value:
            raise CheckpointError(f"{path}.{name} is {own!r}, but {value!r} in the file")
    keys = [_attribute(*row) for row in data["attributes"]]
    attributes = {key: int(reduce(getitem, key[2], originals[key[:2]])) for key in keys}
    plan = Plan(
        check_widths(data["widths"]),
        int(data["round_to"]),
        str(data.get("rounding", "nearest")),
        bool(data.get("overlap", True)),
        tuple(map(str, data.get("switchable", ()))),
        bool(data["universal"]),
        pins=[Pin(row[:3], *row[3:]) for row in rows("pins", str, str, int, int, str)],
    )
    check_rounding("the plan", rounding=plan.rounding)
    for path, name in rows("caches", str, str):
        value = vars(modules[path])[name]
        if not (value is None or isinstance(value, (dict, Tensor))) or name.startswith("_"):
            raise CheckpointError(f"{path}.{name} is not an attribute in which a forward keeps results")
        plan.caches.setdefault(path, {})[name] = {} if isinstance(value, dict) else value
    constraints = [Constraint(*row) for row in rows("constraints", expression, expression, str)]
    plan.channels = Channels(
        Requirements(grouping, constraints, attributes),
        {(path, name): units_of for path, name, units_of in rows("tensors", str, str, axes)},
        originals,
        rows("scales", str, str, axis),
        [Output(*row) for row in rows("outputs", str, _numbers, axes, str)],
        tuple(tuple(map(str, paths)) for paths in data["makers"]),
        tuple(map(bool, data["ordered"])),
        [(int(macs), tuple(map(axis, numbers))) for macs, numbers in data["products"]],
        {(path, name): shape for path, name, shape in rows("sizes", str, str, _numbers)},
    )
    for place, shape in misfits(network, plan):
        seen = "is missing" if shape is None else f"has shape {shape}"
        raise CheckpointError(f"{place} {seen}, which does not fit the file's plan")
    plan.fill([plan.sub_network(tuple(counts)).counts for counts in data["counts"]])
    if len(plan.columns) != len(plan.widths) or plan.columns[0].counts != sizes:
        raise CheckpointError("its counts are not those of its widths, of which the first is the full network")
    return plan


def _attribute(path: str, name: str, position: list[int]) -> Attribute:
    return str(path), str(name), _numbers(position)


def _numbers(values: list[Any]) -> tuple[int, ...]:
    return tuple(map(int, values))
