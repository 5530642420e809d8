"""Checks of what classifiers are trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from slimmable._errors import DataError


def check_features(where: str, features: Tensor, labels: Tensor, num_classes: int | None) -> int:
    """Refuse features that are no matrix with one class number for each row; return the number of classes.

    Raises: DataError.
    """
    if features.ndim != 2 or 0 in features.shape or labels.shape != features.shape[:1]:
        raise DataError(
            f"{where} have shape {tuple(features.shape)}, expected ({len(labels)}, features) for labels of shape "
            f"{tuple(labels.shape)}; there must be at least one of each"
        )
    return check_classes(where, labels, num_classes)


def check_classes(where: str, labels: Tensor, num_classes: int | None) -> int:
    """Refuse labels that are not class numbers from 0 on; return the number of classes.

    Raises: DataError.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{where}: labels are {labels.dtype}, expected class numbers; give labels.long()")
    lowest, highest = int(labels.min()), int(labels.max())
    classes = highest + 1 if num_classes is None else num_classes
    if lowest < 0 or highest >= classes:
        raise DataError(f"{where}: labels from {lowest} to {highest} are not class numbers from 0 to {classes - 1}")
    return classes
