"""Gates set to a budget: the cost of a gated pass is that of the budget, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import slimmable
from slimmable.errors import DataError, UsageError
from slimmable.gating import calibrate_gates, gate_activity, gate_plan

IMAGES = [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def gated_model(widths=None):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 16, 3), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    if widths:
        net = slimmable.slimify(net, widths, example_inputs=IMAGES[0])
    model = slimmable.gating.gate(net, example_inputs=IMAGES[0]).train()
    with torch.no_grad():
        for width in widths or (None,):
            if width:
                slimmable.set_width(model, width)
            for images in IMAGES:  # statistics of the gates
                with slimmable.gating.gated(model):
                    model(images)
    return model


def cost(model, images):
    """The mean share of images, each one run by itself."""
    shares = []
    for image in images:
        with torch.no_grad(), slimmable.gating.gated(model) as run:
            model(image[None])
        shares.append(run.share().item())
    return sum(shares) / len(shares)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.25, 0.95))
def test_a_gated_pass_costs_the_budget(budget):
    model = gated_model()
    reached = calibrate_gates(model, IMAGES, budget)
    assert reached == pytest.approx(budget, abs=2e-3)
    assert cost(model.eval(), torch.cat(IMAGES)) == pytest.approx(reached, abs=1e-9)


def test_all_gates_have_one_threshold_and_nothing_else_changes():
    model = gated_model()
    model[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    calibrate_gates(model, IMAGES, 0.4)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"3.channel_gate.at.0.threshold", "6.channel_gate.at.0.threshold"}
    assert len({model.state_dict()[name].item() for name in changed}) == 1
    assert [module.training for module in model.modules()] == modes
    other = gated_model()
    other.load_state_dict(model.state_dict())
    assert cost(other.eval(), torch.cat(IMAGES)) == pytest.approx(0.4, abs=2e-3)


def test_a_threshold_is_taken_off_the_logits_with_and_without_noise():
    gate = slimmable.gating.ChannelGate(8, 12)
    pooled = torch.randn(64, 8)
    gate.threshold.fill_(0.3)
    assert torch.equal(gate.eval()(pooled), (gate.logits(pooled) > 0.3).float())
    gate.threshold.fill_(1e16)
    assert not gate.train()(pooled).any()


def test_each_width_has_thresholds_of_its_own():
    model = gated_model((1.0, 0.5))
    with slimmable.at_width(model, 0.5):
        calibrate_gates(model, IMAGES, 0.6)
    gates = model[3].channel_gate.at
    assert gates[0].threshold == 0
    assert gates[1].threshold != 0


def test_more_budget_opens_more():
    model = gated_model()
    opened = []
    for budget in (0.3, 0.5, 0.8):
        calibrate_gates(model, IMAGES, budget)
        opened.append(gate_activity(model, IMAGES)["3"])
    assert (opened[0] <= opened[1]).all()
    assert (opened[1] <= opened[2]).all()


@pytest.mark.parametrize(
    ("loader", "budget", "error", "message"),
    [
        (IMAGES, 0.0, UsageError, r"calibrate_gates: budget .* in \(0, 1\), got 0.0"),
        (
            IMAGES,
            0.01,
            UsageError,
            r"budget is 0.01, but with all gates closed the network costs 0\.\d+, with all open",
        ),
        ([], 0.5, DataError, "calibrate_gates: loader is empty"),
        (iter(IMAGES), 0.5, UsageError, "iterated over many times"),
        (["a"], 0.5, DataError, "calibrate_gates: batches must be .* got <class 'str'>"),
        ([*IMAGES, torch.zeros(0, 3, 8, 8)], 0.5, DataError, "calibrate_gates: a batch is empty"),
    ],
)
def test_bad_calls_change_nothing(loader, budget, error, message):
    model = gated_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        calibrate_gates(model, loader, budget)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_a_model_without_gates():
    with pytest.raises(UsageError, match="Linear has no gates"):
        calibrate_gates(nn.Linear(4, 2), [torch.zeros(2, 4)], 0.5)


def test_the_least_share_is_what_closed_gates_cost():
    model = gated_model().eval()
    for module in model.modules():
        if isinstance(module, slimmable.gating.ChannelGate):
            module.threshold.fill_(float("inf"))
    assert gate_plan(model).least_share() == pytest.approx(cost(model, IMAGES[0][:2]), rel=1e-12)
