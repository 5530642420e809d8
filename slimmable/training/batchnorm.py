"""BatchNorm: statistics of chosen widths from data, and norms of the joined batch of all processes or of its groups."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from slimmable._checks import check_count, check_tensors, checked
from slimmable._distributed import from_all, from_all_alike, world_size
from slimmable._inputs import Arguments, Inputs, map_tensors, output_tensors
from slimmable._modules import in_eval_mode, swapped
from slimmable._numerics import at_least_float32
from slimmable._reach import PROCESS
from slimmable._width import at_width, registered, set_width, widths_of
from slimmable.analysis.plan import Setting
from slimmable.errors import DataError, UsageError
from slimmable.layers import SwitchableNorm

ModelInput: TypeAlias = "Tensor | Sequence[Tensor] | Inputs"
"""One batch of a loader: the model's input, a tuple or list that starts with it, or `Inputs`."""

_originals: list[Any] = []  # torch's functions, while a block is open
_groups: dict[object, int] = {}  # of each block that is open in any thread


@checked
@torch.no_grad()
def calibrate_bn(model: nn.Module, loader: Iterable[ModelInput], widths: Iterable[Setting] | None = None) -> None:
    """Recompute the running statistics of the BatchNorms at `widths` (None: all) as the mean over `loader`'s batches.

    These are the post-statistics of US-Nets (Yu and Huang 2019, section 3.2): the average of means and of unbiased
    variances, the rest of the model in eval mode. Norms that do not run at `widths` are not touched; one that several
    share gets the average over them. Modes, momenta and the width are restored, and after an error the statistics too.

    Args:
        model: converted, or built from slimmable layers.
        loader: batches, each the model's input, a tuple or list that starts with it, or `slimmable.Inputs`. All count
            equally, so leave out a smaller one. A few thousand images are enough: `itertools.islice(loader, 16)`.
        widths: whatever `set_width` takes. A width of a universal model, or a sub-network, that has no statistics of
            its own yet keeps the new ones, in the state dict too.

    Raises: WidthError: if the model lacks one of `widths`. DataError: if `loader` is empty or holds anything other than
        batches, or statistics are not finite. UsageError: if `widths` is a single width, or `loader` is not iterable.

    >>> model = nn.Sequential(slimmable.layers.SwitchableBatchNorm1d(4, widths=(1.0, 0.5), slim=False))
    >>> calibrate_bn(model, [torch.full((8, 4), 3.0), torch.full((8, 4), 5.0)], widths=[0.5])
    >>> with at_width(model, 0.5):
    ...     model[0].running_mean
    tensor([4., 4., 4., 4.])
    """
    if not isinstance(widths, (Iterable, type(None))) or isinstance(widths, Mapping):
        raise UsageError(f"calibrate_bn: widths must be a list of them, got {widths!r}")
    chosen = widths_of(model) if widths is None else tuple(widths)
    with registered(model, chosen), at_width(model, 1.0):
        collect(model, batches_of("calibrate_bn", model, loader), chosen, model.modules())


@checked
@torch.no_grad()
def collect_statistics(model: nn.Module, loader: Iterable[ModelInput]) -> None:
    """Calibrate the active width as `calibrate_bn` does, if it is not one of the model's own; others do not change."""
    containers = [module for module in model.modules() if isinstance(module, SwitchableNorm)]
    guests = (each.module_at(-1) for each in containers if each._slim.index == -1)
    collect(model, batches_of("calibrate_bn", model, loader, bar=False), [None], guests)


def collect(
    model: nn.Module, batches: Iterable[Arguments], widths: Sequence["Setting | None"], modules: Iterable[nn.Module]
) -> None:
    """Run every batch at each of `widths` (None: the active one); norms of `modules` that run get new statistics."""
    norms = [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms or not widths:
        return
    new: list[Any] = [(n._buffers, name, it.clone()) for n in norms for name, it in n.named_buffers(recurse=False)]
    if not torch.is_inference_mode_enabled() and any(own[name].is_inference() for own, name, _ in new):
        raise UsageError("calibrate_bn: the model was made in torch.inference_mode, so call calibrate_bn in that too")
    cumulative: list[Any] = [(vars(norm), "momentum", None) for norm in norms]
    with in_eval_mode(model), swapped(cumulative + new):
        for norm in norms:
            type(norm).reset_running_stats(norm)  # the norm itself may refuse it
            norm.training = True
        for args, kwargs in batches:
            for width in widths:
                if width is not None:
                    set_width(model, width)
                model(*args, **kwargs)
        if not all(bool(each.isfinite().all()) for _, _, each in new):
            raise DataError("calibrate_bn: the statistics are not finite; a batch holds nan or infinity")
        ran = [(own, name, each) for own, name, each in new if own["num_batches_tracked"]]
    for own, name, each in ran:
        own[name].copy_(each)


def batches_of(where: str, model: nn.Module, loader: Iterable[ModelInput], bar: bool = True) -> Iterator[Arguments]:
    """Yield each batch as the arguments of a forward, on the model's device, with a bar on terminals; refuse others."""
    if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, str, Mapping)):
        raise UsageError(f"{where}: loader must hold batches, as [images] does, got {type(loader).__name__}")
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    batch: Any = None
    for batch in tqdm(loader, where, leave=False, disable=None if bar else True):
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(first, (Tensor, Inputs)):
            raise DataError(f"{where}: batches must be tensors, begin with one, or be Inputs, got {type(batch)}")
        given = first if isinstance(first, Inputs) else Inputs(first)
        tensors = output_tensors((given.args, given.kwargs))
        check_tensors(where, **{f"batch[{at}]": each for at, each in enumerate(tensors)})
        if any(tensor.numel() == 0 for tensor in tensors):
            raise DataError(f"{where}: a batch is empty")
        yield map_tensors(lambda tensor: tensor.to(device), (given.args, given.kwargs))
    if batch is None:
        raise DataError(f"{where}: loader is empty; give at least one batch, in a list if it is needed again")


@contextmanager
def synchronised_batchnorm(groups: int = 1) -> Iterator[None]:
    """Run a block in which every batch norm in training mode works on the joined batch of all processes.

    Outputs, gradients and running statistics are those of one process with the joined batch, in at least float32. The
    block applies to all that calls `torch.nn.functional.batch_norm` in training mode, as the norms of torch, timm and
    slimmable models do, in all threads, but not to TorchScript or second derivatives. The processes must run the same
    layers in the same order, at the same width; their batches may differ in size. One process alone changes nothing.
    Run forward passes in the block, with activation checkpointing `backward` too. On GPUs
    `nn.SyncBatchNorm.convert_sync_batchnorm` is faster.

    Args:
        groups: how many equal parts of the joined batch, a multiple of the number of processes, have statistics of
            their own, as on that many GPUs without synchronisation. Running statistics get the mean of the groups'.

    Raises: DataError: in all processes, if the input of a batch norm differs between them in channels, dtype or need
        for gradients, cannot be divided into the groups, or has fewer than two values per channel in one.

    >>> norm = torch.nn.BatchNorm1d(2)
    >>> with synchronised_batchnorm():  # the only process: the batch is the joined batch
    ...     norm(torch.tensor([[0.0, 1.0], [2.0, 5.0]])).detach().round(decimals=2)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    check_count("synchronised_batchnorm", groups=groups)
    if world_size() == 1 and groups == 1 and not _groups:
        yield
        return
    block = object()
    with PROCESS:
        if not _groups:
            # A TorchFunctionMode would not do: it is off in `backward`, where checkpointing runs forwards again.
            _originals[:] = F.batch_norm, torch.batch_norm
            states, parameters, rest = "running_mean running_var", "weight bias", "training momentum eps cudnn_enabled"
            F.batch_norm = _joined(F.batch_norm, f"input {states} {parameters} {rest}")
            torch.batch_norm = _joined(torch.batch_norm, f"input {parameters} {states} {rest}")
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
        given = {"momentum": 0.1, "eps": 1e-5} | dict(zip(names.split(), args, strict=False)) | kwargs
        groups = next(reversed(_groups.values()), 1)
        if not given.get("training") or (groups == 1 and world_size() == 1):
            return original(*args, **kwargs)
        states = given["running_mean"], given["running_var"]
        return joined(groups, given["input"], states, *map(given.get, ("weight", "bias", "momentum", "eps")))

    return batch_norm


def joined_batch_norm(
    groups: int, input: Tensor, states: Sequence[Tensor | None], weight: Any, bias: Any, momentum: float, eps: float
) -> Tensor:
    """Return this process's part of the batch norm of the joined batch, or of `groups` parts of it."""
    if groups > 1:
        return _of_groups(groups, input, states, weight, bias, momentum, eps)
    if input.ndim < 2:
        raise DataError(f"batch_norm: the input has shape {tuple(input.shape)}, expected (batch, channels, ...)")
    channels, graph = input.shape[1], ", with gradient" if input.requires_grad and torch.is_grad_enabled() else ""
    own, values = f"{channels} channels of {input.dtype.itemsize} bytes{graph}", input.numel() // max(1, channels)
    advice = "run the same layers at the same width in all processes"
    total = sum(from_all_alike("synchronised_batchnorm", own, advice, input.device, values))  # per channel
    if total < 2:
        raise DataError(f"synchronised_batchnorm: all have {total} values per channel, expected more than 1")
    mean, variance = _Moments.apply(input, total)
    for running, found in zip(states, (mean, variance * (total / (total - 1))), strict=True):
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
            state.copy_(mean if world_size() == 1 else from_all(mean).mean(0))
    return torch.cat(outputs)


class _Moments(Function):
    """Mean and variance of each channel of the joined batch, which broadcast over the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, total: int) -> tuple[Tensor, Tensor]:
        values, axes = at_least_float32(input), [axis for axis in range(input.ndim) if axis != 1]
        mean = values.sum(axes, keepdim=True) / total
        dist.all_reduce(mean)
        variance = (values - mean).square_().sum(axes, keepdim=True) / total
        dist.all_reduce(variance)
        ctx.total = total
        ctx.save_for_backward(input, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        input, mean = ctx.saved_tensors
        sums = torch.stack(grads)
        dist.all_reduce(sums)
        of_mean, of_variance = sums / ctx.total
        return (at_least_float32(input) - mean).mul_(2 * of_variance).add_(of_mean).to(input.dtype), None
