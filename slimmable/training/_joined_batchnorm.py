"""The batch norm of a batch whose parts are in several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from slimmable.errors import DataError
from slimmable.losses._cosines import at_least_float32
from slimmable.training._processes import of_all


def joined_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Return what `batch_norm` in training gives for the own part of the joined batch, shape (batch, channels, ...)."""
    counts = _counts(input, group)
    with torch.no_grad():
        values = at_least_float32(input)
        mean = _sums(values) / max(1, counts[dist.get_rank(group)])
        squares = _sums((values - _per_channel(mean, values)).square_())
        means, all_squares = torch.stack(of_all(torch.stack([mean, squares]), group)).unbind(1)
        mean, squares = merged_moments(counts, means, all_squares)
        total = sum(counts)
        for running, found in ((running_mean, mean), (running_var, squares / (total - 1))):
            if running is not None:
                running.copy_(torch.lerp(running.to(found.dtype), found, momentum))
        scale = (squares / total + eps).rsqrt()
    return cast(Tensor, _Normalise.apply(input, weight, bias, mean, scale, total, group))


def merged_moments(counts: Sequence[int], means: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means, and the sums of squared distances to them, of the union of several samples.

    The pairwise update of Chan, Golub and LeVeque (1979), for any number of samples; a sample may be empty.

    Args:
        counts: values per channel in each sample.
        means, squares: shape (samples, channels); the mean of each sample, and the sum of squared distances to it.

    >>> merged_moments([1, 3], torch.tensor([[0.0], [4.0]]), torch.tensor([[0.0], [6.0]]))  # e.g. of 0 and 3, 3, 6
    (tensor([3.]), tensor([18.]))
    """
    sizes = torch.tensor(counts, dtype=means.dtype, device=means.device)[:, None]
    mean = (sizes / sum(counts) * means).sum(0)
    return mean, squares.sum(0) + (sizes * (means - mean).square()).sum(0)


class _Normalise(Function):
    """Centre, scale, and apply gain and bias; the backward includes the way through the moments of the joined batch."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        total: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.total, ctx.group = total, group
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
            dist.all_reduce(sums, group=ctx.group)
            shift, slope = sums / ctx.total
            gain = scale if weight is None else scale * weight
            inner = normal.mul_(_per_channel(-slope, input)).add_(grad).sub_(_per_channel(shift, input))
            grad_input = inner.mul_(_per_channel(gain, input)).to(input.dtype)
        rest = (None, None, None, None)
        return grad_input, grad_weight if needs_weight else None, grad_bias if needs_bias else None, *rest


def _counts(input: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """Return the number of values per channel in each process; raise `DataError` in all if they cannot be joined."""
    if input.ndim < 2:
        raise DataError(f"batch_norm: the input has shape {tuple(input.shape)}, expected (batch, channels, ...)")
    channels = input.shape[1]
    graph = input.requires_grad and torch.is_grad_enabled()
    own = [input.numel() // max(1, channels), channels, input.dtype.itemsize, int(graph)]
    everyones = torch.stack(of_all(torch.tensor(own, device=input.device), group)).tolist()
    if any(other[1:] != everyones[0][1:] for other in everyones):
        listed = "; ".join(
            f"process {rank}: {other[1]} channels of {other[2]} bytes{', with gradient' if other[3] else ''}"
            for rank, other in enumerate(everyones)
        )
        raise DataError(
            f"synchronised_batchnorm: the processes' inputs must be alike, but are {listed}; "
            "run the same layers at the same width in all processes"
        )
    counts = [other[0] for other in everyones]
    if sum(counts) < 2:
        raise DataError(
            f"synchronised_batchnorm: the joined batch has {sum(counts)} values per channel, expected more than 1"
        )
    return counts


def _sums(values: Tensor) -> Tensor:
    """Return the sum of each channel's values, shape (channels)."""
    return values.sum([axis for axis in range(values.ndim) if axis != 1])


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per channel in the shape that broadcasts over `like`."""
    return values.view(1, -1, *[1] * (like.ndim - 2))
