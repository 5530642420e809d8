"""Batch norms of the joined batch of all processes, or of groups of its images, as a context manager."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from slimmable._checks import check_count
from slimmable._distributed import alone, from_all, from_all_alike, world_size
from slimmable._numerics import at_least_float32
from slimmable._reach import PROCESS
from slimmable.errors import DataError

_originals: list[Any] = []  # torch's functions, while a block is open
_groups: dict[object, int] = {}  # of each block that is open in any thread


@contextmanager
def synchronised_batchnorm(groups: int = 1) -> Iterator[None]:
    """Run a block in which every batch norm in training mode works on the joined batch of all processes.

    Outputs, gradients and running statistics are those of one process with the joined batch. The block applies to all
    that calls `torch.nn.functional.batch_norm`, as the norms of torch, timm and slimmable models do, but not to layers
    in eval mode that have running statistics. The processes must run the same layers in the same order, at the same
    width; their batches may differ in size. Half precision is computed in float32. With one process nothing changes.

    Run forward passes in the block, with activation checkpointing `backward` too. It applies to all threads, but not to
    TorchScript or second derivatives. On GPUs `nn.SyncBatchNorm.convert_sync_batchnorm` is faster and works as well.

    Args:
        groups: how many equal parts of the joined batch, a multiple of the number of processes, have statistics of
            their own, as on that many GPUs without synchronisation. Running statistics get the mean of the groups'.

    Raises: DataError: in all processes, if the input of a batch norm differs between them in channels, dtype or need
        for gradients, has fewer than two values per channel in the joined batch or in a group, or cannot be divided
        into the groups.

    >>> norm = torch.nn.BatchNorm1d(2)
    >>> with synchronised_batchnorm():  # the only process: the batch is the joined batch
    ...     norm(torch.tensor([[0.0, 1.0], [2.0, 5.0]])).detach().round(decimals=2)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    check_count("synchronised_batchnorm", groups=groups)
    if alone() and groups == 1 and not _groups:
        yield
        return
    block = object()
    with PROCESS:
        if not _groups:
            # A TorchFunctionMode would not do: it is off in `backward`, where checkpointing runs forwards again.
            _originals[:] = F.batch_norm, torch.batch_norm
            names = "input running_mean running_var weight bias training momentum eps"
            F.batch_norm = _joined(F.batch_norm, names)
            names = "input weight bias running_mean running_var training momentum eps cudnn_enabled"
            torch.batch_norm = _joined(torch.batch_norm, names)
        _groups[block] = groups
    try:
        yield
    finally:
        with PROCESS:
            del _groups[block]
            if not _groups:
                F.batch_norm, torch.batch_norm = _originals


def _joined(original: Callable[..., Tensor], names: str) -> Callable[..., Tensor]:
    """Return a batch norm with the arguments of `original` that joins the batches in training mode."""
    # hidden from the compiler; here and not at the top, because this loads it
    joined: Callable[..., Tensor] = torch.compiler.disable(joined_batch_norm)  # type: ignore[no-untyped-call]

    def batch_norm(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(names.split(), args, strict=False)) | kwargs
        given.pop("cudnn_enabled", None)
        groups = next(reversed(_groups.values()), 1)
        if not given.pop("training", False) or (groups == 1 and alone()):
            return original(*args, **kwargs)
        return joined(groups, **given)

    return batch_norm


def joined_batch_norm(
    groups: int,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return this process's part of the batch norm of the joined batch, or of `groups` parts of it."""
    if groups > 1:
        return _of_groups(groups, input, (running_mean, running_var), weight, bias, momentum, eps)
    if input.ndim < 2:
        raise DataError(f"batch_norm: the input has shape {tuple(input.shape)}, expected (batch, channels, ...)")
    channels, graph = input.shape[1], ", with gradient" if input.requires_grad and torch.is_grad_enabled() else ""
    own = f"{channels} channels of {input.dtype.itemsize} bytes{graph}"
    advice = "run the same layers at the same width in all processes"
    values = input.numel() // max(1, channels)
    total = sum(from_all_alike("synchronised_batchnorm", own, advice, input.device, values))  # per channel
    if total < 2:
        raise DataError(f"synchronised_batchnorm: all have {total} values per channel, expected more than 1")
    mean, variance = _Moments.apply(input, total)
    for running, found in ((running_mean, mean), (running_var, variance * (total / (total - 1)))):
        if running is not None:
            running.copy_(torch.lerp(running.to(found.dtype), found.detach().flatten(), momentum))
    gain = (variance + eps).rsqrt()
    gain = gain if weight is None else gain * weight.view_as(gain)
    shift = -mean * gain if bias is None else bias.view_as(gain) - mean * gain
    return torch.mul(input, gain).add_(shift).to(input.dtype)  # a product of two types keeps only the input itself


def _of_groups(
    groups: int, input: Tensor, states: Sequence[Tensor | None], weight: Any, bias: Any, *settings: float
) -> Tensor:
    own, rest = divmod(groups, world_size())
    if rest or len(input) % own or input.numel() // (own * max(1, input.shape[1])) < 2:
        what = f"{groups} groups of a batch norm's input, of shape {tuple(input.shape)} in each of {world_size()}"
        raise DataError(f"synchronised_batchnorm: {what} processes, must be equal, and of two values per channel each")
    outputs, found = [], []
    for part in input.chunk(own):
        found.append([None if state is None else state.clone() for state in states])
        more = True, *settings, torch.backends.cudnn.enabled
        outputs.append(torch.ops.aten.batch_norm(part, weight, bias, *found[-1], *more))
    for state, copies in zip(states, zip(*found, strict=True), strict=True):
        if state is not None:
            mean = torch.stack(copies).mean(0)
            state.copy_(mean if alone() else from_all(mean).mean(0))
    return torch.cat(outputs)


class _Moments(Function):
    """Mean and variance of each channel of the joined batch, which broadcast over the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, total: int) -> tuple[Tensor, Tensor]:
        values = at_least_float32(input)
        mean = _summed(values) / total
        ctx.total = total
        ctx.save_for_backward(input, mean)
        return mean, _summed((values - mean).square_()) / total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        input, mean = ctx.saved_tensors
        sums = torch.stack(grads)
        dist.all_reduce(sums)
        of_mean, of_variance = sums / ctx.total
        return (at_least_float32(input) - mean).mul_(2 * of_variance).add_(of_mean).to(input.dtype), None


def _summed(values: Tensor) -> Tensor:
    """Return the sum of each channel's values in all processes, shape (1, channels, 1, ...)."""
    sums = values.sum([axis for axis in range(values.ndim) if axis != 1], keepdim=True)
    dist.all_reduce(sums)
    return sums
