"""Tensors nested inside the arguments and outputs of a forward."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, dicts and objects with attributes."""
    return [tensor for _, tensor in named_tensors(output)]


def named_tensors(output: Any) -> list[tuple[str, Tensor]]:
    """Return the same tensors with names such as "1.features", joined from positions, keys and attribute names."""
    seen: set[int] = set()  # ids of objects, which may hold each other

    def named(value: Any, *name: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield ".".join(name), value
            return
        if isinstance(value, Mapping):
            parts = dict(value)
        elif isinstance(value, (tuple, list)):
            parts = dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
        elif id(value) in seen:
            return
        else:
            seen.add(id(value))
            leaves = tree_leaves(value)  # of a container that torch knows
            parts = _parts(value) if any(leaf is value for leaf in leaves) else dict(enumerate(leaves))
        for key, part in parts.items():
            yield from named(part, *name, str(key))

    return list(named(output))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a copy of nested tuples, lists, dicts and objects in which `function` has replaced every tensor."""

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not output_tensors(leaf):
            return leaf
        twin = copy.copy(leaf)
        for name, part in _parts(leaf).items():
            object.__setattr__(twin, name, map_tensors(function, part))
        return twin

    return tree_map(replaced, value)


def _parts(value: Any) -> dict[str, Any]:
    """Return the attributes of a data object; none for classes and modules."""
    if isinstance(value, (type, nn.Module)):
        return {}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(getattr(value, "__dict__", {}))
