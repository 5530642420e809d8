"""What a network computes besides its tensors, as JSON data: the class and the settings of each module, by path."""

import math
import re
from collections.abc import Mapping
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimmable._described import counts_channels, named_in_forward, stored_by_forward

_ABSENT: Any = object()
_OWN = {*vars(nn.Module()), "training"}
_FREE = re.compile(r"drop|stochastic|checkpoint|fused|flash|sdpa|momentum")  # matters for training or speed alone
_NO_SIZE = re.compile(r"stride|pad|dilat|kernel|window|patch|level|layer|depth|block|class|label|axis|scale|factor")
_SIZES = {"normalized_shape", "num_parameters", "kdim", "vdim", "input_size", "unflattened_size"}  # of torch's layers
_MOST_HEAD = 2**16  # channels of one head

Row = tuple[str, str, dict[str, Any]]  # path, name of the class, settings


def describe(model: nn.Module) -> list[Row]:
    """Return the class and the settings of each module: numbers, and what else a forward in the model reads by name."""
    read = _read_in(model)
    return [(path, _kind(module), _settings(module, read)) for path, module in model.named_modules()]


def compare(
    model: nn.Module, rows: list[Any], shapes: Mapping[str, Any], narrow: bool
) -> tuple[dict[str, list[str]], list[Row]]:
    """Return, by kind, how another network differs from `model`, and the settings in which it may differ, to take over.

    These are numbers that forwards set themselves or do not read, settings of training and speed and, if the other
    network is `narrow`, sizes. `rows` describe the other network, and `shapes` are those of its tensors.
    """
    modules, read = dict(model.named_modules()), _read_in(model)
    kinds = {path: kind for path, kind, _ in rows}
    edited, free = list[str](), list[Row]()
    for path, kind, settings in rows:
        module = modules.get(path)
        if module is None or kind != _kind(module):
            continue
        held = {**{name: getattr(type(module), name, _ABSENT) for name in settings}, **vars(module)}
        own = {name: written(held[name]) for name in settings}
        differing = [name for name in settings if own[name] is not _ABSENT and not _alike(settings[name], own[name])]
        shape = shapes.get(f"{path}.weight".lstrip("."))
        bound = [
            name
            for name in differing
            if name in read
            and not _is_free(module, name)
            and not (narrow and _is_narrower(module, name, settings, shape))
        ]
        edited += [f"{_place(path, name)} is {settings[name]!r} in the file, {own[name]!r} here" for name in bound]
        set_here = [name for name in differing if name in vars(module) and name not in bound]
        free.append((path, kind, {name: _like(held[name], settings[name]) for name in set_here}))
    found = {
        "modules only in the file": [f"{_place(path)} ({kind})" for path, kind in kinds.items() if path not in modules],
        "modules only here": [f"{_place(path)} ({_kind(each)})" for path, each in modules.items() if path not in kinds],
        "other modules": [
            f"{_place(path)} is {kinds[path]} in the file, {_kind(each)} here"
            for path, each in modules.items()
            if path in kinds and kinds[path] != _kind(each)
        ],
        "other settings": edited,
    }
    return found, free


def take_over(model: nn.Module, free: list[Row]) -> None:
    """Set the settings that `compare` returned."""
    modules = dict(model.named_modules())
    for path, _, settings in free:
        modules[path].__dict__.update(settings)


def unlike_numbers(model: nn.Module, other: nn.Module) -> dict[str, Any]:
    """Return the numbers that the modules of `model` hold and those of `other` do not, if all that differ are one."""
    twins, found = dict(other.named_modules()), dict[str, list[Any]]()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if path in twins and _is_number(value) and vars(twins[path]).get(name, value) != value:
                found.setdefault(name, []).append(value)
    return {name: values[0] for name, values in found.items() if all(value == values[0] for value in values)}


def _kind(module: nn.Module) -> str:
    """Return the name of a module's class; converters swap BatchNorms for those of other dimensions or processes."""
    name = type(module).__name__
    return re.sub(r"^Sync|\dd$", "", name) if isinstance(module, _BatchNorm) else name


def _place(path: str, name: str = "") -> str:
    return ".".join(filter(None, (path, name))) or "the model"


def _read_in(model: nn.Module) -> set[str]:
    """Return the names in the forwards of all modules, since some read other modules' attributes."""
    return {name for kind in set[Any](map(type, model.modules())) for name in named_in_forward(kind)}


def _settings(module: nn.Module, read: set[str]) -> dict[str, Any]:
    found = {
        name: written(value)
        for name, value in vars(module).items()
        if name not in _OWN and (name in read or (not name.startswith("_") and _is_number(value)))
    }
    return {name: value for name, value in found.items() if value is not _ABSENT}


def written(value: Any) -> Any:
    """Return plain data as JSON data, classes and functions as their names, and `_ABSENT` for everything else."""
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, np.generic):
        value = value.item()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, partial):
        return ["partial", *map(written, (value.func, value.args, sorted(value.keywords.items())))]
    if isinstance(value, (tuple, list)):
        parts = [written(part) for part in value]
        return _ABSENT if any(part is _ABSENT for part in parts) else parts
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, dict):
        found = {str(key): written(part) for key, part in value.items()}
        return _ABSENT if any(part is _ABSENT for part in found.values()) else found
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__name__", type(value).__name__)
    return None if value is None else _ABSENT


def _alike(given: Any, own: Any) -> bool:
    """Tell whether two settings are the same; a cache may hold more than another."""
    if isinstance(given, list) and isinstance(own, list):
        return len(given) == len(own) and all(map(_alike, given, own))
    if isinstance(given, dict) and isinstance(own, dict):
        return all(_alike(part, own[key]) for key, part in given.items() if key in own)
    return bool(given == own) or (given != given and own != own)


def _is_free(module: nn.Module, name: str) -> bool:
    kind: Any = type(module)
    return bool(_FREE.search(kind.__name__.lower() if name == "p" else name.lower())) or name in stored_by_forward(kind)


def _is_narrower(module: nn.Module, name: str, settings: Mapping[str, Any], shape: Any) -> bool:
    """Tell whether a setting may be that of fewer units; `shape` is that of the other module's weight."""
    if name == "groups" and isinstance(module, nn.modules.conv._ConvNd) and shape is not None:
        channels = "out_channels" if module.transposed else "in_channels"
        here = getattr(module, channels) == module.groups * module.weight.shape[1]
        return here and bool(settings[channels] == settings[name] * shape[1])
    return _is_smaller(module, name, settings[name], written(vars(module).get(name)))


def _is_smaller(module: nn.Module, name: str, given: Any, own: Any) -> bool:
    if isinstance(given, list) and isinstance(own, list) and len(given) == len(own):
        return all(_alike(*pair) or _is_smaller(module, name, *pair) for pair in zip(given, own, strict=True))
    torchs = type(module).__module__.startswith("torch.nn.")
    if type(given) is float and type(own) is float and not torchs:
        return 1 <= _channels(given) <= _channels(own) <= _MOST_HEAD
    if type(given) is not int or type(own) is not int or not 1 <= given < own:
        return False
    if torchs:
        return name in _SIZES or (counts_channels(name) and name != "dim")
    return counts_channels(name) or not _NO_SIZE.search(name.lower())


def _channels(scale: float) -> int:
    """Return the number of a head's channels whose `n ** -0.5` a scale is, or 0."""
    n = round(scale**-2) if 1e-6 < scale <= 1 else 0
    return n if n and math.isclose(n**-0.5, scale, rel_tol=1e-6) else 0


def _is_number(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_number, value)) and len(value) > 0
    return type(value) in (int, float, bool)


def _like(own: Any, given: Any) -> Any:
    """Return numbers from a file with the types of a module's own, or the own ones if they are something else."""
    if isinstance(own, (tuple, list)) and isinstance(given, list) and len(own) == len(given):
        parts = [_like(*pair) for pair in zip(own, given, strict=True)]
        return type(own)(*parts) if hasattr(own, "_fields") else type(own)(parts)
    if type(own) in (int, float, bool) and type(given) in (int, float, bool):
        return type(own)(given)
    return own
