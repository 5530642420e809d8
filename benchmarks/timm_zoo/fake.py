"""What can be said of a model without its weights: it converts, every width runs, what that costs, what stays full."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import timm
import torch
from torch import nn

import slimmable
from slimmable._inputs import example_of
from slimmable._profile import _Counter
from slimmable.analysis.plan import Plan

WIDTHS = (1.0, 0.75, 0.5, 0.25)
LIMIT = 0.34  # of the multiply-adds, at width 0.5


def measure(name: str) -> dict[str, Any]:
    """Convert the model `name` on the meta device and return its line of the table."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    start = time.process_time()
    slim = slimmable.slimify(model, WIDTHS)  # runs every width, on shapes
    seconds = time.process_time() - start
    plan = slimmable.plan(slim, WIDTHS)
    full, half, quarter = plan.columns[0], plan.columns[2], plan.columns[3]
    dear = half.macs > LIMIT * full.macs
    return {
        "module": module_of(name),
        "parameters": full.parameters,
        "macs": full.macs,
        "ratio_50": round(half.macs / full.macs, 4),
        "ratio_25": round(quarter.macs / full.macs, 4),
        "parameters_50": round(half.parameters / full.parameters, 4),
        "pinned": reasons(plan),
        "seconds": round(seconds, 2),
        "cause": cause(counted(slim, 1.0), counted(slim, 0.5)) if dear else "",
    }


def module_of(name: str) -> str:
    """Return timm's module that defines a model."""
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


class Kinds(_Counter):
    """Counts multiply-adds by kind of operation too."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.flops
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.flops > before:
            self.macs[kind_of(func, args)] += (self.flops - before) // 2
        return out


def kind_of(func: Any, args: Any) -> str:
    name = func._schema.name.removeprefix("aten::")
    if "convolution" in name:
        channels, weight = int(args[0].shape[1]), args[1]
        if channels <= 4:
            return "the first layer"
        return "depthwise convolutions" if weight.shape[1] == 1 and args[8] > 1 else "convolutions"
    return "linear layers" if name in ("mm", "addmm") else "attention and other products of activations"


def counted(slim: nn.Module, width: float, example: Any = None) -> Counter[str]:
    """Count the multiply-adds of a converted model at a width, by kind of operation."""
    args, kwargs = example_of(slim, example)
    counter = Kinds()
    with next(slim.parameters()).device, torch.no_grad(), slimmable.at_width(slim, width), counter:
        slim(*args, **kwargs)
    return counter.macs


def cause(full: Counter[str], half: Counter[str], limit: float = LIMIT) -> str:
    """Say which kinds of operation cost more than the limit at half width, and their share at full width."""
    total = full.total()
    dear = [(kind, macs / total, half[kind] / macs) for kind, macs in full.most_common() if half[kind] > limit * macs]
    return "; ".join(f"{kind} ({share:.0%} of all, {ratio:.2f} of them at 0.5)" for kind, share, ratio in dear)


def reasons(plan: Plan, most: int = 4) -> str:
    """Say which operations keep axes at full width, and how many units each, class scores apart."""
    units: Counter[str] = Counter()
    for pin in plan.pins:
        if "class scores" not in pin.reason:
            operation, _, rest = pin.reason.partition(" in ")
            why = rest.partition(": ")[2]
            units[f"{operation}: {why}" if why else operation] += pin.size
    return "; ".join(f"{reason[:90]} ({count})" for reason, count in units.most_common(most))
