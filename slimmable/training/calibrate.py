"""Recompute the BatchNorm statistics of chosen widths from data."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimmable._checks import check_tensors, checked
from slimmable._inputs import Arguments, Inputs, map_tensors, output_tensors
from slimmable._modules import in_eval_mode, swapped
from slimmable._width import at_width, registered, set_width, widths_of
from slimmable.analysis.plan import Setting
from slimmable.errors import DataError, UsageError
from slimmable.layers import SwitchableNorm

ModelInput: TypeAlias = "Tensor | Sequence[Tensor] | Inputs"
"""One batch of a loader: the model's input, a tuple or list that starts with it, or `Inputs`."""


@checked
@torch.no_grad()
def calibrate_bn(model: nn.Module, loader: Iterable[ModelInput], widths: Iterable[Setting] | None = None) -> None:
    """Recompute the running statistics of the BatchNorms at `widths` (None: all) as the mean over `loader`'s batches.

    These are the post-statistics of US-Nets (Yu and Huang 2019, section 3.2): the average of means and of unbiased
    variances, the rest of the model in eval mode. Norms that do not run at `widths` are not touched; one that several
    share gets the average over them. Modes, momenta and the width are restored, and after an error the statistics too.

    Args:
        model: converted, or built from slimmable layers.
        loader: batches, each the model's input, a tuple or list that starts with it, or `slimmable.Inputs` for a
            forward that takes something other than one tensor. A few thousand images are enough:
            `calibrate_bn(model, itertools.islice(loader, 16))`. All batches count equally; leave out a smaller one.
        widths: whatever `set_width` takes. A width of a universal model, or a sub-network, that has no statistics of
            its own yet keeps the new ones, in the state dict too.

    Raises: WidthError: if the model lacks one of `widths`. DataError: if `loader` is empty or holds anything other than
        batches, or statistics are not finite. UsageError: if `widths` is a single width, or `loader` is not iterable.

    >>> from slimmable.layers import SwitchableBatchNorm1d
    >>> model = nn.Sequential(SwitchableBatchNorm1d(4, widths=(1.0, 0.5), slim=False))
    >>> calibrate_bn(model, [torch.full((8, 4), 3.0), torch.full((8, 4), 5.0)], widths=[0.5])
    >>> with at_width(model, 0.5):
    ...     model[0].running_mean
    tensor([4., 4., 4., 4.])
    """
    several = isinstance(widths, (Iterable, type(None))) and not isinstance(widths, Mapping)
    if not several or not isinstance(loader, Iterable) or isinstance(loader, (Tensor, str, Mapping)):
        given = f"{type(loader).__name__} and {widths!r}"
        raise UsageError(f"calibrate_bn: loader must hold batches and widths be a list of widths, got {given}")
    chosen = widths_of(model) if widths is None else tuple(widths)
    with registered(model, chosen):
        if chosen:
            with at_width(model, chosen[0]):
                _collect(model, loader, chosen, model.modules())


@checked
@torch.no_grad()
def collect_statistics(model: nn.Module, loader: Iterable[ModelInput]) -> None:
    """Calibrate the active width as `calibrate_bn` does, if it is not one of the model's own; others do not change."""
    containers = [module for module in model.modules() if isinstance(module, SwitchableNorm)]
    _collect(model, loader, [None], [each.module_at(-1) for each in containers if "guest" in each._modules])


def _collect(
    model: nn.Module, loader: Iterable[ModelInput], widths: Sequence["Setting | None"], modules: Iterable[nn.Module]
) -> None:
    """Run every batch at each of `widths` (None: the active one), and collect statistics in the norms of `modules`.

    Those that do not run are put back, and all of them after an error.
    """
    norms = [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    if not torch.is_inference_mode_enabled() and any(each.is_inference() for norm in norms for each in norm.buffers()):
        raise UsageError("calibrate_bn: the model was made in torch.inference_mode, so call calibrate_bn in that too")
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    before = [{name: each.clone() for name, each in norm.named_buffers(recurse=False)} for norm in norms]
    batch, done = None, False
    try:
        with in_eval_mode(model), swapped([(vars(norm), "momentum", None) for norm in norms]):  # cumulative averages
            for norm in norms:
                type(norm).reset_running_stats(norm)  # the norm itself may refuse it
                norm.training = True
            for batch in loader:
                args, kwargs = arguments_of(batch, device)
                for width in widths:
                    if width is not None:
                        set_width(model, width)
                    model(*args, **kwargs)
        if batch is None:
            raise DataError("calibrate_bn: loader is empty; give at least one batch, in a list if it is needed again")
        if not all(bool(buffer.isfinite().all()) for norm in norms for buffer in norm.buffers()):
            raise DataError("calibrate_bn: the statistics are not finite; a batch holds nan or infinity")
        done = True
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            if not (done and norm.num_batches_tracked):
                for name, buffer in norm.named_buffers(recurse=False):
                    buffer.copy_(buffers[name])


def arguments_of(batch: ModelInput, device: torch.device, where: str = "calibrate_bn") -> Arguments:
    """Return a batch as the arguments of a forward, on a device; refuse one without model input, or an empty one."""
    if not isinstance(batch, Inputs):
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(first, Tensor):
            what = f"a batch of type {type(batch).__name__} is neither a tensor nor a tuple or list starting with one"
            raise DataError(f"{where}: {what}; give (batch['image'] for batch in loader), or slimmable.Inputs(...)")
        batch = Inputs(first)
    if any(tensor.numel() == 0 for tensor in output_tensors((batch.args, batch.kwargs))):
        raise DataError(f"{where}: a batch is empty")
    check_tensors(where, **{f"batch[{at}]": each for at, each in enumerate(output_tensors((batch.args, batch.kwargs)))})
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), (batch.args, batch.kwargs))
    return tuple(args), dict(kwargs)
