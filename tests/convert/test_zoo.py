"""The smallest model of each of timm's model modules: it converts, it gets small, and every oracle holds.

All of them are converted on the meta device. The oracles, which need real numbers, run on `SAMPLE`, on the others with
`--runslow`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import slimmable
from tests.convert import oracles

WIDTHS = (1.0, 0.75, 0.5, 0.25)
SMALLEST: dict[str, str] = json.loads((Path(__file__).parent / "zoo.json").read_text())
SAMPLE = (
    "byobnet", "convnext", "cspnet", "densenet", "edgenext", "efficientnet", "efficientvit_msra", "eva", "fasternet",
    "hgnet", "levit", "mambaout", "maxxvit", "mlp_mixer", "mobilenetv3", "nfnet", "regnet", "resnet", "starnet",
    "vision_transformer", "vision_transformer_relpos",
)  # fmt: skip
MACS_AT_HALF = 0.34
MORE_MACS = {"mobilenetv3": 0.37}  # depthwise convolutions and the classifier cost in proportion to the width


def images(model: nn.Module, **kwargs) -> torch.Tensor:
    size = model.pretrained_cfg["input_size"]
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0), **kwargs)


def test_the_list_has_every_module_of_timm():
    if timm.__version__ != "1.0.31":
        pytest.skip("the list is of timm 1.0.31")
    theirs = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm.")]
    assert set(SMALLEST) == {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in theirs}


@pytest.mark.parametrize("module", SMALLEST)
def test_it_converts_and_half_width_takes_a_third_of_the_multiply_adds(module):
    with torch.device("meta"):
        model = timm.create_model(SMALLEST[module]).eval()
    slim = slimmable.slimify(model, WIDTHS)  # runs every width, and checks its output shapes
    cost = {width: column.macs for width, column in zip(WIDTHS, slimmable.plan(slim, WIDTHS).columns, strict=True)}
    assert cost[0.5] / cost[1.0] <= MORE_MACS.get(module, MACS_AT_HALF)
    assert cost[0.25] < cost[0.5] < cost[0.75] < cost[1.0]


@pytest.mark.parametrize("module", ["resnet", "vision_transformer", "levit", "regnet"])
def test_a_plan_knows_what_a_counter_counts(module):
    with torch.device("meta"):
        model = timm.create_model(SMALLEST[module]).eval()
        example = torch.zeros(1, *model.pretrained_cfg["input_size"])
    slim = slimmable.slimify(model, WIDTHS, example_inputs=example)
    known = [(column.macs, column.parameters) for column in slimmable.plan(slim, WIDTHS).columns]
    assert known == [(row.macs, row.parameters) for row in slimmable.profile(slim, repeats=0).rows]


@pytest.mark.parametrize(
    "module", [pytest.param(module, marks=() if module in SAMPLE else pytest.mark.slow) for module in SMALLEST]
)
def test_every_oracle_holds(module):
    torch.manual_seed(0)
    model = oracles.randomise(timm.create_model(SMALLEST[module]).double().eval())
    x = images(model, dtype=torch.float64)
    slim, plan = slimmable.slimify(model, WIDTHS), slimmable.plan(model, WIDTHS)
    run = oracles.run_on(x)
    outputs = oracles.outputs_of(slim, run)
    limit = PERMUTED.get(module, 1e-10)
    oracles.permuting_units_changes_nothing(model, plan, x, limit=limit)
    assert oracles.permuted_difference(model, plan, run, run(model), "magnitude") <= limit
    oracles.full_width_is_the_original(model, slim, x)
    assert oracles.extracted_difference(slim, run, outputs) <= 1e-10
    if oracles.zeroing_applies(model, plan):
        assert oracles.zeroed_difference(model, plan, run, outputs, WIDTHS) <= 1e-9
    assert (oracles.attention_difference(slim, run, outputs) or 0) < 1e-9


PERMUTED = {"efficientvit_mit": 1e-6}  # attention computed in float32
