"""Linear evaluation: what a linear classifier per width, or one for all widths, makes of frozen features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._errors import DataError
from slimmable._widths import check_widths
from slimmable.layers import SwitchableNorm, SwitchableProbe
from slimmable.layers._view import install_view
from slimmable.losses import soft_cross_entropy
from slimmable.losses._checks import check_matrix
from slimmable.losses._cosines import at_least_float32
from slimmable.training._labels import check_features, check_tensors, check_training

_NO_EPS = 1e-30  # changes no variance that `_moments` gives; 0 is not allowed by torch 2.11


def probe_loss(scores: Mapping[float, Tensor], labels: Tensor) -> Tensor:
    """Return the loss of a switchable probe, a scalar in nats (SlimCLR, Zhao et al. 2024, linear evaluation).

    The widest width's cross-entropy with the labels, plus for every narrower one the mean of its cross-entropy with
    the labels and of that with the widest's class probabilities, detached.

    Args:
        scores: width -> class scores of shape (batch, classes), the full width 1.0 among them.
        labels: class numbers of shape (batch,).

    Raises: DataError: if scores and labels do not fit. WidthError: if the full width is missing.

    >>> even = torch.zeros(3, 4)
    >>> probe_loss({1.0: even, 0.5: even}, torch.tensor([0, 1, 2]))  # 2 log 4
    tensor(2.7726)
    """
    check_widths(scores)
    check_matrix("probe_loss", "scores at width 1.0", scores[1.0])
    check_tensors("probe_loss", labels=labels)
    if labels.shape != scores[1.0].shape[:1] or labels.is_floating_point():
        raise DataError(
            f"probe_loss: labels have shape {tuple(labels.shape)} and type {labels.dtype}, expected class numbers for "
            f"scores of shape {tuple(scores[1.0].shape)}"
        )
    scores = {width: at_least_float32(part) for width, part in scores.items()}
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
        labels: class numbers of shape (images,), on the device of the features.
        num_classes: number of classes; by default one more than the largest label.

    Raises: DataError: if labels and features do not fit. WidthError: if the full width is missing. UsageError: if a
        number of epochs or images, or the learning rate, is out of its range.

    >>> from slimmable import at_width
    >>> wide = torch.cat([torch.eye(4)] * 8)
    >>> probe = train_probe({1.0: wide, 0.5: wide[:, :2]}, torch.arange(4).repeat(8), epochs=30)
    >>> probe(wide).argmax(1)[:4]
    tensor([0, 1, 2, 3])
    """
    check_training("train_probe", epochs, batch_size, learning_rate)
    classes = _check("train_probe", features, labels, num_classes)
    moments = {width: _moments(features[width]) for width in check_widths(features)}
    scaled = {width: (features[width].float() - mean) / deviation for width, (mean, deviation) in moments.items()}
    probe = SwitchableProbe(features[1.0].shape[1], classes, scaled, device=labels.device)
    linears = {width: _zero_linear(part.shape[1], classes, labels) for width, part in scaled.items()}

    def scores(rows: Tensor) -> dict[float, Tensor]:
        return {width: linears[width](part[rows]) for width, part in scaled.items()}

    for index, linear in enumerate(linears.values()):
        probe.linears[index] = linear
    _descend(probe, scores, labels, epochs, batch_size, learning_rate, seed)
    with torch.no_grad():
        for width, (mean, deviation) in moments.items():
            linears[width].weight.div_(deviation)
            linears[width].bias.sub_(linears[width].weight @ mean)
    return probe


def train_slimmable_probe(
    features: Mapping[float, Tensor],
    labels: Tensor,
    *,
    num_classes: int | None = None,
    epochs: int = 90,
    batch_size: int = 256,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> nn.Sequential:
    """Train one linear classifier for all widths, of which a narrow width uses the first columns; for comparison.

    For linear regression it is the best at every width only if the features that a narrow width has are orthogonal to
    the others, over the images (SlimCLR, Zhao et al. 2024, theory): `train_probe` has a classifier per width instead.
    Loss, steps and arguments are those of `train_probe`, and so is what the classifiers see: features scaled to zero
    mean and unit variance at every width. What differs is that weights and bias are shared. The scales of the widths
    differ, so they cannot be worked into shared weights; they stay in front, as a BatchNorm per width.

    The features of a narrow width must be the first ones of the full width. That is how `slimify` keeps them, unless
    the features are put together from several parts, as in DenseNet: sort them first, as `evaluate_widths` does. It
    means nothing for layers made with `overlap=False`.

    Returns: BatchNorm and classifier, in eval mode (stay there), that switch widths together and take the features as
        they are.

    Raises: as `train_probe`, and DataError: if a narrow width has more features than the full one.

    >>> from slimmable import at_width
    >>> wide = torch.cat([torch.eye(4)] * 8)
    >>> probe = train_slimmable_probe({1.0: wide, 0.5: wide[:, :2]}, torch.arange(4).repeat(8), epochs=30)
    >>> with at_width(probe, 0.5):
    ...     probe(wide[:, :2]).argmax(1)[:2], probe[1].weight.shape
    (tensor([0, 1]), torch.Size([4, 2]))
    """
    check_training("train_slimmable_probe", epochs, batch_size, learning_rate)
    classes = _check("train_slimmable_probe", features, labels, num_classes)
    widths = check_widths(features)
    full, kept = features[1.0].shape[1], [features[width].shape[1] for width in widths]
    if max(kept) > full:
        raise DataError(f"train_slimmable_probe: {kept} features at widths {widths}; none may have more than the full")
    norm = SwitchableNorm(nn.BatchNorm1d(full, eps=_NO_EPS, affine=False, device=labels.device), widths, kept)
    for index, width in enumerate(widths):
        mean, deviation = _moments(features[width])
        norm.norm_at(index).load_state_dict({"running_mean": mean, "running_var": deviation.square()}, strict=False)
    norm.eval()
    linear = _zero_linear(full, classes, labels)
    scaled = {width: norm.norm_at(index)(features[width].float()) for index, width in enumerate(widths)}

    def scores(rows: Tensor) -> dict[float, Tensor]:
        return {
            width: F.linear(part[rows], linear.weight[:, : part.shape[1]], linear.bias)
            for width, part in scaled.items()
        }

    _descend(linear, scores, labels, epochs, batch_size, learning_rate, seed)
    install_view(linear, widths, {"weight": [(None, count) for count in kept]}, {}, {"in_features": kept})
    return nn.Sequential(norm, linear).eval()


def _check(where: str, features: Mapping[float, Tensor], labels: Tensor, num_classes: int | None) -> int:
    return max(
        check_features(f"{where}: features of width {width}", features[width], labels, num_classes)
        for width in check_widths(features)
    )


def _zero_linear(features: int, classes: int, labels: Tensor) -> nn.Linear:
    linear = nn.Linear(features, classes, device=labels.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _descend(
    probe: nn.Module,
    scores: Callable[[Tensor], dict[float, Tensor]],
    labels: Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Minimise `probe_loss` of `scores`, a function of row numbers, over the parameters of `probe`."""
    optimizer = torch.optim.SGD(probe.parameters(), lr=learning_rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            optimizer.zero_grad()
            probe_loss(scores(rows), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each feature."""
    return features.float().mean(0), features.float().std(0, correction=0).clamp(min=1e-6)
