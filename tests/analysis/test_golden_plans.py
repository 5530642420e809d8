"""Plans of small models are what they were when somebody last looked at them, down to the reasons.

After a change that is meant to change plans, `python -m tests.analysis.test_golden_plans` writes the file anew; look at
the difference. The right numbers are not known from elsewhere: that plans are right is for the tests of `convert`.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import slimmable
from slimmable.analysis.plan import Plan
from tests.kept import keep, kept

KEPT = Path(__file__).parents[1] / "golden" / "plans.json"
WIDTHS = (1.0, 0.6, 0.25)
MODELS: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_resnet features": {"num_classes": 0, "outputs": "auto"},
    "test_resnet to 8": {"round_to": 8, "skip": "layer1.0"},
    "test_vit": {},
    "test_vit features": {"num_classes": 0, "global_pool": "", "outputs": "slim"},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_nfnet": {},
    "skresnet18": {},
    "densenet121": {},
    "gmlp_ti16_224": {},
    "levit_128s": {},
    "mobilevit_xxs": {},
    "xcit_nano_12_p8_224": {},
    "test_vit_relpos": {},
}  # fmt: skip


def plan_of(name: str) -> Plan:
    made = dict(MODELS[name])
    options = {key: made.pop(key) for key in ("outputs", "round_to", "skip") if key in made}
    with torch.device("meta"):
        model = timm.create_model(name.partition(" ")[0], **made).eval()
    return slimmable.plan(model, WIDTHS, **options)


def summary(plan: Plan) -> dict[str, Any]:
    """What a plan says, in the types of JSON."""
    channels = plan.channels
    found = {
        "units": channels.units,
        "ordered": [group for group, ordered in enumerate(channels.ordered) if ordered],
        "makers": channels.makers,
        "pins": Counter(f"{pin.axis[1]} of {pin.size}: {pin.reason}" for pin in plan.pins),
        "outputs": [(output.name, output.shape, output.why) for output in channels.outputs],
        "macs": [column.macs for column in plan.columns],
        "parameters": [column.parameters for column in plan.columns],
        "counts": [column.counts for column in plan.columns],
        "values": [
            Counter(f"{name} = {value}" for values in column.values.values() for name, value in values.items())
            for column in plan.columns[1:]
        ],
        "shapes": [column.output_shapes for column in plan.columns],
    }
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_is_what_it_was(name):
    assert summary(plan_of(name)) == kept(KEPT, name)


if __name__ == "__main__":
    keep(KEPT, {name: summary(plan_of(name)) for name in MODELS})
