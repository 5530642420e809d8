"""Gradient checkpointing: a forward is run again at the width that it had, wherever the model was switched to since."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slimmable
from slimmable.view import recompute
from tests.life.networks import WIDTHS, converted, images


class Network(nn.Module):
    """Thin inside only: between its blocks no shape tells at which width they ran."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(self.block() for _ in range(2))
        self.use_reentrant: bool | None = None

    @staticmethod
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant))
        return x


def one_backward_a_width(model: nn.Module, x: Tensor) -> None:
    for width in WIDTHS:
        with slimmable.at_width(model, width):
            model(x).square().mean().backward()


def summed_loss(model: nn.Module, x: Tensor) -> Tensor:
    return sum(y.square().mean() for y in slimmable.run_widths(model, x).values())


def one_summed_backward(model: nn.Module, x: Tensor) -> None:
    summed_loss(model, x).backward()


def switched_by_hand(model: nn.Module, x: Tensor) -> None:
    """And left at the last width."""
    loss = torch.zeros(())
    for width in WIDTHS:
        slimmable.set_width(model, width)
        loss = loss + model(x).square().mean()
    loss.backward()
    slimmable.set_width(model, 1.0)


def backward_in_another_order(model: nn.Module, x: Tensor) -> None:
    losses = [y.square().mean() for y in slimmable.run_widths(model, x).values()]
    slimmable.set_width(model, 0.5)
    for loss in losses:
        loss.backward()
    slimmable.set_width(model, 1.0)


def all_widths_inside_a_checkpoint(model: nn.Module, x: Tensor) -> None:
    def all_widths(x: Tensor) -> Tensor:
        return summed_loss(model, x)

    loss = checkpoint(all_widths, x, use_reentrant=False)
    slimmable.set_width(model, 0.25)
    loss.backward()
    assert slimmable.width_of(model) == 0.25
    slimmable.set_width(model, 1.0)


LOOPS = [one_backward_a_width, one_summed_backward, switched_by_hand, backward_in_another_order]


def small(reentrant: bool | None) -> tuple[nn.Module, Tensor]:
    slim = slimmable.slimify(Network(), WIDTHS, example_inputs=torch.zeros(2, 8))
    slim.use_reentrant = reentrant
    return slim, torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)


def of_timm(name: str, reentrant: bool | None, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Tensor]:
    slim = converted(name).train()
    slim.set_grad_checkpointing(reentrant is not None)
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", bool(reentrant))
    return slim, images()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loop", [*LOOPS, all_widths_inside_a_checkpoint])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["thin inside", pytest.param("test_resnet", marks=pytest.mark.slow), "test_vit"])
def test_gradients_are_those_without_checkpointing(name, loop, reentrant, monkeypatch):
    found = []
    for use in (None, reentrant):
        model, x = small(use) if name == "thin inside" else of_timm(name, use, monkeypatch)
        if use is None and loop is all_widths_inside_a_checkpoint:
            one_summed_backward(model, x)
        else:
            loop(model, x)
        assert slimmable.width_of(model) == 1.0
        found.append(gradients_of(model))
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-5, atol=1e-6, msg=key)


def test_a_copy_made_between_forward_and_backward_has_no_part_in_it():
    slim, x = small(False)
    loss = summed_loss(slim, x)
    twin = slimmable.slimify(slim, WIDTHS, example_inputs=torch.zeros(2, 8))
    slimmable.set_width(twin, 0.25)
    loss.backward()
    assert all(p.grad is not None for p in slim.parameters())
    assert all(p.grad is None for p in twin.parameters())


def test_a_forward_too_many_switches_ago_is_refused():
    slim, x = small(True)
    loss = slim(x).sum()
    for _ in range(recompute._REMEMBERED // 2):
        for width in (0.5, 1.0):
            slimmable.set_width(slim, width)
            slim(x)
    with pytest.raises(slimmable.errors.WidthError, match="call backward earlier"):
        loss.backward()
