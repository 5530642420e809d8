"""The switchable probe: one classifier per width."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from slimmable._width import run_widths, set_width, width_of
from slimmable.errors import ConversionError, WidthError
from slimmable.layers import SwitchableProbe

WIDTHS = (1.0, 0.5, 0.25)


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 20), st.integers(1, 5), st.booleans())
def test_each_width_has_its_own_classifier(features, classes, bias):
    probe = SwitchableProbe(features, classes, WIDTHS, bias)
    assert list(probe.state_dict())[: 1 + bias] == ["linears.0.weight", "linears.0.bias"][: 1 + bias]
    for index, width in enumerate(WIDTHS):
        set_width(probe, width)
        linear = probe.linears[index]
        x = torch.randn(3, linear.in_features)
        assert torch.equal(probe(x), linear(x))
        probe.zero_grad()
        probe(x).sum().backward()
        assert [i for i in range(3) if probe.linears[i].weight.grad is not None] == [index]


def test_twins():
    linear = nn.Linear(8, 3).eval()
    probe = SwitchableProbe.from_plain(linear, WIDTHS)
    assert probe.to_plain() is linear
    assert not any(module.training for module in probe.modules())
    x = torch.randn(2, 8)
    for index, width in enumerate(WIDTHS):
        set_width(probe, width)
        kept = (8, 4, 2)[index]
        assert torch.allclose(probe(x[:, :kept]), x[:, :kept] @ linear.weight[:, :kept].T + linear.bias)
    half = SwitchableProbe.from_plain(nn.Linear(8, 3, False, dtype=torch.float16), WIDTHS)
    assert {(p.dtype, p.ndim) for p in half.parameters()} == {(torch.float16, 2)}
    with pytest.raises(ConversionError, match="got Conv2d"):
        SwitchableProbe.from_plain(nn.Conv2d(1, 1, 1), WIDTHS)
    with pytest.raises(WidthError):
        SwitchableProbe(8, 3, (0.5,))


def test_print_and_copies():
    probe = SwitchableProbe(8, 3, WIDTHS)
    set_width(probe, 0.5)
    expected = "SwitchableProbe(in_features=8, out_features=3, bias=True, widths=(1.0, 0.5, 0.25), width=0.5)"
    assert repr(probe) == expected
    x = torch.randn(2, 4)
    for again in (copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))):
        assert torch.equal(again(x), probe(x))
        set_width(again, 1.0)
    assert width_of(probe) == 0.5


def test_on_the_features_of_each_width():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            from slimmable.layers import SlimLinear

            self.body = SlimLinear(4, 8, widths=WIDTHS, slim_in=False)
            self.probe = SwitchableProbe(8, 3, WIDTHS)

        def forward(self, x):
            return self.probe(self.body(x))

    outputs = run_widths(Features(), torch.randn(5, 4))
    assert [output.shape for output in outputs.values()] == [(5, 3)] * 3
