"""Checks of what classifiers are trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from slimmable._errors import DataError
from slimmable.losses._checks import check_count, check_factor


def check_training(where: str, epochs: int, batch_size: int, learning_rate: float) -> None:
    """Refuse settings that no training can have.

    Raises: UsageError.
    """
    check_count(where, "epochs", epochs, 0)
    check_count(where, "batch_size", batch_size)
    check_factor(where, "learning_rate", learning_rate)


def check_tensors(where: str, **tensors: object) -> None:
    """Refuse what is no tensor.

    Raises: DataError.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DataError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")


def check_features(where: str, features: Tensor, labels: Tensor, num_classes: int | None) -> int:
    """Refuse features that are no matrix with one class number for each row; return the number of classes.

    Raises: DataError.
    """
    check_tensors(where, features=features, labels=labels)
    if features.is_complex():
        raise DataError(f"{where} are {features.dtype}, expected real numbers")
    if features.ndim != 2 or 0 in features.shape or labels.shape != features.shape[:1]:
        raise DataError(
            f"{where} have shape {tuple(features.shape)}, expected ({len(labels)}, features) for labels of shape "
            f"{tuple(labels.shape)}; there must be at least one of each"
        )
    return check_classes(where, labels, num_classes)


def check_classes(where: str, labels: Tensor, num_classes: int | None) -> int:
    """Refuse labels that are not class numbers from 0 on; return the number of classes.

    Raises: DataError. UsageError: if `num_classes` is no number of classes.
    """
    check_tensors(where, labels=labels)
    if num_classes is not None:
        check_count(where, "num_classes", num_classes)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{where}: labels are {labels.dtype}, expected class numbers; give labels.long()")
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    classes = highest + 1 if num_classes is None else num_classes
    if lowest < 0 or highest >= classes:
        raise DataError(f"{where}: labels from {lowest} to {highest} are not class numbers from 0 to {classes - 1}")
    return classes
