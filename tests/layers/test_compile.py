"""Tracing: one graph per width, no breaks, and programs that equal the model."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from slimmable._convert import extract, slimify
from slimmable._width import at_width, set_width, width_of
from slimmable.layers import (
    SlimConv2d,
    SlimGroupNorm,
    SlimLayerNorm,
    SlimLinear,
    SwitchableBatchNorm2d,
    SwitchableProbe,
)
from slimmable.training import SlimRecipe
from slimmable.view.state import state_of

WIDTHS = (1.0, 0.75, 0.5, 0.25)
X = torch.randn(2, 3, 6, 6)


def net() -> nn.Sequential:
    return nn.Sequential(
        SlimConv2d(3, 16, 3, widths=WIDTHS, slim_in=False),
        SwitchableBatchNorm2d(16, widths=WIDTHS),
        nn.ReLU(),
        SlimConv2d(16, 32, 3, groups=4, widths=WIDTHS),
        SlimGroupNorm(2, 32, widths=WIDTHS),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        SlimLinear(32, 16, widths=WIDTHS),
        SlimLayerNorm(16, widths=WIDTHS),
        SwitchableProbe(16, 5, WIDTHS),
    )


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_per_width_and_none_after_switching_back(training):
    torch._dynamo.reset()
    model = net().train(training)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for lap in range(2):
        for count, width in enumerate(WIDTHS, start=1):
            set_width(compiled, width)
            out = compiled(X)
            assert torch.equal(out, model(X))
            assert counter.frame_count == (count if lap == 0 else len(WIDTHS))


def test_graphs_of_many_widths_and_kinds_of_input_stay():
    """Torch gives up after 8 graphs of a forward, unless it is told to keep more."""
    torch._dynamo.reset()
    model, counter = net().eval(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    for lap in range(2):
        for size in (1, 2, 3):
            for count, width in enumerate(WIDTHS, start=4 * size - 3):
                set_width(compiled, width)
                compiled(X[:1].expand(size, -1, -1, -1))
                assert counter.frame_count == (count if lap == 0 else 12)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_drawn_widths_run_without_a_graph_of_their_own(fullgraph):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    x, counter = X[:, 0, 0], CompileCounter()
    model = slimify(plain, (1.0, 0.5, 0.25), example_inputs=x, universal=True)
    twin = copy.deepcopy(model)
    recipe, other = (SlimRecipe(each, random_widths=2) for each in (model, twin))
    compiled = torch.compile(model, backend=counter, fullgraph=fullgraph)
    for _ in range(4):
        assert torch.equal(
            recipe.backward(lambda: compiled(x).square().mean()), other.backward(lambda: twin(x).square().mean())
        )
        assert recipe.losses == other.losses
        assert counter.frame_count == 2
    with pytest.raises(ZeroDivisionError):
        recipe.backward(lambda: compiled(x).square().mean() if 1 / (width_of(model) in (1, 0.25)) else None)
    with at_width(model, 0.5):
        compiled(x)
    assert counter.frame_count == 3  # what stays compiled


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_export_at_a_width(width):
    model = net().eval()
    set_width(model, width)
    before = [(set(vars(module)), state_of(module)) for module in model.modules()]
    program = torch.export.export(model, (X,), strict=False)
    assert torch.equal(program.module()(X), model(X))
    assert set(program.state_dict) == set(model.state_dict())
    assert [(set(vars(module)), state_of(module)) for module in model.modules()] == before
    assert torch.allclose(extract(model, width)(X), model(X), atol=1e-6)


def test_recomputation_at_the_width_of_the_forward():
    model = net()
    set_width(model, 0.5)
    torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    again = net()
    again.load_state_dict(model.state_dict())
    set_width(again, 0.5)
    again(X).sum().backward()
    for name, parameter in again.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None)
        assert parameter.grad is None or torch.allclose(parameter.grad, expected[name], atol=1e-6)
