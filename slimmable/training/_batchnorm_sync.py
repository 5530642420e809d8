"""A block in which batch norms normalise with the statistics of all processes' batches together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from slimmable.training._joined_batchnorm import joined_batch_norm
from slimmable.training._processes import alone


@contextmanager
def synchronised_batchnorm(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Let every batch norm in training mode work on the joined batch of all processes while the block runs.

    Outputs, gradients and running statistics are those of one process with the joined batch. No module is replaced:
    it holds for whatever calls `torch.nn.functional.batch_norm`, such as torch's and timm's batch norms and the norm
    of each width of a slimmable model, on CPU and GPU. The processes must run the same layers in the same order, at
    the same width; their batches may differ in size. Half precision is computed in float32. Layers in eval mode
    that have running statistics stay as they are. Without a process group, or with one process, nothing changes.

    Forward passes belong in the block, and with activation checkpointing `backward`, too. The block replaces the
    function in `torch` itself, so it holds for all threads; it does not reach into TorchScript, and there are no
    second derivatives. On GPUs `nn.SyncBatchNorm.convert_sync_batchnorm` (for timm's models
    `timm.layers.convert_sync_batchnorm`) is faster, and works on slimmable models as well.

    Args:
        group: the processes whose batches are joined; all of them by default.

    Raises: DataError: in all processes, by a batch norm whose input differs in channels, type or need of gradient
        between them, or has one value per channel in the whole joined batch.

    >>> norm = torch.nn.BatchNorm1d(2)
    >>> with synchronised_batchnorm():  # the only process: the batch is the joined batch
    ...     norm(torch.tensor([[0.0, 1.0], [2.0, 5.0]])).detach().round(decimals=2)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    if alone(group):
        yield
        return
    functional, native, joined = F.batch_norm, torch.batch_norm, _eager()

    def our_functional(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return functional(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return joined(input, running_mean, running_var, weight, bias, momentum, eps, group)

    def our_native(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        if not training:
            return native(input, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled)
        return joined(input, running_mean, running_var, weight, bias, momentum, eps, group)

    # Not by a TorchFunctionMode: it is off within `backward`, where activation checkpointing runs forwards again.
    F.batch_norm, torch.batch_norm = our_functional, our_native
    try:
        yield
    finally:
        F.batch_norm, torch.batch_norm = functional, native


@functools.cache
def _eager() -> Callable[..., Tensor]:
    """Return `joined_batch_norm` out of the compiler's reach; made when needed only, since it loads the compiler."""
    return cast(Callable[..., Tensor], torch.compiler.disable(joined_batch_norm))  # type: ignore[no-untyped-call]
