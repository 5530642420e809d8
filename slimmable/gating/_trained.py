"""Use trained gates: measure how often they open, set their threshold to meet a budget, extract a static network."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from slimmable._checks import checked, number_or_nan
from slimmable._convert import apply_plan, copy_of, extract, strip
from slimmable._modules import in_eval_mode
from slimmable._width import at_width
from slimmable._widths import kept_units
from slimmable.analysis.importance import permute
from slimmable.errors import DataError, UsageError
from slimmable.gating._convert import ungate
from slimmable.gating._gates import ChannelGate
from slimmable.gating._passes import GatedPass, PassNorm, gated, gates_of
from slimmable.gating._plan import PLAN, GatePlan
from slimmable.training.calibrate import ModelInput, arguments_of, calibrate_bn

M = TypeVar("M", bound=nn.Module)
Taken = TypeVar("Taken")


@checked
@torch.no_grad()
def gate_activity(model: nn.Module, loader: Iterable[ModelInput]) -> dict[str, Tensor]:
    """Return gate name -> the fraction of images for which it opens each unit, shape (units,), float64.

    The gates decide in eval mode, without noise; modes are restored afterwards. `loader` is as for `calibrate_bn`.

    Raises: UsageError: if the model has no gates, or the loader is not an iterable of batches. DataError: if the loader
        is empty or holds anything other than batches.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> _ = nn.init.ones_(model[2].channel_gate.at[0].expand.weight)
    >>> gate_activity(model, [torch.ones(3, 4)])["2"].unique().numel()
    1
    """

    def opened_by(run: GatedPass) -> tuple[dict[str, Tensor], int]:
        masks = run.masks()
        return {name: mask.double().sum(0) for name, mask in masks.items()}, len(next(iter(masks.values())))

    opened = _over_batches("gate_activity", model, loader, opened_by)
    images = sum(count for _, count in opened)
    return {name: torch.stack([each[name] for each, _ in opened]).sum(0) / images for name in opened[0][0]}


@checked
@torch.no_grad()
def calibrate_gates(model: nn.Module, loader: Iterable[ModelInput], budget: float) -> float:
    """Set the gates' thresholds in place so that gated passes cost `budget` on average; return their actual share.

    Gates that are near a budget with noise may open fewer or more units without. One threshold for all logits, found by
    bisection in eval mode, corrects this, and allows other budgets nearby. Where many logits are equal, as in untrained
    gates, the closest share is chosen. Only the gates of the active width change; after an error none have.

    Args:
        model: a gated model; its training modes are restored afterwards.
        loader: batches as for `calibrate_bn`; it is iterated over about 15 times.
        budget: target multiply-adds as a share of the dense network's, in (0, 1).

    Raises: UsageError: if the budget is outside (0, 1), below the share with all gates closed or above that with all
        open; if the model has no gates, or the loader can be iterated over only once. DataError: as `gate_activity`.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> _ = nn.init.normal_(model[2].channel_gate.at[0].expand.bias)  # as if trained
    >>> round(calibrate_gates(model, [torch.randn(64, 4)], budget=0.5), 1)
    0.5
    """
    if isinstance(loader, Iterator):
        raise UsageError("calibrate_gates: the loader is iterated over many times; give a list or a DataLoader")
    gates = [gates.module_at(gates._slim.index) for gates in gates_of("calibrate_gates", model)]
    thresholds = [gate.threshold for gate in gates if isinstance(gate, ChannelGate)]
    before = [threshold.clone() for threshold in thresholds]

    def share_at(value: float) -> float:
        for threshold in thresholds:
            threshold.fill_(value)
        return float(torch.cat(_over_batches("calibrate_gates", model, loader, GatedPass.share)).mean())

    try:
        least, most = share_at(math.inf), share_at(-math.inf)
        if not least <= budget <= most:
            costs = f"with all gates closed the network costs {least:.3f}, with all open {most:.3f}, of the dense one"
            raise UsageError(f"calibrate_gates: budget is {budget}, but {costs}")
        low, high, misses = -1.0, 1.0, {}
        for _ in range(40):
            middle = (low + high) / 2
            value = math.tan(middle * math.pi / 2)
            share = share_at(value)
            misses[value] = abs(share - budget)
            if misses[value] <= 5e-4:  # of the dense multiply-adds
                break
            low, high = (middle, high) if share > budget else (low, middle)
        return share_at(min(misses, key=misses.__getitem__))
    except BaseException:
        for threshold, old in zip(thresholds, before, strict=True):
            threshold.copy_(old)
        raise


def _over_batches(
    where: str, model: nn.Module, loader: Iterable[ModelInput], take: Callable[[GatedPass], Taken]
) -> list[Taken]:
    """Run a gated pass in eval mode on each batch, and return the results of `take`."""
    gates_of(where, model)
    if isinstance(loader, (Tensor, str)) or not isinstance(loader, Iterable):
        raise UsageError(f"{where}: loader must hold batches, as [images] does, got {type(loader).__name__}")
    device = next(model.parameters()).device
    found = []
    with in_eval_mode(model):
        for batch in loader:
            args, kwargs = arguments_of(batch, device, where)
            with gated(model) as run:
                model(*args, **kwargs)
            found.append(take(run))
    if not found:
        raise DataError(f"{where}: loader is empty; give at least one batch")
    return found


@checked
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

    Raises: UsageError: unless exactly one of `keep` and `budget` is given, in its range and at least the cost of the
        smallest network; if the model has no gates, or `loader` can be iterated over only once. DataError: as
        `gate_activity`.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> small = extract_gated(model, [torch.randn(16, 4)], budget=0.5)
    >>> type(small[2]), small[2].out_features
    (<class 'torch.nn.modules.linear.Linear'>, 14)
    """
    if (keep is None) == (budget is None):
        raise UsageError("extract_gated: give either keep, a fraction of the images, or budget, a share of the cost")
    if keep is not None and not 0 < number_or_nan(keep) <= 1:
        raise UsageError(f"extract_gated: keep is a fraction of the images and must be in (0, 1], got {keep!r}")
    if recalibrate and isinstance(loader, Iterator):
        raise UsageError("extract_gated: the loader is iterated over twice; give a list or a DataLoader")
    found: GatePlan | None = model.__dict__.get(PLAN)
    if found is None:
        raise UsageError(f"extract_gated: this {type(model).__name__} is not a model that gate returned; give that one")
    with at_width(model, 1.0):
        opened = gate_activity(model, loader)
        twin = copy_of(model)
    for norm in [module for module in twin.modules() if isinstance(module, PassNorm)]:
        norm.full = norm.gated[0]
    strip(ungate(twin))
    channels = found.plan.channels
    activity = {gate.group: opened[gate.name].tolist() for gate in found.gates if not channels.ordered[gate.group]}
    read = {gate.group: min((each.units >= 0).sum() for each in gate.readers) // gate.units for gate in found.gates}
    steps = {group: round_to // math.gcd(round_to, int(per_unit)) for group, per_unit in read.items()}
    kept = _kept(found, activity, steps, keep, budget or 0.0)
    orders = {group: np.argsort(np.negative(own), kind="stable") for group, own in activity.items()}
    permute(twin, found.plan, [orders.get(group, np.arange(units)) for group, units in enumerate(channels.units)])
    slim = apply_plan(twin, found.plan)
    counts = found.plan.near(kept).counts
    if recalibrate:
        calibrate_bn(slim, loader, [counts])
    return cast(M, extract(slim, counts))


def _kept(
    found: GatePlan, opened: Mapping[int, Sequence[float]], steps: Mapping[int, int], keep: float | None, budget: float
) -> tuple[int, ...]:
    """Return how many units of each group to keep: those open often enough, or as many as the budget allows."""
    full = found.plan.channels.units
    every = ((share, group) for group, own in opened.items() for share in own)
    ranked = sorted(every, key=itemgetter(0), reverse=True)

    def counts(units: int) -> tuple[int, ...]:
        most = Counter(group for _, group in ranked[:units])
        return tuple(
            kept_units(whole, most[group] / whole, steps[group]) if group in opened else whole
            for group, whole in enumerate(full)
        )

    def macs(units: int) -> float:
        return found.macs.total(counts(units))

    if keep is not None:
        return counts(sum(share >= keep for share, _ in ranked))
    dense = found.macs.total(full)
    fitting = bisect_right(range(len(ranked) + 1), budget * dense, key=macs)
    if not fitting:
        what = f"the budget is {budget}, but the smallest network costs {macs(0) / dense:.3f}"
        raise UsageError(f"extract_gated: {what}; give a larger budget or a smaller round_to")
    return counts(fitting - 1)
