"""Example inputs that a model is analysed on: the caller's, or zeros of the input size that timm names."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimmable.errors import ConversionError, UsageError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
MOST = 2**20  # elements of a tensor whose values are tracked; larger ones are only shapes


class Inputs:
    """Positional and keyword arguments for the forward of a model, as `example_inputs` of `slimify` and others.

    A tensor, a tuple or list of positional arguments, or a dict of keyword arguments needs no `Inputs`. Positional
    and keyword arguments together do, and so does a forward whose only argument is a tuple, list or dict.

    >>> class Scaled(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
    ...     def forward(self, batch, *, scale):
    ...         return self.second(self.first(batch["image"]) * scale)
    >>> from slimmable import Inputs, slimify
    >>> example = Inputs({"image": torch.zeros(2, 4)}, scale=torch.ones(1))
    >>> slimify(Scaled(), (1.0, 0.5), example_inputs=example).first
    Linear(in_features=4, out_features=8, bias=True, widths=(1.0, 0.5), width=1.0)
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
        size = _image_size(model)
        if size is None:
            raise ConversionError(
                f"{name} names no input size; pass example_inputs, such as torch.zeros(2, 3, 224, 224)"
            )
        return (image_batch(model, size),), {}
    if is_size(example) and example:
        sizes = ", ".join(map(str, example))
        raise ConversionError(
            f"example_inputs is {example!r}, which looks like an input size; pass a batch of that "
            f"size, such as torch.zeros(2, {sizes}). If the forward takes integers, pass slimmable.Inputs({sizes})"
        )
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
        raise ConversionError(
            f"{name}.forward{signature} does not take example_inputs: {error}. A tuple or list holds positional "
            "arguments, a dict keyword arguments; if the forward takes it as one, pass slimmable.Inputs(...)"
        ) from error
    return args, kwargs


def is_size(value: object) -> bool:
    """Tell whether a value is a size such as (3, 224, 224), not the arguments of a forward.

    >>> is_size((3, 224, 224)), is_size((torch.zeros(2, 3), 5)), is_size(())
    (True, False, True)
    """
    return isinstance(value, (tuple, list)) and all(type(size) is int and size > 0 for size in value)


def image_batch(model: nn.Module, size: tuple[int, ...], images: int = 2) -> Tensor:
    """Return zeros of shape (images, *size), with the dtype and device of the model's parameters."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        return torch.zeros(images, *size, dtype=weight.dtype, device=weight.device)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise UsageError(f"there can be no input of shape {(images, *size)}: {error}") from error


def _image_size(model: nn.Module) -> tuple[int, ...] | None:
    """Return (channels, height, width) from timm's configuration, or from the model itself where they differ."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or config.get("input_size") is None:
        return None
    size = config["input_size"]
    layers = dict(model.named_modules())
    channels = getattr(layers.get(str(config.get("first_conv"))), "in_channels", None)
    if not channels or channels % size[0] == 0:  # a multiple: the model first folds pixels into channels
        channels = size[0]
    return (channels, *(getattr(layers.get("patch_embed"), "img_size", None) or size[1:]))


def is_index(value: Any) -> bool:
    """Tell whether a value is a tensor of integers or booleans, on which shapes may depend."""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex() or value.is_meta)
