"""Gates set to a budget after the training, by one threshold for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from slimmable.errors import UsageError
from slimmable.gating._activity import over_batches
from slimmable.gating._gate import ChannelGate
from slimmable.gating._gated_pass import GatedPass
from slimmable.gating._losses import check_target
from slimmable.gating._parts import LayerGates
from slimmable.gating._passes import parts_of
from slimmable.training.calibrate import ModelInput

_HALVINGS = 40
_CLOSE = 5e-4  # share of the dense multiply-adds that is close enough


@torch.no_grad()
def calibrate_gates(model: nn.Module, loader: Iterable[ModelInput], budget: float) -> float:
    """Set the thresholds of the gates so that a gated pass costs `budget` on average, in place; return what it costs.

    Training holds gates near a budget while they decide with noise; without noise they may open fewer or more units.
    One threshold for the logits of all gates takes this back, and lets a trained network run at other budgets near it.
    Found by halving an interval, each time with a gated pass in eval mode over all images. Where many logits are the
    same, as those of untrained gates, the cost jumps; then it is the nearest that can be had. Only the gates of the
    active width change. On an error nothing has.

    Args:
        model: gated; its modes stay as they are.
        loader: batches as `calibrate_bn` takes them, gone through about 15 times.
        budget: wanted multiply-adds over those of the dense network, in (0, 1).

    Raises:
        UsageError: if the budget is outside (0, 1), costs less than all gates closed or more than all open, or the
            model has no gates, or the loader can be gone through once only.
        DataError: if the loader is empty or holds something else.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> _ = nn.init.normal_(model[2].channel_gate.at[0].expand.bias)  # as if it was trained
    >>> round(calibrate_gates(model, [torch.randn(64, 4)], budget=0.5), 1)
    0.5
    """
    check_target("calibrate_gates", budget, "budget")
    if isinstance(loader, Iterator):
        raise UsageError("calibrate_gates: the loader is gone through often; give a list or a DataLoader, no iterator")
    parts = parts_of("calibrate_gates", model)
    gates = [part.module_at(part._slim.index) for part in parts if isinstance(part, LayerGates)]
    thresholds = [gate.threshold for gate in gates if isinstance(gate, ChannelGate)]
    before = [threshold.clone() for threshold in thresholds]

    def cost(value: float) -> float:
        for threshold in thresholds:
            threshold.fill_(value)
        return _mean_share(model, loader)

    try:
        return _found(cost, budget)
    except BaseException:
        for threshold, old in zip(thresholds, before, strict=True):
            threshold.copy_(old)
        raise


def _found(cost: Callable[[float], float], budget: float) -> float:
    """Halve the interval of thresholds until what they cost is close to the budget; stay at the closest."""
    least, most = cost(math.inf), cost(-math.inf)
    if not least <= budget <= most:
        raise UsageError(
            f"calibrate_gates: budget is {budget}, but with all gates closed the network costs {least:.3f}, with all "
            f"open {most:.3f}, of the dense one"
        )
    low, high = -1.0, 1.0
    closest, at = math.inf, 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        reached = cost(math.tan(middle * math.pi / 2))
        if abs(reached - budget) < abs(closest - budget):
            closest, at = reached, middle
        if abs(closest - budget) <= _CLOSE:
            break
        low, high = (middle, high) if reached > budget else (low, middle)
    return cost(math.tan(at * math.pi / 2))


def _mean_share(model: nn.Module, loader: Iterable[ModelInput]) -> float:
    shares = over_batches(model, loader, GatedPass.share, "calibrate_gates")
    return float(torch.cat(shares).mean())
