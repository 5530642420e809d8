"""VICReg: variance, invariance and covariance of two views' embeddings, no negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from slimmable.errors import DataError
from slimmable.losses._checks import check_factor, check_same_shape
from slimmable.losses._cosines import at_least_float32, products


def vicreg(
    z0: torch.Tensor,
    z1: torch.Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> torch.Tensor:
    """Return the VICReg loss, a scalar (Bardes et al. 2022, eq. 1-6), weighted by the three factors.

    `z0` and `z1` have shape (batch, dim), raw embeddings, row i of both from the same image. The invariance term is the
    mean squared difference; the variance and covariance terms are summed, not averaged, over the two views, as in the
    code of Krishna et al. 2023 (the paper's own code halves the variance term). With several processes, give both
    views gathered, by `slimmable.training.gather`.

    Raises: DataError: if shapes differ, or the batch has less than two images. UsageError: if a factor is negative.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # std .816 per feature, uncorrelated
    >>> vicreg(z, z)
    tensor(9.1721)
    """
    check_factors("vicreg", invariance, variance, covariance)
    check_same_shape("vicreg", z0=z0, z1=z1)
    if z0.shape[0] < 2:
        raise DataError(f"vicreg: batch of shape {tuple(z0.shape)} has no variance; give at least two images")
    z0, z1 = at_least_float32(z0), at_least_float32(z1)
    spread = _variance_term(z0) + _variance_term(z1)
    correlation = _covariance_term(z0) + _covariance_term(z1)
    return invariance * F.mse_loss(z0, z1) + variance * spread + covariance * correlation


def check_factors(where: str, invariance: float, variance: float, covariance: float) -> None:
    """Raise `UsageError` unless all are finite numbers from 0 on."""
    for name, value in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
        check_factor(where, name, value)


def _variance_term(z: torch.Tensor) -> torch.Tensor:
    """Mean over features of how far the standard deviation stays below 1."""
    return F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()


def _covariance_term(z: torch.Tensor) -> torch.Tensor:
    """Sum of the squared covariances of different features, over the number of features."""
    centred = z - z.mean(0)
    covariances = products(centred.T, centred) / (z.shape[0] - 1)
    off_diagonal = covariances - torch.diag(covariances.diagonal())
    return off_diagonal.square().sum() / z.shape[1]
