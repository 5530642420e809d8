"""Extract a static network from a gated one: the channels that its gates open most often."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slimmable._checks import check_count, check_module, number_or_nan
from slimmable._convert import apply_plan, copy_of, extract, strip
from slimmable._width import at_width
from slimmable._widths import kept_units
from slimmable.analysis.importance import permute
from slimmable.errors import UsageError, WidthError
from slimmable.gating._calibrate import gate_activity
from slimmable.gating._convert import ungate
from slimmable.gating._losses import check_budget
from slimmable.gating._pass_norm import PassNorm
from slimmable.gating._plan import PLAN, GatePlan
from slimmable.training.calibrate import ModelInput, calibrate_bn

M = TypeVar("M", bound=nn.Module)
Activity: TypeAlias = "Mapping[int, NDArray[np.float64]]"
"""Group -> the fraction of images for which each of its units is open."""


def extract_gated(
    model: M,
    loader: Iterable[ModelInput],
    keep: float | None = None,
    *,
    budget: float | None = None,
    round_to: int = 1,
    recalibrate: bool = True,
) -> M:
    """Return a plain network, without gates, of the channels that the gates of a trained model open most often.

    It has the norms of the gated pass at full width, and computes the same as that pass where the masks are the same
    for all images. Each gate keeps at least one unit. Groups whose units have a fixed order are kept whole.

    Args:
        model: a gated model; it is not changed.
        loader: calibration images, batches as for `calibrate_bn`; it is iterated over twice.
        keep: keep the units that are open for at least this fraction of the images, in (0, 1].
        budget: instead of `keep`: keep as many units as this share of the dense multiply-adds allows, in (0, 1).
        round_to: round the number of kept channels of each gate to about a multiple of this, if it has that many; 8 or
            16 suit most hardware. An attention head of 64 channels counts as 64.
        recalibrate: recompute the BatchNorm statistics of the small network on the loader.

    Raises:
        UsageError: unless exactly one of `keep` and `budget` is given, in its range and at least the cost of the
            smallest network; if the model has no gates, or `loader` can be iterated over only once.
        DataError: as `gate_activity`.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> small = extract_gated(model, [torch.randn(16, 4)], budget=0.5)
    >>> type(small[2]), small[2].out_features
    (<class 'torch.nn.modules.linear.Linear'>, 14)
    """
    check_module("extract_gated", model)
    check_count("extract_gated", round_to=round_to)
    if (keep is None) == (budget is None):
        raise UsageError(
            "extract_gated: give either keep, a fraction of the images, or budget, a share of multiply-adds"
        )
    if keep is not None and not 0 < number_or_nan(keep) <= 1:
        raise UsageError(f"extract_gated: keep is a fraction of the images and must be in (0, 1], got {keep!r}")
    if budget is not None:
        check_budget("extract_gated", budget)
    if recalibrate and isinstance(loader, Iterator):
        raise UsageError(
            "extract_gated: the loader is iterated over twice; give a list or a DataLoader, not an iterator"
        )
    found: GatePlan | None = model.__dict__.get(PLAN)
    if found is None:
        raise UsageError(f"extract_gated: this {type(model).__name__} is not a model that gate returned; give that one")
    with at_width(model, 1.0):
        opened = gate_activity(model, loader)
        twin = _of_the_gated_pass(copy_of(model))
    channels = found.plan.channels
    activity = {gate.group: opened[gate.name].cpu().numpy() for gate in found.gates if not channels.ordered[gate.group]}
    steps = _steps(found, round_to)
    kept = _active_for(activity, keep, steps) if keep is not None else _within(found, activity, budget or 0.0, steps)
    orders = {group: np.argsort(-own, kind="stable") for group, own in activity.items()}
    permute(twin, found.plan, [orders.get(group, np.arange(units)) for group, units in enumerate(channels.units)])
    slim = apply_plan(twin, found.plan)
    counts = tuple(kept.get(group, units) for group, units in enumerate(channels.units))
    try:
        found.plan.sub_network(counts)
    except WidthError:  # the counts of some groups are incompatible
        counts = found.plan.near(counts).counts
    if recalibrate:
        calibrate_bn(slim, loader, [counts])
    return cast(M, extract(slim, counts))


def _steps(found: GatePlan, round_to: int) -> dict[int, int]:
    """Return group -> the smallest number of units whose channels are a multiple of `round_to`."""
    channels = {
        gate.group: min((reader.units >= 0).sum() for reader in gate.readers) // gate.units for gate in found.gates
    }
    return {group: round_to // math.gcd(round_to, int(each)) for group, each in channels.items()}


def _active_for(activity: Activity, keep: float, steps: Mapping[int, int]) -> dict[int, int]:
    """Return group -> how many units are open for at least the fraction `keep` of the images, rounded."""
    return {group: kept_units(len(own), float(np.mean(own >= keep)), steps[group]) for group, own in activity.items()}


def _within(found: GatePlan, activity: Activity, budget: float, steps: Mapping[int, int]) -> dict[int, int]:
    """Return group -> how many units to keep: the most often open ones, as many as the budget allows."""
    full = found.plan.channels.units
    group_of = np.concatenate([np.full(len(own), group) for group, own in activity.items()])
    order = np.argsort(-np.concatenate(list(activity.values())), kind="stable")
    dense = float(found.macs.total({}, full))

    def counts(units: int) -> dict[int, int]:
        first = np.bincount(group_of[order[:units]], minlength=len(full))
        return {
            group: kept_units(len(own), float(first[group] / len(own)), steps[group]) for group, own in activity.items()
        }

    def macs(units: int) -> float:
        masks = {group: (torch.arange(full[group]) < count).double()[None] for group, count in counts(units).items()}
        return float(found.macs.total(masks, full))

    low, high = 0, len(order)
    if macs(low) > budget * dense:
        raise UsageError(
            f"extract_gated: the budget is {budget}, but the smallest network costs {macs(low) / dense:.3f}; "
            "give a larger budget or a smaller round_to"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if macs(middle) <= budget * dense else (low, middle - 1)
    return counts(low)


def _of_the_gated_pass(model: nn.Module) -> nn.Module:
    """Turn a gated model, in place, into a plain one with the norms of the gated pass."""
    for norm in [module for module in model.modules() if isinstance(module, PassNorm)]:
        norm.full = norm.of_gated_pass(0)
    strip(ungate(model))
    return model
