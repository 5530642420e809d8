"""Measure how often trained gates open each unit, and set their threshold to meet a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from slimmable._modules import in_eval_mode
from slimmable.errors import DataError, UsageError
from slimmable.gating._gate import ChannelGate
from slimmable.gating._losses import check_budget
from slimmable.gating._passes import GatedPass, gated, gates_of
from slimmable.training.calibrate import ModelInput, arguments_of

Taken = TypeVar("Taken")

_HALVINGS = 40
_CLOSE = 5e-4  # tolerance, as a share of the dense multiply-adds


@torch.no_grad()
def gate_activity(model: nn.Module, loader: Iterable[ModelInput]) -> dict[str, Tensor]:
    """Return gate name -> the fraction of images for which it opens each unit, shape (units,), float64.

    The gates decide in eval mode, without noise; training modes are restored afterwards.

    Args:
        model: a gated model.
        loader: batches as for `calibrate_bn`.

    Raises:
        UsageError: if the model has no gates, or the loader is not an iterable of batches.
        DataError: if the loader is empty or holds anything other than batches.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> _ = nn.init.ones_(model[2].channel_gate.at[0].expand.weight)
    >>> gate_activity(model, [torch.ones(3, 4)])["2"].unique().numel()
    1
    """
    opened = _over_batches("gate_activity", model, loader, _opened)
    images = sum(count for _, count in opened)
    return {name: torch.stack([each[name] for each, _ in opened]).sum(0) / images for name in opened[0][0]}


def _opened(run: GatedPass) -> tuple[dict[str, Tensor], int]:
    """Return the number of images for which each unit is open, and the number of images."""
    masks = run.masks()
    return {name: mask.double().sum(0) for name, mask in masks.items()}, len(next(iter(masks.values())))


@torch.no_grad()
def calibrate_gates(model: nn.Module, loader: Iterable[ModelInput], budget: float) -> float:
    """Set the gates' thresholds in place so that gated passes cost `budget` on average; return their actual share.

    Training keeps gates near a budget while they decide with noise; without noise they may open fewer or more units.
    One threshold for the logits of all gates corrects this, and lets a trained network run at other budgets nearby.
    It is found by bisection, with gated passes in eval mode over all images at every step. Where many logits are
    equal, as in untrained gates, the share jumps; the closest one possible is then chosen. Only the gates of the active
    width change; after an error none have.

    Args:
        model: a gated model; its training modes are restored afterwards.
        loader: batches as for `calibrate_bn`; it is iterated over about 15 times.
        budget: target multiply-adds as a share of the dense network's, in (0, 1).

    Raises:
        UsageError: if the budget is outside (0, 1), below the share with all gates closed or above that with all open;
            if the model has no gates, or the loader can be iterated over only once.
        DataError: if the loader is empty or holds anything other than batches.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> _ = nn.init.normal_(model[2].channel_gate.at[0].expand.bias)  # as if trained
    >>> round(calibrate_gates(model, [torch.randn(64, 4)], budget=0.5), 1)
    0.5
    """
    check_budget("calibrate_gates", budget)
    if isinstance(loader, Iterator):
        raise UsageError(
            "calibrate_gates: the loader is iterated over many times; give a list or a DataLoader, not an iterator"
        )
    gates = [gates.module_at(gates._slim.index) for gates in gates_of("calibrate_gates", model)]
    thresholds = [gate.threshold for gate in gates if isinstance(gate, ChannelGate)]
    before = [threshold.clone() for threshold in thresholds]

    def share_at(value: float) -> float:
        for threshold in thresholds:
            threshold.fill_(value)
        return float(torch.cat(_over_batches("calibrate_gates", model, loader, GatedPass.share)).mean())

    try:
        return _set_to_budget(share_at, budget)
    except BaseException:
        for threshold, old in zip(thresholds, before, strict=True):
            threshold.copy_(old)
        raise


def _set_to_budget(share_at: Callable[[float], float], budget: float) -> float:
    """Bisect the thresholds until the share is close to the budget; end at the closest."""
    least, most = share_at(math.inf), share_at(-math.inf)
    if not least <= budget <= most:
        raise UsageError(
            f"calibrate_gates: budget is {budget}, but with all gates closed the network costs {least:.3f}, with all "
            f"open {most:.3f}, of the dense one"
        )
    low, high = -1.0, 1.0
    closest, at = math.inf, 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        share = share_at(math.tan(middle * math.pi / 2))
        if abs(share - budget) < abs(closest - budget):
            closest, at = share, middle
        if abs(closest - budget) <= _CLOSE:
            break
        low, high = (middle, high) if share > budget else (low, middle)
    return share_at(math.tan(at * math.pi / 2))


def _over_batches(
    where: str, model: nn.Module, loader: Iterable[ModelInput], take: Callable[[GatedPass], Taken]
) -> list[Taken]:
    """Run a gated pass in eval mode on each batch, and return the results of `take`.

    Raises: as `gate_activity`; messages start with `where`.
    """
    gates_of(where, model)
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
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
