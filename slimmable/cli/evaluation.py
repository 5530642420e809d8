"""Evaluation of the networks of a run: features in one pass over the images, then probes on the features."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils.misc import natural_key
from torch import Tensor, nn
from torchvision.transforms import v2

from slimmable._atomic import write_aside
from slimmable._modules import in_eval_mode
from slimmable._profile import parameter_count, profile
from slimmable._width import at_width
from slimmable.cli import data, report
from slimmable.cli.commands import Evaluate
from slimmable.cli.config import LINEAR, PretrainConfig, printable, say
from slimmable.cli.data import Images, Plain, Views, batches_of, load, make_views, normalisation, seed_of
from slimmable.cli.export import Source
from slimmable.cli.report import DENSE, GATED, PART, STATIC, UNTRAINED, Row, named_at
from slimmable.cli.run import new_method, output_for
from slimmable.errors import DataError, UsageError, explained
from slimmable.evaluation import evaluate_features, knn_accuracy, label_fraction, linear_evaluation, narrowest_first
from slimmable.gating import GatedPass, calibrate_gates, extract_gated, gated
from slimmable.methods import Method

_BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the static networks, as in Krishna et al. 2023
_CALIBRATION = 1024  # training images that set the gates
VOTERS = 50_000  # training images that vote in kNN during training, or by their pixels, of as many held-out ones

Passes = Mapping[Any, Callable[[], AbstractContextManager[Any]]]  # what to run a backbone in, by width or by name


def passes_of(config: PretrainConfig, backbone: nn.Module, widths: Sequence[float]) -> Passes:
    """Return what a run evaluates of its backbone: these widths, or the dense and the gated pass at each."""

    @contextmanager
    def entered(kind: str, width: float) -> Iterator[GatedPass | None]:
        with at_width(backbone, width), gated(backbone) if kind == GATED else nullcontext() as run:
            yield run

    if config.gate_budget is None:
        return {width: partial(entered, DENSE, width) for width in widths}
    return {named_at(kind, width): partial(entered, kind, width) for width in widths for kind in (DENSE, GATED)}


@torch.no_grad()
def features_in(
    passes: Passes, backbone: nn.Module, images: Plain, workers: int = 0
) -> tuple[dict[Any, Tensor], dict[Any, float]]:
    """Return the features in each of `passes`, float32 on the CPU, and the gated ones' mean shares of multiply-adds."""
    device = next(backbone.parameters()).device
    parts: dict[Any, list[Tensor]] = {name: [] for name in passes}
    shares: dict[Any, list[Tensor]] = {}
    with in_eval_mode(backbone):
        for batch in batches_of(images, workers=workers):
            scaled = batch.to(device)
            for name, enter in passes.items():
                with enter() as run:
                    parts[name].append(backbone(scaled).float().cpu())
                if isinstance(run, GatedPass):
                    shares.setdefault(name, []).append(run.share().cpu())
    features = {name: torch.cat(found) for name, found in parts.items()}
    return features, {name: float(torch.cat(found).mean()) for name, found in shares.items()}


def calibration_images(config: PretrainConfig, images: Images) -> list[Tensor]:
    """Return the training images that set the gates of a run, in batches."""
    return list(batches_of(Plain(images.train, config.image_size, normalisation(config), _CALIBRATION)))


def set_gates(config: PretrainConfig, backbone: nn.Module, images: Images) -> dict[float, float]:
    """Set the gates of each width to the budget of the run; return width -> the share that they reach."""
    some, budget, reached = calibration_images(config, images), config.gate_budget or 0.0, {}
    for width in config.widths:
        with at_width(backbone, width):
            reached[width] = calibrate_gates(backbone, some, budget)
    return reached


def report_run(config: PretrainConfig, rows: Sequence[Row], images: Images, options: Evaluate) -> str:
    """Write the report of a run into its folder, and return the table as Markdown."""
    gates = "" if config.gate_budget is None else f", gated to {config.gate_budget:g}"
    title = f"{config.model}, {config.epochs} epochs of {config.method}{gates}"
    size = min(config.image_size, 32)
    train, test = (Plain(part, size, most=VOTERS) for part in (images.train, images.test))
    known, asked = (torch.cat(list(load(part, options.count_workers(), batch_size=256))) for part in (train, test))
    pixels = knn_accuracy(known, images.train_labels[train.places], asked, images.test_labels[test.places])
    return report.write_report(options.run, rows, pixels, title)


def rows_of_run(config: PretrainConfig, method: Method, images: Images, options: Evaluate) -> list[Row]:
    """Evaluate every network of a run, trained and untrained; a share "knn@0.1" is learnt from 0.1 of the labels."""
    backbone = method.backbone
    untrained = new_method(config, images.channels, len(images.classes)).backbone
    untrained.to(next(backbone.parameters()).device)
    prober = Prober(config, images, options)
    passes = passes_of(config, backbone, config.widths)
    shares, share_of = prober.measure(backbone, passes)
    if config.method == "supervised":
        whole = passes_of(config, method.encoder, config.widths)
        scores, _ = features_in(whole, method.encoder, prober.test, prober.workers)
        for width, rated in scores.items():
            shares[width]["classifier"] = float((rated.argmax(1) == images.test_labels).float().mean())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the gates of this .* were never trained")
        if config.gate_budget is not None:
            set_gates(config, untrained, images)
        for name, found in prober.measure(untrained, passes_of(config, untrained, config.widths))[0].items():
            shares[name] |= {UNTRAINED + probe: share for probe, share in found.items()}
    for suffix in prober.parts if "published" in options.probes else ():
        for width, more in prober.on_crops(backbone, suffix).items():
            shares[width] |= more
    costs = profile(backbone, prober.size, repeats=0).rows
    if config.gate_budget is None:
        return [Row(own.width, own.parameters, own.macs, shares[own.width]) for own in costs]
    rows = []
    for own, kind in product(costs, (DENSE, GATED)):
        name = named_at(kind, own.width)
        with passes[name]():
            parameters = parameter_count(backbone)
        shown = name.replace(GATED, f"{GATED} {config.gate_budget:g}")
        rows.append(Row(own.width, parameters, round(share_of.get(name, 1) * own.macs), shares[name], shown))
    for name, network in static_networks(config, backbone, images).items():
        (own,) = profile(network, prober.size, repeats=0).rows
        rows.append(Row(1.0, own.parameters, own.macs, prober.measure(network, {1.0: nullcontext})[0][1.0], name))
    return rows


def static_networks(config: PretrainConfig, backbone: nn.Module, images: Images) -> dict[str, nn.Module]:
    """Return the static networks of a gated run by name: of the published budgets and its own."""
    networks, some = {}, calibration_images(config, images)
    with suppress(UsageError):  # even one unit per gate costs more
        for budget in sorted({*_BUDGETS, config.gate_budget or 0.0}, reverse=True):
            networks[f"{STATIC} {budget:g}"] = extract_gated(backbone, some, budget=budget)
    return networks


class Prober:
    """Accuracy of every probe for networks on the images of a run, of which up to `most` are trained on."""

    def __init__(self, config: PretrainConfig, images: Images, options: Evaluate, most: int | None = None) -> None:
        self.config, self.images, self.options, self.workers = config, images, options, options.count_workers()
        size, normalise = config.image_size, normalisation(config)
        self.size, self.test = (images.channels, size, size), Plain(images.test, size, normalise)
        self.train = Plain(images.train, size, normalise, most)
        self.train_labels, self.test_labels = images.train_labels[self.train.places], images.test_labels
        self.parts: dict[str, Any] = {"": slice(None)}  # end of the name of a share -> the images trained on
        self.parts |= {f"{PART}{each:g}": label_fraction(self.train_labels, each) for each in options.label_fraction}

    def measure(self, network: nn.Module, passes: Passes) -> tuple[dict[Any, dict[str, float]], dict[Any, float]]:
        """Return pass -> probe -> accuracy, the widths of a network probed together, and costs as `features_in`."""
        known, _ = features_in(passes, network, self.train, self.workers)
        asked, costs = features_in(passes, network, self.test, self.workers)
        if 1.0 in passes:
            return self._accuracies(narrowest_first(network, known), narrowest_first(network, asked)), costs
        return {name: self._accuracies({1.0: known[name]}, {1.0: asked[name]})[1.0] for name in passes}, costs

    def _accuracies(self, known: Mapping[float, Tensor], asked: Mapping[float, Tensor]) -> dict[Any, dict[str, float]]:
        accuracies: dict[Any, dict[str, float]] = {width: {} for width in known}
        given, probes = self.options, [probe for probe in self.options.probes if probe != "published"]
        how: Any = {"probes": probes, "k": given.k, "metric": given.knn_metric, "temperature": given.knn_temperature}
        for suffix, part in self.parts.items() if probes else ():
            sets = {width: x[part] for width, x in known.items()}, self.train_labels[part], asked, self.test_labels
            for width, found in evaluate_features(*sets, **how).items():
                accuracies[width] |= {probe + suffix: getattr(found, probe) for probe in probes}
        return accuracies

    def on_crops(self, backbone: nn.Module, suffix: str) -> dict[float, dict[str, float]]:
        """Return width -> accuracies of a linear evaluation on the part of this suffix, kept in the run folder."""
        config, images, options, normalise = self.config, self.images, self.options, self.test.normalise
        how, size = LINEAR["default"] | LINEAR.get(config.method, {}), config.image_size
        epochs, batch_size = options.probe_epochs or how["epochs"], options.probe_batch_size
        rate = (options.probe_lr or how["lr"]) * batch_size / 256
        steps = [round(share * epochs) for share in how["steps"]] or None
        kept = torch.arange(len(self.train_labels))[self.parts[suffix]]
        scale, mirror = config.min_crop_scale if images.handwriting else 0.08, not images.handwriting
        crop = make_views("crops", size, min_crop_scale=scale, mirror=mirror)
        views = Views(images.train, images.train_labels, crop, config.seed)
        centres = Plain(images.test, size, normalise, resized=round(size * 256 / 224))

        def crops(epoch: int) -> Iterator[Sequence[Tensor]]:
            say(f"linear evaluation on random crops: epoch {epoch + 1}/{epochs}")
            order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed_of(config.seed, epoch)))
            keys = [(epoch, number) for number in kept[order].tolist()]
            batches = load(views, self.workers, sampler=keys, batch_size=batch_size)
            return ((normalise(x), labels) for x, labels in batches)

        def middles(epoch: int) -> Iterator[Sequence[Tensor]]:
            return zip(batches_of(centres, 256, self.workers), torch.split(self.test_labels, 256), strict=True)

        name, five = f"published{suffix}", f"published_top5{suffix}"
        settings: Any = {"epochs": epochs, "learning_rate": rate, "milestones": steps}
        settings |= {"num_classes": len(images.classes), "path": options.run / f"{name}.safetensors"}
        found = linear_evaluation(backbone, crops, middles, **settings)
        return {width: {name: own.linear, five: own.linear_top5} for width, own in found.items()}


def embed(source: Source, folder: Path, widths: Sequence[float], path: Path, device: torch.device, workers: int) -> int:
    """Write the features of the images in `folder` as an npz file, whole or not at all; return how many images.

    The arrays are `w0.5` and so on, what the network gives out, or its classifier reads: float32 (images, features);
    `names`, the paths in the folder; and of images in folders `classes`, and `labels`, -1 for those in none.
    """
    channels, height, side = source.image
    if channels not in (1, 3) or height != side or len(source.mean) not in (1, channels):
        taken = f"{channels} x {height} x {side} numbers, with means {source.mean}"
        raise UsageError(f"{source.name} takes {taken}; embed makes grey or RGB squares, so give the folder of a run")
    model: Any = source.model
    if getattr(model, "num_classes", 0):
        model.reset_classifier(0)
    features = output_for(torch.zeros(2, *source.image), model, source.name)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UsageError(f"{source.name} does not output one feature vector per image; choose another model")
    with explained(f"{printable(folder)} cannot be listed"):
        pictures = data.pictures_in(folder, folder, channels)
    if not pictures.names:
        raise DataError(f"{printable(folder)} holds no images ({', '.join(sorted(data.SUFFIXES))})")
    arrays: dict[str, Any] = {"names": np.array([Path(name).relative_to(folder).as_posix() for name in pictures.names])}
    if classes := sorted({*pictures.labels} - {""}, key=natural_key):
        numbers = {"": -1} | {name: number for number, name in enumerate(classes)}
        arrays |= {"classes": np.array(classes), "labels": np.array([numbers[label] for label in pictures.labels])}
    images = Plain(pictures, side, v2.Normalize(source.mean, source.std))
    passes = {f"w{width}": partial(at_width, model.to(device), width) for width in widths}
    write_aside(path, lambda aside: np.savez(aside, **arrays | features_in(passes, model, images, workers)[0]))
    return len(pictures)
