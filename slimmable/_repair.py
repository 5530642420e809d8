"""`repair`: the best narrow network that unlabelled images give, by least squares, layer after layer."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from slimmable._checks import check_count, checked
from slimmable._convert import extract, plain, plan_of, slimify
from slimmable._inputs import Arguments, Inputs, output_tensors
from slimmable._modules import in_eval_mode
from slimmable._numerics import at_least_float32
from slimmable._widths import number_or_nan
from slimmable.analysis.importance import Importance, magnitude
from slimmable.analysis.plan import Plan, Setting
from slimmable.errors import ConversionError, DataError, UsageError
from slimmable.training.batchnorm import ModelInput, arguments_of, collect

M = TypeVar("M", bound=nn.Module)
_PLACES = 64  # of each image, in which a convolution or a layer over tokens is fitted


@checked
@torch.no_grad()
def repair(
    model: M,
    loader: Iterable[ModelInput],
    width: Setting,
    *,
    importance: str | Importance | None = "magnitude",
    example_inputs: Any = None,
    images: int = 1024,
    ridge: float = 1e-3,
) -> M:
    """Return the plain network of one width, fitted to the full network on images without labels; nothing is trained.

    The most important units are kept. Then each linear layer and convolution, in the order in which they run, gets the
    weights and bias with which its input in the narrow network gives, as nearly as least squares can, the kept part of
    what the full network's layer gave. BatchNorms then get the statistics of the narrow network. What is not fitted
    keeps its cut weights: transposed convolutions, classes with a forward of their own, `nn.MultiheadAttention`'s
    projections and weights that an embedding shares. `model` is unchanged; its modes are those of the result.

    Args:
        model: plain, or as `slimify` returned it, with whatever else it was given there.
        loader: batches as for `calibrate_bn`, like those the network is made for. They are kept in memory.
        width: as `set_width` takes it.
        importance: of a plain model's units: "magnitude"; "activation", which multiplies each weight with the mean size
            of what it reads; a function as for `slimify`; None keeps the first. A converted model has its order.
        example_inputs: for a plain model, as for `slimify`; by default the first batch.
        images: read batches until they hold that many. Each layer is fitted in at most 64 random places of each image;
            with fewer places in all than a layer has inputs, its fit means little.
        ridge: how strongly each layer is held to its cut weights, as a share of its inputs' mean square.

    Raises: ConversionError: if `importance` is unknown, or not its default for a converted model, which has an order.
        WidthError: if there is no such width. DataError: if `loader` is empty or a batch is not finite.
    Source: the fit of He, Zhang, Sun, Channel Pruning, ICCV 2017, section 3.1, equation 1, without its choice of units.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    >>> images = [torch.randn(64, 4)]
    >>> small = repair(net, images, 0.5)
    >>> small[1].in_features, bool((small(images[0]) - net(images[0])).abs().max() < 0.05)
    (4, True)
    """
    check_count("repair", images=images)
    if not 0 <= number_or_nan(ridge) < float("inf"):
        raise UsageError(f"repair: ridge is {ridge!r}; it must be a number of at least 0")
    if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, str, Mapping)):
        raise UsageError(f"repair: loader must hold batches, got {type(loader)}")
    slim, batches = model, list(_batches(model, loader, images))
    if plan_of(model) is not None:
        if importance != "magnitude":
            raise ConversionError("repair: a converted model has its order; leave out importance, or give slimify's")
    else:
        order = partial(_by_activation, batches) if importance == "activation" else importance
        example = Inputs(*batches[0][0], **batches[0][1]) if example_inputs is None else example_inputs
        widths = (1.0, width) if isinstance(width, (int, float)) and width != 1 else (1.0,)
        slim = slimify(model, widths, example_inputs=example, importance=order)
    small, full, plan = extract(slim, width), plain(slim), cast(Plan, plan_of(slim))
    first = {path: axes[0] for (path, name), axes in plan.sub_network(width).tensors.items() if name == "weight"}
    kept = {path: range(units) if isinstance(units, int) else units for path, units in first.items()}
    if all(a.shape == b.shape for a, b in zip(small.parameters(), full.parameters(), strict=True)):
        return small
    full.eval()
    with in_eval_mode(small):
        for norm in small.modules():  # so that each layer reads what the narrow network's statistics will give
            norm.training = isinstance(norm, _BatchNorm) and norm.track_running_stats
        for paths in _fitted(small, batches[0]):
            _fit(small, full, paths, kept, batches, ridge)
    collect(small, [Inputs(*args, **kwargs) for args, kwargs in batches], [None], small.modules())
    return small


def _batches(model: nn.Module, loader: Iterable[ModelInput], images: int) -> Iterator[Arguments]:
    """Yield the first batches, on the model's device, until they hold `images` images."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    left = images
    for batch in loader:
        args, kwargs = arguments_of(batch, device, "repair")
        if not all(bool(each.isfinite().all()) for each in output_tensors((args, kwargs))):
            raise DataError("repair: a batch holds nan or infinity")
        yield args, kwargs
        left -= len(next(iter(output_tensors((args, kwargs))), ()))
        if left <= 0:
            return
    if left == images:
        raise DataError("repair: loader is empty; give at least one batch, in a list if it is needed again")


def _by_activation(batches: Sequence[Arguments], model: nn.Module, plan: Plan) -> list[Any]:
    """Return scores as `magnitude` does, of weights that are multiplied with the mean size of what they read."""
    layers = {module: path for path, module in model.named_modules() if _is_linear(module)}
    sizes: dict[str, Any] = dict.fromkeys(layers.values(), 0.0)
    with in_eval_mode(model), _calls(layers) as calls:
        for args, kwargs in batches:
            calls.clear()
            model(*args, **kwargs)
            for layer, x in ((layer, x) for layer, found in calls.items() for x, _ in found):
                channels = at_least_float32(x).abs().movedim(_channel_axis(layer), -1).flatten(0, -2).mean(0)
                sizes[layers[layer]] += channels.view(getattr(layer, "groups", 1), -1).mean(0).cpu().numpy()
    return magnitude(model, plan, sizes)


def _is_linear(module: nn.Module) -> bool:
    """Tell whether the forward of a module is that of a linear layer or convolution with a weight of its own."""
    forwards = [kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)]
    return module._parameters.get("weight") is not None and type(module).forward in forwards


def _channel_axis(layer: nn.Module) -> int:
    return -len(layer.kernel_size) - 1 if isinstance(layer, _ConvNd) else -1


@contextmanager
def _calls(layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[tuple[Tensor, Tensor]]]]:
    """Collect input and output of each call of these layers, in the order of the layers' first calls."""
    found: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def note(layer: nn.Module, args: Any, output: Tensor) -> None:
        found.setdefault(layer, []).append((args[0], output))

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _fitted(small: nn.Module, batch: Arguments) -> list[list[str]]:
    """Return the layers to fit, in the order in which they run; those that share a weight are fitted together."""
    paths = {module: path for path, module in small.named_modules() if _is_linear(module)}
    users = Counter(id(each) for module in small.modules() for each in module._parameters.values())
    with _calls(paths) as calls:
        small(*batch[0], **batch[1])
    together: dict[int, list[str]] = {}
    for layer in calls:
        together.setdefault(id(layer.weight), []).append(paths[layer])
    return [own for weight, own in together.items() if len(own) == users[weight]]


def _fit(small: nn.Module, full: nn.Module, paths: list[str], kept: dict[str, Any], batches: Any, ridge: float) -> None:
    """Fit the layers at these paths, which share a weight, to the full network's: solve the normal equations."""
    layers, wide = map(small.get_submodule, paths), map(full.get_submodule, paths)
    pairs: list[tuple[str, Any, nn.Module]] = list(zip(paths, layers, wide, strict=True))
    first, products, draw = pairs[0][1], torch.zeros(()), torch.Generator().manual_seed(0)
    for args, kwargs in batches:
        with _calls(layer for _, layer, _ in pairs) as narrow, _calls(layer for _, _, layer in pairs) as wanted:
            small(*args, **kwargs)
            full(*args, **kwargs)
        for path, layer, wider in pairs:
            for (x, y), (_, target) in zip(narrow.get(layer, ()), wanted.get(wider, ()), strict=True):
                if (units := kept.get(path)) is not None:
                    target = target.index_select(_channel_axis(layer), torch.tensor(units, device=target.device))
                products = products.to(x.device) + _products(layer, x, target - y, draw)
    inputs, weights = products.shape[1], first.weight[0].numel()
    squares, mixed = products[..., :inputs], products[..., inputs:]
    diagonal = squares.diagonal(dim1=1, dim2=2)[:, :weights]
    diagonal += diagonal.mean(1, keepdim=True) * ridge + torch.finfo(torch.float32).tiny
    change = torch.linalg.solve(squares, mixed).mT  # groups, outputs, inputs
    if not bool(change.isfinite().all()):
        raise DataError(f"repair: the fit of {paths[0]} is not finite; its inputs or outputs are not, or ridge is 0")
    first.weight += change[..., :weights].reshape(first.weight.shape)
    if first.bias is not None:
        first.bias += change[..., weights].flatten()


def _products(layer: Any, x: Tensor, rest: Tensor, draw: torch.Generator) -> Tensor:
    """Return the sums of the products of a layer's inputs with themselves, and with what its outputs lack, by group.

    The inputs of an output of each group are those under the kernel, and a 1 for the bias if there is one. The shape is
    (groups, inputs, inputs + outputs), in float64.
    """
    kernel, groups = getattr(layer, "kernel_size", ()), getattr(layer, "groups", 1)
    x, rest = (each if each.ndim > len(kernel) + 1 else each[None] for each in (x, rest))
    if not kernel:
        x, rest = x.movedim(-1, 1), rest.movedim(-1, 1)
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    sizes, count = rest.shape[2:], len(rest)
    places = torch.randperm(sizes.numel(), generator=draw)[:_PLACES].to(x.device)
    parts = []
    for offset in product(*map(range, kernel)):
        rules = zip(offset, getattr(layer, "dilation", ()), getattr(layer, "stride", ()), sizes, strict=False)
        window = [slice(at * wide, at * wide + (size - 1) * step + 1, step) for at, wide, step, size in rules]
        parts.append(x[(slice(None), slice(None), *window)].reshape(count, x.shape[1], -1)[..., places])
    columns = torch.stack(parts, 2).reshape(count, groups, -1, len(places))
    lacking = rest.reshape(count, groups, -1, sizes.numel())[..., places]
    rows, wanted = (each.double().permute(1, 0, 3, 2).flatten(1, 2) for each in (columns, lacking))
    if layer.bias is not None:
        rows = F.pad(rows, (0, 1), value=1.0)
    return rows.mT @ torch.cat([rows, wanted], 2)
