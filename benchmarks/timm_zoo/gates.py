"""Which groups of a model get channel gates, what these can save, and, on small models, whether masks are exact."""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from typing import Any

import timm
import torch
from torch import nn

import slimmable
from benchmarks.timm_zoo.fake import module_of
from benchmarks.timm_zoo.real import smallest
from slimmable._convert import apply_plan
from slimmable.errors import WidthError
from slimmable.gating import ChannelGate, GatePlan, LayerGates, gate_plan
from tests.convert.oracles import difference

WITH_NUMBERS = 25e6  # parameters
OPEN = 0.4  # of the units of each gate


class Constant(nn.Module):
    """In the place of a gate: the first units are open, for every image."""

    def __init__(self, gate: ChannelGate, units: int, opened: int) -> None:
        super().__init__()
        self.macs = gate.macs
        self.mask = torch.cat([torch.ones(1, opened), torch.zeros(1, units - opened)], 1).double()

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return the mask of every image."""
        return self.mask.expand(len(pooled), -1)


def measure(name: str) -> dict[str, Any]:
    """Return the line of the table of the model `name`."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    start = time.process_time()
    found = gate_plan(model)
    seconds = time.process_time() - start
    counts = found.plan.channels.units
    parameters = found.plan.columns[0].parameters
    return {
        "module": module_of(name),
        "parameters": parameters,
        "gates": len(found.gates),
        "units": sum(gate.units for gate in found.gates),
        "least": round(float(found.macs.total(counts, found.gates) / found.macs.total(counts)), 4),
        "refused": refused(found),
        "seconds": round(seconds, 2),
    } | (with_numbers(name) if found.gates and parameters <= WITH_NUMBERS else {})


def refused(found: GatePlan, most: int = 4) -> str:
    """Say why groups have no gate, and how many for each reason."""
    reasons = Counter(re.sub(r"\d+", "#", reason)[:80] for _, _, reason in found.refused)
    return "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(most))


@torch.no_grad()
def with_numbers(name: str) -> dict[str, Any]:
    """Compare with the plain model, and with the network of the open units alone; differences are relative."""
    model, example = smallest(name)
    gated = slimmable.gating.gate(model, example_inputs=example, separate_norms=False)
    found = gate_plan(gated)
    counts = list(found.plan.channels.units)
    gates = {part.name: part for part in gated.modules() if isinstance(part, LayerGates)}
    for gate in found.gates:
        opened = counts[gate.group] = max(1, round(OPEN * gate.units))
        made = gates[gate.name].at[0]
        assert isinstance(made, ChannelGate)
        gates[gate.name].at[0] = Constant(made, gate.units, opened)
    with slimmable.gating.gated(gated) as run:
        masked = gated(example)
    result: dict[str, Any] = {"dense": f"{difference(gated(example), model(example)):.1e}"}
    try:
        small = slimmable.extract(apply_plan(copy.deepcopy(model), found.plan), tuple(counts))
    except WidthError:  # these counts do not go together
        return result
    macs = slimmable.profile(small, example_inputs=example, repeats=0).rows[0].macs / len(example)
    counted = sum(cost[0].item() for layer, cost in run.layer_macs().items() if "channel_gate" not in layer)
    return result | {"masked": f"{difference(masked, small(example)):.1e}", "counted": f"{counted / macs - 1:.1e}"}
