"""Checks that every loss makes on its tensors; the messages name the function, the argument and its shape."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch

from slimmable.errors import DataError, UsageError


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


def check_count(where: str, name: str, value: object, least: int = 1) -> None:
    """Raise `UsageError` unless `value` is an integer from `least` on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise UsageError(f"{where}: {name} must be an integer from {least} on, got {value!r}")


def check_share(where: str, name: str, value: object) -> None:
    """Raise `UsageError` unless `value` is a number in [0, 1]."""
    if not 0 <= as_number(value) <= 1:
        raise UsageError(f"{where}: {name} must be in [0, 1], got {value!r}")


def check_factor(where: str, name: str, value: object) -> None:
    """Raise `UsageError` unless `value` is a finite number from 0 on."""
    if not 0 <= as_number(value) < math.inf:
        raise UsageError(f"{where}: {name} must be a number from 0 on, got {value!r}")


def check_temperature(where: str, name: str, value: float) -> None:
    """Raise `UsageError` unless `value` is a positive, finite number."""
    if not 0 < as_number(value) < math.inf:
        raise UsageError(f"{where}: {name} must be a positive number, got {value!r}")
