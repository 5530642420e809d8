"""Two processes: steps by `recipe.backward` and `total` have the gradients of one process, parameter by parameter."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import slimmable
from slimmable.layers import SlimLinear
from slimmable.losses import nt_xent
from slimmable.training import SlimRecipe
from tests.two_processes import run_in_two

WIDTHS = (1.0, 0.5, 0.25)
STEPS = 3  # the first, or its first part, lies in the slow start
PARTS = 2  # of an accumulated step
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
SHARDS = hasattr(torch.cpu.Stream, "record_event")
needs_shards = pytest.mark.skipif(not SHARDS, reason=f"fully_shard of torch {torch.__version__} does not run on CPUs")


class Modules(NamedTuple):
    """What a step runs, and what the recipe was given."""

    encoder: nn.Module
    head: nn.Module
    recipe: SlimRecipe


@functools.cache
def converted() -> nn.Module:
    torch.manual_seed(0)
    encoder = timm.create_model("test_resnet", num_classes=0).double()
    encoder = slimmable.slimify(encoder, WIDTHS, outputs="full")
    return nn.ModuleList([encoder, SlimLinear(96, 8, widths=WIDTHS, slim_in=False, slim_out=False).double()]).train()


def new_recipe(model: nn.Module, **options: Any) -> SlimRecipe:
    steps = STEPS * PARTS
    return SlimRecipe(model, slimmable.OnlineDistillation(), slow_start=0.1, steps=steps, **options)


# -- ways to wrap; the recipe gets the wrapper, what is inside it, or a list of wrappers
def recipe_of_the_wrapper(both: nn.ModuleList, **options: Any) -> Modules:
    joined = nn.Sequential(*both)
    wrapped = DistributedDataParallel(joined, **options)
    return Modules(wrapped, nn.Identity(), new_recipe(wrapped))


def wrapped_after_the_recipe(both: nn.ModuleList, **options: Any) -> Modules:
    joined = nn.Sequential(*both)
    recipe = new_recipe(joined)
    return Modules(DistributedDataParallel(joined, **options), nn.Identity(), recipe)


def list_of_wrappers(both: nn.ModuleList, **options: Any) -> Modules:
    encoder, head = (DistributedDataParallel(part, **options) for part in both)
    return Modules(encoder, head, new_recipe(nn.ModuleList([encoder, head])))


def sharded(both: nn.ModuleList) -> Modules:
    joined = nn.Sequential(*both)
    fully_shard(joined[0].layer1)
    fully_shard(joined)
    return Modules(joined, nn.Identity(), new_recipe(joined))


def unwrapped(both: nn.ModuleList) -> Modules:
    return Modules(*both, new_recipe(both))


Wrap = Callable[..., Modules]
WRAPS: dict[str, Wrap] = {
    "recipe of the wrapper": recipe_of_the_wrapper,
    "recipe of the wrapper, looks for unused": functools.partial(recipe_of_the_wrapper, find_unused_parameters=True),
    "recipe of the wrapper, bucket views": functools.partial(recipe_of_the_wrapper, gradient_as_bucket_view=True),
    "wrapped after the recipe": wrapped_after_the_recipe,
    "wrapped after the recipe, static graph": functools.partial(wrapped_after_the_recipe, static_graph=True),
    "list of wrappers": list_of_wrappers,
    "sharded": sharded,
}
ONE_BROADCAST = ("recipe of the wrapper", "list of wrappers")  # of buffers in a step; others at every width, or none
ACCUMULATES = ("in one part", "all parts reduced", "last part reduced")
WAYS = {
    (wrap, way, parts): (WRAPS[wrap], way, parts)
    for wrap in WRAPS
    for way in ("backward", "total")
    for parts in ACCUMULATES
    if not (parts == "last part reduced" and ("static" in wrap or wrap == "sharded"))  # torch's own limits
    and not (way == "total" and ("static" in wrap or parts != "in one part"))
}


def views(rank: int, number: int, part: int) -> Tensor:
    seed = (number * PARTS + part) * 2 + rank
    return torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else whole(p.grad).clone() for name, p in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of_step(modules: Modules, way: str, x: Tensor) -> Tensor:
    """Add up the gradients of one part of a step, whose two views go through one call; return the widest's loss."""

    def closure() -> tuple[Tensor, Tensor]:
        z = modules.head(modules.encoder(x.flatten(0, 1)))
        return nt_xent(*z.chunk(2)), z

    if way == "backward":
        return modules.recipe.backward(closure)
    modules.recipe.total(closure).backward()
    return modules.recipe.losses[1.0]


@contextlib.contextmanager
def unreduced(modules: Modules):
    with contextlib.ExitStack() as stack:
        for module in (modules.encoder, modules.head):
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def train(wrap: Wrap, way: str, parts: str) -> list[dict[str, Any]]:
    """Take the steps; return the losses, gradients and buffers of each."""
    both = copy.deepcopy(converted())
    several_forwards = way == "total" and wrap is not sharded and TORCH <= (2, 11)  # which then forbids broadcasts
    modules = wrap(both, **({"broadcast_buffers": False} if several_forwards else {}))
    optimizer = torch.optim.SGD(both.parameters(), lr=0.05)
    found = []
    for number in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for part in range(PARTS if parts != "in one part" else 1):
            held = parts == "last part reduced" and part == 0
            with unreduced(modules) if held else contextlib.nullcontext():
                losses.append(float(part_of_step(modules, way, views(dist.get_rank(), number, part))))
        buffers = {name: buffer.clone() for name, buffer in both.named_buffers()}
        found.append({"losses": losses, "gradients": gradients_of(both), "buffers": buffers})
        optimizer.step()
    return found


@functools.cache
def train_in_one_process(parts: str) -> list[list[dict[str, Any]]]:
    """The same steps on a copy for each process, with the mean of both gradients; buffers are those of the first."""
    copies = [copy.deepcopy(converted()) for _ in range(2)]
    all_modules = [unwrapped(each) for each in copies]
    found: list[list[dict[str, Any]]] = [[], []]
    for number in range(STEPS):
        losses: list[list[float]] = [[], []]
        for part in range(PARTS if parts != "in one part" else 1):
            if part == 0 or parts == "all parts reduced":
                copies[1].load_state_dict(dict(copies[0].named_buffers()), strict=False)
            for rank, modules in enumerate(all_modules):
                losses[rank].append(float(part_of_step(modules, "backward", views(rank, number, part))))
        halves = [gradients_of(each) for each in copies]
        mean = {name: None if g is None else (g + halves[1][name]) / 2 for name, g in halves[0].items()}
        for rank, each in enumerate(copies):
            buffers = {name: buffer.clone() for name, buffer in each.named_buffers()}
            found[rank].append({"losses": losses[rank], "gradients": mean, "buffers": buffers})
            with torch.no_grad():
                for name, parameter in each.named_parameters():
                    if mean[name] is not None:
                        parameter -= 0.05 * mean[name]
                    parameter.grad = None
    return found


# -- settings of DistributedDataParallel: with all weight on the full width, a step is that of the plain network
def plain_or_slim(slim: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    return slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4).double()) if slim else net


def step_with(setting: str, rank: int, slim: bool) -> Any:
    """Return the gradients of a step with this setting, or what a refusal says."""
    model, groups = plain_or_slim(slim), [dist.new_group([each]) for each in range(2)]
    if setting == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight"])
    wrapped = DistributedDataParallel(model, process_group=groups[rank] if setting == "group" else None)
    if setting == "hook":
        wrapped.register_comm_hook(None, lambda _, bucket: dist.all_reduce(bucket.buffer(), async_op=True).get_future())
    recipe = SlimRecipe(wrapped, loss_weights=[1.0, 0.0]) if slim else None
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    with wrapped.join() if setting == "join" else contextlib.nullcontext():
        if recipe is None:
            wrapped(x).square().mean().backward()
            return gradients_of(model)
        try:
            recipe.backward(lambda: wrapped(x).square().mean())
        except slimmable.errors.UsageError as error:
            return str(error)
    return gradients_of(model)


def work(rank: int) -> dict[Any, Any]:
    """What each process does: everything once, since starting a process is slow."""
    found: dict[Any, Any] = {key: train(*way) for key, way in WAYS.items() if SHARDS or key[0] != "sharded"}
    for setting in ("group", "ignored"):
        found |= {(setting, slim): step_with(setting, rank, slim) for slim in (False, True)}
    return found | {setting: step_with(setting, rank, slim=True) for setting in ("hook", "join")}


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[Any, Any]]:
    return run_in_two(work, tmp_path_factory.mktemp("processes"))


def ways() -> list[Any]:
    return [pytest.param(*key, marks=needs_shards if key[0] == "sharded" else ()) for key in WAYS]


@pytest.mark.parametrize(("wrap", "way", "parts"), ways())
def test_two_processes_are_one(wrap, way, parts, processes):
    for rank, (found, expected) in enumerate(zip(processes, train_in_one_process(parts), strict=True)):
        for ours, reference in zip(found[wrap, way, parts], expected, strict=True):
            assert ours["losses"] == pytest.approx(reference["losses"], rel=1e-8)
            assert ours["gradients"].keys() == reference["gradients"].keys()
            for name, gradient in reference["gradients"].items():
                if gradient is not None:
                    torch.testing.assert_close(ours["gradients"][name], gradient, rtol=1e-8, atol=1e-10, msg=name)
                elif way == "total" or "after" in wrap:  # DistributedDataParallel itself averages: zeros
                    assert ours["gradients"][name] is None or not ours["gradients"][name].any(), name
                else:
                    assert ours["gradients"][name] is None, name
            if rank == 0 or (way == "backward" and wrap.startswith(ONE_BROADCAST)):
                torch.testing.assert_close(ours["buffers"], reference["buffers"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("wrap", "way", "parts"), ways())
def test_both_processes_have_the_same_gradients(wrap, way, parts, processes):
    for ours, theirs in zip(*(found[wrap, way, parts] for found in processes), strict=True):
        for name, gradient in ours["gradients"].items():
            other = theirs["gradients"][name]
            assert torch.equal(gradient, other) if gradient is not None else other is None, name


@pytest.mark.parametrize("setting", ["group", "ignored"])
def test_settings_of_the_wrapper_hold(setting, processes):
    for found in processes:
        torch.testing.assert_close(found[setting, True], found[setting, False], rtol=1e-12, atol=1e-12)


def test_what_expects_one_backward_pass_is_refused(processes):
    for found in processes:
        assert "a communication hook of DistributedDataParallel expects one backward pass" in found["hook"]
        assert "join of DistributedDataParallel expects one backward pass" in found["join"]
