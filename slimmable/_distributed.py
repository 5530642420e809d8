"""Talk to the other processes of a training: which one am I, gather tensors, average gradients."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from slimmable._numerics import at_least_float32
from slimmable.errors import DataError, UsageError

_BUCKET = 25 * 2**20  # bytes in one reduction, as in DistributedDataParallel


def alone() -> bool:
    """Return whether there is no process group, or this process is the only one in it."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def rank() -> int:
    """Return the number of this process; 0 without a process group."""
    return 0 if alone() else dist.get_rank()


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return 1 if alone() else dist.get_world_size()


def from_all(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all processes in rank order, without gradient; they must agree in shape and type."""
    own = tensor.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return parts


def means_over_processes(*values: Tensor) -> list[float]:
    """Return the mean of each scalar over all processes, so that all of them see the same numbers, NaN included."""
    means = torch.stack([at_least_float32(value.detach()).reshape(()) for value in values])
    if not alone():
        dist.all_reduce(means)
        means /= world_size()
    found: list[float] = means.tolist()
    return found


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient of `model` by its average over the processes; call it after the step's last `backward`.

    A step of `SlimRecipe` runs one backward pass per width, and each leaves out the parameters of other widths.
    DistributedDataParallel expects a single pass that uses every parameter, so run the loop under its `no_sync`, then
    call this. An unwrapped model works too, if all processes start from the same weights.

    A gradient that is None in every process stays None; where only some processes have it, it counts as zero in the
    others. Without a process group, or with one process, nothing happens.

    Args:
        model: the same in each process, wrapped in DistributedDataParallel or not.

    Raises: UsageError: if the gradients are sharded, as by `fully_shard`, which averages them itself.

    >>> layer = nn.Linear(2, 1)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> average_gradients(layer)  # the only process: nothing to do
    """
    if alone():
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return
    if any(hasattr(parameter, "placements") for parameter in parameters):
        raise UsageError("average_gradients: the parameters are sharded; fully_shard averages their gradients itself")
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    gradients = []
    for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
        if anywhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket, strict=True)])


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list into runs of one type and device, each of about one bucket's size at most."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        fits = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not fits or size + tensor.nbytes > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, concatenated along dim 0 in rank order; gradients flow back.

    For losses that compare the images of a batch with each other: every process computes the loss of the joined batch
    from the gathered embeddings, and `average_gradients` after the last `backward` then gives the gradients that one
    process would get from the joined batch. The backward pass communicates too, so all processes must run it.

    Tensors of any type can be gathered; those that need no gradient come back without a graph. Two views at once save
    a round: `z0, z1 = gather(torch.stack([z0, z1], dim=1)).unbind(1)`. Without a process group, or with one process,
    the result is `tensor` itself.

    Args:
        tensor: shape (batch, ...), the same in all processes; the result has shape (processes * batch, ...).

    Raises: DataError: in all processes, if their tensors differ in shape, type or need of gradient, or are scalars.

    >>> embeddings = torch.ones(4, 8)
    >>> gather(embeddings).shape  # the only process: nothing to add
    torch.Size([4, 8])
    """
    if alone():
        return tensor
    _check_alike(tensor)
    return cast(Tensor, _Gather.apply(tensor))


class _Gather(Function):
    """All-gather; its backward sums the gradients of all processes and gives each process those of its own rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return torch.cat(from_all(tensor))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = at_least_float32(grad).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.tensor_split(dist.get_world_size())[dist.get_rank()].to(grad.dtype)


def _check_alike(tensor: Tensor) -> None:
    """Raise `DataError` in all processes unless their tensors can be gathered."""
    graph = tensor.requires_grad and torch.is_grad_enabled()
    own = f"{tuple(tensor.shape)} of {tensor.dtype}{', with gradient' if graph else ''}"
    digest = torch.tensor(zlib.crc32(own.encode()), device=tensor.device)
    if len(set(torch.stack(from_all(digest)).tolist())) > 1:
        all_own: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_own, own)
        listed = "; ".join(f"process {number}: {what}" for number, what in enumerate(all_own))
        raise DataError(
            f"gather: the processes' tensors must be alike, but are {listed}; give batches of one size (drop_last=True)"
        )
    if tensor.ndim == 0:
        raise DataError("gather: a scalar has no dim 0 to join along; give a tensor of shape (batch, ...)")
