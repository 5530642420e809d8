"""Classification by the nearest training features: what features know without any training on labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimmable._errors import DataError, UsageError

_CHUNK = 1024


@torch.no_grad()
def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20, temperature: float = 0.1
) -> float:
    """Return the share of `test` whose class the weighted vote of the `k` nearest of `train` finds.

    Neighbours are the largest cosines, their votes `exp(cosine / temperature)` (Wu et al., *Unsupervised Feature
    Learning via Non-Parametric Instance Discrimination*, 2018, section 3.4).

    Args:
        train, test: features of shape (images, ...), flattened and scaled to unit length here.
        train_labels, test_labels: class numbers of shape (images,).
        k: number of neighbours; all of `train` where that is fewer.

    Raises: DataError: if a set is empty, or shapes do not fit. UsageError: if `k` or `temperature` is not positive.

    >>> corners = torch.eye(3)
    >>> knn_accuracy(corners, torch.arange(3), corners + 0.1, torch.tensor([0, 1, 1]), k=1)
    0.6666666666666666
    """
    if k < 1 or not temperature > 0:
        raise UsageError(f"knn_accuracy: k must be at least 1 and temperature positive, got {k} and {temperature}")
    check_labels("knn_accuracy: train", train, train_labels)
    check_labels("knn_accuracy: test", test, test_labels)
    bank = F.normalize(train.flatten(1).float(), dim=1)
    queries = F.normalize(test.flatten(1).float(), dim=1)
    if bank.shape[1] != queries.shape[1]:
        raise DataError(f"knn_accuracy: train has {bank.shape[1]} features, test {queries.shape[1]}")
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    right = 0
    for start in range(0, len(queries), _CHUNK):
        features, labels = queries[start : start + _CHUNK], test_labels[start : start + _CHUNK]
        cosines, nearest = (features @ bank.T).topk(min(k, len(bank)))
        votes = features.new_zeros(len(features), classes)
        votes.scatter_add_(1, train_labels[nearest], ((cosines - cosines[:, :1]) / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return right / len(test_labels)


def check_labels(what: str, images: Tensor, labels: Tensor) -> None:
    """Refuse a set of images or features that is empty, or that has not one label each.

    Raises: DataError.
    """
    if not len(images) or labels.shape != (len(images),):
        raise DataError(
            f"{what} has shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}; expected one label for "
            "each of at least one image"
        )
