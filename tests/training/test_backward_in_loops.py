"""`recipe.backward` in the loops that people have: accumulation, clipping, mixed precision; beside plain loops."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import slimmable
from slimmable.training import SlimRecipe

WIDTHS = (1.0, 0.5)
STEPS = 4
TOO_LARGE = 2.0**40  # a scale at which gradients in float16 overflow


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )  # fmt: skip


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator), torch.randint(4, (8,), generator=generator)


class Loop:
    """A training loop; `backward` takes a closure, and has what the loop calls for each loss."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.scaler = torch.amp.GradScaler(
            "cpu", TOO_LARGE, backoff_factor=2.0**-30, growth_interval=2, enabled=kind.startswith("float16")
        )
        self.skipped = 0

    def precision(self) -> contextlib.AbstractContextManager[object]:
        name = self.kind.split(",")[0]
        return torch.autocast("cpu", getattr(torch, name)) if "float" in name else contextlib.nullcontext()

    def run(self, model: nn.Module, backward: Callable[[Callable[[], Tensor]], object]) -> list[Tensor]:
        """Train, and return the gradients of the last step, the parameters and the buffers."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(STEPS):
            x, labels = batch(step)
            parts = 2 if "accumulated" in self.kind else 1
            optimizer.zero_grad()
            for x_part, labels_part in zip(x.chunk(parts), labels.chunk(parts), strict=True):

                def closure(x: Tensor = x_part, labels: Tensor = labels_part, parts: int = parts) -> Tensor:
                    with self.precision():
                        return nn.functional.cross_entropy(model(x), labels) / parts

                backward(closure)
            if "clipped" in self.kind:
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            before = self.scaler.get_scale()
            self.scaler.step(optimizer)
            self.scaler.update()
            self.skipped += self.scaler.get_scale() < before
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [*gradients, *model.state_dict().values()]


KINDS = ["accumulated", "clipped", "bfloat16", "float16", "bfloat16, accumulated", "float16, accumulated, clipped"]


def by_recipe(kind: str, slim: nn.Module, **options: float) -> tuple[list[Tensor], Loop]:
    loop = Loop(kind)
    steps = STEPS * (2 if "accumulated" in kind else 1)
    scaled = lambda loss: loop.scaler.scale(loss).backward()  # noqa: E731
    recipe = SlimRecipe(slim, steps=steps, backward=scaled, **options)
    return loop.run(slim, recipe.backward), loop


@pytest.mark.parametrize("kind", KINDS)
def test_all_widths_are_trained_as_by_a_loop_without_the_recipe(kind):
    slim = slimmable.slimify(plain(), WIDTHS, example_inputs=torch.zeros(2, 12))
    twin, reference = copy.deepcopy(slim), Loop(kind)
    weights = SlimRecipe(slim).loss_weights

    def backward(closure: Callable[[], Tensor]) -> None:
        for width in WIDTHS:
            slimmable.set_width(twin, width)
            reference.scaler.scale(weights[width] * closure()).backward()
        slimmable.set_width(twin, 1.0)

    expected = reference.run(twin, backward)
    found, loop = by_recipe(kind, slim)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert loop.scaler.state_dict() == reference.scaler.state_dict()
    assert loop.skipped == reference.skipped == ("float16" in kind.split(", "))


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_slow_start_it_is_the_plain_program(kind):
    model, reference = plain(), Loop(kind)
    slim = slimmable.slimify(copy.deepcopy(model), WIDTHS, example_inputs=torch.zeros(2, 12))
    expected = reference.run(model, lambda closure: reference.scaler.scale(closure()).backward())
    found, loop = by_recipe(kind, slim, slow_start=1.0)
    narrow = {name for name in slim.state_dict() if "narrow" in name}
    gradients = found[: -len(slim.state_dict())]
    kept = [tensor for name, tensor in slim.state_dict().items() if name not in narrow]
    assert narrow
    assert all(torch.equal(ours, theirs) for ours, theirs in zip([*gradients, *kept], expected, strict=True))
    assert loop.skipped == reference.skipped
