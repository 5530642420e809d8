"""Conversion of a model to a slimmable one (`slimify`, `plan`), and extraction of the plain network of one width."""

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from slimmable import rules as rules  # which registers rules that the analysis uses
from slimmable._checks import check_flags, check_whole
from slimmable._described import follow_configs, follow_layers
from slimmable._inputs import example_of
from slimmable._modules import M, addons_of, detach_all, is_under, replace_modules, tensors_of, undone_on_error, walk
from slimmable._tables import listed
from slimmable._width import at_width, places_of, registered, widths_of
from slimmable._widths import WIDTHS, check_widths
from slimmable.analysis.fake import left_behind
from slimmable.analysis.importance import Importance, moved, order_units, permute
from slimmable.analysis.make import make_plan
from slimmable.analysis.plan import AxisName, Plan, Setting
from slimmable.analysis.trace import Outputs
from slimmable.errors import ConversionError, WidthError, explained
from slimmable.view.norms import Switchable, SwitchableContainer, SwitchableNorm, inherit
from slimmable.view.state import Counts, WidthState, is_slim, state_of, take
from slimmable.view.view import column_of, full_tensor, install_view, remove_view

Skip = str | Sequence[str] | Callable[[str, nn.Module], bool]


def slimify(
    model: M,
    widths: Iterable[float] = WIDTHS,
    *,
    example_inputs: Any = None,
    skip: Skip = (),
    round_to: int = 1,
    rounding: str = "nearest",
    overlap: bool = True,
    switchable: Skip = (),
    importance: str | Importance | None = None,
    outputs: Outputs = "auto",
    universal: bool = False,
    inplace: bool = False,
) -> M:
    """Return a model with the weights of `model` that runs at several widths; `model` itself is unchanged.

    One run on fake tensors finds the groups of channels; at width w a group of n keeps its first `round(w * n)`. Each
    width has its own BatchNorms. Parameters keep their names and full sizes, and the full width computes exactly what
    it did before. If `model` is converted, its widths that stay keep their BatchNorms, and a new one starts from those
    of the nearest wider one; a warning names what no longer fits. On any error `model` is as it was.

    Args:
        model: any module whose forward can be traced, with parameters on any device.
        widths: distinct numbers in (0, 1], with 1.0 among them.
        example_inputs: for the forward: a tensor, a tuple of arguments, a dict of keywords, or `Inputs`; not for timm.
        skip: modules to keep at full width, as `fnmatch` patterns of their names or a function `(name, module) ->
            bool`. A skipped module that cannot be traced is run once on the real example. Converting a converted model
            again by the same rules, without `skip`, keeps what it skips, unless layers were added to it.
        round_to: keep a multiple of this many channels, in groups that have at least as many.
        rounding: "floor" keeps `int(w * n)`, as the published code does, but at least one.
        overlap: False gives the narrower widths disjoint channels, the first ones to the narrowest.
        switchable: layers, named as in `skip`, that hold their own weights at each width, as BatchNorms do: those of
            narrower widths start as the part of the full width's that they would read otherwise.
        importance: "magnitude" first moves the channels with the largest weights in the layers that read them to the
            front; the full network still computes the same function. None leaves them where they are. A function
            `(model, plan) -> scores`, one per unit for each of `plan.groups`, ranks them in its own way.
        outputs: "full" keeps the sizes of all outputs, for a backbone whose features other code reads; "slim" lets them
            get thinner. "auto" keeps class scores, images and embeddings (made by layers with weights, and since then
            only moved, scaled, normalized or bounded), and lets features get thinner (rectified ones, those of a
            residual stream, and all that a timm model without its classifier makes). A sequence says it for each
            output, a dict for some, by position or name: `{"features": "full"}`. The plan lists all outputs.
        universal: let `set_width` take any width from the narrowest up. BatchNorms then share gain and bias, sliced,
            with separate statistics for each of `widths` and for those passed to `calibrate_bn` later.
        inplace: convert `model` itself and return it.

    A model in which nothing becomes narrower is converted with a warning.

    Raises: TraceError: if the forward fails on fake tensors; the message names the operation and the module.
    Source: Yu et al., Slimmable Neural Networks, ICLR 2019, section 3; SlimCLR, arXiv 2209.15525, section 3.1;
    `universal`: Yu and Huang, Universally Slimmable Networks, ICCV 2019, section 3.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> slim = slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 3, 8, 8))
    >>> with at_width(slim, 0.5):
    ...     print(slim[0].weight.shape, slim(torch.zeros(2, 3, 8, 8)).shape)
    torch.Size([4, 3, 3, 3]) torch.Size([2, 10])
    """
    check_whole("slimify", model)
    check_flags("slimify", inplace=inplace)
    for addon in addons_of(model).values():
        raise ConversionError(f"this {type(model).__name__} {addon.refusal}, convert it, and put them back")
    layers = _switchable_layers(model, switchable)
    asked = Plan(check_widths(widths), round_to, rounding, overlap, layers, universal), skip, outputs
    if importance not in (None, "magnitude") and not callable(importance):
        raise ConversionError(f'importance {importance!r} is unknown; use None, "magnitude" or a function')
    if importance is None and _current_plan(model, *asked) is not None:
        return model if inplace else copy_of(model)
    found = _plan(model, example_inputs, *asked)
    if not found.channels.units:
        warnings.warn(f"nothing in this {type(model).__name__} gets narrower; slimmable.plan says why", stacklevel=2)
    target = model if inplace else copy_of(model)
    with undone_on_error(target):
        before = strip(target)
        orders = order_units(target, found, importance) if importance is not None else []
        try:
            permute(target, found, orders)
            slim = cast(M, apply_plan(target, found))
            _inherit(slim, before, moved(found, orders))
            return slim
        except BaseException:
            strip(target)
            permute(target, found, [np.argsort(units) for units in orders])
            raise


def plan(
    model: nn.Module,
    widths: Iterable[float] | None = None,
    *,
    example_inputs: Any = None,
    skip: Skip = (),
    round_to: int = 1,
    rounding: str = "nearest",
    overlap: bool = True,
    switchable: Skip = (),
    outputs: Outputs = "auto",
    universal: bool = False,
) -> Plan:
    """Return the plan that `slimify` would follow with the same arguments; print it to see groups, counts and pins.

    For a converted model and no other arguments, this is the plan that it has, at its own widths.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(plan(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4)))
    group   units  kept at 1.0, 0.5                  axes
        0       8  8, 4                              0.weight[0], 0.bias[0], 2.weight[1]
    kept at full width:
      2.weight[0] (2): output in the model itself: class scores, an image or an embedding
      2.bias[0] (2): output in the model itself: class scores, an image or an embedding
    outputs:
      output: (2, 2), full: class scores, an image or an embedding
    """
    check_whole("plan", model)
    known, layers = check_widths(WIDTHS if widths is None else widths), _switchable_layers(model, switchable)
    rules = Plan(known, round_to, rounding, overlap, layers, universal)
    if widths is None and (rules.rules(), skip, outputs) == (Plan(WIDTHS).rules(), (), "auto"):
        rules = plan_of(model) or rules
    asked = rules, skip, outputs
    return _current_plan(model, *asked) or _plan(model, example_inputs, *asked)


def extract(model: M, width: Setting, *, repair: "Iterable[Any] | None" = None) -> M:
    """Return the plain network of one width, as `set_width` takes it: the original classes, with its own memory.

    With a loader of images as `repair`, its layers are then fitted to the full network's, as `slimmable.repair` does.

    Raises: ConversionError: if no part is slimmable. UsageError: if `fully_shard` split it. WidthError: as `set_width`.

    >>> net = slimify(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> extract(net, 0.5)
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    check_whole("extract", model)
    if repair is not None:  # imported late, since that room calls this one
        return cast(M, import_module("slimmable._repair").repair(model, repair, width))
    with at_width(model, width):
        memo: dict[int, Any] = {}
        slim = []
        for module, state in places_of(model):
            if isinstance(module, SwitchableContainer):
                memo[id(module)] = copy_of(module.own_at(state.index), memo)
                continue
            slim.append((module, state.active))
            known = {*module._parameters, *module._buffers, *module.__dict__.get("_slim_lent", ())}
            for name in state.active.cuts.keys() - known:  # computed from others since the conversion
                if state.plan is None or (state.path, name) in state.plan.channels.sizes:  # it was a parameter
                    what = f"{f'{state.path}.{name}'.lstrip('.')} is no longer a parameter, as after weight_norm"
                    raise ConversionError(f"{what}; make that permanent, or call slimmable.slimify again, then extract")
            for name, cut in state.active.cuts.items():
                full = full_tensor(module, name)
                if full is not None and id(full) not in memo:
                    part = take(full, cut).detach()
                    if full.is_contiguous():  # also of quantised tensors, which are only copied this way
                        own = part.clone(memory_format=torch.contiguous_format)
                    else:  # laid out as the full one, such as in `channels_last`
                        own = torch.empty_like(full[tuple(map(slice, part.shape))]).copy_(part)
                    memo[id(full)] = nn.Parameter(own, full.requires_grad) if isinstance(full, nn.Parameter) else own
        small = copy_of(model, memo)  # of a container, what memo has
        for module, active in slim:
            twin = memo[id(module)]
            if is_slim(twin):  # not if the class copies itself through its constructor
                remove_view(twin)
            twin.__dict__.update(active.values)
        small = cast(M, detach_all(small))
        follow_layers(model, small)
        follow_configs(model, small)
        return small


# -- the steps of a conversion
def _switchable_layers(model: nn.Module, switchable: Skip) -> tuple[str, ...]:
    """Return the names of the layers with weights that `switchable` names, which must have them to themselves."""
    if isinstance(switchable, (tuple, list)) and not switchable:
        return ()
    chosen, network, found = skipper(model, switchable, "switchable"), plain(model), list[str]()
    owners = Counter(id(own) for module in network.modules() for own in module._parameters.values())
    for path, module in network.named_modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if not own or isinstance(module, _BatchNorm) or not chosen(path, module):
            continue
        if next(module.children(), None) is not None or any(owners[id(parameter)] > 1 for parameter in own):
            what = f"{path!r}, a {type(module).__name__}, which has modules inside or shares its weights"
            raise ConversionError(f"switchable names {what}; name only layers that have weights to themselves")
        found.append(path)
    if not found:
        raise ConversionError(f"switchable is {switchable!r:.80}, which names no layer with weights")
    return tuple(found)


@torch.inference_mode(False)  # in which operations are not seen one by one
def _plan(model: nn.Module, given: Any, rules: Plan, skip: Skip, how: Outputs) -> Plan:
    return make_plan(plain(model), example_of(model, given), rules, skipper(model, skip), how)


def plain(model: nn.Module) -> nn.Module:
    """Return `model` without views and add-ons: itself if it has none, otherwise a copy that shares its tensors."""
    if not addons_of(model) and not any(is_slim(module) for module in model.modules()):
        return model
    leaves = (leaf for module in model.modules() for leaf in tree_leaves(module.__dict__))
    shared = {id(leaf): leaf for leaf in leaves if isinstance(leaf, (Tensor, WidthState))}  # `strip` only reads these
    copied = detach_all(copy.deepcopy(model, left_behind(model) | shared))
    strip(copied)
    return copied


def skipper(model: nn.Module, skip: Skip, what: str = "skip") -> Callable[[str, nn.Module], bool]:
    """Turn `skip`, a function of two arguments or patterns that each match a module, into such a function."""
    if callable(skip) and not isinstance(skip, type):
        with explained(f"{what} is {skip!r}, which cannot be called with (name, module)", kind=ConversionError):
            inspect.signature(skip).bind("", model)
        return skip
    patterns: list[Any] = [skip] if isinstance(skip, str) else list(skip) if isinstance(skip, Iterable) else [skip]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConversionError(f"{what} is {skip!r}; it is a name pattern, a list of them, or a function (name, module)")
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(is_under(name, pattern) for name in names):
            found = f"matches no module of {type(model).__name__}; it has {', '.join(map(repr, names[1:6]))}"
            raise ConversionError(f"{what} pattern {pattern!r} {found}")
    return lambda name, module: any(is_under(name, pattern) for pattern in patterns)


def plan_of(model: nn.Module) -> Plan | None:
    """Return the plan of a model that `slimify` has returned, or None for any other, such as a part of one."""
    state = state_of(model)
    return None if state is None or state.path else state.plan


def _current_plan(model: nn.Module, rules: Plan, *others: Any) -> Plan | None:
    """Return the plan of a converted model if converting it with these arguments, as of `_plan`, changes nothing."""
    plan = plan_of(model)
    with suppress(ConversionError):  # of `widths_of`, if it has gained a layer
        if plan is not None and others == ((), "auto") and rules.rules() == plan.rules() and widths_of(model):
            return None if any(misfits(model, plan)) else plan
    return None


def misfits(model: nn.Module, plan: Plan) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Yield name and shape of each tensor that does not have the sizes in the plan; the shape is None if it is gone."""
    modules = dict(model.named_modules())
    for (path, name), axes in plan.channels.tensors.items():
        module = modules.get(path)
        was_parameter = (path, name) in plan.channels.sizes  # and is none any more if it is pruned
        own = {} if module is None else module._parameters if was_parameter else tensors_of(module)
        tensor = own.get(name)
        shape = None if tensor is None else tuple(tensor.shape)
        planned = tuple(n if ids is None else len(ids) for n, ids in zip(shape or (), axes, strict=False))
        sized = was_parameter or plan.channels.needed.grouping.groups_in(axes)  # others may begin empty
        if sized and (shape != planned or len(planned) != len(axes)):
            yield f"{path}.{name}".lstrip("."), shape


def strip(model: nn.Module) -> dict[str, Switchable]:
    """Remove all views and containers from `model`; return the containers by path."""
    norms = {path: m for path, m in model.named_modules() if isinstance(m, Switchable)}
    replace_modules(model, {id(norm): norm.to_plain() for norm in norms.values()})
    for module in model.modules():
        if is_slim(module) and not isinstance(module, SwitchableContainer):
            remove_view(module)
    return norms


def apply_plan(model: nn.Module, found: Plan) -> nn.Module:
    """Convert a plain model in place: what has something to slim gets a view, what is switchable a container."""
    norms, inside = dict[int, nn.Module](), tuple[str, ...]()
    attributed = {path for path, _ in found.channels.attributes}  # some change only in other sub-networks
    for path, module in list(model.named_modules()):
        own = {name: found.tensors[path, name] for name in tensors_of(module) if (path, name) in found.tensors}
        changed = [column.values.get(path, {}) for column in found.columns]
        if path.startswith(inside) or isinstance(module, SwitchableContainer):
            continue
        if (isinstance(module, _BatchNorm) and own) or path in found.switchable:
            inside = (*inside, f"{path}.")
            if isinstance(module, _BatchNorm):
                kept = next([axes[0] for axes in per_width] for per_width in own.values() if len(per_width[0]) == 1)
                norm: Switchable = SwitchableNorm(module, found.widths, kept, shared_affine=found.universal)
            else:
                cuts = [{name: per_width[at] for name, per_width in own.items()} for at in range(len(found.widths))]
                norm = Switchable(module, list(map(partial(column_of, module), found.widths, cuts, changed)))
            norms[id(module)] = norm
            know(norm, found, path)
        elif own or module._parameters or module._buffers or path in attributed or path in (*found.caches, ""):
            cut = {name: kept for name, kept in own.items() if any(k is not None for axes in kept for k in axes)}
            full = {name: found.channels.attributes[path, name] for each in changed for name in each}
            values = {name: [each.get(name, value) for each in changed] for name, value in full.items()}
            install_view(module, found.widths, cut, values, found.caches.get(path))
            know(module, found, path)
    return replace_modules(model, norms)


def _inherit(model: nn.Module, before: Mapping[str, Switchable], moved: Mapping[AxisName, Any]) -> None:
    """Give each width, also those of `calibrate_bn`, what the containers before, by path, learned; warn of losses."""
    states = [norm._slim for norm in before.values() if norm._slim.plan is not None]
    added = {column.width: None for state in states for column in state.columns[len(state.plan.widths) :]}
    lost: dict[float | Counts, list[str]] = {}
    for width in added:
        try:
            with registered(model, [width]):
                pass
        except WidthError:
            lost[width] = list(before)
    for path, norm in before.items():
        heir = model.get_submodule(path)
        for width in inherit(heir, norm, moved, path) if isinstance(heir, Switchable) else norm.widths[1:]:
            lost.setdefault(width, []).append(path)
    if lost:
        listing = "; ".join(f"at {width} {listed(paths, most=3)}" for width, paths in lost.items())
        why = "as they keep other channels, share gain and bias, or are no longer switched"
        advice = "Train on, or call slimmable.calibrate_bn"
        warnings.warn(f"some layers lose what a width has learned, {why}: {listing}. {advice}", stacklevel=3)


def know(module: nn.Module, found: Plan, path: str) -> None:
    """Record the plan, and the module's path in it, in the module's state."""
    state = module.__dict__["_slim"]
    state.plan, state.path = found, path
    for column, sub_network in zip(state.columns, found.columns, strict=False):
        column.counts = sub_network.counts


def shallow_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module once, except those inside containers."""
    return walk([model], lambda module: not isinstance(module, SwitchableContainer))


def copy_of(model: M, memo: dict[int, Any] | None = None) -> M:
    """Return a deep copy; tensors that a forward has left in attributes lose their autograd history."""
    memo = {} if memo is None else memo
    for key, value in left_behind(model).items():
        memo.setdefault(key, value.clone() if isinstance(value, Tensor) else value)
    return copy.deepcopy(model, memo)
