"""Tensors nested inside the arguments and outputs of a forward."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, dicts and objects with attributes."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def collect(value: Any) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif id(leaf) not in seen:
                seen.add(id(leaf))
                collect(_parts(leaf))

    collect(output)
    return found


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
