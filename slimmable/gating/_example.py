"""Encode the example inputs of `gate` as JSON: shapes of images, contents of indices and masks, plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimmable._inputs import MOST, Arguments, is_index
from slimmable.errors import CheckpointError

_PLAIN = (type(None), bool, int, float, str)


def encode_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments of a forward as JSON data; of floating-point tensors it holds only dtype and shape.

    >>> encode_inputs([torch.zeros(2, 3)], {"mask": torch.tensor([True]), "scale": 2})[1]
    ['tuple', ['tensor', 'float32', [2, 3], None]]
    """
    return _encode((tuple(args), dict(kwargs)))


def decode_inputs(data: list[Any], like: Tensor) -> Arguments:
    """Return the arguments that `encode_inputs` was given; floating-point tensors are uninitialised.

    Args:
        data: from `encode_inputs`.
        like: sets the device of all tensors and the dtype of the floating-point ones.

    Raises: CheckpointError: if the arguments held an object other than a tensor, number, string, tuple, list or dict.
        An error of any type if the data is malformed.

    >>> decode_inputs(encode_inputs([torch.zeros(2, 3)], {"scale": 2}), torch.zeros(1).double())[0][0].dtype
    torch.float64
    """
    args, kwargs = _decode(data, like)
    if type(args) is not tuple or type(kwargs) is not dict or not all(type(name) is str for name in kwargs):
        raise CheckpointError("its example does not hold the arguments of a forward")
    return args, kwargs


def _encode(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        numbers = value.flatten().tolist() if is_index(value) and value.numel() <= MOST else None
        return ["tensor", str(value.dtype).removeprefix("torch."), list(value.shape), numbers]
    if type(value) in (tuple, list):
        return [type(value).__name__, *map(_encode, value)]
    if type(value) is dict:
        return ["dict", *([_encode(key), _encode(part)] for key, part in value.items())]
    return ["plain", value] if type(value) in _PLAIN else ["object", type(value).__name__]


def _decode(data: list[Any], like: Tensor) -> Any:
    kind, *parts = data
    if kind == "tensor":
        return _decode_tensor(like, *parts)
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(_decode(part, like) for part in parts)
    if kind == "dict":
        return {_decode(key, like): _decode(part, like) for key, part in parts}
    if kind == "plain" and type(parts[0]) in _PLAIN:
        return parts[0]
    raise CheckpointError(f"its example holds an object of class {parts[0]!r}, which no file can hold")


def _decode_tensor(like: Tensor, name: str, shape: list[int], numbers: list[Any] | None) -> Tensor:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype) or not all(type(size) is int for size in shape):
        raise CheckpointError(f"its example has a tensor of type {name!r} and shape {shape!r}")
    if numbers is not None:
        return torch.tensor(numbers, dtype=dtype, device=like.device).reshape(shape)
    if dtype.is_floating_point:
        return torch.empty(shape, dtype=like.dtype, device=like.device)  # its contents are never read
    return torch.zeros(shape, dtype=dtype, device=like.device)
