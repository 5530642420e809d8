"""The ridge classifier: linear evaluation in closed form."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable.errors import DataError, UsageError
from slimmable.losses._checks import as_number
from slimmable.training._labels import check_features

_NOISE = 1e-14  # of the mean square: a variance below it is the rounding of float32


@torch.no_grad()
def ridge_classifier(
    features: Tensor, labels: Tensor, *, num_classes: int | None = None, penalty: float = 0.1
) -> nn.Linear:
    """Return the linear classifier that has the least squared error to one-hot labels, with penalised weights.

    It minimises `mean over images of |W x + b - onehot|^2 + penalty v |W|^2` in closed form, in float64 (Hoerl and
    Kennard, *Ridge Regression*, 1970). `v` is the variance of the features, averaged over them, and `b` is not
    penalised. So neither a factor on all features nor a shift of each changes an answer, and one penalty suits any
    features. With one-hot labels the scores estimate the classes' probabilities and sum to 1; targets of 1 and -1, as
    in scikit-learn's `RidgeClassifier`, would give `2 score - 1`, and the same answers.

    Unlike `train_probe` it has no steps to get wrong, and the widths of a network do not teach each other: call it
    for the features of each width. It solves for as many unknowns as there are features, or images if these are fewer.

    Args:
        features: of shape (images, features), as they are.
        labels: class numbers of shape (images,).
        num_classes: number of classes; by default one more than the largest label. A class without images gets the
            score 0 everywhere.
        penalty: from 1e-9 on. A larger one suits fewer images.

    Returns: a classifier on the device of the features, float64 if they are and float32 otherwise.

    Raises: DataError: if labels and features do not fit or are not finite. UsageError: if `penalty` is too small.

    >>> corners = torch.eye(3).repeat(4, 1)
    >>> classifier = ridge_classifier(100 * corners + 7, torch.arange(3).repeat(4))
    >>> classifier(100 * corners + 7).argmax(1)[:3]
    tensor([0, 1, 2])
    """
    if not 1e-9 <= as_number(penalty) < math.inf:
        raise UsageError(f"ridge_classifier: penalty must be a number from 1e-9 on, got {penalty!r}")
    classes = check_features("ridge_classifier: features", features, labels, num_classes)
    device = torch.device("cpu") if features.device.type == "mps" else features.device  # which has no float64
    x, y = features.to(device, torch.float64), F.one_hot(labels.to(device).long(), classes).double()
    if not x.isfinite().all():
        raise DataError("ridge_classifier: features hold nan or infinity")
    mean, shares, size = x.mean(0), y.mean(0), x.square().mean()
    x, y = x - mean, y - shares
    ridge = penalty * len(x) * torch.maximum(x.square().mean(), _NOISE * size).clamp(min=torch.finfo(x.dtype).tiny)
    weight = _solve(x.T @ x, x.T @ y, ridge) if len(x) >= x.shape[1] else x.T @ _solve(x @ x.T, y, ridge)
    bias = shares - mean @ weight
    exact = features.dtype if features.dtype == torch.float64 else torch.float32
    classifier = nn.Linear(x.shape[1], classes, device=features.device, dtype=exact)
    classifier.weight.copy_(weight.T)
    classifier.bias.copy_(bias)
    return classifier


def _solve(gram: Tensor, right: Tensor, ridge: Tensor) -> Tensor:
    """Solve `(gram + ridge I) s = right` for a `gram` without negative eigenvalues; it is changed."""
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
