"""`slimify`, `extract` and `plan`: from a model to a slimmable one, and from that to plain small ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimmable._errors import ConversionError
from slimmable._inputs import Inputs, example_of
from slimmable._widths import check_widths, width_index
from slimmable.analysis._sizes import feature_sizes, layer_sizes
from slimmable.analysis._trace import FakeModel, left_behind, output_tensors
from slimmable.analysis.ordering import magnitude_order, permute
from slimmable.analysis.plan import Kept, Plan, make_plan
from slimmable.layers._container import SwitchableContainer
from slimmable.layers._switch import SwitchableNorm
from slimmable.layers._view import install_view, is_slim, narrow_tensors, narrow_values, remove_view, state_of
from slimmable.width import at_width, widths_of

WIDTHS = (1.0, 0.75, 0.5, 0.25)
Skip = str | Sequence[str] | Callable[[str, nn.Module], bool]


def slimify(
    model: nn.Module,
    widths: Iterable[float] = WIDTHS,
    *,
    example_inputs: Any = None,
    skip: Skip = (),
    round_to: int = 1,
    order: str | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Return a model with the weights of `model` that runs at several widths; `model` itself stays as it is.

    The model's channels are labelled in one run on fake tensors; at width w each group of channels keeps its first
    `round(w * n)`. Image channels, class scores and embeddings stay full. BatchNorms are switched: one per width.
    Parameters stay full-size under their names, and the full width computes the same numbers as before.

    Args:
        model: any module whose forward can be traced, with parameters on any device.
        widths: distinct numbers in (0, 1], with 1.0 among them.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for the forward; timm models
            need none.
        skip: patterns (`fnmatch`) of module names, or a function `(name, module) -> bool`: kept at full width.
        round_to: kept channels are a multiple of it, where a group has that many.
        order: "magnitude" permutes the channels first, the largest weights to the front; the full network computes
            the same function.
        inplace: convert `model` itself and return it.

    Raises:
        WidthError: for widths that cannot be used.
        TraceError: if the forward fails on fake tensors; the message names the operation and the module.
        ConversionError: for other arguments that cannot be used. On any error `model` is as it was.

    Source: Yu et al., Slimmable Neural Networks, ICLR 2019, section 3; SlimCLR, arXiv 2209.15525, section 3.1.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> slim = slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 3, 8, 8))
    >>> with at_width(slim, 0.5):
    ...     print(slim[0].weight.shape, slim(torch.zeros(2, 3, 8, 8)).shape)
    torch.Size([4, 3, 3, 3]) torch.Size([2, 10])
    """
    wanted = check_widths(widths)
    if order not in (None, "magnitude"):
        raise ConversionError(f'order {order!r} is unknown; it is None or "magnitude"')
    if _is_converted(model, wanted) and skip == () and order is None:
        return model if inplace else copy_of(model)
    found = _plan(model, example_of(model, example_inputs), wanted, skip, round_to)
    target = model if inplace else copy_of(model)
    before = _strip(target)
    if order == "magnitude":
        permute(target, found, magnitude_order(target, found))
    return _apply(target, found, before)


def plan(
    model: nn.Module,
    widths: Iterable[float] = WIDTHS,
    *,
    example_inputs: Any = None,
    skip: Skip = (),
    round_to: int = 1,
) -> Plan:
    """Return what `slimify` would do with the same arguments; printing it shows groups, kept counts and pins.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(plan(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4)))
    group   units  kept at 1.0, 0.5                  axes
        0       8  8, 4                              0.weight[0], 0.bias[0], 2.weight[1]
    kept at full width:
      2.weight[0] (2): output in the model itself: class scores or an embedding
      2.bias[0] (2): output in the model itself: class scores or an embedding
    """
    return _plan(model, example_of(model, example_inputs), check_widths(widths), skip, round_to)


def extract(model: nn.Module, width: float) -> nn.Module:
    """Return the network of one width: the original classes, no class of this library, memory of its own.

    Raises:
        ConversionError: if `model` has no slimmable part.
        WidthError: if it does not have this width.

    >>> net = slimify(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> extract(net, 0.5)
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    widths_of(model)  # raises for models that are not converted
    memo: dict[int, Any] = {}
    slim = []
    for module in shallow_modules(model):
        state = state_of(module)
        if state is None:
            continue
        index = width_index(width, state.widths)
        if isinstance(module, SwitchableContainer):
            memo[id(module)] = copy.deepcopy(module.module_at(index), memo)
            continue
        slim.append((module, index))
        for name, part in narrow_tensors(module, index).items():
            full = {**module._parameters, **module._buffers, **module.__dict__}[name]
            if id(full) not in memo:
                own = part.detach().clone(memory_format=torch.contiguous_format)
                memo[id(full)] = nn.Parameter(own, full.requires_grad) if isinstance(full, nn.Parameter) else own
    small: nn.Module = memo[id(model)] if id(model) in memo else copy_of(model, memo)
    for module, index in slim:
        twin = memo[id(module)]
        remove_view(twin)
        twin.__dict__.update(narrow_values(module, index))
    for module in small.modules():
        module.__dict__.pop("_slim_root", None)
    return small


# -- the steps of a conversion
def _plan(model: nn.Module, inputs: Inputs, widths: tuple[float, ...], skip: Skip, round_to: int) -> Plan:
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ConversionError(f"round_to is {round_to!r}; it must be an integer of at least 1")
    args, kwargs = inputs
    return make_plan(model, args, kwargs, widths, _skipper(model, skip), round_to, _first_failure, _strip)


def _skipper(model: nn.Module, skip: Skip) -> Callable[[str, nn.Module], bool]:
    if callable(skip):
        return skip
    patterns = [skip] if isinstance(skip, str) else list(skip)
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConversionError(
                f"skip pattern {pattern!r} matches no module of {type(model).__name__}; "
                f"its modules are named like {', '.join(repr(name) for name in names[1:6])}"
            )

    def matches(name: str, module: nn.Module) -> bool:
        parts = name.split(".")
        above = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatchcase(part, pattern) for part in above for pattern in patterns)

    return matches


def _first_failure(fake: FakeModel, found: Plan) -> tuple[str, Exception] | None:
    """Convert a fake model and run every narrow width; return the module that fails and the error, if one does."""
    with fake.mode:
        _apply(fake.model, found)
    for width, shapes in list(zip(found.widths, found.output_shapes, strict=True))[1:]:
        try:
            with at_width(fake.model, width):
                out = fake.run()
        except Exception as error:
            return fake.running, error
        got = [tuple(tensor.shape) for tensor in output_tensors(out)]
        if got != shapes:
            return "", ConversionError(f"the outputs at width {width} have shapes {got}, planned were {shapes}")
    return None


def _is_converted(model: nn.Module, widths: tuple[float, ...]) -> bool:
    """Tell whether nothing is left to convert: the root is marked, and every module with tensors knows its widths."""
    try:
        return "_slim_root" in model.__dict__ and widths_of(model) == widths
    except ConversionError:  # it has gained a layer
        return False


def _strip(model: nn.Module) -> dict[str, SwitchableNorm]:
    """Take all views and containers off `model`; return the containers by path."""
    norms = {path: m for path, m in model.named_modules() if isinstance(m, SwitchableNorm)}
    _replace(model, {id(norm): norm.to_norm() for norm in norms.values()})
    for module in model.modules():
        module.__dict__.pop("_slim_root", None)
        if is_slim(module) and not isinstance(module, SwitchableContainer):
            remove_view(module)
    return norms


def _replace(model: nn.Module, new: dict[int, nn.Module]) -> nn.Module:
    """Put modules in the places of others, given by `id`; return the root."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and id(child) in new:
                module._modules[name] = new[id(child)]
    return new.get(id(model), model)


def _apply(model: nn.Module, found: Plan, before: Mapping[str, SwitchableNorm] | None = None) -> nn.Module:
    """Give every module with something to slim its view, and every BatchNorm its container.

    Without `before`, the containers that the model had, BatchNorms are sliced like any module: enough for shapes.
    """
    tensors: dict[str, dict[str, list[list[Kept]]]] = {}
    for (path, name), per_width in found.tensors.items():
        tensors.setdefault(path, {})[name] = per_width
    norms: dict[int, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in list(model.named_modules()):
        own = tensors.get(path, {})
        if (inside and path.startswith(inside)) or isinstance(module, SwitchableContainer):
            continue
        if isinstance(module, _BatchNorm) and before is not None:
            inside = (*inside, f"{path}.") if path else inside
            for per_width in [kept for kept in own.values() if len(kept[0]) == 1][:1]:
                norms[id(module)] = _switched(module, found.widths, [axes[0] for axes in per_width], before.get(path))
        elif module._parameters or module._buffers or path in (*found.values, *found.caches, ""):
            cut = {name: kept for name, kept in own.items() if any(k is not None for axes in kept for k in axes)}
            values, caches = found.values.get(path, {}), found.caches.get(path)
            sizes = layer_sizes(module, cut, values) | (feature_sizes(module, found) if module is model else {})
            install_view(module, found.widths, cut, values, sizes, caches)
    root = _replace(model, norms)
    root.__dict__["_slim_root"] = True
    return root


def _switched(
    norm: nn.Module, widths: tuple[float, ...], kept: list[Kept], before: SwitchableNorm | None
) -> SwitchableNorm:
    """Return the container of a norm; one that it had before stays if it keeps the same channels."""
    if before is not None and before.full is norm and before.widths == widths and list(before._kept) == kept:
        before.eval() if not norm.training else before.train()
        return before
    return SwitchableNorm.from_norm(norm, widths, kept)


def shallow_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module once, containers without the modules that they hold."""
    hidden: set[int] = set()
    for module in model.modules():
        if isinstance(module, SwitchableContainer):
            hidden.update(id(inner) for child in module.children() for inner in child.modules())
    yield from (module for module in model.modules() if id(module) not in hidden)


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy; tensors that a forward with gradient has left behind are copied without their history."""
    memo = {} if memo is None else memo
    for key, value in left_behind(model).items():
        memo.setdefault(key, value.detach().clone())
    return copy.deepcopy(model, memo)
