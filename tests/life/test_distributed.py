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
from torch.utils.checkpoint import checkpoint

import slimmable
from slimmable.errors import UsageError
from slimmable.layers import SwitchableProbe
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


def reduced_each_time(model: nn.Module, x: Tensor, widths: tuple[float, ...]) -> None:
    """The plain loop, in which DDP averages the gradients so far after every backward."""
    for width in widths:
        with slimmable.at_width(model, width):
            loss_of(model(x)).backward()


def reduced_at_the_last(model: nn.Module, x: Tensor, widths: tuple[float, ...]) -> None:
    """As plain programs accumulate gradients: all but the last backward under `no_sync`."""
    for width in widths:
        with slimmable.at_width(model, width), model.no_sync() if width != widths[-1] else contextlib.nullcontext():
            loss_of(model(x)).backward()


def all_in_ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(slimmable.AllWidths(model), **options)


def ddp_of_several_forwards(model: nn.Module, **options: Any) -> nn.Module:
    """Up to torch 2.11, the second forward would overwrite the statistics of norms that the first's backward reads."""
    return DistributedDataParallel(model, broadcast_buffers=TORCH > (2, 11), **options)


class Checkpointed(nn.Module):
    """The network with its stages recomputed in the backward pass."""

    def __init__(self, model: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.maxpool(self.model.act1(self.model.bn1(self.model.conv1(x))))
        for stage in (self.model.layer1, self.model.layer2, self.model.layer3, self.model.layer4):
            x = checkpoint(stage, x, use_reentrant=self.use_reentrant)
        return self.model.forward_head(x)


def sharded(model: nn.Module) -> nn.Module:
    for block in (model.layer1, model.layer3):
        fully_shard(block)
    return fully_shard(model)


def sharded_around_all(model: nn.Module) -> nn.Module:
    fully_shard(model.layer1)
    return fully_shard(slimmable.AllWidths(model))


Wrap = Callable[[nn.Module], nn.Module]
Step = Callable[[nn.Module, Tensor, tuple[float, ...]], None]
PLAIN_WRAPPERS: dict[str, Wrap] = {
    "DDP": DistributedDataParallel,
    "DDP with bucket views": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "DDP that looks for unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "DDP, static graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "DDP, checkpoints": lambda model: DistributedDataParallel(Checkpointed(model, use_reentrant=False)),
    "DDP, reentrant checkpoints": lambda model: DistributedDataParallel(Checkpointed(model, use_reentrant=True)),
}
WAYS: dict[str, tuple[Wrap, Step, bool]] = {
    # name: wrapper, step, whether narrow widths wait for the end of the slow start
    **{f"{name}, reduced each time": (wrap, reduced_each_time, True) for name, wrap in PLAIN_WRAPPERS.items()},
    **{
        f"{name}, reduced at the last": (wrap, reduced_at_the_last, True)
        for name, wrap in PLAIN_WRAPPERS.items()
        if name != "DDP, static graph"  # of any model, torch refuses to begin with no_sync
    },
    "DDP of all widths": (all_in_ddp, summed, False),
    "DDP of all widths, static graph": (lambda model: all_in_ddp(model, static_graph=True), summed, False),
    "DDP, one forward a width, summed": (ddp_of_several_forwards, summed, False),
    "DDP that looks for unused, one forward a width, summed": (
        lambda model: ddp_of_several_forwards(model, find_unused_parameters=True),
        summed,
        False,
    ),
    "DDP, static graph, one forward a width, summed": (
        lambda model: ddp_of_several_forwards(model, static_graph=True),
        summed,
        False,
    ),
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


def unswitched(wrap: Wrap, model: nn.Module) -> dict[str, Tensor]:
    """Three plain steps of a model that nobody switches: the losses, and the state dict after them."""
    wrapped = wrap(model.float())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=0.01)
    losses = []
    for number in range(3):
        optimizer.zero_grad()
        loss = loss_of(wrapped(images(2 * number + dist.get_rank()).float()))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)} | model.state_dict()


def idle_parts() -> list[Gradients]:
    """Two steps of a probe, and of the dense pass of a model with gates, at full width."""
    probe = SwitchableProbe(4, 3, WIDTHS)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    example = torch.zeros(2, 4)
    slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=example)
    gated = slimmable.gating.gate(slim, example_inputs=example)
    for model in (probe, gated):
        wrapped = DistributedDataParallel(model)
        for _ in range(2):
            wrapped(torch.ones(3, 4) + dist.get_rank()).square().mean().backward()
    return [gradients_of(probe), gradients_of(gated)]


def some_gradients_are_missing() -> Gradients:
    """`b` has a gradient in process 1 only, `c` in none; the types differ."""
    rank = dist.get_rank()
    model = nn.ParameterDict({name: torch.zeros(3) for name in "abc"})
    model["d"] = torch.zeros(2, 4, dtype=torch.float64)
    model["a"].grad = torch.full((3,), 1.0 + rank)
    model["d"].grad = torch.full((2, 4), 3.0 * rank, dtype=torch.float64)
    if rank == 1:
        model["b"].grad = torch.ones(3)
    average_gradients(model)
    return gradients_of(model)


def gathered() -> dict[str, Tensor]:
    """What a sharded model saves for later use without shards."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    return get_model_state_dict(sharded(network()), options=options)


def work(rank: int) -> dict[str, Any]:
    """What each process does: everything once, since starting a process is slow."""
    found: dict[str, Any] = {way: train(way, rank) for way in WAYS if SHARDS or "fully_shard" not in way}
    plain = timm.create_model("test_resnet", num_classes=5).train()
    plain.load_state_dict({name: tensor for name, tensor in network().state_dict().items() if "narrow" not in name})
    found["plain"] = {name: unswitched(wrap, copy.deepcopy(plain)) for name, wrap in PLAIN_WRAPPERS.items()}
    found["unswitched"] = {name: unswitched(wrap, network()) for name, wrap in PLAIN_WRAPPERS.items()}
    found["idle parts"] = idle_parts()
    found["missing"] = some_gradients_are_missing()
    if not SHARDS:
        return found
    found["gathered"] = gathered()
    with pytest.raises(UsageError, match="fully_shard averages"):
        average_gradients(sharded(network()))
    split = sharded(network())
    for run in (
        lambda: slimmable.extract(split, 0.5),
        lambda: slimmable.save(split, "never.safetensors"),
        lambda: slimmable.slimify(split, (1.0, 0.75)),
        lambda: slimmable.plan(split),
        lambda: slimmable.full_state_dict(split),
        lambda: slimmable.profile(split, (3, 32, 32)),
        lambda: slimmable.gating.gate(split),
    ):
        with pytest.raises(UsageError, match="split over processes"):
            run()
    with torch.no_grad():
        split(torch.rand(2, 3, 32, 32, dtype=torch.float64))  # after which some parameters are whole
    with pytest.raises(UsageError, match="split over processes"):
        slimmable.extract(split, 0.5)
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
                if gradient is None and "reduced" in way:  # whether an idle norm's is missing or zero is DDP's affair
                    assert step[name] is None or not step[name].any(), name
                elif gradient is None:
                    assert step[name] is None, name
                else:
                    torch.testing.assert_close(step[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", PLAIN_WRAPPERS)
def test_a_model_that_nobody_switches_trains_as_the_plain_one_to_the_last_bit(name, processes):
    for found in processes:
        plain, converted = found["plain"][name], found["unswitched"][name]
        assert len(converted) > len(plain)
        assert all(torch.equal(converted[key], tensor) for key, tensor in plain.items())


def test_probes_and_gates_may_be_idle_too(processes):
    for ours, theirs in zip(*(found["idle parts"] for found in processes), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    probe, gated = processes[0]["idle parts"]
    trained = [name for name, gradient in probe.items() if gradient.any()]
    assert trained == ["linears.0.weight", "linears.0.bias"]
    gates = [gradient for name, gradient in gated.items() if "channel_gate" in name]
    assert gates
    assert not any(gradient.any() for gradient in gates)
    assert any(gradient.any() for gradient in gated.values())


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
