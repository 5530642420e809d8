"""Several processes: gradients that many backward passes have added up, averaged once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimmable._errors import UsageError

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
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
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
