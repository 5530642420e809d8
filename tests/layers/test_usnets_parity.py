"""Sliced layers and norms with a shared gain and bias against the published code of US-Nets (`tests/golden/usnets`)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from slimmable._width import set_width
from slimmable.layers import SwitchableNorm
from slimmable.view.view import install_view

GOLDEN = Path(__file__).parents[1] / "golden"
TENSORS = load_file(GOLDEN / "usnets.safetensors")
CASES = json.loads((GOLDEN / "usnets.json").read_text())["cases"]
WIDTHS = (1.0, 0.75, 0.5, 0.35, 0.25)
LAYERS = {
    "conv_stem": lambda: nn.Conv2d(3, 16, 3, stride=2, padding=1),
    "conv": lambda: nn.Conv2d(16, 24, 3, padding=1),
    "conv_dw": lambda: nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
    "conv_ratio": lambda: nn.Conv2d(16, 96, 1, bias=False),
    "linear": lambda: nn.Linear(40, 10),
}


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_sliced_layers(kind):
    layer = LAYERS[kind]().double()
    layer.load_state_dict({name: TENSORS[f"{kind}/{name}"] for name in layer.state_dict()})
    cases = sorted((case for case in CASES if case["layer"] == kind), key=lambda case: -case["width"])
    rest = (None,) * (layer.weight.ndim - 2)
    depthwise = kind == "conv_dw"
    columns = [None if depthwise else case["in_ch"] for case in cases]
    cuts = {"weight": [(case["out"][1], column, *rest) for case, column in zip(cases, columns, strict=True)]}
    if layer.bias is not None:
        cuts["bias"] = [(case["out"][1],) for case in cases]
    install_view(layer, WIDTHS, cuts, {"groups": [case["in_ch"] for case in cases]} if depthwise else {})
    for case in cases:
        set_width(layer, case["width"])
        close(layer(TENSORS[f"{kind}/x"][:, : case["in_ch"]]), TENSORS[f"{kind}/{case['width']:g}/out"])


def test_norms_that_share_gain_and_bias():
    norm = nn.BatchNorm2d(24).double()
    norm.load_state_dict({"weight": TENSORS["bn/weight"], "bias": TENSORS["bn/bias"]}, strict=False)
    switched = SwitchableNorm(norm, WIDTHS, (None, 24, 16, 8, 8), shared_affine=True)
    for index, width in enumerate(WIDTHS):
        set_width(switched, width)
        own = switched.module_at(index)
        x = TENSORS["bn/x0"][:, : own.num_features]
        close(switched.train()(x), TENSORS[f"bn/{width:g}/train_out"])
        close(own.running_mean, TENSORS[f"bn/{width:g}/running_mean_after1"])
        close(own.running_var, TENSORS[f"bn/{width:g}/running_var_after1"])
        close(switched.eval()(TENSORS["bn/x1"][:, : own.num_features]), TENSORS[f"bn/{width:g}/eval_out"])
