"""`repair`: the best narrow network that unlabelled images give, by least squares, layer after layer."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._checks import checked
from slimmable._convert import extract, plain, plan_of, slimify
from slimmable._inputs import Arguments, Inputs
from slimmable._modules import M, in_eval_mode
from slimmable._numerics import in_float64
from slimmable._widths import kept_of
from slimmable.analysis.importance import Importance
from slimmable.analysis.plan import Plan, Setting
from slimmable.errors import ConversionError, DataError
from slimmable.training.batchnorm import ModelInput, batches_of, collect

_PLACES = 64  # of each image, in which a convolution or a layer over tokens is fitted
_FORWARDS = [kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)]


@checked
@torch.no_grad()
def repair(
    model: M,
    loader: Iterable[ModelInput],
    width: Setting,
    *,
    importance: str | Importance | None = "magnitude",
    example_inputs: Any = None,
    ridge: float = 1e-3,
) -> M:
    """Return the plain network of one width, fitted to the full network on images without labels; nothing is trained.

    Each linear layer and convolution, in the order in which they run, gets the weights and bias with which its input in
    the narrow network gives, by least squares, the kept part of what the full network's layer gave. BatchNorms then get
    the narrow network's statistics. Not fitted, only cut, are transposed convolutions, classes with a forward of their
    own, projections of `nn.MultiheadAttention`, and shared weights. `model` is unchanged; the result has its modes.

    Args:
        model: plain, or as `slimify` returned it.
        loader: batches as for `calibrate_bn`, which are kept in memory: a thousand images like those it is made for.
        width: as `set_width` takes it.
        importance, example_inputs: for a plain model, as for `slimify`; the example is by default the first batch.
        ridge: how strongly each layer is held to its cut weights, as a share of its inputs' mean square. A layer is
            fitted in at most 64 random places of each image; with fewer in all than it has inputs, a fit means little.

    Raises: ConversionError: if `importance` is given for a converted model, which has an order. WidthError: if there is
        no such width. DataError: if `loader` is empty or holds anything other than batches, or a fit is not finite.
    Source: the fit of He, Zhang, Sun, Channel Pruning, ICCV 2017, section 3.1, equation 1, without its choice of units.

    >>> _ = torch.manual_seed(0)
    >>> net, images = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(64, 4)
    >>> small = slimmable.repair(net, [images], 0.5)
    >>> small[1].in_features, bool((small(images) - net(images)).abs().max() < 0.05)
    (4, True)
    """
    batches, slim = list(batches_of("repair", model, loader)), model
    if plan_of(model) is None:
        example = Inputs(*batches[0][0], **batches[0][1]) if example_inputs is None else example_inputs
        widths = {1.0, width} if isinstance(width, (int, float)) else {1.0}
        slim = slimify(model, widths, example_inputs=example, importance=importance)
    elif importance != "magnitude":
        raise ConversionError("repair: a converted model has its order; leave out importance, or give slimify's")
    small, full, plan = extract(slim, width), plain(slim).eval(), cast(Plan, plan_of(slim))
    sub_network = plan.sub_network(width)
    if sub_network.counts == plan.channels.units:
        return small
    users = Counter(id(own) for module in small.modules() for own in module._parameters.values())
    paths = {layer: path for path, layer in small.named_modules() if type(layer).forward in _FORWARDS}
    with in_eval_mode(small):
        for norm in small.modules():  # so that each layer reads what the narrow network's statistics will give
            norm.training = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats
        with _calls(*paths) as ran:
            small(*batches[0][0], **batches[0][1])
        for layer in ran:
            if users[id(layer._parameters["weight"])] == 1:  # none, if it is parametrized
                wide: Any = full.get_submodule(paths[layer])
                first, *_ = sub_network.tensors.get((paths[layer], "weight"), (None,))
                units = torch.tensor(first if isinstance(first, tuple) else range(kept_of(len(wide.weight), first)))
                if not _fit((small, layer), (full, wide), units, batches, ridge):
                    why = "a batch holds nan or infinity, or ridge is 0"
                    raise DataError(f"repair: the fit of {paths[layer]} is not finite; {why}")
    collect(small, batches, [None], small.modules())
    return small


@contextmanager
def _calls(*layers: nn.Module) -> Iterator[dict[nn.Module, list[tuple[Tensor, Tensor]]]]:
    """Collect input and output of each call of these layers, in the order of the layers' first calls."""
    found: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def note(layer: nn.Module, args: Any, output: Tensor) -> None:
        found.setdefault(layer, []).append((args[0], output))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(note))
        yield found


def _fit(small: Any, full: Any, units: Tensor, batches: list[Arguments], ridge: float) -> bool:
    """Fit a layer, given with its network, to these units of the full network's; tell whether the fit is finite."""
    (network, layer), (whole, wide) = small, full
    axis, draw = -1 - len(getattr(layer, "kernel_size", ())), torch.Generator().manual_seed(0)
    products: Any = 0
    for args, kwargs in batches:
        with _calls(layer, wide) as found:
            network(*args, **kwargs)
            whole(*args, **kwargs)
        for (x, y), (_, wanted) in zip(found[layer], found[wide], strict=True):
            products = products + _products(layer, x, wanted.index_select(axis, units.to(y.device)) - y, draw)
    squares, mixed = products.tensor_split([products.shape[1]], -1)
    inputs = layer.weight[0].numel()
    diagonal = squares.diagonal(dim1=1, dim2=2)[:, :inputs]
    diagonal += diagonal.mean(1, keepdim=True) * ridge + torch.finfo(torch.float32).tiny
    change = torch.linalg.solve(squares, mixed).mT.to(layer.weight)  # groups, outputs, inputs and the bias
    layer.weight += change[..., :inputs].reshape(layer.weight.shape)
    if layer.bias is not None:
        layer.bias += change[..., inputs].flatten()
    return bool(change.isfinite().all())


def _products(layer: Any, x: Tensor, lacking: Tensor, draw: torch.Generator) -> Tensor:
    """Return the sums of the products of a layer's inputs with themselves, and with what its outputs lack, by group.

    An output's inputs are those under the kernel, and a 1 for a bias: (groups, inputs, inputs + outputs), in float64.
    """
    kernel, groups = getattr(layer, "kernel_size", ()), getattr(layer, "groups", 1)
    x, lacking = (each if each.ndim > len(kernel) + 1 else each[None] for each in (x, lacking))
    if isinstance(layer, nn.modules.conv._ConvNd):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
        for axis, (size, gap, step) in enumerate(zip(kernel, layer.dilation, layer.stride, strict=True)):
            x = x.unfold(axis - len(kernel), gap * (size - 1) + 1, step)[..., ::gap].movedim(-1, 2 + axis)
    else:
        x, lacking = x.movedim(-1, 1), lacking.movedim(-1, 1)
    sizes = lacking.shape[2:]
    places = torch.randperm(sizes.numel(), generator=draw, device="cpu")[:_PLACES].to(x.device)
    at: Any = (..., *torch.unravel_index(places, sizes))
    seen = (each[at].reshape(len(each), groups, -1, len(places)) for each in (x, lacking))
    rows, wanted = (in_float64(each).permute(1, 0, 3, 2).flatten(1, 2) for each in seen)
    rows = rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)
    return rows.mT @ torch.cat([rows, wanted], 2)
