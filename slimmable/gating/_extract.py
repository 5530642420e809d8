"""A static network from a gated one: the channels that its gates open most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slimmable._convert import apply_plan, copy_of, extract, strip
from slimmable._inputs import check_module
from slimmable._width import at_width
from slimmable._widths import kept_units
from slimmable.analysis.importance import permute
from slimmable.errors import UsageError, WidthError
from slimmable.gating._activity import gate_activity
from slimmable.gating._find import GatePlan
from slimmable.gating._parts import PLAN, PassNorm, remove_gates
from slimmable.losses._checks import as_number
from slimmable.training.calibrate import Batch, calibrate_bn

Shares: TypeAlias = "Mapping[int, NDArray[np.float64]]"


def extract_gated(
    model: nn.Module,
    loader: Iterable[Batch],
    keep: float | None = None,
    *,
    budget: float | None = None,
    round_to: int = 1,
    recalibrate: bool = True,
) -> nn.Module:
    """Return a plain network of the channels that the gates of a trained model open most; it has no gates.

    It computes what a gated pass does whose masks are the same for all images, with the norms of that pass, at the
    full width. Each gate keeps one unit at least. Units of a group whose order matters all stay.

    Args:
        model: gated; it stays as it is.
        loader: calibration images, batches as `calibrate_bn` takes them; it is gone through twice.
        keep: keep the units that are open for at least this share of the images, in (0, 1].
        budget: instead of `keep`, keep as many units as cost at most this share of the dense multiply-adds, in (0, 1).
        round_to: each gate keeps about as many units as have a multiple of it in channels, where it has that many; 8 or
            16 suit processors. A head of 64 channels counts as 64.
        recalibrate: recompute the BatchNorm statistics of the small network on the loader.

    Raises:
        UsageError: if not one of `keep` and `budget` is given, it is outside its range or the smallest network costs
            more, or if the model has no gates.
        DataError: as `gate_activity`.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> small = extract_gated(model, [torch.randn(16, 4)], budget=0.5)
    >>> type(small[2]), small[2].out_features
    (<class 'torch.nn.modules.linear.Linear'>, 14)
    """
    check_module("extract_gated", model)
    _check(keep, budget, round_to)
    if recalibrate and isinstance(loader, Iterator):
        raise UsageError(
            "extract_gated: the loader is gone through twice; give a list or a DataLoader, not an iterator"
        )
    if PLAN not in model.__dict__:
        raise UsageError(f"extract_gated: give the model that gate returned; this {type(model).__name__} is not it")
    with at_width(model, 1.0):
        activity = gate_activity(model, loader)
        found: GatePlan = model.__dict__[PLAN]
        shares = {gate.group: activity[gate.name].cpu().numpy() for gate in found.gates}
        shares = {group: share for group, share in shares.items() if not found.plan.channels.ordered[group]}
        steps = _steps(found, round_to)
        kept = _over(shares, keep, steps) if keep is not None else _within(found, shares, budget or 0.0, steps)
        twin = _of_the_gated_pass(copy_of(model))
    groups = found.plan.groups
    orders = {group: np.argsort(-share, kind="stable") for group, share in shares.items()}
    permute(twin, found.plan, [orders.get(number, np.arange(group.units)) for number, group in enumerate(groups)])
    slim = apply_plan(twin, found.plan)
    counts = tuple(kept.get(number, group.units) for number, group in enumerate(groups))
    try:
        found.plan.sub_network(counts)
    except WidthError:  # some of them do not go together
        counts = found.plan.near(counts).counts
    if recalibrate:
        calibrate_bn(slim, loader, [counts])
    return extract(slim, counts)


def _check(keep: float | None, budget: float | None, round_to: int) -> None:
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise UsageError(f"extract_gated: round_to must be an integer of at least 1, got {round_to!r}")
    if (keep is None) == (budget is None):
        raise UsageError("extract_gated: give either keep, a share of images, or budget, a share of multiply-adds")
    if keep is not None and not 0 < as_number(keep) <= 1:
        raise UsageError(f"extract_gated: keep is a share of the images and must be in (0, 1], got {keep!r}")
    if budget is not None and not 0 < as_number(budget) < 1:
        raise UsageError(f"extract_gated: budget is a share of multiply-adds and must be in (0, 1), got {budget!r}")


def _steps(found: GatePlan, round_to: int) -> dict[int, int]:
    """Return group -> the fewest units that have a multiple of `round_to` channels."""
    channels = {
        gate.group: min((reader.units >= 0).sum() for reader in gate.readers) // gate.units for gate in found.gates
    }
    return {group: round_to // math.gcd(round_to, int(each)) for group, each in channels.items()}


def _over(shares: Shares, keep: float, steps: Mapping[int, int]) -> dict[int, int]:
    return {
        group: kept_units(len(share), float(np.mean(share >= keep)), steps[group]) for group, share in shares.items()
    }


def _within(found: GatePlan, shares: Shares, budget: float, steps: Mapping[int, int]) -> dict[int, int]:
    """Return the counts of as many units, the most open first, as fit the budget."""
    every = np.concatenate([np.full(len(share), group) for group, share in shares.items()])
    order = np.argsort(-np.concatenate(list(shares.values())), kind="stable")

    def counts(units: int) -> dict[int, int]:
        first = np.bincount(every[order[:units]], minlength=len(found.plan.channels.units))
        return {
            group: kept_units(len(share), float(first[group] / len(share)), steps[group])
            for group, share in shares.items()
        }

    def cost(units: int) -> float:
        full = found.plan.channels.units
        masks = {
            group: torch.cat([torch.ones(1, count), torch.zeros(1, full[group] - count)], 1).double()
            for group, count in counts(units).items()
        }
        return float(sum(found.costs.layers(masks, full).values()))

    dense = float(sum(found.costs.layers({}, found.plan.channels.units).values()))
    low, high = 0, len(order)
    if cost(low) > budget * dense:
        raise UsageError(
            f"extract_gated: the budget is {budget}, but the fewest units for each gate cost "
            f"{cost(low) / dense:.3f}; give more, or a smaller round_to"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget * dense else (low, middle - 1)
    return counts(low)


def _of_the_gated_pass(model: nn.Module) -> nn.Module:
    """Return, of a gated model, in place, the plain one with the norms of the gated pass."""
    for norm in [module for module in model.modules() if isinstance(module, PassNorm)]:
        norm.full = norm.of_gated_pass(0)
    remove_gates(model)
    strip(model)
    return model
