"""Several processes: gradients averaged once per step, embeddings gathered, batch norms of the joined batch."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from slimmable._errors import DataError, UsageError
from slimmable.losses._cosines import at_least_float32
from slimmable.training._batchnorm_sync import synchronised_batchnorm as synchronised_batchnorm
from slimmable.training._processes import alone, of_all

_BUCKET = 25 * 2**20  # bytes in one reduction, as in DistributedDataParallel


def average_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Replace every gradient of `model` by its average over the processes; call it after the step's last `backward`.

    A step of `SlimRecipe` has one backward pass per width, and each leaves out the parameters of other widths.
    DistributedDataParallel expects one pass that uses all: let the loop run under its `no_sync`, and then call this.
    A model without that wrapper works too, if all processes start from the same weights.

    A gradient that is None in all processes stays None; where only some have it, it counts as zero in the others.
    Without a process group, or with one process, nothing happens.

    Args:
        model: the same model in each process, wrapped in DistributedDataParallel or not.
        group: the processes to average over; all of them by default.

    Raises: UsageError: if the gradients are sharded, as `fully_shard` makes them: it averages them itself.

    >>> layer = nn.Linear(2, 1)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> average_gradients(layer)  # the only process: nothing to do
    """
    if alone(group):
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return
    if any(hasattr(parameter, "placements") for parameter in parameters):
        raise UsageError("average_gradients: the parameters are sharded; fully_shard averages their gradients itself")
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group)
    gradients = []
    for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
        if anywhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket, strict=True)])


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list into runs of one type and device, each of at most about the size of a bucket."""
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


def gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the tensors of all processes in one, joined along dim 0 in rank order, with gradient.

    For losses that compare the images of a batch with each other: every process computes the loss of the joined batch
    from the gathered embeddings, and `average_gradients` after the last `backward` makes of it the gradients that one
    process would get on the joined batch. As the backward pass communicates, too, all processes must run it.

    Tensors of any type can be gathered; what needs no gradient comes back without a graph. Two views at once spare a
    round: `z0, z1 = gather(torch.stack([z0, z1], dim=1)).unbind(1)`. Without a process group, or with one process,
    the result is `tensor` itself.

    Args:
        tensor: shape (batch, ...), the same in all processes; the result has shape (processes * batch, ...).
        group: the processes to gather from; all of them by default.

    Raises: DataError: in all processes, if their tensors differ in shape, type or need of gradient, or lack a dim 0.

    >>> embeddings = torch.ones(4, 8)
    >>> gather(embeddings).shape  # the only process: nothing to add
    torch.Size([4, 8])
    """
    if alone(group):
        return tensor
    _check_alike(tensor, group)
    return cast(Tensor, _Gather.apply(tensor, group))


class _Gather(Function):
    """All-gather; its backward adds up what the processes ask of each row, and hands every process its own rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return torch.cat(of_all(tensor, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = at_least_float32(grad).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        own = total.tensor_split(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)]
        return own.to(grad.dtype), None


def _check_alike(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Raise `DataError` in all processes unless their tensors can be gathered."""
    graph = tensor.requires_grad and torch.is_grad_enabled()
    own = f"{tuple(tensor.shape)} of {tensor.dtype}{', with gradient' if graph else ''}"
    digest = torch.tensor(zlib.crc32(own.encode()), device=tensor.device)
    if len(set(torch.stack(of_all(digest, group)).tolist())) > 1:
        all_own: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(all_own, own, group)
        listed = "; ".join(f"process {number}: {what}" for number, what in enumerate(all_own))
        raise DataError(
            f"gather: the processes' tensors must be alike, but are {listed}; give batches of one size (drop_last=True)"
        )
    if tensor.ndim == 0:
        raise DataError("gather: a scalar has no dim 0 to join along; give a tensor of shape (batch, ...)")
