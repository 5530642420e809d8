"""Linear evaluation: what a linear classifier per width makes of frozen features."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._errors import DataError
from slimmable._widths import check_widths
from slimmable.layers import SwitchableProbe
from slimmable.losses import soft_cross_entropy


def probe_loss(scores: Mapping[float, Tensor], labels: Tensor) -> Tensor:
    """Return the loss of a switchable probe, a scalar in nats (SlimCLR, Zhao et al. 2024, linear evaluation).

    The widest width's cross-entropy with the labels, plus for every narrower one the mean of its cross-entropy with
    the labels and of that with the widest's class probabilities, detached.

    Args:
        scores: width -> class scores of shape (batch, classes), the full width 1.0 among them.
        labels: class numbers of shape (batch,).

    >>> even = torch.zeros(3, 4)
    >>> probe_loss({1.0: even, 0.5: even}, torch.tensor([0, 1, 2]))  # 2 log 4
    tensor(2.7726)
    """
    widest = scores[1.0]
    total = F.cross_entropy(widest, labels)
    for width, narrow in scores.items():
        if width != 1.0:
            total = total + (F.cross_entropy(narrow, labels) + soft_cross_entropy(narrow, widest, 1.0, 1.0)) / 2
    return total


def train_probe(
    features: Mapping[float, Tensor],
    labels: Tensor,
    *,
    num_classes: int | None = None,
    epochs: int = 90,
    batch_size: int = 256,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> SwitchableProbe:
    """Train one linear classifier per width on frozen features, all of them in the same steps.

    SGD with momentum 0.9, no weight decay, and a cosine schedule. For the training the features are scaled to zero mean
    and unit variance, which is then worked into the classifiers: they take the features as they are.

    Args:
        features: width -> features of shape (images, features of this width), 1.0 among the widths.
        labels: class numbers of shape (images,).
        num_classes: number of classes; by default one more than the largest label.

    Raises: DataError: if labels and features do not fit. WidthError: if widths are missing.

    >>> from slimmable import at_width
    >>> wide = torch.cat([torch.eye(4)] * 8)
    >>> probe = train_probe({1.0: wide, 0.5: wide[:, :2]}, torch.arange(4).repeat(8), epochs=30)
    >>> probe(wide).argmax(1)[:4]
    tensor([0, 1, 2, 3])
    """
    widths = check_widths(features)
    for width in widths:
        if features[width].ndim != 2 or len(features[width]) != len(labels) or not len(labels):
            raise DataError(
                f"train_probe: features of width {width} have shape {tuple(features[width].shape)}, "
                f"expected ({len(labels)}, features) for labels of shape {tuple(labels.shape)}"
            )
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    device = labels.device
    probe = SwitchableProbe(features[1.0].shape[1], classes, widths, device=device)
    scaled = {}
    with torch.no_grad():
        for index, width in enumerate(widths):
            scaled[width] = _standardise(features[width])
            linear = nn.Linear(features[width].shape[1], classes, device=device)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            probe.linears[index] = linear
    optimizer = torch.optim.SGD(probe.parameters(), lr=learning_rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = torch.randperm(len(labels), generator=generator).to(device)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            scores = {width: probe.module_at(index)(scaled[width][batch]) for index, width in enumerate(widths)}
            optimizer.zero_grad()
            probe_loss(scores, labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    _take_raw_features(probe, [features[width] for width in widths])
    return probe


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.float().mean(0), features.float().std(0, correction=0).clamp(min=1e-6)


def _standardise(features: Tensor) -> Tensor:
    mean, deviation = _moments(features)
    return (features.float() - mean) / deviation


@torch.no_grad()
def _take_raw_features(probe: SwitchableProbe, features: list[Tensor]) -> None:
    for index, part in enumerate(features):
        mean, deviation = _moments(part)
        linear = probe.module_at(index)
        linear.weight.div_(deviation)
        linear.bias.sub_(linear.weight @ mean)
