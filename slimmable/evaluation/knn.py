"""Classify by the nearest training features, to evaluate features without training on labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimmable._checks import check_classes, check_count, check_labelled, check_positive
from slimmable.errors import DataError

_CHUNK = 1024


@torch.no_grad()
def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20, temperature: float = 0.1
) -> float:
    """Return the fraction of `test` that a weighted vote of the `k` nearest features of `train` classifies correctly.

    The nearest features have the largest cosines, and their votes are `exp(cosine / temperature)` (Wu et al.,
    *Unsupervised Feature Learning via Non-Parametric Instance Discrimination*, 2018, section 3.4).

    Args:
        train, test: features of shape (images, ...), which are flattened and scaled to unit length.
        train_labels, test_labels: class numbers, shape (images,).
        k: number of neighbours, at most all of `train`.

    Raises:
        DataError: if a set is empty, shapes do not match, or labels are not class numbers.
        UsageError: if `k` is not an integer of at least 1, or `temperature` is not positive.

    >>> corners = torch.eye(3)
    >>> knn_accuracy(corners, torch.arange(3), corners + 0.1, torch.tensor([0, 1, 1]), k=1)
    0.6666666666666666
    """
    check_count("knn_accuracy", k=k)
    check_positive("knn_accuracy", temperature=temperature)
    check_labelled("knn_accuracy: train", train, train_labels)
    check_labelled("knn_accuracy: test", test, test_labels)
    classes = max(check_classes("knn_accuracy", labels, None) for labels in (train_labels, test_labels))
    bank = F.normalize(train.float().reshape(len(train), -1), dim=1)
    queries = F.normalize(test.float().reshape(len(test), -1), dim=1)
    if bank.shape[1] != queries.shape[1]:
        raise DataError(f"knn_accuracy: train has {bank.shape[1]} features, test {queries.shape[1]}")
    right = 0
    for features, labels in zip(torch.split(queries, _CHUNK), torch.split(test_labels, _CHUNK), strict=True):
        cosines, nearest = (features @ bank.T).topk(min(k, len(bank)))
        votes = features.new_zeros(len(features), classes)
        votes.scatter_add_(1, train_labels[nearest].long(), ((cosines - cosines[:, :1]) / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return right / len(test_labels)
