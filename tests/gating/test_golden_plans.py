"""Where gates go in small models, and why nowhere else, is what it was when somebody last looked at it.

After a change that is meant to change it, `python -m tests.gating.test_golden_plans` writes the file anew; look at the
difference.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from slimmable.gating import GatePlan, gate_plan
from slimmable.gating._plan import gate_macs
from tests.kept import keep, kept

KEPT = Path(__file__).parents[1] / "golden" / "gate_plans.json"
MODELS = (
    "test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet", "skresnet18", "test_mambaout",
    "test_vit_relpos", "resmlp_12_224", "test_byobnet",
)  # fmt: skip


def plan_of(name: str) -> GatePlan:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    return gate_plan(model, skip="*.conv1" if name == "test_resnet" else ())


def summary(found: GatePlan) -> dict[str, Any]:
    """What a plan says, in the types of JSON."""
    gates = [
        (gate.name, gate.number, gate.group, gate.units, gate.axis, macs, channels, gate.norms)
        for gate in found.gates
        for channels in [(len(gate.channels), int(gate.channels.min()), int(gate.channels.max()))]
        for macs in [gate_macs(len(gate.channels), gate.units)]
    ]
    readers = [[(r.path, r.axis, int((r.units >= 0).sum())) for r in gate.readers] for gate in found.gates]
    refused = Counter(f"{maker} {units}: {reason}" for maker, units, reason in found.refused)
    full, layers = found.plan.channels.units, found.macs
    without = [layers.total(full, [gate]) for gate in found.gates]
    named = {"gates": gates, "readers": readers, "refused": refused, "least": found.least_share(), "without": without}
    return json.loads(json.dumps(named | {"full": layers.total(full), "all": layers.total(full, found.gates)}))


@pytest.mark.parametrize("name", MODELS)
def test_gates_are_where_they_were(name):
    assert summary(plan_of(name)) == kept(KEPT, name)


if __name__ == "__main__":
    keep(KEPT, {name: summary(plan_of(name)) for name in MODELS})
