"""Processes that train at different widths are an error in all of them; those that train at the same ones are none."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import slimmable
from slimmable.errors import DivergedError, UsageError
from slimmable.methods import Batch, SimCLR
from slimmable.training import average_gradients
from tests.two_processes import run_in_two

WIDTHS = (1.0, 0.5, 0.25)
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def network(*, normed: bool = True, universal: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8) if normed else nn.Identity()
    net = nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 2))
    return slimmable.slimify(net, WIDTHS, example_inputs=X, universal=universal)


def step(model: nn.Module, width: Any = 1.0) -> None:
    with slimmable.at_width(model, width):
        model(X).square().mean().backward()


def recipe_step(model: nn.Module, summed: bool = False, **options: Any) -> None:
    recipe = slimmable.SlimRecipe(model, steps=2, **options)
    if summed:
        recipe.total(lambda: model(X).square().mean()).backward()
    else:
        recipe.backward(lambda: model(X).square().mean())


def ddp_at(width: Any) -> None:
    step(DistributedDataParallel(network()), width)


def ddp_later(rank: int) -> None:
    """The sandwich: the widest first, then a random width that is not the same."""
    model = DistributedDataParallel(network(universal=True))
    for width in (1.0, random.Random(rank).uniform(0.3, 0.9), 0.25):
        step(model, width)


def averaged_at(width: Any, **options: Any) -> None:
    model = network(**options)
    step(model)
    step(model, width)
    average_gradients(model)


def recipe_and_average(rank: int) -> None:
    model = network(normed=False)
    recipe_step(model, slow_start=0.5 * rank)
    average_gradients(model)


def evaluates_elsewhere(rank: int) -> None:
    """The first process looks at other widths between the steps, and one has no batch for the last step."""
    model = network()
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        step(wrapped, 0.5)
        if rank == 0:
            slimmable.run_widths(model, X)
    other = network()
    if rank == 1:
        step(other, 0.25)
    average_gradients(other)
    assert other[0].weight.grad.any()


def accumulates(rank: int) -> None:
    """Two parts of a batch in one process and three in the other."""
    model = DistributedDataParallel(network())
    with model.no_sync():
        for _ in range(2 + rank):
            for width in WIDTHS:
                step(model, width)
    average_gradients(model)


DIFFERENT: dict[str, Callable[[int], None]] = {
    "DDP": lambda rank: ddp_at((1.0, 0.5)[rank]),
    "DDP, random": ddp_later,
    "averaged": lambda rank: averaged_at((0.25, 0.5)[rank]),
    "averaged, universal": lambda rank: averaged_at((0.61, 0.62)[rank], universal=True),
    "slow start": lambda rank: recipe_step(DistributedDataParallel(network()), slow_start=0.5 * rank),
    "no norms": lambda rank: recipe_step(DistributedDataParallel(network(normed=False)), slow_start=0.5 * rank),
    "no norms, averaged": recipe_and_average,
    "seed": lambda rank: recipe_step(DistributedDataParallel(network(universal=True)), random_widths=2, seed=rank),
    "summed": lambda rank: recipe_step(
        DistributedDataParallel(network(), broadcast_buffers=False), summed=True, slow_start=0.5 * rank
    ),
}
SAME: dict[str, Callable[[int], None]] = {
    "DDP": lambda rank: ddp_at(0.5),
    "evaluation": evaluates_elsewhere,
    "accumulation": accumulates,
    "seed": lambda rank: recipe_step(DistributedDataParallel(network(universal=True)), random_widths=2, seed=3),
}


def diverge(rank: int) -> None:
    method = SimCLR(network())
    if rank == 1:
        method.encoder[0].weight.data[0, 0] = float("nan")
    method.step(slimmable.SlimRecipe(method.online), Batch([X, X + 1]), 1.0)


def message_of(call: Callable[[int], None], rank: int) -> str:
    try:
        call(rank)
    except (UsageError, DivergedError) as error:
        return str(error)
    return ""


def work(rank: int) -> dict[str, str]:
    found = {name: message_of(call, rank) for name, call in SAME.items()}
    found |= {f"different {name}": message_of(call, rank) for name, call in DIFFERENT.items()}
    dist.barrier()
    return found | {"diverged": message_of(diverge, rank)}


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[str, str]]:
    return run_in_two(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_widths_are_an_error_in_all_processes(name, processes):
    one, two = (found[f"different {name}"] for found in processes)
    assert one == two
    assert "the processes must train at the same widths, but those of process 0: " in one
    listed = one.partition("process 0: ")[2].partition("; give")[0].split("; process 1: ")
    assert len(set(listed)) == 2


@pytest.mark.parametrize("name", SAME)
def test_the_same_widths_are_none(name, processes):
    assert [found[name] for found in processes] == ["", ""]


def test_the_process_that_diverges_is_named(processes):
    for found in processes:
        assert found["diverged"] == "the loss is nan at width 1; the weights of process 1 are not finite"
