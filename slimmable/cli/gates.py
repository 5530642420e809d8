"""Runs with a gate budget: whether it can be had, gates set to it in the end, and what its networks are worth."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from slimmable._convert import extract
from slimmable._profile import parameter_count, profile
from slimmable.cli.config import PretrainConfig
from slimmable.cli.evaluation import features_in, finetuned_accuracies
from slimmable.cli.images import Images
from slimmable.cli.loader import Plain, batches_of, some_of
from slimmable.cli.report import DENSE, GATED, STATIC, UNTRAINED, Row
from slimmable.errors import UsageError
from slimmable.evaluation.evaluate import ProbeName, evaluate_features
from slimmable.gating import calibrate_gates, extract_gated, gate_plan, gated

_BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the static networks; those of Krishna et al. 2023
_CALIBRATION = 1024  # training images


def check_budget(config: PretrainConfig, backbone: nn.Module) -> None:
    """Refuse a budget below what the gates and the rest of the network cost with all gates closed.

    Raises: UsageError.
    """
    least = gate_plan(backbone).least_share()
    if config.gate_budget is not None and config.gate_budget < least:
        raise UsageError(
            f"--gate-budget {config.gate_budget:g}: {config.model} with all gates closed costs {least:.3f} of its "
            "multiply-adds; give more"
        )


def calibrate(config: PretrainConfig, backbone: nn.Module, images: Images) -> float:
    """Set the gates to the budget of the run, in place, on some of the training images; return what they cost then."""
    assert config.gate_budget is not None
    with _also_untrained():
        return calibrate_gates(backbone, _some(config, images), config.gate_budget)


@contextmanager
def _also_untrained() -> Iterator[None]:
    """Let untrained gates, which a report compares with trained ones, pass without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the gates of this .* were never trained")
        yield


def _some(config: PretrainConfig, images: Images) -> list[Tensor]:
    return list(batches_of(some_of(Plain(images.train, config.image_size), _CALIBRATION)))


def features_of_passes(
    backbone: nn.Module, images: Plain | Subset[Tensor], workers: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the features of the dense and of the gated pass, and what the latter costs.

    Returns: pass -> features in eval mode, of shape (images, features), float32; and for each image the multiply-adds
        of the gated pass, the gates' own included, over those of the dense one, of shape (images,).
    """
    shares: list[Tensor] = []

    @contextmanager
    def counted() -> Iterator[None]:
        with gated(backbone) as run:
            yield
        shares.append(run.share().cpu())

    with _also_untrained():
        found = features_in({DENSE: nullcontext, GATED: counted}, backbone, images, workers)
    return found, torch.cat(shares)


def evaluate_networks(
    config: PretrainConfig,
    backbone: nn.Module,
    untrained: nn.Module,
    images: Images,
    probes: Sequence[ProbeName],
    finetune_epochs: int = 0,
    workers: int = 0,
) -> list[Row]:
    """Evaluate both passes of a gated backbone and the static networks that are extracted from it.

    Args:
        config: of the run; its budget names the gated pass.
        backbone: with calibrated gates.
        untrained: the same one before training; its gates are set to the budget here, in place.
        images, probes, workers: as in `evaluate_run`.
        finetune_epochs: of the dense and the static networks.
    """
    train, test = Plain(images.train, config.image_size), Plain(images.test, config.image_size)
    networks = {DENSE: extract(backbone, 1.0), **_static_networks(config, backbone, images)}
    known, _ = features_of_passes(backbone, train, workers)
    asked, costs = features_of_passes(backbone, test, workers)
    for name in list(networks)[1:]:
        known |= features_in({name: nullcontext}, networks[name], train, workers)
        asked |= features_in({name: nullcontext}, networks[name], test, workers)
    shares = {name: _accuracies(known[name], asked[name], images, probes) for name in known}
    if finetune_epochs:
        for name, share in finetuned_accuracies(config, networks, images, finetune_epochs).items():
            shares[name]["finetuned"] = share
    calibrate(config, untrained, images)
    known, _ = features_of_passes(untrained, train, workers)
    asked, _ = features_of_passes(untrained, test, workers)
    for name in known:
        found = _accuracies(known[name], asked[name], images, probes)
        shares[name] |= {UNTRAINED + probe: share for probe, share in found.items()}
    size = (images.channels, config.image_size, config.image_size)
    plain = {name: profile(network, size, repeats=0).rows[0] for name, network in networks.items()}
    rows = {name: Row(1.0, row.parameters, row.macs, shares[name], name) for name, row in plain.items()}
    with gated(backbone):
        parameters = parameter_count(backbone)
    macs = round(float(costs.mean()) * rows[DENSE].macs)
    own = Row(1.0, parameters, macs, shares[GATED], f"{GATED} {config.gate_budget:g}")
    return [rows.pop(DENSE), own, *rows.values()]


def _static_networks(config: PretrainConfig, backbone: nn.Module, images: Images) -> dict[str, nn.Module]:
    """Return the networks of the channels that are open most, by name, within each budget that can be had."""
    some = _some(config, images)
    networks = {}
    for budget in sorted({*_BUDGETS, config.gate_budget or _BUDGETS[0]}, reverse=True):
        try:
            networks[f"{STATIC} {budget:g}"] = extract_gated(backbone, some, budget=budget)
        except UsageError:  # one unit for each gate costs more
            break
    return networks


def _accuracies(train: Tensor, test: Tensor, images: Images, probes: Sequence[ProbeName]) -> dict[str, float]:
    """Return probe -> accuracy of the features of one network."""
    labels = images.train_labels, images.test_labels
    found = evaluate_features({1.0: train}, labels[0], {1.0: test}, labels[1], probes=probes)[1.0]
    return {probe: getattr(found, probe) for probe in probes}
