"""Evaluate the frozen features of every width: nearest neighbours, linear probes and a ridge classifier."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._atomic import checksum, plain_tensors, read_tensors, write_tensors
from slimmable._checks import check_classes, check_features, check_labelled, check_same_shape, checked, shown
from slimmable._convert import plan_of
from slimmable._modules import in_eval_mode
from slimmable._numerics import at_least_float32, in_float64
from slimmable._width import at_width, run_widths
from slimmable._widths import check_widths
from slimmable.errors import DataError, DivergedError, UsageError
from slimmable.layers import SwitchableNorm, SwitchableProbe
from slimmable.losses import soft_cross_entropy
from slimmable.view.view import install_view

__all__ = [
    "Accuracies", "evaluate_features", "evaluate_widths", "knn_accuracy",
    "label_fraction", "linear_evaluation", "probe_loss", "ridge_classifier", "train_probe",
]  # fmt: skip

Features = Mapping[float, Tensor]
Batches = Iterable[Sequence[Tensor]]  # pairs of images and their labels
ProbeName = Literal["knn", "linear", "slimmable", "ridge"]
Metric = Literal["cosine", "euclidean"]

_CHUNK = 1024  # images whose neighbours are found together
_NOISE = 1e-14  # as a share of the mean square: a smaller variance is float32 rounding
_NO_EPS = 1e-30  # too small to change a variance, which is at least 1e-12; torch 2.11 does not allow 0


@dataclass(frozen=True)
class Accuracies:
    """Fraction of held-out images whose class each probe scores best, or among its best five; NaN if it did not run."""

    knn: float = math.nan
    linear: float = math.nan
    slimmable: float = math.nan
    ridge: float = math.nan
    linear_top5: float = math.nan
    slimmable_top5: float = math.nan


def as_input(model: nn.Module, images: Tensor) -> Tensor:
    """Return the images on the device of `model`, with uint8 scaled to [0, 1]."""
    moved = images.to(next(model.parameters(), images).device)
    return moved.float() / 255 if moved.dtype == torch.uint8 else moved


@checked
def label_fraction(labels: Tensor, fraction: float, *, seed: int = 0) -> Tensor:
    """Return indices, ascending, of a fraction of the images, as many of each class, at least one, chosen by `seed`.

    A class that has fewer gives all; a larger fraction includes the images of a smaller one. For a loader, pass them to
    `torch.utils.data.Subset`. Shapes: class numbers (images,) -> (kept images,).
    Raises: DataError: if `labels` are not class numbers. UsageError: if `fraction` is not in [0, 1].

    >>> label_fraction(torch.tensor([0, 1, 0, 1, 1, 1, 0, 0]), 0.25).shape
    torch.Size([2])
    """
    check_labelled("label_fraction: labels", labels, labels)
    check_classes("label_fraction", labels, None)
    labels = labels.long().cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device="cpu")
    order, counts = order[labels[order].argsort(stable=True)], labels.bincount()
    each = max(1, round(fraction * len(labels) / int(counts.count_nonzero())))
    return torch.cat([members[:each] for members in order.split_with_sizes(counts.tolist())]).sort().values


@checked
def evaluate_widths(
    backbone: nn.Module,
    train: Tensor | Batches,
    train_labels: Tensor | None = None,
    test: Tensor | Batches | None = None,
    test_labels: Tensor | None = None,
    *,
    probes: Sequence[ProbeName] = ("knn", "linear"),
    k: int = 20,
    metric: Metric = "cosine",
    temperature: float = 0.1,
) -> dict[float, Accuracies]:
    """Return width -> accuracies on `test` of classifiers trained on the frozen features of `train`.

    The features of every width are computed once, in eval mode; the backbone is not changed.

    Args:
        backbone: a converted network; images in, features of shape (batch, features) out.
        train, test: images of shape (images, channels, height, width), float, or uint8 to be scaled to [0, 1]. Or
            `evaluate_widths(backbone, loader, test=loader)` with batches (images, labels), such as a `DataLoader`'s.
        train_labels, test_labels, probes, k, metric, temperature: as in `evaluate_features`. For "slimmable" the
            features of a converted backbone are sorted; a part of one must have those of the narrowest width first.

    Raises: ConversionError: if `backbone` was never converted. The others are as in `evaluate_features`.

    >>> backbone = nn.Sequential(nn.Flatten(), slimmable.SlimLinear(4, 8, widths=(1.0, 0.5), slim_in=False))
    >>> images, labels = torch.rand(20, 1, 2, 2), torch.arange(20) % 2
    >>> list(evaluate_widths(backbone, images, labels, images, labels))
    [1.0, 0.5]
    """
    sets: list[Any] = []
    for name, images, labels in cast("Any", (("train", train, train_labels), ("test", test, test_labels))):
        where = f"evaluate_widths: {name}"
        if isinstance(images, Tensor) or labels is not None:
            check_labelled(where, images, labels)
            images = zip(images.split(256), labels.split(256), strict=True)
        features, labels = _joined(_batches(where, backbone, images))
        sets += narrowest_first(backbone, features), labels
    return evaluate_features(*sets, probes=probes, k=k, metric=metric, temperature=temperature)


def _joined(batches: Iterable[tuple[Features, Tensor]]) -> tuple[dict[float, Tensor], Tensor]:
    parts, labels = zip(*batches, strict=True)
    return {width: torch.cat([part[width] for part in parts]) for width in parts[0]}, torch.cat(labels)


def _batches(
    where: str, backbone: nn.Module, batches: Any, num_classes: int | None = None
) -> Iterator[tuple[Features, Tensor]]:
    batch = None
    for batch in batches if isinstance(batches, Iterable) else [batches]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"{where} must be images with labels, or batches (images, labels), got {shown(batch)}")
        check_labelled(f"{where}: a batch", *batch)
        with torch.no_grad(), in_eval_mode(backbone):
            found = run_widths(backbone, as_input(backbone, batch[0]))
        labels = batch[1].to(found[1.0].device)
        for width, features in found.items():
            check_features(f"{where} features at width {width}", features, labels, num_classes)
        yield {width: at_least_float32(features) for width, features in found.items()}, labels
    if batch is None:
        raise DataError(f"{where} is empty; give at least one batch, and no generator that has ended")


@checked
def evaluate_features(
    train: Features,
    train_labels: Tensor,
    test: Features,
    test_labels: Tensor,
    *,
    probes: Sequence[ProbeName] = ("knn", "linear"),
    k: int = 20,
    metric: Metric = "cosine",
    temperature: float = 0.1,
) -> dict[float, Accuracies]:
    """Return width -> accuracies on `test` of classifiers trained on `train`, for features already computed.

    Args:
        train, test: width -> features of shape (images, features of this width), including width 1.0.
        train_labels, test_labels: class numbers, shape (images,); moved to the device of the features.
        probes: "knn" is `knn_accuracy`, "linear" a classifier per width (`train_probe`), "ridge" one in closed form
            (`ridge_classifier`), "slimmable" one for all widths (`train_probe` with `shared`, which says more).
        k, metric, temperature: of the neighbours, as in `knn_accuracy`.

    Raises: DataError: if a set is empty, or labels or features do not match. WidthError: if width 1.0 is missing.
        UsageError: if `probes` holds an unknown name, or `k` is not an integer of at least 1.

    >>> wide, labels = torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8)
    >>> features = {1.0: wide, 0.5: wide[:, :2]}
    >>> evaluate_features(features, labels, features, labels, probes=("ridge",))[1.0].ridge
    1.0
    """
    given: dict[str, Any] = {"train": train, "test": test}
    for name, found in given.items():
        if not isinstance(found, Mapping):
            way = f"features by width, such as {{1.0: features}}, got {shown(found)}"
            raise DataError(f"evaluate_features: {name} must be {way}")
    widths = check_widths(train)
    if widths != check_widths(test):
        raise DataError(f"evaluate_features: train has widths {widths}, test {check_widths(test)}")
    for width in widths:
        at = f" features at width {width}"
        classes = _check_sets("evaluate_features", at, train[width], train_labels, test[width], test_labels)
    device = train[1.0].device
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    named = [name for name in ("linear", "slimmable") if name in probes]
    trained = {name: train_probe(train, train_labels, shared=name != "linear", num_classes=classes) for name in named}
    accuracies = {}
    for width in widths:
        shares: dict[str, float] = {}
        for name, probe in trained.items():
            with at_width(probe, width), torch.no_grad():
                scores = probe(test[width].float())
            shares |= {name: _accuracy(scores, test_labels), f"{name}_top5": _accuracy(scores, test_labels, 5)}
        if "knn" in probes:
            sets = train[width], train_labels, test[width], test_labels
            shares["knn"] = knn_accuracy(*sets, k=k, metric=metric, temperature=temperature)
        if "ridge" in probes:
            classifier = ridge_classifier(train[width], train_labels, num_classes=classes)
            shares["ridge"] = _accuracy(classifier(test[width]), test_labels)
        accuracies[width] = Accuracies(**shares)
    return accuracies


def _check_sets(where: str, at: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> int:
    """Return the number of classes of two sets of features, which must be finite and as many in both."""
    classes = []
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        check_labelled(f"{where}: {name}{at}", features, labels)
        flat = features.reshape(len(features), features[0].numel())
        classes.append(check_features(f"{where}: {name}{at}", flat, labels))
    if train[0].numel() != test[0].numel():
        shapes = f"{tuple(train.shape)}, test {tuple(test.shape)}"
        raise DataError(f"{where}: train{at} has shape {shapes}; both need as many features for each image")
    return max(classes)


def _accuracy(scores: Tensor, labels: Tensor, best: int = 1) -> float:
    """Return the fraction of images whose class is among those of the `best` scores, of equal ones the first."""
    ranked = scores.argmax(1, keepdim=True) if best == 1 else scores.sort(dim=1, descending=True, stable=True).indices
    return (ranked[:, :best] == labels.to(scores.device).unsqueeze(1)).any(1).float().mean().item()


def narrowest_first(backbone: nn.Module, features: dict[float, Tensor]) -> dict[float, Tensor]:
    """Sort features so that those of each width come first in every wider one, by the plan of `backbone`, if any."""
    plan = plan_of(backbone)
    if plan is None or (ids := plan.channels.outputs[0].units[1]) is None:
        return features
    mask = plan.channels.needed.grouping.mask
    kept = {width: mask(np.array([*plan.sub_network(width).counts, 1]), ids) for width in features}
    widths = np.sum(list(kept.values()), axis=0)  # how many widths have each feature
    order = {width: torch.from_numpy(np.argsort(-widths[part], kind="stable")) for width, part in kept.items()}
    return {width: part[:, order[width].to(part.device)] for width, part in features.items()}


@torch.no_grad()
@checked
def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    metric: Metric = "cosine",
    temperature: float = 0.1,
) -> float:
    """Return the fraction of `test` that a weighted vote of the `k` nearest features of `train` classifies correctly.

    The nearest have the largest cosines, and votes `exp(cosine / temperature)` (Wu et al., *Unsupervised Feature
    Learning via Non-Parametric Instance Discrimination*, 2018, section 3.4: `k` 200, temperature 0.07). By "euclidean"
    they have the smallest distances `d`, and votes `exp(-d**2 / (2 temperature))`, the same for those of unit length.

    Args:
        train, test: features of shape (images, ...), which are flattened, and for "cosine" scaled to unit length.
        train_labels, test_labels: class numbers, shape (images,).
        k, metric, temperature: as above, `k` at most all of `train`; a larger `temperature` makes votes more equal.

    Raises: DataError: if a set is empty, shapes do not match, or labels are not class numbers.

    >>> corners = torch.eye(3)
    >>> knn_accuracy(corners, torch.arange(3), corners + 0.1, torch.tensor([0, 1, 1]), k=1)
    0.6666666666666666
    """
    classes = _check_sets("knn_accuracy", "", train, train_labels, test, test_labels)
    bank, queries = (features.float().reshape(len(features), -1) for features in (train, test))
    if metric == "cosine":
        bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    else:  # rounding is less near zero
        bank, queries = bank - bank.mean(0), queries - bank.mean(0)
    train_labels, test_labels = train_labels.to(bank.device), test_labels.to(bank.device)
    right = 0
    for features, labels in zip(torch.split(queries, _CHUNK), torch.split(test_labels, _CHUNK), strict=True):
        near = features @ bank.T if metric == "cosine" else -torch.cdist(features, bank).square() / 2
        near, places = near.topk(min(k, len(bank)))
        votes = features.new_zeros(len(features), classes)
        votes.scatter_add_(1, train_labels[places].long(), ((near - near[:, :1]) / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return right / len(test_labels)


@checked
def probe_loss(scores: Features, labels: Tensor) -> Tensor:
    """Return the loss of a switchable probe, a scalar in nats (SlimCLR, Zhao et al. 2024, linear evaluation).

    It is the widest width's cross-entropy with the labels, plus for every narrower width the mean of its cross-entropy
    with the labels and that with the widest's class probabilities, detached.

    Shapes: width, including 1.0, -> scores (batch, classes), and class numbers (batch,) -> ().
    Raises: DataError: if scores and labels do not match. WidthError: if the full width is missing.

    >>> even = torch.zeros(3, 4)
    >>> probe_loss({1.0: even, 0.5: even}, torch.tensor([0, 1, 2]))  # 2 log 4
    tensor(2.7726)
    """
    check_same_shape("probe_loss", **{f"scores of width {width}": scores[width] for width in check_widths(scores)})
    check_labelled("probe_loss: scores", scores[1.0], labels)
    widest, labels = at_least_float32(scores[1.0]), labels.long()
    total = F.cross_entropy(widest, labels)
    for narrow in (at_least_float32(part) for width, part in scores.items() if width != 1.0):
        total = total + (F.cross_entropy(narrow, labels) + soft_cross_entropy(narrow, widest, 1.0, 1.0)) / 2
    return total


@checked
def train_probe(
    features: Features,
    labels: Tensor,
    *,
    shared: bool = False,
    num_classes: int | None = None,
    epochs: int = 90,
    batch_size: int = 256,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> nn.Module:
    """Train one linear classifier per width on frozen features, all of them in the same steps: a `SwitchableProbe`.

    Uses SGD with momentum 0.9, no weight decay, and a cosine schedule. The features are scaled to zero mean and unit
    variance for training; the scales are then folded into the classifiers, which take the unscaled features.

    With `shared`, for comparison, it is one classifier for all widths, whose first columns serve the narrow ones. In
    linear regression it is optimal at every width only if the features of a narrow width are orthogonal to the others
    over the images (SlimCLR, Zhao et al. 2024, theory). They must be the first ones of the full width, which `slimify`
    ensures unless they are concatenated from several parts, as in DenseNet: then sort them first, as `evaluate_widths`
    does. The scales stay in a BatchNorm per width in front, so the result must stay in eval mode.

    Args:
        features: width -> features of shape (images, features of this width), including width 1.0.
        labels: class numbers, shape (images,), on the device of the features.
        shared: as above.
        num_classes: number of classes; by default one more than the largest label.
        epochs, batch_size, learning_rate, seed: of the training, with the first learning rate, and the images' order.

    Raises: DataError: if labels and features do not match, or for `shared` a narrow width has more features than the
        full one. WidthError: if the full width is missing.

    >>> wide = torch.cat([torch.eye(4)] * 8)
    >>> probe = train_probe({1.0: wide, 0.5: wide[:, :2]}, torch.arange(4).repeat(8), epochs=30)
    >>> probe(wide).argmax(1)[:4]
    tensor([0, 1, 2, 3])
    """
    widths = check_widths(features)
    for width in widths:
        classes = check_features(f"train_probe: features of width {width}", features[width], labels, num_classes)
    exact = {width: features[width].float() for width in widths}
    moments = {width: (x.mean(0), x.std(0, correction=0).clamp(min=1e-6)) for width, x in exact.items()}
    scaled = {width: (exact[width] - mean) / std for width, (mean, std) in moments.items()}
    kept = [part.shape[1] for part in scaled.values()]
    if shared and max(kept) > kept[0]:
        raise DataError(f"train_probe: {kept} features at widths {widths}; the full width must have most")
    generator = torch.Generator().manual_seed(seed)

    def batches(_: int) -> Iterator[tuple[Features, Tensor]]:
        order = torch.randperm(len(labels), generator=generator, device="cpu")
        for rows in torch.split(order.to(labels.device), batch_size):
            yield {width: part[rows] for width, part in scaled.items()}, labels[rows]

    linears = _minimised(scaled, classes, shared, batches, epochs, learning_rate, milestones=None, file=None)
    if shared:
        norm = SwitchableNorm(nn.BatchNorm1d(kept[0], eps=_NO_EPS, affine=False, device=labels.device), widths, kept)
        for at, (mean, std) in enumerate(moments.values()):
            norm.module_at(at).load_state_dict({"running_mean": mean, "running_var": std.square()}, strict=False)
        install_view(linears[1.0], widths, {"weight": [(None, count) for count in kept]}, {})
        return nn.Sequential(norm, linears[1.0]).eval()
    with torch.no_grad():
        for width, (mean, std) in moments.items():
            linears[width].weight.div_(std)
            linears[width].bias.sub_(linears[width].weight @ mean)
    probe = SwitchableProbe(kept[0], classes, widths, device=labels.device)
    probe.linears = nn.ModuleList(linears.values())
    return probe


def _scores(linears: Mapping[float, nn.Linear], features: Features) -> dict[float, Tensor]:
    """Return the scores of linear layers, the first columns of which serve a width with fewer features."""
    return {w: F.linear(part, linears[w].weight[:, : part.shape[1]], linears[w].bias) for w, part in features.items()}


def _minimised(
    first: Features, classes: int, shared: bool, batches: Any, epochs: int, rate: float, milestones: Any, file: Any
) -> dict[float, nn.Linear]:
    """Return width -> a classifier of features like the `first`, `shared` or its own, that minimises `probe_loss`."""
    new = partial(nn.utils.skip_init, nn.Linear, out_features=classes)  # draws no random numbers
    linears = {width: new(part.shape[1], device=part.device, dtype=part.dtype) for width, part in first.items()}
    linears = dict.fromkeys(first, linears[1.0]) if shared else linears
    parameters = dict(nn.ModuleList(linears.values()).named_parameters())
    for parameter in parameters.values():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(parameters.values(), lr=rate, momentum=0.9)
    shapes = [tuple(linear.weight.shape) for linear in linears.values()]
    start, falls = 0, milestones and [*milestones]
    path, weights = file or (None, "")
    how = f"linear_evaluation of {shapes} and weights {weights:.8}, {epochs=}, learning_rate={rate}, milestones={falls}"
    if path is not None and os.path.exists(path):
        said, tensors = read_tensors(path, how, how)
        start = int(said["epoch"])
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])
            optimizer.state[parameter]["momentum_buffer"] = tensors[f"{name}.momentum"].to(parameter, copy=True)
    for epoch in range(start, epochs):
        cosine = (1 + math.cos(math.pi * epoch / epochs)) / 2
        decay = 0.1 ** sum(epoch >= milestone for milestone in milestones) if milestones else cosine
        optimizer.param_groups[0]["lr"] = rate * decay
        for features, labels in batches(epoch):
            optimizer.zero_grad()
            probe_loss(_scores(linears, features), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if not all(parameter.isfinite().all() for parameter in parameters.values()):
            raise DivergedError(f"a linear classifier is not finite after epoch {epoch + 1}; lower learning_rate")
        if path is not None:
            momenta = {f"{name}.momentum": optimizer.state[p]["momentum_buffer"] for name, p in parameters.items()}
            write_tensors(path, parameters | momenta, {"format": how, "epoch": str(epoch + 1)})
    return linears


@checked
def linear_evaluation(
    backbone: nn.Module,
    train: Batches | Callable[[int], Batches],
    test: Batches | Callable[[int], Batches],
    *,
    num_classes: int,
    epochs: int = 90,
    learning_rate: float = 0.1,
    milestones: Sequence[int] | None = None,
    path: "str | os.PathLike[str] | None" = None,
) -> dict[float, Accuracies]:
    """Return width -> accuracies on `test` of linear classifiers trained on random crops, as papers report them.

    The frozen backbone runs in eval mode on every batch, at all widths. The classifiers, one per width, take features
    that are not scaled, start from zero, and minimise `probe_loss` by SGD with momentum 0.9 and no weight decay.

    Args:
        backbone, num_classes: as in `evaluate_widths` and `train_probe`.
        train, test: `DataLoader`s, or other batches (images, labels) that can be gone over again, or functions of the
            epoch, from 0, that return them; published are random crops, mirrored at random, and centre crops.
        learning_rate: published for batches of 256 are 0.1 (SimCLR, MoCo v3), and 15 in 100 epochs (MoCo v2).
        milestones: epochs from which on it falls to a tenth, 60 and 80 for MoCo v2; by default it follows a cosine.
        path: a file that holds what is reached after each epoch, and from which the same call goes on.

    Raises: DataError: if batches, labels or features do not fit. DivergedError: if a classifier is no longer finite.
        UsageError: if `train` or `test` cannot be gone over again. CheckpointError: if `path` is of another call.

    >>> backbone = nn.Sequential(slimmable.SlimLinear(4, 8, widths=(1.0, 0.5), slim_in=False))
    >>> batches = [(torch.rand(10, 4), torch.arange(10) % 3) for _ in range(4)]
    >>> linear_evaluation(backbone, batches, batches, num_classes=3, epochs=2)[0.5].linear_top5  # of three classes
    1.0
    """
    for name, given in (("train", train), ("test", test)):
        if isinstance(given, Iterator):
            raise UsageError(f"linear_evaluation: {name} is a {type(given).__name__}, which ends after one epoch")

    def batches(name: str, given: Any, epoch: int = 0) -> Iterator[tuple[Features, Tensor]]:
        loader = given(epoch) if callable(given) and not isinstance(given, type) else given
        return _batches(f"linear_evaluation: {name}", backbone, loader, num_classes)

    first, _ = next(batches("test", test))
    crops = partial(batches, "train", train)
    file = None if path is None else (Path(path), checksum(plain_tensors(backbone.state_dict()), {}))
    linears = _minimised(first, num_classes, False, crops, epochs, learning_rate, milestones, file)
    features, labels = _joined(batches("test", test))
    scores = _scores(linears, features).items()
    return {width: Accuracies(linear=_accuracy(x, labels), linear_top5=_accuracy(x, labels, 5)) for width, x in scores}


@torch.no_grad()
@checked
def ridge_classifier(
    features: Tensor, labels: Tensor, *, num_classes: int | None = None, penalty: float = 0.1
) -> nn.Linear:
    """Return the ridge classifier: least squared error to one-hot labels plus a penalty on the weights.

    It minimises `mean over images of |W x + b - onehot|^2 + penalty v |W|^2` in closed form, in float64 (Hoerl and
    Kennard, *Ridge Regression*, 1970). `v` is the mean variance of the features, and `b` is not penalised, so neither
    scaling all features nor shifting any of them changes a prediction, and one penalty suits any features. The scores
    estimate the class probabilities and sum to 1; a class without images gets 0 everywhere.

    Args:
        features, labels, num_classes: as in `train_probe`, of one width; the classifier is on the features' device, and
            float64 if they are, otherwise float32.
        penalty: at least 1e-9. The fewer the images, the larger it should be.

    Raises: DataError: if labels and features do not match or are not finite. UsageError: if `penalty` is too small.

    >>> corners = torch.eye(3).repeat(4, 1)
    >>> classifier = ridge_classifier(100 * corners + 7, torch.arange(3).repeat(4))
    >>> classifier(100 * corners + 7).argmax(1)[:3]
    tensor([0, 1, 2])
    """
    classes = check_features("ridge_classifier: features", features, labels, num_classes)
    x = in_float64(features)
    y = F.one_hot(labels.to(x.device).long(), classes).to(x)
    mean, frequencies, size = x.mean(0), y.mean(0), x.square().mean()
    x, y = x - mean, y - frequencies
    ridge = penalty * len(x) * torch.maximum(x.square().mean(), _NOISE * size).clamp(min=torch.finfo(x.dtype).tiny)
    dual = len(x) < x.shape[1]  # then the matrix of the images' products is the smaller one
    gram = x @ x.T if dual else x.T @ x
    gram.diagonal().add_(ridge)
    solved = torch.cholesky_solve(y if dual else x.T @ y, torch.linalg.cholesky(gram))
    weight = x.T @ solved if dual else solved
    exact = features.dtype if features.dtype == torch.float64 else torch.float32
    classifier = nn.Linear(x.shape[1], classes, device=features.device, dtype=exact)
    classifier.load_state_dict({"weight": weight.T, "bias": frequencies - mean @ weight})
    return classifier
