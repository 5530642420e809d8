"""Small helpers for modules of any class and their attributes."""

import pytest
import torch
from torch import nn

from slimmable._described import counts_channels
from slimmable._modules import in_eval_mode, is_under, size_axes, tensors_of


@pytest.mark.parametrize(
    ("name", "pattern", "under"),
    [("layer1.0.conv1", "layer1*", True), ("layer1.0.conv1", "layer1", True), ("layer10", "layer1", False)],
)
def test_names_under_a_pattern(name, pattern, under):
    assert is_under(name, pattern) == under


def test_each_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout().eval(), nn.Dropout())
    with in_eval_mode(model):
        assert [module.training for module in model.modules()] == [False, False, False]
    assert [module.training for module in model.modules()] == [True, False, True]


def test_tensors_of_a_module_are_those_with_channels():
    norm = nn.LayerNorm(2, bias=False)
    norm.table, norm.index = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    assert list(tensors_of(norm)) == ["weight", "table"]


@pytest.mark.parametrize(
    ("module", "axes"),
    [
        (nn.Conv2d(4, 8, 3), {"out_channels": 0, "in_channels": 1}),
        (nn.ConvTranspose2d(4, 8, 3), {"in_channels": 0, "out_channels": 1}),
        (nn.Linear(4, 8), {"out_features": 0, "in_features": 1}),
    ],
)
def test_sizes_are_axes_of_the_weight(module, axes):
    assert size_axes(module) == axes


@pytest.mark.parametrize(("name", "counts"), [("in_chs", True), ("hidden_size", True), ("num_hidden_layers", False)])
def test_names_say_what_is_counted(name, counts):
    assert counts_channels(name) == counts
