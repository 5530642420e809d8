"""BatchNorm statistics of chosen widths, computed anew from data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimmable._inputs import Arguments, Inputs
from slimmable._modules import in_eval_mode
from slimmable._nested import map_tensors, output_tensors
from slimmable._width import at_width, registered, set_width, widths_of
from slimmable.analysis.plan import Setting
from slimmable.errors import DataError, UsageError
from slimmable.layers import SwitchableNorm

Batch: TypeAlias = "torch.Tensor | Sequence[torch.Tensor] | Inputs"


@torch.no_grad()
def calibrate_bn(model: nn.Module, loader: Iterable[Batch], widths: Iterable[Setting] | None = None) -> None:
    """Recompute the running statistics of the BatchNorms at `widths` (None: all), as the mean over `loader`'s batches.

    The post-statistics of US-Nets (Yu and Huang 2019, section 3.2), wanted for widths whose statistics were not, or no
    longer, trained along: each norm is reset, then collects the cumulative average of the batches' means and unbiased
    variances, with the rest of the model in eval mode. Norms that do not run at `widths` are not touched; one that
    several of them share gets the average over these. Momenta, training modes and the width are put back, and on an
    error the statistics too.

    `widths` may hold whatever `set_width` takes. A width of a universal model, or a sub-network, that has no statistics
    of its own yet has them from now on, in the state dict too.

    A batch is the model's input, or a tuple or list that starts with it, or `slimmable.Inputs` for a forward that takes
    something else than one tensor; it is moved to the model's device. A few thousand images do:
    `calibrate_bn(model, itertools.islice(loader, 16))`. All batches count alike, so leave out a smaller last one.

    Raises:
        WidthError: if the model lacks one of `widths`.
        DataError: if `loader` is empty, a batch is neither, or statistics are not finite.
        UsageError: if `widths` is one width, or `loader` nothing to go through.

    >>> from slimmable.layers import SwitchableBatchNorm1d
    >>> model = nn.Sequential(SwitchableBatchNorm1d(4, widths=(1.0, 0.5), slim=False))
    >>> calibrate_bn(model, [torch.full((8, 4), 3.0), torch.full((8, 4), 5.0)], widths=[0.5])
    >>> with at_width(model, 0.5):
    ...     model[0].running_mean
    tensor([4., 4., 4., 4.])
    """
    if isinstance(widths, (float, int, Mapping)) or not isinstance(loader, Iterable):
        raise UsageError(
            f"calibrate_bn: loader must hold batches and widths be a list of widths, got {type(loader).__name__} and "
            f"{widths!r}"
        )
    chosen = widths_of(model) if widths is None else tuple(widths)
    with registered(model, chosen):
        if chosen:
            with at_width(model, chosen[0]):
                _collect(model, loader, chosen, list(model.modules()))


@torch.no_grad()
def collect_statistics(model: nn.Module, loader: Iterable[Batch]) -> None:
    """Do as `calibrate_bn` at the active width if the model does not keep it; statistics that it keeps stay."""
    containers = [module for module in model.modules() if isinstance(module, SwitchableNorm)]
    _collect(model, loader, [], [container.norm_at(-1) for container in containers if "guest" in container._modules])


def _collect(
    model: nn.Module,
    loader: Iterable[Batch],
    widths: Sequence[Setting],
    modules: Sequence[nn.Module],
) -> None:
    """Run the batches at each of `widths`, without any at the active one; for those norms among `modules` that run."""
    norms = [module for module in modules if _has_statistics(module)]
    if not norms:
        return
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with _collecting(model, norms):
        empty = True
        for batch in loader:
            empty = False
            args, kwargs = arguments_of(batch, device)
            settings: Sequence[Setting | None] = widths or [None]
            for width in settings:
                if width is not None:
                    set_width(model, width)
                model(*args, **kwargs)
        if empty:
            raise DataError("calibrate_bn: loader is empty; give at least one batch, in a list if it is needed again")
        if not all(bool(buffer.isfinite().all()) for norm in norms for buffer in norm.buffers()):
            raise DataError("calibrate_bn: the statistics are not finite; a batch holds nan or infinity")


def _has_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and module.track_running_stats


def arguments_of(batch: Batch, device: torch.device, where: str = "calibrate_bn") -> Arguments:
    """Return the arguments of the forward that a batch is, on a device.

    Raises: DataError: if it is none, or empty.
    """
    given = _input_of(batch, where)
    if any(tensor.numel() == 0 for tensor in output_tensors((given.args, given.kwargs))):
        raise DataError(f"{where}: a batch is empty")
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), (given.args, given.kwargs))
    return tuple(args), dict(kwargs)


def _input_of(batch: Batch, where: str) -> Inputs:
    if isinstance(batch, Inputs):
        return batch
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, torch.Tensor):
        raise DataError(
            f"{where}: a batch of type {type(batch).__name__} is neither a tensor nor a tuple or list that starts "
            "with one; give (batch['image'] for batch in loader), or slimmable.Inputs(...) for each batch"
        )
    return Inputs(first)


@contextmanager
def _collecting(model: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let the norms collect cumulative averages, starting from zero at each one's first call."""
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    started: set[nn.Module] = set()

    def start(norm: nn.Module, _: object) -> None:
        if norm not in started:
            started.add(norm)
            assert isinstance(norm, _BatchNorm)
            norm.reset_running_stats()

    handles = [norm.register_forward_pre_hook(start) for norm in norms]
    try:
        with in_eval_mode(model):
            for norm in norms:
                norm.training = True
                norm.momentum = None
            yield
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers(recurse=False):
                buffer.copy_(buffers[name])
        raise
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
