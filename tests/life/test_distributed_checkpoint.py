"""`torch.distributed.checkpoint` saves and restores model and optimizer of converted models, also in two processes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import slimmable
from slimmable.layers import SwitchableProbe
from tests.life.test_distributed import needs_shards
from tests.two_processes import run_in_two

WIDTHS = (1.0, 0.5)
pytestmark = pytest.mark.skipif(
    not hasattr(StateDictOptions, "dsd_fqn_modifiers"), reason=f"torch {torch.__version__} asks no module for its names"
)


def plain_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
        BatchNormAct2d(8, act_layer=nn.PReLU, act_kwargs={"num_parameters": 8}),
        nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


def converted(**options: Any) -> nn.Module:
    return slimmable.slimify(plain_network(), WIDTHS, example_inputs=torch.zeros(2, 3, 8, 8), **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain_network,
    "converted": converted,
    "universal": lambda: converted(universal=True),
    "part": lambda: converted()[1],
    "gated": lambda: slimmable.gating.gate(converted(), example_inputs=torch.zeros(2, 3, 8, 8)),
    "timm": lambda: slimmable.slimify(timm.create_model("test_resnet", num_classes=4), WIDTHS),
    "probe": lambda: SwitchableProbe(8, 3, WIDTHS),
}
OPTIONS = {
    "as it is": {},
    "full": {"full_state_dict": True},
    "full, on the CPU": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
}


def filled(model: nn.Module, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its AdamW, in which every number is random; a step fills the optimizer's state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor) -> None:
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        own.detach().copy_(torch.rand(own.shape, generator=generator))

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values()]
    for tensor in (*model.parameters(), *model.buffers(), *states):
        fill(tensor)
    return model, optimizer


def numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a checkpoint must restore, by names that do not come from `torch.distributed.checkpoint`."""
    found = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        found |= {f"{name} {key}": value for key, value in optimizer.state[parameter].items()}
    found = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}
    return {name: value.clone() for name, value in found.items()}


def check_restored(make: Callable[[], nn.Module], options: dict[str, Any], folder: str | None) -> None:
    """Restore a model and an optimizer from another one's state, by way of a folder if one is given."""
    source, own = filled(make(), seed=1)
    expected = numbers(source, own)
    settings = StateDictOptions(**options)
    model_state, optimizer_state = get_state_dict(source, own, options=settings)
    target, other = filled(make(), seed=2)
    if folder is not None:
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
        model_state, optimizer_state = get_state_dict(target, other)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    if dist.is_initialized() and "cpu_offload" in options:  # only the first process has it
        states = [model_state, optimizer_state]
        dist.broadcast_object_list(states)
        model_state, optimizer_state = states
    plain = target.module if isinstance(target, DistributedDataParallel) else target
    assert list(model_state) == list(plain.state_dict())
    set_state_dict(target, other, model_state_dict=model_state, optim_state_dict=optimizer_state, options=settings)
    found = numbers(target, other)
    assert list(found) == list(expected)
    differing = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not differing
    assert other.param_groups[0]["lr"] == own.param_groups[0]["lr"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("name", MODELS)
def test_model_and_optimizer_are_restored(name, options, recwarn):
    check_restored(MODELS[name], options, None)


def test_through_a_folder(tmp_path, recwarn):
    check_restored(MODELS["gated"], {}, str(tmp_path))


@functools.cache
def network() -> nn.Module:
    return MODELS["timm"]()


def in_ddp() -> nn.Module:
    return DistributedDataParallel(copy.deepcopy(network()))


def sharded() -> nn.Module:
    model = copy.deepcopy(network())
    fully_shard(model.layer1)
    return fully_shard(model)


def work(folder: Path, rank: int) -> bool:
    for make in (in_ddp, sharded):
        for options in ({}, {"full_state_dict": True}):
            check_restored(make, options, None)
        check_restored(make, {}, str(folder / make.__name__))
    check_restored(sharded, {"full_state_dict": True, "cpu_offload": True}, None)
    return True


@needs_shards
def test_in_two_processes_with_fully_shard_and_ddp(tmp_path):
    assert run_in_two(functools.partial(work, tmp_path), tmp_path) == [True, True]
