"""What files say of a model, as JSON data: its plan, and what it computes besides its tensors."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial, reduce
from operator import getitem
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimmable._convert import misfits
from slimmable._described import counts_channels, named_in_forward, stored_by_forward
from slimmable._tables import differences, listing
from slimmable._widths import check_widths
from slimmable.analysis.integers import Attribute, Constraint, Expression
from slimmable.analysis.labels import Ids
from slimmable.analysis.plan import Channels, Grouping, Output, Pin, Plan, Requirements
from slimmable.errors import CheckpointError

_ABSENT: Any = object()
_NUMBERS = (int, float, bool)
_OWN = {*vars(nn.Module()), "training"}
_FREE = re.compile(r"drop|stochastic|checkpoint|fused|flash|sdpa|momentum")  # matters for training or speed alone
_NO_SIZE = re.compile(r"stride|pad|dilat|kernel|window|patch|level|layer|depth|block|class|label|axis|scale|factor")
_TORCH_SIZES = {"normalized_shape", "num_parameters", "kdim", "vdim", "input_size", "proj_size", "unflattened_size"}
HIDDEN = "slimmable/buffer/"  # before the names of buffers that are not in the state dict

Settings = dict[str, dict[str, Any]]  # by path
Tensors = Mapping[str, Tensor]


def describe(model: nn.Module) -> list[tuple[str, str, dict[str, Any]]]:
    """Return path, class and settings of each module: numbers, and what else a forward in the model reads by name."""
    read, rows = _read_in(model), []
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in _OWN}
        leaves = {name: tree_leaves(value) for name, value in own.items() if not name.startswith("_")}
        numbers = {name for name, each in leaves.items() if each and all(type(leaf) in _NUMBERS for leaf in each)}
        shown = {name: written(own[name]) for name in own if name in read or name in numbers}
        rows.append((path, _kind(module), {name: value for name, value in shown.items() if value is not _ABSENT}))
    return rows


def unlike(plain: nn.Module, rows: list[Any], tensors: Tensors, narrow: bool) -> tuple[str, Settings]:
    """Return how a network differs from `plain`, "" if it does not, and by path the settings in which it may differ.

    These are numbers that forwards set themselves or do not read, settings of training and speed and, in a `narrow`
    network, sizes. `rows` describe it, and `tensors` are its own; those that forwards have added or cut do not count.
    """
    hidden = hidden_buffers(plain)
    expected = plain.state_dict(keep_vars=True) | hidden
    given = {name: each for name, each in tensors.items() if name in hidden or not name.startswith(HIDDEN)}
    pairs = {name: (given[name], each) for name, each in expected.items() if name in given}
    narrow = narrow and any(its.shape != own.shape for name, (its, own) in pairs.items() if name not in hidden)
    modules, read = dict(plain.named_modules()), _read_in(plain)
    there, here = {path: kind for path, kind, _ in rows}, {path: _kind(module) for path, module in modules.items()}
    edited, free = list[str](), Settings()
    for path, kind, settings in rows:
        if here.get(path) != kind:
            continue
        module, weight = modules[path], given.get(f"{path}.weight".lstrip("."))
        cls: Any = type(module)
        for name, value in settings.items():
            held = vars(module).get(name, getattr(cls, name, _ABSENT))
            if (own := written(held)) is _ABSENT or _alike(value, own):
                continue
            bound = name in read and name not in stored_by_forward(cls)
            bound = bound and not _FREE.search(kind.lower() if name == "p" else name.lower())
            inside = (pair for key, pair in pairs.items() if key.startswith(f"{path}.".lstrip(".")))
            sizes = (both for its, full in inside for both in zip(its.shape, full.shape, strict=False))
            if bound and not (narrow and (_is_narrower(module, name, settings, weight) or (value, own) in sizes)):
                edited.append(f"{path}.{name}".lstrip(".") + f" is {value!r} in the file, {own!r} here")
            elif name in vars(module):
                free.setdefault(path, {})[name] = _like(held, value)
    found = {
        "other modules": [
            f"{path or 'the model'} is {there.get(path, 'missing')} in the file, {here.get(path, 'missing')} here"
            for path in here | there
            if there.get(path) != here.get(path)
        ],
        "other settings": edited,
        "of another type": [
            f"{name} {its.dtype}, expected {own.dtype}"
            for name, (its, own) in pairs.items()
            if its.dtype != own.dtype and not (its.is_complex() and own.is_complex())
            if not (its.is_floating_point() and own.is_floating_point())
        ],
    }
    return listing(found, 4) + differences(expected, given, most=4, smaller=expected if narrow else hidden), free


def hidden_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a plain network that are not in the state dict, by their names in files."""
    saved = model.state_dict(keep_vars=True)
    return {f"{HIDDEN}{name}": buffer for name, buffer in model.named_buffers() if name not in saved}


def _kind(module: nn.Module) -> str:
    """Return the name of a module's class; converters swap BatchNorms for those of other dimensions or processes."""
    name = type(module).__name__
    return re.sub(r"^Sync|\dd$", "", name) if isinstance(module, nn.modules.batchnorm._BatchNorm) else name


def _read_in(model: nn.Module) -> set[str]:
    """Return the names in the forwards of all modules, since some read other modules' attributes."""
    return {name for kind in set[Any](map(type, model.modules())) for name in named_in_forward(kind)}


def written(value: Any) -> Any:
    """Return plain data as JSON data, classes and functions as their names, and `_ABSENT` for everything else."""
    try:
        return json.loads(json.dumps(value, default=_written, skipkeys=True))
    except (TypeError, ValueError, RecursionError):
        return _ABSENT


def _written(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (Enum, torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, partial):
        return ["partial", value.func, value.args, sorted(value.keywords.items())]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__name__", type(value).__name__)
    raise TypeError(f"{type(value).__name__} is no plain data")


def _alike(given: Any, own: Any) -> bool:
    """Tell whether two settings are the same; a cache may hold more than another."""
    if isinstance(given, list) and isinstance(own, list):
        return len(given) == len(own) and all(map(_alike, given, own))
    if isinstance(given, dict) and isinstance(own, dict):
        return all(_alike(part, own[key]) for key, part in given.items() if key in own)
    return bool(given == own) or (given != given and own != own)


def _is_narrower(module: nn.Module, name: str, settings: Mapping[str, Any], weight: Tensor | None) -> bool:
    """Tell whether a setting may be that of fewer units; `weight` is the other module's."""
    if name == "groups" and isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        channels = "out_channels" if module.transposed else "in_channels"
        here = getattr(module, channels) == module.groups * module.weight.shape[1]
        return here and bool(settings[channels] == settings[name] * weight.shape[1])
    torchs = type(module).__module__.startswith("torch.nn.")
    size = counts_channels(name) or not _NO_SIZE.search(name.lower())
    if torchs:
        size = name in _TORCH_SIZES or (counts_channels(name) and name != "dim")

    def smaller(given: Any, own: Any) -> bool:
        if isinstance(given, list) and isinstance(own, list) and len(given) == len(own):
            return all(_alike(*pair) or smaller(*pair) for pair in zip(given, own, strict=True))
        if type(given) is float and type(own) is float and not torchs:  # n ** -0.5 for the n channels of a head
            counts = [each**-2 if 2**-8 <= each <= 1 else 0.5 for each in (given, own)]
            return own <= given and all(math.isclose(n, round(n), rel_tol=1e-6) for n in counts)
        return size and type(given) is int and type(own) is int and 1 <= given < own

    return smaller(settings[name], written(vars(module).get(name)))


def _like(own: Any, given: Any) -> Any:
    """Return numbers from a file with the types of a module's own, or the own ones if they are something else."""
    if isinstance(own, (tuple, list)) and isinstance(given, list) and len(own) == len(given):
        parts = [_like(*pair) for pair in zip(own, given, strict=True)]
        return type(own)(*parts) if hasattr(own, "_fields") else type(own)(parts)
    if type(own) in _NUMBERS and type(given) in _NUMBERS:
        return type(own)(given)
    return own


# -- plans, with one array for the units of all axes
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
        **{name: getattr(channels, name) for name in ("units", "scales", "outputs", "makers", "ordered", "products")},
        "tensors": [[*key, ids] for key, ids in channels.tensors.items()],
        "constraints": channels.needed.constraints,
        "attributes": list(channels.needed.attributes),
        "originals": [[*key, value] for key, value in channels.attributes.items()],
        "sizes": [[*key, shape] for key, shape in channels.sizes.items()],
    }
    encoded: dict[str, Any] = json.loads(json.dumps(data, default=write))
    units = [ids for _, ids in arrays.values()]
    return {**encoded, "lengths": [len(ids) for ids in units]}, np.concatenate([*units, np.zeros(0, np.int64)])


def decode(data: dict[str, Any], units: NDArray[np.int64], network: nn.Module) -> Plan:
    """Return the plan of a plain network that `encode` wrote; attributes and empty caches are those of the network."""
    sizes = tuple(int(n) for n in data["units"])
    total = sum(sizes)
    if min(sizes, default=1) < 1 or total > len(units) or (len(units) and not 0 <= units.min() <= units.max() <= total):
        raise CheckpointError("its channel groups do not fit its axes")
    axis = np.split(units.astype(np.int64), np.cumsum(data["lengths"])[:-1]).__getitem__
    leaves: dict[str, Callable[..., Any]] = {"constant": int, "size": axis}
    leaves["attribute"] = lambda path, name, position: (path, name, tuple(position))

    def axes(numbers: Sequence[int | None]) -> tuple[Ids | None, ...]:
        return tuple(None if number is None else axis(number) for number in numbers)

    def expression(parts: list[Any]) -> Expression:
        kind, *rest = parts
        return Expression(kind, leaves[kind](*rest) if kind in leaves else tuple(map(expression, rest)))

    modules = dict(network.named_modules())
    originals = dict[tuple[str, str], Any]()
    for path, name, value in data["originals"]:
        own = originals[path, name] = vars(modules[path])[name]
        if written(own) != value:
            raise CheckpointError(f"{path}.{name} is {own!r}, but {value!r} in the file")
    keys: list[Attribute] = [leaves["attribute"](*row) for row in data["attributes"]]
    attributes = {key: int(reduce(getitem, key[2], originals[key[:2]])) for key in keys}
    rules: Any = {name: data[name] for name in ("round_to", "rounding", "overlap", "universal") if name in data}
    rules |= {"widths": check_widths(data["widths"]), "switchable": tuple(data.get("switchable", ()))}
    plan = Plan(**rules, pins=[Pin((path, name, dim), size, why) for path, name, dim, size, why in data["pins"]])
    for path, name in data["caches"]:
        value = vars(modules[path]).get(name, getattr(type(modules[path]), name, None))  # None: it has not run yet
        if not (value is None or isinstance(value, (dict, float, Tensor))) or name.startswith("_"):
            raise CheckpointError(f"{path}.{name} is not an attribute in which a forward keeps results")
        plan.caches.setdefault(path, {})[name] = {} if isinstance(value, dict) else value
    constraints = [Constraint(expression(one), expression(other), where) for one, other, where in data["constraints"]]
    plan.channels = Channels(
        Requirements(Grouping.of(sizes), constraints, attributes),
        {(path, name): axes(numbers) for path, name, numbers in data["tensors"]},
        originals,
        [(path, name, axis(number)) for path, name, number in data["scales"]],
        [Output(name, tuple(shape), axes(numbers), why) for name, shape, numbers, why in data["outputs"]],
        tuple(map(tuple, data["makers"])),
        tuple(data["ordered"]),
        [(macs, tuple(map(axis, numbers))) for macs, numbers in data["products"]],
        {(path, name): tuple(shape) for path, name, shape in data["sizes"]},
    )
    for place, shape in misfits(network, plan):
        raise CheckpointError(f"{place} of shape {shape} does not fit the file's plan")
    plan.fill([plan.sub_network(tuple(counts)).counts for counts in data["counts"]])
    if len(plan.columns) != len(plan.widths) or plan.columns[0].counts != sizes:
        raise CheckpointError("its counts are not those of its widths, of which the first is the full network")
    return plan
