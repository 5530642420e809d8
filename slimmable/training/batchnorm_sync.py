"""Batch norms of the joined batch of all processes, or of groups of its images, as a context manager."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

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
    joined, grouped = map(torch.compiler.disable, (joined_batch_norm, grouped_batch_norm))

    def batch_norm(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(names.split(), args, strict=False)) | kwargs
        given.pop("cudnn_enabled", None)
        groups = next(reversed(_groups.values()), 1)
        if not given.pop("training", False) or (groups == 1 and alone()):
            return original(*args, **kwargs)
        if groups > 1:
            states = given.pop("running_mean"), given.pop("running_var")
            return cast(Tensor, grouped(groups, given.pop("input"), *states, **given))
        return cast(Tensor, joined(**given))

    return batch_norm


def joined_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return this process's part of the batch norm of the joined batch, shape (batch, channels, ...)."""
    if input.ndim < 2:
        raise DataError(f"batch_norm: the input has shape {tuple(input.shape)}, expected (batch, channels, ...)")
    channels, graph = input.shape[1], ", with gradient" if input.requires_grad and torch.is_grad_enabled() else ""
    own = f"{channels} channels of {input.dtype.itemsize} bytes{graph}"
    advice = "run the same layers at the same width in all processes"
    counts = from_all_alike("synchronised_batchnorm", own, advice, input.device, input.numel() // max(1, channels))
    total = sum(counts)  # values per channel
    if total < 2:
        raise DataError(f"synchronised_batchnorm: all have {total} values per channel, expected more than 1")
    with torch.no_grad():
        values = at_least_float32(input)
        mean = _sums(values) / max(1, counts[dist.get_rank()])
        squares = _sums((values - _per_channel(mean, values)).square_())
        means, all_squares = from_all(torch.stack([mean, squares])).unbind(1)
        mean, squares = merged_moments(counts, means, all_squares)
        for running, found in ((running_mean, mean), (running_var, squares / (total - 1))):
            if running is not None:
                running.copy_(torch.lerp(running.to(found.dtype), found, momentum))
        scale = (squares / total + eps).rsqrt()
    return cast(Tensor, _Normalise.apply(input, weight, bias, mean, scale, total))


def grouped_batch_norm(groups: int, input: Tensor, *states: Tensor | None, **given: Any) -> Tensor:
    """Return this process's part of the batch norm of equal `groups` of the joined batch; `states` are running ones."""
    own, rest = divmod(groups, world_size())
    if rest or len(input) % own or input.numel() // (own * max(1, input.shape[1])) < 2:
        what = f"{groups} groups of a batch norm's input, of shape {tuple(input.shape)} in each of {world_size()}"
        raise DataError(f"synchronised_batchnorm: {what} processes, must be equal, and of two values per channel each")
    weight, bias, more = given.get("weight"), given.get("bias"), (given.get("momentum", 0.1), given.get("eps", 1e-5))
    outputs, found = [], []
    for part in input.chunk(own):
        found.append([None if state is None else state.clone() for state in states])
        settings = True, *more, torch.backends.cudnn.enabled
        outputs.append(torch.ops.aten.batch_norm(part, weight, bias, *found[-1], *settings))
    for state, copies in zip(states, zip(*found, strict=True), strict=True):
        if state is not None:
            mean = torch.stack(copies).mean(0)
            state.copy_(mean if alone() else from_all(mean).mean(0))
    return torch.cat(outputs)


def merged_moments(counts: Sequence[int], means: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of several samples taken together, and the sums of squared distances to them (Chan et al. 1979).

    `counts` are the samples' values per channel, 0 if empty; `means` and `squares` have shape (samples, channels).
    """
    sizes = torch.tensor(counts, dtype=means.dtype, device=means.device)[:, None]
    mean = (sizes / sum(counts) * means).sum(0)
    return mean, squares.sum(0) + (sizes * (means - mean).square()).sum(0)


class _Normalise(Function):
    """Centre, scale, apply gain and bias; the backward includes the gradient through the joined batch's moments."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, total: int
    ) -> Tensor:
        ctx.total = total
        ctx.save_for_backward(input, weight, mean, scale)
        gain = scale if weight is None else scale * weight
        output = (at_least_float32(input) - _per_channel(mean, input)).mul_(_per_channel(gain, input))
        return (output if bias is None else output.add_(_per_channel(bias, input))).to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, scale = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = at_least_float32(grad)
        normal = (at_least_float32(input) - _per_channel(mean, input)).mul_(_per_channel(scale, input))
        sums = torch.stack([_sums(grad), _sums(grad * normal)])
        grad_bias, grad_weight = sums.to(scale.dtype if weight is None else weight.dtype, copy=True)
        grad_input = None
        if needs_input:
            dist.all_reduce(sums)
            shift, slope = sums / ctx.total
            gain = scale if weight is None else scale * weight
            inner = normal.mul_(_per_channel(-slope, input)).add_(grad).sub_(_per_channel(shift, input))
            grad_input = inner.mul_(_per_channel(gain, input)).to(input.dtype)
        return grad_input, grad_weight if needs_weight else None, grad_bias if needs_bias else None, None, None, None


def _sums(values: Tensor) -> Tensor:
    """Return the sum of each channel's values, shape (channels)."""
    return values.sum([axis for axis in range(values.ndim) if axis != 1])


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per channel in the shape that broadcasts over `like`."""
    return values.view(1, -1, *[1] * (like.ndim - 2))
