"""Evaluation of the networks of a run: features in one pass over the images, then probes on the features."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from slimmable._atomic import write_aside
from slimmable._modules import in_eval_mode
from slimmable._profile import parameter_count, profile
from slimmable._width import at_width
from slimmable.cli import report
from slimmable.cli.commands import Evaluate
from slimmable.cli.config import LINEAR, PretrainConfig, configure, say
from slimmable.cli.data import Images, Plain, Views, batches_of, load, make_views, normalisation, seed_of
from slimmable.cli.report import DENSE, GATED, PART, STATIC, Row, named_at
from slimmable.errors import UsageError
from slimmable.evaluation import evaluate_features, knn_accuracy, label_fraction, linear_evaluation, narrowest_first
from slimmable.gating import GatedPass, extract_gated, gated
from slimmable.methods import Method

_BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the static networks, as in Krishna et al. 2023
_CALIBRATION = 1024  # training images that set the gates
_FIRST_RUN = Path(__file__).with_name("first_run")  # `python -m benchmarks.first_run` measures it
_SHOWN = 8  # held-out images in the picture of neighbours, and neighbours of each
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


def gate_images(config: PretrainConfig, images: Images) -> list[Tensor]:
    """Return the training images that set the gates of a run, in batches."""
    return list(batches_of(Plain(images.train, config.image_size, normalisation(config), _CALIBRATION)))


def report_run(config: PretrainConfig, rows: Sequence[Row], images: Images, options: Evaluate) -> str:
    """Write the report of a run into its folder, and return the table as Markdown."""
    title = f"{config.model}, {config.epochs} epochs of {config.method}"
    train, test = (Plain(part, min(config.image_size, 32), most=VOTERS) for part in (images.train, images.test))
    known, asked = (torch.cat(list(load(part, options.count_workers(), batch_size=256))) for part in (train, test))
    pixels = knn_accuracy(known, images.train_labels[train.places], asked, images.test_labels[test.places])
    others = report.read_rows(_FIRST_RUN) if replace(config, seed=0, mean=None, std=None) == configure({}) else []
    return report.write_report(options.run, rows, pixels, len(images.test_labels), title, *others)


def draw_neighbours(config: PretrainConfig, backbone: nn.Module, images: Images, options: Evaluate) -> None:
    """Draw held-out images, each in front of the training images that are nearest to it at the narrowest width."""
    size, normalise = config.image_size, normalisation(config)
    sets = Plain(images.test, size, normalise, _SHOWN), Plain(images.train, size, normalise, VOTERS)
    passes = {"": partial(at_width, backbone, config.widths[-1])}
    asked, known = (F.normalize(features_in(passes, backbone, part, options.count_workers())[0][""]) for part in sets)
    near = (asked @ known.T).topk(min(_SHOWN, len(known))).indices.tolist()
    drawn = [each for at, row in enumerate(near) for each in (sets[0][at], *map(sets[1].__getitem__, row))]
    grid, zoom = make_grid(drawn, 1 + len(near[0]), pad_value=255), -(-72 // size)
    picture = to_pil_image(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))
    write_aside(options.run / "neighbours.png", picture.save)


def rows_of_run(config: PretrainConfig, method: Method, images: Images, options: Evaluate) -> list[Row]:
    """Evaluate every network of a run; a share "knn@0.1" is learnt from 0.1 of the labels."""
    backbone, prober = method.backbone, Prober(config, images, options)
    passes = passes_of(config, backbone, config.widths)
    shares, share_of = prober.measure(backbone, passes)
    if config.method == "supervised":
        whole = passes_of(config, method.encoder, config.widths)
        scores, _ = features_in(whole, method.encoder, prober.test, prober.workers)
        for width, rated in scores.items():
            shares[width]["classifier"] = float((rated.argmax(1) == images.test_labels).float().mean())
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
    networks, some = {}, gate_images(config, images)
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
        settings: Any = {"epochs": epochs, "learning_rate": (options.probe_lr or how["lr"]) * batch_size / 256}
        settings["milestones"] = [round(share * epochs) for share in how["steps"]] or None
        settings |= {"num_classes": len(images.classes), "path": options.run / f"{name}.safetensors"}
        found = linear_evaluation(backbone, crops, middles, **settings)
        return {width: {name: own.linear, five: own.linear_top5} for width, own in found.items()}
