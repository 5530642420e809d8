"""What a model is run on while it is analysed: the example of the caller, or the input size that timm knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimmable._errors import ConversionError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def example_of(model: nn.Module, example_inputs: Any = None) -> Inputs:
    """Return positional and keyword arguments for the forward of `model`.

    Args:
        model: a timm model needs no example; its `pretrained_cfg` names the input size.
        example_inputs: one tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    Raises:
        ConversionError: if there is no example and no input size.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if example_inputs is not None:
        return (example_inputs,), {}
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if size is None:
        raise ConversionError(
            f"{type(model).__name__} does not say what its input looks like. "
            "Pass example_inputs, such as torch.zeros(2, 3, 224, 224)."
        )
    return (image_batch(model, size),), {}


def image_batch(model: nn.Module, size: tuple[int, ...], images: int = 2) -> Tensor:
    """Return zeros of shape (images, *size), of the dtype and on the device of the model's parameters."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(images, *size, dtype=weight.dtype, device=weight.device)
