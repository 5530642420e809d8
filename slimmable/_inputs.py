"""Inputs and outputs of a forward: the example that a model is analysed on, and the tensors nested in them."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from slimmable.errors import ConversionError, UsageError, explained

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
MOST = 2**20  # elements of a tensor whose values are tracked; larger ones are only shapes


class Inputs:
    """Positional and keyword arguments for the forward of a model, as `example_inputs` of `slimify` and others.

    Needed for both kinds together, and for a forward whose only argument is a tuple, list or dict.

    >>> class Scaled(nn.Linear):
    ...     def forward(self, batch, *, scale):
    ...         return super().forward(batch["image"]) * scale
    >>> example = Inputs({"image": torch.zeros(2, 4)}, scale=torch.ones(1))
    >>> slimmable.slimify(Scaled(4, 8), (1.0, 0.5), example_inputs=example, outputs="slim")
    Scaled(in_features=4, out_features=8, bias=True, widths=(1.0, 0.5), width=1.0)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __repr__(self) -> str:
        shown = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        return f"Inputs({', '.join(shown)})"


def example_of(model: nn.Module, example_inputs: Any = None) -> Arguments:
    """Return arguments for the forward of `model`: the example, or zeros of the size in timm's `pretrained_cfg`."""
    example, name = example_inputs, type(model).__name__
    if example is None:
        if (size := _image_size(model)) is None:
            raise ConversionError(f"{name} names no input size; pass example_inputs=, as torch.zeros(2, 3, 224, 224)")
        return (image_batch(model, size),), {}
    if is_size(example):
        sizes = ", ".join(map(str, example))
        way = f"torch.zeros({'2, ' * (len(example) < 4)}{sizes}), or slimmable.Inputs({sizes}) if it takes integers"
        raise ConversionError(f"example_inputs is {example!r}, which looks like an input size; pass {way}")
    args, kwargs = (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
    if isinstance(example, Inputs):
        args, kwargs = example.args, example.kwargs
    elif isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # compiled code has no signature
        return args, kwargs
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        way = "pass slimmable.Inputs(...), also of a tuple, list or dict that is one argument"
        raise ConversionError(f"{name}.forward{signature} does not take example_inputs: {error}; {way}") from error
    return args, kwargs


def is_size(value: object) -> bool:
    """Tell whether a value is a size such as (3, 224, 224), not the arguments of a forward."""
    return isinstance(value, (tuple, list)) and bool(value) and all(type(size) is int and size > 0 for size in value)


def image_batch(model: nn.Module, size: tuple[int, ...], images: int = 2) -> Tensor:
    """Return zeros of shape (images, *size), with the dtype and device of the model's parameters."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    with explained(f"there can be no input of shape {(images, *size)}", kind=UsageError):
        return torch.zeros(images, *size, dtype=weight.dtype, device=weight.device)


def _image_size(model: nn.Module) -> tuple[int, ...] | None:
    """Return (channels, height, width) from timm's configuration, or from the model itself where they differ."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or (size := config.get("input_size")) is None:
        return None
    layers = dict(model.named_modules())
    channels = getattr(layers.get(str(config.get("first_conv"))), "in_channels", None)
    if not channels or channels % size[0] == 0:  # a multiple: the model first folds pixels into channels
        channels = size[0]
    return (channels, *(getattr(layers.get("patch_embed"), "img_size", None) or size[1:]))


def is_index(value: Any) -> bool:
    """Tell whether a value is a tensor of integers or booleans, on which shapes may depend."""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex() or value.is_meta)


def tensors(tree: Any) -> list[Tensor]:
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
