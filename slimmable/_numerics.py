"""Numerics in at least float32, also under autocast: type promotion, unit and standard vectors, matrix products."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32 if it has half precision, and unchanged otherwise."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@cache
def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has none, such as Apple's GPUs."""
    try:
        return torch.zeros((), dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32


def in_float64(tensor: Tensor) -> Tensor:
    """Return `tensor` in float64, on the CPU if its own device has none."""
    return (tensor if widest_float(tensor.device) == torch.float64 else tensor.cpu()).double()


def unit_vectors(tensor: Tensor, dim: int = 1) -> Tensor:
    """Return `tensor` with its vectors along `dim` scaled to length 1; one below 1e-12 becomes 0, without gradient."""
    exact = at_least_float32(tensor)
    length: Tensor = torch.linalg.vector_norm(exact, dim=dim, keepdim=True)
    return exact / length.masked_fill(length < 1e-12, torch.inf)  # or its gradient could overflow


def standardised(features: Tensor) -> Tensor:
    """Return (batch, features) scaled to mean 0 and variance 1 over the batch, as by a BatchNorm with eps 1e-5."""
    return F.layer_norm(at_least_float32(features).T, features.shape[:1]).T


def matmul_without_autocast(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` in the wider type, for cosines, whose rounding errors a small temperature would magnify."""
    wider = torch.promote_types(left.dtype, right.dtype)
    with torch.autocast(left.device.type, enabled=False):
        return left.to(wider) @ right.to(wider)
