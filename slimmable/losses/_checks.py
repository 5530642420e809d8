"""Checks that every loss makes on its tensors; the messages name the function, the argument and its shape."""

from __future__ import annotations

import math
from numbers import Real

import torch

from slimmable._errors import DataError, UsageError


def check_matrix(where: str, name: str, tensor: torch.Tensor) -> None:
    """Raise `DataError` unless `tensor` is a floating-point matrix with at least one row and one column."""
    if not isinstance(tensor, torch.Tensor):
        raise DataError(f"{where}: {name} must be a tensor of shape (batch, features), got {type(tensor).__name__}")
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise DataError(
            f"{where}: {name} has shape {tuple(tensor.shape)}, expected (batch, features) with at least one of each; "
            "flatten other axes first"
        )
    if not tensor.is_floating_point():
        raise DataError(f"{where}: {name} is {tensor.dtype}, expected a floating-point tensor")


def check_same_shape(where: str, **tensors: torch.Tensor) -> None:
    """Raise `DataError` unless all are floating-point matrices of one shape."""
    for name, tensor in tensors.items():
        check_matrix(where, name, tensor)
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise DataError(f"{where}: shapes differ: {shapes}; row i of each must belong to the same image")


def as_number(value: object) -> float:
    """Return `value` as a float, and NaN, which no range contains, if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    return float(value)


def check_temperature(where: str, name: str, value: float) -> None:
    """Raise `UsageError` unless `value` is a positive, finite number."""
    if not 0 < as_number(value) < math.inf:
        raise UsageError(f"{where}: {name} must be a positive number, got {value!r}")
