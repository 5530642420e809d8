"""Evaluation of frozen features at every width: kNN and the linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimmable.training.knn import check_labels, knn_accuracy
from slimmable.training.probe import train_probe
from slimmable.width import at_width, widths_of


@dataclass(frozen=True)
class Accuracy:
    """Shares of the held-out images that are classified rightly, in [0, 1]."""

    knn: float
    linear: float


@torch.no_grad()
def features_of(backbone: nn.Module, images: Tensor, width: float, batch_size: int = 256) -> Tensor:
    """Return the features of `backbone` at `width` in eval mode, of shape (images, features), float32.

    Args:
        backbone: a converted network; width and training mode are put back afterwards.
        images: of shape (images, ...); uint8 ones are scaled to [0, 1].
    """
    device = next(backbone.parameters()).device
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        with at_width(backbone, width):
            parts = []
            for start in range(0, len(images), batch_size):
                scaled = images[start : start + batch_size].to(device)
                parts.append(backbone(scaled.float() / 255 if scaled.dtype == torch.uint8 else scaled).float())
            return torch.cat(parts)
    finally:
        for module in training:
            module.training = True


def evaluate_widths(
    backbone: nn.Module, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20
) -> dict[float, Accuracy]:
    """Return width -> accuracy on `test` of weighted kNN and of a linear probe, both made from `train`.

    The features of every width are computed once, in eval mode; the backbone stays as it is. `knn_accuracy` and
    `train_probe` say what is measured.

    Args:
        backbone: a converted network; images in, features of shape (batch, features) out.
        train, test: images of shape (images, channels, height, width), floats, or uint8 to be scaled to [0, 1].
        train_labels, test_labels: class numbers of shape (images,).
        k: neighbours that vote.

    Raises: ConversionError: if `backbone` was never converted. DataError: if a set is empty or labels do not fit.

    >>> import slimmable
    >>> backbone = slimmable.slimify(nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)),
    ...                              widths=(1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2))
    >>> images, labels = torch.rand(20, 1, 2, 2), torch.arange(20) % 2
    >>> list(evaluate_widths(backbone, images, labels, images, labels))
    [1.0, 0.5]
    """
    check_labels("evaluate_widths: train", train, train_labels)
    check_labels("evaluate_widths: test", test, test_labels)
    widths = widths_of(backbone)
    device = next(backbone.parameters()).device
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    known = {width: features_of(backbone, train, width) for width in widths}
    asked = {width: features_of(backbone, test, width) for width in widths}
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    probe = train_probe(known, train_labels, num_classes=classes)
    linear = probe_accuracies(
        [probe.module_at(index) for index in range(len(widths))], list(asked.values()), test_labels
    )
    return {
        width: Accuracy(knn_accuracy(known[width], train_labels, asked[width], test_labels, k=k), share)
        for width, share in zip(widths, linear, strict=True)
    }


@torch.no_grad()
def probe_accuracies(classifiers: Sequence[nn.Module], features: Sequence[Tensor], labels: Tensor) -> list[float]:
    """Return the share of right answers of each classifier on its features."""
    return [
        (classifier(part).argmax(1) == labels).float().mean().item()
        for classifier, part in zip(classifiers, features, strict=True)
    ]
