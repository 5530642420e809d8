"""Two processes: every way to train all widths gives, parameter by parameter, the gradients of one process."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import slimmable
from slimmable import _distributed
from slimmable.errors import UsageError
from slimmable.training import average_gradients
from tests.two_processes import run_in_two

WIDTHS = (1.0, 0.5, 0.25)
PROGRESS = (0.1, 0.9)  # of the two steps; the first lies in the slow start
RATE = 0.1

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
SHARDS = hasattr(torch.cpu.Stream, "record_event")
needs_shards = pytest.mark.skipif(not SHARDS, reason=f"fully_shard of torch {torch.__version__} does not run on CPUs")

Gradients = dict[str, Tensor | None]


def network() -> nn.Module:
    return copy.deepcopy(converted())


@functools.cache
def converted() -> nn.Module:
    torch.manual_seed(0)
    return slimmable.slimify(timm.create_model("test_resnet", num_classes=5).double(), WIDTHS).train()


def images(rank: int) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def gradients_of(model: nn.Module) -> Gradients:
    return {name: None if p.grad is None else whole(p.grad).clone() for name, p in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# -- ways to take one step's gradients; each is given the model, wrapped, its images and the widths of this step
def summed(model: nn.Module, x: Tensor, widths: tuple[float, ...]) -> None:
    """One forward for all widths, or one for each: both give a dict, and one summed loss."""
    outputs = model(x) if isinstance(getattr(model, "module", model), slimmable.AllWidths) else None
    sum(loss_of(y) for y in (outputs or slimmable.run_widths(model, x)).values()).backward()


def one_backward_a_width(model: nn.Module, x: Tensor, widths: tuple[float, ...]) -> None:
    recipe = slimmable.SlimRecipe(model, loss_weights=[1] * len(WIDTHS), slow_start=0.5)
    wrapped = isinstance(model, DistributedDataParallel)
    with model.no_sync() if wrapped else contextlib.nullcontext():
        for _ in recipe.widths(0.9 if len(widths) > 1 else 0.1):
            recipe.loss(loss_of(model(x))).backward()


def averaged(model: nn.Module, x: Tensor, widths: tuple[float, ...]) -> None:
    one_backward_a_width(model, x, widths)
    average_gradients(model)


def all_in_ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(slimmable.AllWidths(model), **options)


def ddp_of_several_forwards(model: nn.Module) -> nn.Module:
    """Up to torch 2.11, the second forward would overwrite the statistics of norms that the first's backward reads."""
    return DistributedDataParallel(model, broadcast_buffers=TORCH > (2, 11))


def sharded(model: nn.Module) -> nn.Module:
    for block in (model.layer1, model.layer3):
        fully_shard(block)
    return fully_shard(model)


def sharded_around_all(model: nn.Module) -> nn.Module:
    fully_shard(model.layer1)
    return fully_shard(slimmable.AllWidths(model))


Wrap = Callable[[nn.Module], nn.Module]
WAYS: dict[str, tuple[Wrap, Callable[[nn.Module, Tensor, tuple[float, ...]], None], bool]] = {
    # name: wrapper, step, whether narrow widths wait for the end of the slow start
    "DDP of all widths": (all_in_ddp, summed, False),
    "DDP of all widths, static graph": (lambda model: all_in_ddp(model, static_graph=True), summed, False),
    "DDP, one forward a width, summed": (ddp_of_several_forwards, summed, False),
    "DDP, one backward a width": (DistributedDataParallel, averaged, True),
    "DDP with bucket views, one backward a width": (
        lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
        averaged,
        True,
    ),
    "no wrapper, one backward a width": (lambda model: model, averaged, True),
    "fully_shard, one backward a width": (sharded, one_backward_a_width, True),
    "fully_shard, summed": (sharded, summed, False),
    "fully_shard of all widths, summed": (sharded_around_all, summed, False),
}


def train(way: str, rank: int) -> list[Gradients]:
    """Take two steps; return the gradients of each."""
    wrap, step, slow = WAYS[way]
    model = network()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    found = []
    for number in range(2):
        optimizer.zero_grad()
        step(wrapped, images(2 * number + rank), WIDTHS[:1] if slow and number == 0 else WIDTHS)
        found.append(gradients_of(model))
        optimizer.step()
    return found


def train_in_one_process(slow: bool) -> list[Gradients]:
    """The same two steps: the plain mean of what each process's images give."""
    model = network()
    found = []
    for number in range(2):
        halves = []
        for rank in range(2):
            model.zero_grad()
            for width in WIDTHS[:1] if slow and number == 0 else WIDTHS:
                with slimmable.at_width(model, width):
                    loss_of(model(images(2 * number + rank))).backward()
            halves.append(gradients_of(model))
        mean = {name: None if g is None else (g + halves[1][name]) / 2 for name, g in halves[0].items()}
        found.append(mean)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if mean[name] is not None:
                    parameter -= RATE * mean[name]
    return found


def some_gradients_are_missing() -> Gradients:
    """`b` has a gradient in process 1 only, `c` in none; the types differ and every bucket is tiny."""
    rank = dist.get_rank()
    model = nn.ParameterDict({name: torch.zeros(3) for name in "abc"})
    model["d"] = torch.zeros(2, 4, dtype=torch.float64)
    model["a"].grad = torch.full((3,), 1.0 + rank)
    model["d"].grad = torch.full((2, 4), 3.0 * rank, dtype=torch.float64)
    if rank == 1:
        model["b"].grad = torch.ones(3)
    _distributed._BUCKET = 16
    average_gradients(model)
    _distributed._BUCKET = 25 * 2**20
    return gradients_of(model)


def gathered() -> dict[str, Tensor]:
    """What a sharded model saves for later use without shards."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    return get_model_state_dict(sharded(network()), options=options)


def work(rank: int) -> dict[str, Any]:
    """What each process does: everything once, since starting a process is slow."""
    found: dict[str, Any] = {way: train(way, rank) for way in WAYS if SHARDS or "fully_shard" not in way}
    found["missing"] = some_gradients_are_missing()
    if not SHARDS:
        return found
    found["gathered"] = gathered()
    with pytest.raises(UsageError, match="fully_shard averages"):
        average_gradients(sharded(network()))
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[str, Any]]:
    return run_in_two(work, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone() -> dict[bool, list[Gradients]]:
    return {slow: train_in_one_process(slow) for slow in (False, True)}


@pytest.mark.parametrize("way", [pytest.param(way, marks=needs_shards if "fully_shard" in way else ()) for way in WAYS])
def test_gradients_of_two_processes_are_those_of_one(way, processes, alone):
    for found in processes:
        for step, expected in zip(found[way], alone[WAYS[way][2]], strict=True):
            assert step.keys() == expected.keys()
            for name, gradient in expected.items():
                if gradient is None:
                    assert step[name] is None, name
                else:
                    torch.testing.assert_close(step[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_gradient_that_one_process_lacks_counts_as_zero(processes):
    for found in processes:
        missing = found["missing"]
        assert missing["c"] is None
        assert missing["a"].tolist() == [1.5] * 3
        assert missing["b"].tolist() == [0.5] * 3
        assert missing["d"].dtype == torch.float64
        assert missing["d"].tolist() == [[1.5] * 4] * 2


@needs_shards
def test_the_full_state_of_a_sharded_model_is_that_of_an_unsharded_one(processes):
    expected = network().state_dict()
    assert processes[0]["gathered"].keys() == expected.keys()
    assert all(torch.equal(processes[0]["gathered"][name], tensor) for name, tensor in expected.items())
