"""Gradient checkpointing: a forward is run again at the width that it had, wherever the model was switched to since."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import cache
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
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
    return slim, small_input()


def small_input() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)


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


# -- threads and tasks
class Threads:
    """Threads that run one function at a time; each has its own numbers of autograd's nodes."""

    def __init__(self, count: int) -> None:
        self.pools = [ThreadPoolExecutor(1) for _ in range(count)]

    def __call__(self, number: int, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in a thread; the last number is this one."""
        if number == len(self.pools):
            return function(*args)
        return self.pools[number].submit(function, *args).result()


@pytest.fixture(scope="module")
def threads():
    found = Threads(2)
    yield found
    for pool in found.pools:
        pool.shutdown()


@cache
def made() -> nn.Module:
    return small(None)[0]


@cache
def plain_gradient(width: float, blocks: Sequence[int]) -> Tensor:
    slim, x = copy.deepcopy(made()), small_input()
    own = x.detach().requires_grad_()
    with slimmable.at_width(slim, width):
        run_blocks(slim, own, blocks).backward()
    return own.grad


def run_blocks(model: nn.Module, x: Tensor, blocks: Sequence[int]) -> Tensor:
    for block in blocks:
        run, reentrant = model.blocks[block], model.use_reentrant
        x = x + (run(x) if reentrant is None else checkpoint(run, x, use_reentrant=reentrant))
    return x.square().sum()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["same", "forward in another", "backward in another"])
def test_a_forward_is_repeated_as_it_was_wherever_it_ran(threads, where, reentrant):
    slim, x = small(reentrant)
    for _ in range(50):
        (x * 2).sum()
    slimmable.set_width(slim, 0.5)
    loss = threads(0 if where == "forward in another" else 2, run_blocks, slim, x, (0, 1))
    slimmable.set_width(slim, 1.0)
    threads(0 if where == "backward in another" else 2, loss.backward)
    torch.testing.assert_close(x.grad, plain_gradient(0.5, (0, 1)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_forwards_that_only_their_threads_tell_apart_are_refused(reentrant):
    slim, x = small(reentrant)
    losses = []
    for width in (0.5, 0.25):
        slimmable.set_width(slim, width)
        with ThreadPoolExecutor(1) as pool:
            losses.append(pool.submit(run_blocks, slim, x, (0, 1)).result())
    for loss in losses:
        with pytest.raises(slimmable.errors.WidthError, match="a forward of one of several threads or tasks"):
            loss.backward()


ACTIONS = st.one_of(
    st.tuples(st.just("switch"), st.integers(0, 2), st.sampled_from(WIDTHS)),
    st.tuples(st.just("block"), st.integers(0, 2), st.sampled_from(WIDTHS)),
    st.tuples(st.just("forward"), st.integers(0, 2), st.sampled_from([None, True, False])),
    st.tuples(st.just("evaluate"), st.integers(0, 2), st.none()),
    st.tuples(st.just("backward"), st.integers(0, 2), st.integers(0, 3)),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(ACTIONS, min_size=4, max_size=16), st.lists(st.integers(0, 1), min_size=1, max_size=3))
def test_any_program_of_several_threads_has_the_gradients_without_checkpointing_or_is_refused(threads, program, blocks):
    slim, x = copy.deepcopy(made()), small_input()
    losses: list[tuple[Tensor, Tensor, float]] = []

    def forward(reentrant: bool | None, width: float | None) -> None:
        own = x.detach().requires_grad_()
        with slimmable.at_width(slim, width) if width else nullcontext():
            slim.use_reentrant = reentrant
            losses.append((run_blocks(slim, own, blocks), own, slimmable.width_of(slim)))

    def evaluate() -> None:
        with torch.no_grad():
            slim(x)

    def backward(number: int) -> None:
        loss, own, width = losses.pop(number % len(losses))
        loss.backward()
        torch.testing.assert_close(own.grad, gradients[width], msg=f"{program} {blocks}")

    gradients = {width: plain_gradient(width, tuple(blocks)) for width in WIDTHS}
    steps = {
        "switch": lambda width: slimmable.set_width(slim, width),
        "block": lambda width: forward(False, width),
        "forward": lambda reentrant: forward(reentrant, None),
        "evaluate": lambda _: evaluate(),
        "backward": lambda number: backward(number) if losses else None,
    }

    def run(action: str, argument: Any) -> None:
        # In its own thread: torch takes the hooks of a checkpointed forward away when the error that ended it is gone.
        with suppress(slimmable.errors.WidthError):
            steps[action](argument)

    for action, thread, argument in [*program, *(("backward", thread, 0) for thread in (2, 0, 1))]:
        threads(thread, run, action, argument)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(WIDTHS), st.booleans(), st.integers(0, 2)), min_size=2, max_size=3))
def test_tasks_that_take_turns_have_the_gradients_without_checkpointing_or_are_refused(tasks):
    slim, x = copy.deepcopy(made()), small_input()

    async def work(width: float, reentrant: bool, turns: int) -> None:
        own = x.detach().requires_grad_()
        with slimmable.at_width(slim, width):
            for _ in range(turns):
                await asyncio.sleep(0)
            slim.use_reentrant = reentrant
            loss = run_blocks(slim, own, (0, 1))
            await asyncio.sleep(0)
            try:
                loss.backward()
            except slimmable.errors.WidthError:
                return
        torch.testing.assert_close(own.grad, plain_gradient(width, (0, 1)))

    async def main() -> None:
        await asyncio.gather(*(work(*task) for task in tasks))

    asyncio.run(main())
    assert slimmable.width_of(slim) == 1.0
