"""A step with gates: the first view by the gated network, the others by the dense one, and the losses of the gates."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import slimmable
from slimmable import methods
from slimmable.errors import UsageError
from slimmable.gating import GateBudget
from slimmable.training import MomentumEncoder, average_gradients, cosine_momentum
from tests.methods.networks import DIM, FEATURES, HIDDEN, WIDTHS, batch_of, encoder, gradients_of, make, recipe_of
from tests.methods.test_methods import ORACLES
from tests.two_processes import run_in_two

GATED = ("simclr", "mocov3", "byol", "simsiam", "vicreg", "barlowtwins")
TARGET, ALPHA = 0.4, 3.0
EXAMPLE = torch.zeros(2, 3, 32, 32, dtype=torch.float64)


def make_gated(name: str) -> methods.Method:
    torch.manual_seed(0)
    method = make(name)
    slimmable.gating.gate(method.encoder, example_inputs=EXAMPLE, skip="projector*", inplace=True)
    if hasattr(method, "momentum_encoder"):
        method.momentum_encoder = MomentumEncoder(method.encoder)
    return method.train()


def gates_loss(run: slimmable.gating.GatedPass, progress: float) -> torch.Tensor:
    """The two losses from the masks, by hand."""
    p, s = math.exp(-ALPHA * progress), math.sqrt(TARGET)
    opened = torch.stack([mask.mean() for mask in run.masks().values()])
    below, above = (p * s - opened).clamp(min=0), (opened - (1 - p + p * s)).clamp(min=0)
    return 5 * (run.share().mean() - TARGET) ** 2 + (below**2 + above**2).mean()


def taking_turns(method: methods.Method, runs: list[slimmable.gating.GatedPass]) -> SimpleNamespace:
    """What an oracle needs of a method, with an encoder that is gated for every first of two views."""
    calls: list[int] = []

    def encoder(view):
        calls.append(1)
        if len(calls) % 2 == 0:
            with slimmable.gating.dense(method.encoder):
                return method.encoder(view)
        with slimmable.gating.gated(method.encoder) as run:
            found = method.encoder(view)
        runs.append(run)
        return found

    names = ("momentum_encoder", "online_predictor", "temperature")
    return SimpleNamespace(encoder=encoder, **{n: getattr(method, n) for n in names if hasattr(method, n)})


@pytest.mark.parametrize("name", GATED)
def test_losses_and_gradients_are_those_of_plain_code(name):
    method, again = make_gated(name), make_gated(name)
    recipe = slimmable.SlimRecipe(method.online, loss_weights="ones")
    criterion = GateBudget(TARGET, alpha=ALPHA)
    torch.manual_seed(1)  # of the gates' noise
    found = method.step(recipe, batch_of(method), progress=0.8, gates=criterion)
    if hasattr(again, "momentum_encoder"):
        with torch.no_grad():
            pairs = zip(again.momentum_encoder.parameters(), again.encoder.parameters(), strict=True)
            for own, other in pairs:
                own.lerp_(other, 1 - cosine_momentum(0.8, again.momentum))
    torch.manual_seed(1)
    terms, runs = [], []
    for width in WIDTHS:
        with slimmable.at_width(again.online, width):
            terms.append(ORACLES[name](taking_turns(again, runs), batch_of(again)))
            assert found[width] == pytest.approx(terms[-1].item(), rel=1e-9)
            terms.append(gates_loss(runs[-1], 0.8))
    torch.stack(terms).sum().backward()
    gradients, expected = gradients_of(method), gradients_of(again)
    assert all(gradients[label].any() for label in gradients if label.startswith("encoder.") and "expand" in label)
    for label, gradient in gradients.items():
        if expected[label] is None:
            assert gradient is None, label
        else:
            torch.testing.assert_close(gradient, expected[label], rtol=1e-9, atol=1e-12, msg=label)
    with slimmable.at_width(again.encoder, WIDTHS[-1]):
        assert criterion.reached.item() == pytest.approx(runs[-1].share().mean().item(), rel=1e-12)


@pytest.mark.parametrize("name", GATED)
def test_without_a_budget_gates_are_off(name):
    method, plain = make_gated(name), make(name)
    found = method.step(recipe_of(method), batch_of(method), progress=0.8)
    assert found == pytest.approx(plain.step(recipe_of(plain), batch_of(plain), progress=0.8), rel=1e-12)
    assert all(gradient is None for label, gradient in gradients_of(method).items() if "channel_gate" in label)


def test_random_widths_are_refused_before_anything_changes():
    torch.manual_seed(0)
    network = encoder(methods.VICReg.projector(FEATURES, HIDDEN, DIM), (1.0, 0.25), universal=True)
    method = methods.VICReg(slimmable.gating.gate(network, example_inputs=EXAMPLE, inplace=True))
    recipe = slimmable.SlimRecipe(method.online, random_widths=1)
    with pytest.raises(UsageError, match="the recipe has random_widths, but gates are for the widths"):
        method.step(recipe, batch_of(method), 0.5, gates=GateBudget(0.3))
    assert all(gradient is None for gradient in gradients_of(method).values())


@pytest.mark.parametrize(
    ("name", "gates", "message"),
    [
        ("mocov2", GateBudget(0.3), "MoCoV2.step: its encoder sees one view"),
        ("supervised", GateBudget(0.3), "Supervised.step: its encoder sees one view"),
        ("vicreg", GateBudget(0.3), "the encoder has no gates; make some with slimmable.gating.gate"),
        ("vicreg", 0.3, "gates must be a GateBudget or None, got 0.3"),
    ],
)
def test_gates_that_cannot_be_trained(name, gates, message):
    method = make(name)
    with pytest.raises(UsageError, match=message):
        method.step(recipe_of(method), batch_of(method), progress=0.8, gates=gates)
    assert all(gradient is None for gradient in gradients_of(method).values())


def two_steps(name: str, share: slice) -> dict[str, Any]:
    method = make_gated(name)
    criterion = GateBudget(TARGET, alpha=ALPHA)
    generator = torch.Generator().manual_seed(2)

    def noise(logits):
        return torch.rand(8, logits.shape[1], generator=generator, dtype=torch.float64)[share]

    reached = []
    with mock.patch.object(torch, "rand_like", noise):
        for number, progress in enumerate((0.2, 0.8)):
            method.step(recipe_of(method), batch_of(method, number, share), progress, gates=criterion)
            reached.append(criterion.reached.item())
        average_gradients(method.online)
    return {"reached": reached, "gradients": gradients_of(method)}


def work(rank: int) -> dict[str, Any]:
    return {name: two_steps(name, slice(4 * rank, 4 * rank + 4)) for name in ("vicreg", "byol")}


def test_two_processes_hold_one_budget(tmp_path):
    found = run_in_two(work, tmp_path)
    for name in ("vicreg", "byol"):
        whole = two_steps(name, slice(None))
        for each in found:
            assert each[name]["reached"] == pytest.approx(whole["reached"], rel=1e-9)
            for label, gradient in whole["gradients"].items():
                if gradient is not None:
                    torch.testing.assert_close(each[name]["gradients"][label], gradient, rtol=1e-8, atol=1e-10)
