"""Unit vectors and cosines, in float32 at least, also under autocast."""

from __future__ import annotations

import torch

_SHORTEST = 1e-12  # vectors below this length count as zero


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` in float32 if it is of lower precision, itself otherwise."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def unit(tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Return `tensor` with vectors along `dim` scaled to length 1; a zero vector stays zero, and gets no gradient.

    Its direction has none: the limit depends on the way, and is beyond what half precision can hold.
    """
    exact = at_least_float32(tensor)
    length: torch.Tensor = torch.linalg.vector_norm(exact, dim=dim, keepdim=True)
    return exact / length.masked_fill(length < _SHORTEST, torch.inf)


def products(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the matrix product `rows @ columns` in the wider type of the two, out of autocast's reach.

    Cosines are divided by small temperatures afterwards, which would blow up the rounding of half precision.
    """
    wider = torch.promote_types(rows.dtype, columns.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        return rows.to(wider) @ columns.to(wider)


def without_diagonal(square: torch.Tensor) -> torch.Tensor:
    """Return the entries off the diagonal, shape (n, n - 1), of a matrix of shape (n, n)."""
    n = square.shape[0]
    # Behind its first entry, the flattened matrix is n - 1 runs of n entries, each followed by one of the diagonal.
    return square.reshape(-1)[1:].reshape(n - 1, n + 1)[:, :n].reshape(n, n - 1)
