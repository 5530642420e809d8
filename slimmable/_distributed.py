"""Distributed training: this process and the others, gathered tensors, averaged gradients."""

import zlib
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, compress
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.autograd.function import Function, once_differentiable
from torch.nn.parallel import DistributedDataParallel

from slimmable._checks import check_is_module, check_tensors, has_shards
from slimmable._numerics import at_least_float32
from slimmable.errors import DataError, UsageError

_BUCKET = 25 * 2**20  # about the bytes in one reduction, as in DistributedDataParallel
_trained = WeakKeyDictionary[nn.Module, set[str]]()  # the widths at which modules had gradients


def in_group() -> bool:
    """Return whether there is a process group, if only of this process."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process; the first, 0, writes files and messages."""
    return dist.get_rank() if in_group() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if in_group() else 1


def any_process(value: bool, device: torch.device) -> bool:
    return value if world_size() == 1 else means_over_processes(torch.tensor(float(value), device=device))[0] > 0


def from_all(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the tensors of all processes, stacked in rank order, without gradient; shapes and types must agree."""
    own = tensor.detach().contiguous()
    everyones = own.new_empty((dist.get_world_size(group), *own.shape))
    dist.all_gather(list(everyones.unbind()), own, group)
    return everyones


def from_all_alike(where: str, own: str, advice: str, device: torch.device, number: int = 0) -> list[int]:
    """Return a number of each process; raise `DataError` in all unless `own`, which says what each has, is the same."""
    numbers, digests = from_all(torch.tensor([number, zlib.crc32(own.encode())], device=device)).T.tolist()
    if len(set(digests)) > 1:
        raise DataError(f"{where}: the processes' tensors must be alike, but are {_listed(own)}; {advice}")
    return cast("list[int]", numbers)


def _listed(own: str, group: dist.ProcessGroup | None = None) -> str:
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, own, group)
    return "; ".join(f"process {rank}: {what}" for rank, what in enumerate(everyones))


def check_same_widths(where: str, widths: str, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Raise `UsageError` in all processes if some train at other widths than others; "" stands for one that waits."""
    if len({*from_all(torch.tensor([zlib.crc32(widths.encode())], device=device), group).flatten().tolist(), 0}) > 2:
        what = f"the processes must train at the same widths, but those of {_listed(widths, group)}"
        raise UsageError(f"{where}: {what}; give all recipes the same arguments, seed and number of steps")


def check_same_settings(where: str, settings: str, model: nn.Module) -> None:
    """Run `check_same_widths` if DistributedDataParallel or `fully_shard` average, which all processes must reach."""
    groups = [part.process_group for part in model.modules() if isinstance(part, DistributedDataParallel)]
    if world_size() > 1 and (groups or has_shards(model.parameters())):
        check_same_widths(where, settings, next(model.parameters()).device, *groups[:1])


def note_width(module: nn.Module, width: object) -> None:
    """Note that a module gets gradients at a width, for `average_gradients` to compare between processes."""
    _trained.setdefault(module, set()).add(str(width))


def means_over_processes(*values: Tensor) -> list[float]:
    """Return the mean of each scalar over all processes, the same in each of them, NaN included."""
    means = torch.stack([at_least_float32(value.detach()).reshape(()) for value in values])
    if world_size() > 1:
        dist.all_reduce(means)
        means /= world_size()
    return cast("list[float]", means.tolist())


def where_not_finite(device: torch.device, **kinds: Iterable[Tensor]) -> str:
    """Say in which processes tensors of the first of these kinds are not finite, unless that is so in all or none."""
    for kind, tensors in kinds.items():
        fine = torch.tensor([all(tensor.isfinite().all() for tensor in tensors)], device=device).int()
        ranks = [str(rank) for rank, (own,) in enumerate(from_all(fine).tolist() if in_group() else []) if not own]
        if 0 < len(ranks) < world_size():
            return f"; the {kind} of process {', '.join(ranks)} are not finite"
    return ""


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient of `model` with its average over the processes; call after the step's last `backward`.

    DistributedDataParallel expects one backward pass that uses every parameter, not one per width: for a `model` in it,
    run the loop under its `no_sync`. All processes must have started from the same weights. A gradient that only some
    have counts as zero in the others. Call this before the `unscale_` of a `GradScaler`, so that all processes skip a
    step that is infinite in one. With one process nothing happens.
    Raises: UsageError: if the gradients are sharded, as by `fully_shard`, which averages them itself; or, in all
        processes, if switchable norms or a `SlimRecipe` had gradients at other widths in one process than in another.

    >>> layer = nn.Linear(2, 1)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> average_gradients(layer)  # the only process: nothing to do
    """
    check_is_module("average_gradients", model)
    _average(model)


def _average(model: nn.Module, group: dist.ProcessGroup | None = None, ignored: Container[str] = ()) -> None:
    parameters = [own for name, own in model.named_parameters() if own.requires_grad and name not in ignored]
    if world_size(group) == 1 or not parameters:
        return
    if has_shards(parameters):
        raise UsageError("average_gradients: the parameters are sharded; fully_shard averages their gradients itself")
    device, widths = parameters[0].device, {width for each in model.modules() for width in _trained.pop(each, ())}
    check_same_widths("average_gradients", ", ".join(sorted(widths, reverse=True)), device, group)
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group)
    gradients: dict[torch.device, list[Tensor]] = {}
    for parameter in compress(parameters, used.tolist()):
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.setdefault(parameter.grad.device, []).append(parameter.grad)
    for bucket in chain(*(_take_tensors(each, _BUCKET) for each in gradients.values())):  # type: ignore[no-untyped-call]
        flat = _flatten_dense_tensors(bucket)  # type: ignore[no-untyped-call]
        dist.all_reduce(flat, group=group)
        flat /= world_size(group)
        torch._foreach_copy_(bucket, _unflatten_dense_tensors(flat, bucket))  # type: ignore[no-untyped-call]


@contextmanager
def averaged_once(model: nn.Module) -> Iterator[None]:
    """Average the gradients of each DistributedDataParallel in `model` once, after the block, not in its backwards."""
    wrapped = (part for part in model.modules() if isinstance(part, DistributedDataParallel))
    # not those under their `no_sync`, or with a static graph
    synced = [part for part in wrapped if part.require_backward_grad_sync and not part.static_graph]
    one = "of DistributedDataParallel expects one backward pass in a step"
    if any(part._comm_hooks for part in synced):
        raise UsageError(f"SlimRecipe: a communication hook {one}; call backward on recipe.total(closure) instead")
    if any(part._join_config.enable for part in synced):
        raise UsageError(f"SlimRecipe: join {one}; give all processes the same number of batches instead")
    with ExitStack() as stack:
        for part in synced:
            stack.enter_context(part.no_sync())
        yield
    for part in synced:
        _average(part.module, part.process_group, part.parameters_to_ignore)
        part.require_forward_param_sync = True  # the next forward hands out buffers, as after a plain step


def gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, concatenated along dim 0 in rank order; gradients flow back.

    For losses that compare the images of a batch: every process computes the loss of the joined batch and, after
    `average_gradients`, has the gradients of one process with that batch. All must run the backward pass. One process
    gets `tensor` itself. Two views at once save a round: `z0, z1 = gather(torch.stack([z0, z1], dim=1)).unbind(1)`.
    Shapes: (batch, ...), the same in all processes -> (processes * batch, ...), of any type.
    Raises: DataError: in all processes, if their tensors differ in shape, type or `requires_grad`, or are scalars.

    >>> embeddings = torch.ones(4, 8)
    >>> gather(embeddings).shape  # the only process: nothing to add
    torch.Size([4, 8])
    """
    check_tensors("gather", tensor=tensor)
    if world_size() == 1:
        return tensor
    graph = ", with gradient" if tensor.requires_grad and torch.is_grad_enabled() else ""
    own = f"{tuple(tensor.shape)} of {tensor.dtype}{graph}"
    from_all_alike("gather", own, "use batches of one size (drop_last=True)", tensor.device)
    if tensor.ndim == 0:
        raise DataError("gather: a scalar has no dim 0 to join along; pass a tensor of shape (batch, ...)")
    return cast(Tensor, _Gather.apply(tensor))


class _Gather(Function):
    """All-gather; the backward pass sums the gradients of all processes and returns those of this process's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return from_all(tensor).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = at_least_float32(grad).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.tensor_split(dist.get_world_size())[dist.get_rank()].to(grad.dtype)
