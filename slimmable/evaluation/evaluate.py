"""Evaluation of frozen features at every width: kNN, linear probes and the ridge classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._checks import (
    check_classes,
    check_count,
    check_labelled,
    check_matrices,
    check_module,
    check_positive,
    check_tensors,
)
from slimmable._convert import plan_of
from slimmable._modules import in_eval_mode
from slimmable._width import at_width, widths_of
from slimmable._widths import check_widths
from slimmable.errors import DataError, UsageError
from slimmable.evaluation.linear import ridge_classifier, train_probe, train_slimmable_probe

ProbeName = Literal["knn", "linear", "slimmable", "ridge"]


@dataclass(frozen=True)
class Accuracies:
    """Fraction of held-out images that each probe classifies correctly, in [0, 1]; NaN for a probe that did not run."""

    knn: float = math.nan
    linear: float = math.nan
    slimmable: float = math.nan
    ridge: float = math.nan


def features_of(backbone: nn.Module, images: Tensor, width: float, batch_size: int = 256) -> Tensor:
    """Return the features of `backbone` at `width` in eval mode, of shape (images, features), float32.

    Args:
        backbone: a converted network; its width and training mode are restored afterwards.
        images: shape (images, ...); uint8 images are scaled to [0, 1].
        width: one of the network's widths.
        batch_size: number of images that run together.

    Raises: ConversionError or WidthError: as `set_width`. DataError: if there are no images.
    """
    check_tensors("features_of", images=images)
    check_count("features_of", batch_size=batch_size)
    if not images.ndim or not len(images):
        raise DataError(f"features_of: images have shape {tuple(images.shape)}, expected at least one image")
    with at_width(backbone, width):
        return outputs_of(backbone, images, batch_size)


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Return the outputs of `model` for all images, in eval mode and float32."""
    with in_eval_mode(model):
        return torch.cat([model(as_input(model, batch)).float() for batch in torch.split(images, batch_size)])


def as_input(model: nn.Module, images: Tensor) -> Tensor:
    """Return the images on the device of `model`, with uint8 scaled to [0, 1]."""
    moved = images.to(next(model.parameters(), images).device)
    return moved.float() / 255 if moved.dtype == torch.uint8 else moved


def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Return the fraction of `images` whose largest class score is that of their label, in [0, 1].

    Args:
        model: images in, class scores of shape (batch, classes) out; it runs in eval mode, as in `features_of`.
        images: shape (images, ...); uint8 images are scaled to [0, 1].
        labels: class numbers, shape (images,).
        batch_size: number of images that run together.

    Raises: DataError: if there are no images, not one class number for each, or the model's output is not class scores.

    >>> accuracy_of(nn.Sequential(nn.Linear(2, 2, bias=False)), torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]))
    0.75
    """
    check_module("accuracy_of", model)
    check_labelled("accuracy_of: images", images, labels)
    check_classes("accuracy_of", labels, None)
    check_count("accuracy_of", batch_size=batch_size)
    scores = outputs_of(model, images, batch_size)
    check_matrices("accuracy_of", scores=scores)
    return _accuracy(scores, labels)


def evaluate_widths(
    backbone: nn.Module,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    probes: Sequence[ProbeName] = ("knn", "linear"),
    k: int = 20,
) -> dict[float, Accuracies]:
    """Return width -> accuracies on `test` of classifiers trained on the frozen features of `train`.

    The features of every width are computed once, in eval mode; the backbone is not changed.

    Args:
        backbone: a converted network; images in, features of shape (batch, features) out.
        train, test: images of shape (images, channels, height, width), float, or uint8 to be scaled to [0, 1].
        train_labels, test_labels: class numbers, shape (images,).
        probes: which classifiers, as in `evaluate_features`. For "slimmable" the features of a converted backbone are
            sorted, those of the narrowest width first; a part of a converted network must have them in this order.
        k: number of neighbours that vote.

    Raises:
        ConversionError: if `backbone` was never converted.
        DataError: if a set is empty or labels do not match.
        UsageError: if `probes` holds an unknown name, or `k` is not an integer of at least 1.

    >>> import slimmable
    >>> backbone = slimmable.slimify(nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)),
    ...                              widths=(1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2))
    >>> images, labels = torch.rand(20, 1, 2, 2), torch.arange(20) % 2
    >>> list(evaluate_widths(backbone, images, labels, images, labels))
    [1.0, 0.5]
    """
    _check_probes("evaluate_widths", probes, k)
    check_labelled("evaluate_widths: train", train, train_labels)
    check_labelled("evaluate_widths: test", test, test_labels)
    known, asked = (
        narrowest_first(backbone, {width: features_of(backbone, images, width) for width in widths_of(backbone)})
        for images in (train, test)
    )
    return evaluate_features(known, train_labels, asked, test_labels, probes=probes, k=k)


def evaluate_features(
    train: Mapping[float, Tensor],
    train_labels: Tensor,
    test: Mapping[float, Tensor],
    test_labels: Tensor,
    *,
    probes: Sequence[ProbeName] = ("knn", "linear"),
    k: int = 20,
) -> dict[float, Accuracies]:
    """Return width -> accuracies on `test` of classifiers trained on `train`, for features already computed.

    Args:
        train, test: width -> features of shape (images, features of this width), including width 1.0.
        train_labels, test_labels: class numbers, shape (images,); moved to the device of the features.
        probes: "knn" is `knn_accuracy`, "linear" a classifier per width (`train_probe`), "slimmable" one for all widths
            (`train_slimmable_probe`, which needs the features of a width to be the first ones of every wider width),
            "ridge" the closed form per width (`ridge_classifier`).
        k: number of neighbours that vote.

    Raises:
        DataError: if a set is empty, or labels or features do not match.
        WidthError: if width 1.0 is missing.
        UsageError: if `probes` holds an unknown name, or `k` is not an integer of at least 1.

    >>> wide, labels = torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8)
    >>> features = {1.0: wide, 0.5: wide[:, :2]}
    >>> evaluate_features(features, labels, features, labels, probes=("ridge",))[1.0].ridge
    1.0
    """
    _check_probes("evaluate_features", probes, k)
    widths = check_widths(train)
    if widths != check_widths(test):
        raise DataError(f"evaluate_features: train has widths {widths}, test {check_widths(test)}")
    for width in widths:
        check_labelled(f"evaluate_features: train at width {width}", train[width], train_labels)
        check_labelled(f"evaluate_features: test at width {width}", test[width], test_labels)
        if train[width].shape[1:] != test[width].shape[1:]:
            raise DataError(
                f"evaluate_features: at width {width} train has shape {tuple(train[width].shape)}, test "
                f"{tuple(test[width].shape)}; expected the same number of features"
            )
    device = train[1.0].device
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    classes = check_classes("evaluate_features", torch.cat([train_labels, test_labels]), None)
    kinds: dict[str, Callable[..., nn.Module]] = {"linear": train_probe, "slimmable": train_slimmable_probe}
    trained = {name: kinds[name](train, train_labels, num_classes=classes) for name in kinds if name in probes}
    found = {}
    for width in widths:
        known, asked = train[width], test[width]
        accuracies = {}
        for name, probe in trained.items():
            with at_width(probe, width), torch.no_grad():
                accuracies[name] = _accuracy(probe(asked.float()), test_labels)
        if "knn" in probes:
            accuracies["knn"] = knn_accuracy(known, train_labels, asked, test_labels, k=k)
        if "ridge" in probes:
            classifier = ridge_classifier(known, train_labels, num_classes=classes)
            accuracies["ridge"] = _accuracy(classifier(asked), test_labels)
        found[width] = Accuracies(**accuracies)
    return found


def _check_probes(where: str, probes: Sequence[ProbeName], k: int) -> None:
    check_count(where, k=k)
    listed = isinstance(probes, Iterable) and not isinstance(probes, str)
    if not listed or any(name not in get_args(ProbeName) for name in probes):
        raise UsageError(f"{where}: probes must be a list of {', '.join(get_args(ProbeName))}; got {probes!r}")


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(1) == labels.to(scores.device)).float().mean().item()


def narrowest_first(backbone: nn.Module, features: dict[float, Tensor]) -> dict[float, Tensor]:
    """Sort the features by width so that those of each come first in every wider one, as the plan of `backbone` says.

    Features of a network without a plan of its own are returned unchanged.
    """
    plan = plan_of(backbone)
    ids = None if plan is None else plan.channels.outputs[0].units[1]
    if plan is None or ids is None:
        return features
    mask = plan.channels.needed.grouping.mask
    kept = {width: mask(np.array([*plan.sub_network(width).counts, 1]), ids) for width in features}
    widths = np.sum(list(kept.values()), axis=0)  # how many widths have each feature
    order = {width: torch.from_numpy(np.argsort(-widths[part], kind="stable")) for width, part in kept.items()}
    return {width: part[:, order[width].to(part.device)] for width, part in features.items()}


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
