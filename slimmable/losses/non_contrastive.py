"""Losses without negatives: BYOL, and VICReg's variance, invariance and covariance of two views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._checks import check_not_negative, check_same_shape
from slimmable._numerics import at_least_float32, matmul_without_autocast, unit_vectors
from slimmable.errors import DataError


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the loss of BYOL for one direction, a scalar: the mean squared distance of unit vectors, `2 - 2 cosine`.

    Both arguments have shape (batch, dim). No gradient flows into `target`, the momentum encoder's embedding of the
    other view. A step's loss is symmetric: `byol_loss(p0, z1) + byol_loss(p1, z0)` (Grill et al. 2020, eq. 2).

    Raises: DataError: if the shapes differ or are not those of matrices.

    >>> byol_loss(torch.eye(2), torch.ones(2, 2))  # 2 - sqrt(2)
    tensor(0.5858)
    """
    check_same_shape("byol_loss", prediction=prediction, target=target)
    return 2 - 2 * (unit_vectors(prediction) * unit_vectors(target.detach())).sum(1).mean()


def vicreg_loss(
    z0: Tensor, z1: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """Return the VICReg loss, a scalar: its three terms times the three factors (Bardes et al. 2022, eq. 1-6).

    `z0` and `z1` are raw embeddings of shape (batch, dim), with row i of both from the same image. The invariance term
    is the mean squared difference. The variance and covariance terms are summed over the two views, not averaged, as in
    the code of Krishna et al. 2023 (VICReg's own code halves the variance term). With several processes, gather both
    views first (`slimmable.training.gather`).

    Raises: DataError: if the shapes differ, or the batch has fewer than two images. UsageError: if a factor is below 0.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # std .816 per feature, uncorrelated
    >>> vicreg_loss(z, z)
    tensor(9.1721)
    """
    check_not_negative("vicreg_loss", invariance=invariance, variance=variance, covariance=covariance)
    check_same_shape("vicreg_loss", z0=z0, z1=z1)
    if z0.shape[0] < 2:
        raise DataError(f"vicreg_loss: batch of shape {tuple(z0.shape)} has no variance; give at least two images")
    z0, z1 = at_least_float32(z0), at_least_float32(z1)
    spread = _variance_term(z0) + _variance_term(z1)
    correlation = _covariance_term(z0) + _covariance_term(z1)
    return invariance * F.mse_loss(z0, z1) + variance * spread + covariance * correlation


def _variance_term(z: Tensor) -> Tensor:
    """Return how far the standard deviation falls short of 1, averaged over the features."""
    return F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()


def _covariance_term(z: Tensor) -> Tensor:
    """Return the sum of the squared covariances of different features, divided by the number of features."""
    centred = z - z.mean(0)
    covariances = matmul_without_autocast(centred.T, centred) / (z.shape[0] - 1)
    off_diagonal = covariances - torch.diag(covariances.diagonal())
    return off_diagonal.square().sum() / z.shape[1]


class VICRegLoss(nn.Module):
    """`vicreg_loss` as a module.

    >>> VICRegLoss()
    VICRegLoss(invariance=25.0, variance=25.0, covariance=1.0)
    """

    def __init__(self, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> None:
        super().__init__()
        check_not_negative("VICRegLoss", invariance=invariance, variance=variance, covariance=covariance)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """Return `vicreg_loss(z0, z1)` with the module's factors."""
        return vicreg_loss(z0, z1, self.invariance, self.variance, self.covariance)

    def extra_repr(self) -> str:
        """Return the factors, as in the constructor."""
        return f"invariance={self.invariance}, variance={self.variance}, covariance={self.covariance}"
