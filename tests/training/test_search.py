"""The search keeps its budget and its promises, and shrinks what matters least."""

import copy
from itertools import pairwise

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import slimmable
from slimmable.errors import ConversionError, UsageError
from tests.convert import oracles

WIDTHS = (1.0, 0.25)


def mlp(*sizes):
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*layers[:-1]).double()
    example = torch.zeros(1, sizes[0], dtype=torch.float64)
    return slimmable.slimify(net, WIDTHS, example_inputs=example, universal=True)


def cost(counts, first, last):
    sizes = [first, *counts, last]
    return sum(a * b for a, b in pairwise(sizes))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(4, 20), min_size=1, max_size=3),
    st.lists(st.floats(0.4, 1.0), min_size=1, max_size=2),
    st.sampled_from([0.1, 0.25, 0.5]),
    st.integers(0, 99),
)
def test_it_is_the_greedy_path_to_each_budget(hidden, budgets, step, seed):
    model = mlp(5, *hidden, 3)
    order = torch.rand(64, generator=torch.Generator().manual_seed(seed)).tolist()

    def score(counts):  # any function of the sub-network
        return sum(order[(7 * position + count) % 64] for position, count in enumerate(counts))

    def evaluate(net):
        return score([layer.weight.shape[0] for layer in net if hasattr(layer, "weight")][:-1])

    found = slimmable.search(model, evaluate, budgets, step=step, progress=False)
    counts, full, floor = list(hidden), cost(hidden, 5, 3), [max(1, round(n / 4)) for n in hidden]
    path = [tuple(counts)]
    while cost(counts, 5, 3) > min(budgets) * full:
        options = []
        for group, units in enumerate(hidden):
            fewer = max(floor[group], counts[group] - max(1, round(step * units)))
            if fewer < counts[group]:
                options.append([*counts[:group], fewer, *counts[group + 1 :]])
        counts = max(options, key=lambda option: (score(option), -cost(option, 5, 3)))
        path.append(tuple(counts))
    for budget, each in zip(budgets, found, strict=True):
        expected = next(counts for counts in path if cost(counts, 5, 3) <= budget * full)
        assert (each.counts, each.macs) == (expected, cost(expected, 5, 3))
        assert each.score == pytest.approx(score(expected))
        assert each.parameters == sum(p.numel() for p in slimmable.extract(model, each.counts).parameters())
    assert slimmable.width_of(model) == 1.0


def test_it_shrinks_the_layer_that_does_nothing_and_leaves_model_and_statistics_alone():
    torch.manual_seed(0)
    plain = oracles.randomise(timm.create_model("test_resnet", num_classes=5).eval())
    nn.init.zeros_(plain.layer4[0].conv2.weight)  # nothing of what layer4.0.conv1 makes gets through
    model = slimmable.slimify(plain, WIDTHS, universal=True)
    data, before = [torch.randn(4, 3, 64, 64) for _ in range(2)], copy.deepcopy(model.state_dict())
    target = model(data[0]).detach()

    def evaluate(net):
        with torch.no_grad():
            return -float((net(data[0]) - target).square().mean())

    plan = slimmable.plan(model, WIDTHS, universal=True)
    [found] = slimmable.search(model, evaluate, 0.96, step=0.25, progress=False)
    shrunk = {group.makers for group, count in zip(plan.groups, found.counts, strict=True) if count < group.units}
    assert shrunk == {("layer4.0.conv1",)}
    assert (
        slimmable.search(model, evaluate, 0.95, step=0.25, calibrate=data, progress=False)[0].macs
        <= 0.95 * plan.columns[0].macs
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    slimmable.calibrate_bn(model, data, [found.counts])
    small = slimmable.extract(model, found.counts).eval()
    with slimmable.at_width(model, found.counts):
        torch.testing.assert_close(small(data[0]), model.eval()(data[0]), rtol=0, atol=0)


def test_groups_that_only_shrink_together_do():
    model = slimmable.slimify(timm.create_model("test_vit"), WIDTHS, universal=True)
    [found] = slimmable.search(model, lambda net: 0.0, 0.3, step=0.5, progress=False)
    assert found.macs <= 0.3 * slimmable.plan(model, WIDTHS, universal=True).columns[0].macs


def test_a_budget_of_exactly_the_narrowest_width_is_met():
    model = slimmable.slimify(  # 18 / 35 * 35 is a little less than 18
        nn.Sequential(nn.Linear(4, 35), nn.ReLU(), nn.Linear(35, 2)), (1.0, 0.5), example_inputs=torch.zeros(1, 4)
    )
    full, least = (column.macs for column in slimmable.plan(model, (1.0, 0.5)).columns)
    assert least / full * full < least
    [found] = slimmable.search(model, lambda net: 0.0, least / full, progress=False)
    assert found.macs == least


def test_after_an_error_the_width_is_what_it_was():
    model = mlp(4, 8, 2)
    slimmable.set_width(model, 0.6)
    with pytest.raises(ZeroDivisionError):
        slimmable.search(model, lambda net: 1 / 0, 0.5)
    assert slimmable.width_of(model) == 0.6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": 0.01}, "from 0.25., which the narrowest width needs, .* got 0.01"),
        ({"budget": 2}, "got 2"),
        ({"budget": []}, r"a budget is a share .* got \[\]"),
        ({"budget": 0.5, "of": "flops"}, "'flops'"),
        ({"budget": 0.5, "step": 0}, "got 0"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(UsageError, match=says):
        slimmable.search(mlp(4, 8, 2), lambda net: 0.0, **options)


def test_it_needs_one_converted_model():
    with pytest.raises(ConversionError, match="never converted"):
        slimmable.search(nn.Linear(2, 2), lambda net: 0.0, 0.5)
    with pytest.raises(ConversionError, match="2 parts"):
        slimmable.search(nn.ModuleList([mlp(4, 8, 2), mlp(4, 8, 2)]), lambda net: 0.0, 0.5)


def test_multiply_adds_are_those_of_profile():
    """Of one image, where timm names its size, though the model was converted with two."""
    model = slimmable.slimify(timm.create_model("test_resnet"), (1.0, 0.25), universal=True)
    wide, narrow = slimmable.search(model, lambda net: 0.0, (1.0, 0.5), step=0.5, progress=False)
    assert wide.macs == slimmable.profile(model, repeats=0).rows[0].macs
    small = slimmable.extract(model, narrow.counts)
    assert narrow.macs == slimmable.profile(small, repeats=0).rows[0].macs <= 0.5 * wide.macs
