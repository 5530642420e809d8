"""Switchable norms and layers: one real module per width; the narrow ones are cut copies of the full one."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimmable._checks import checked
from slimmable._modules import twin_of
from slimmable._widths import Kept, kept_of
from slimmable.errors import ConversionError, UsageError
from slimmable.view.container import SwitchableContainer, inner_modules
from slimmable.view.cuts import make_cut, take
from slimmable.view.state import Column, Counts, is_slim
from slimmable.view.view import install_view

M = TypeVar("M")
_Units: TypeAlias = "dict[tuple[str, int], list[int]]"  # name of a tensor, and axis -> units
_CHANNEL_COUNTS = ("num_features", "num_channels", "num_parameters")


class Part(NamedTuple):
    """What a width has of a module: what it keeps of the axes of each tensor, and the values of attributes."""

    axes: Mapping[str, Sequence[Kept]]
    values: Mapping[str, object]
    shared: bool = False  # whether it reads its part of the full module's parameters, instead of having its own


class Switchable(SwitchableContainer):
    """One real module per width, a norm or any layer; see `SwitchableNorm`."""

    full: nn.Module
    narrow: nn.ModuleList
    _lists: ClassVar[dict[str, int]] = {"narrow": 1}  # of all norms but the full one -> the first one's width, by index

    def __init__(self, full: nn.Module, widths: Iterable[float], parts: Sequence[Part]) -> None:
        super().__init__(widths)
        if len(parts) != len(self.widths):
            raise ConversionError(f"{type(self).__name__}: kept has {len(parts)} entries for the widths {self.widths}")
        self.__dict__["_parts"] = tuple(parts)
        self.add_module("full", full)
        self.add_module("narrow", nn.ModuleList(map(self._narrowed, parts[1:])))
        self.__dict__["training"] = self.narrow.training = full.training
        self.register_load_state_dict_post_hook(_report_plain_names)  # type: ignore[no-untyped-call]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Insert a module, as converters do; the container uses the parameter and buffer dicts of its full norm."""
        super().add_module(name, module)
        self.__dict__.update(_parameters=self.full._parameters, _buffers=self.full._buffers)
        _guarded(self.full)
        narrow: Any = self._modules.get("narrow") or ()
        for norm, part in zip(narrow, self._parts[1:], strict=False):
            _guarded(norm)
            if part.shared and not is_slim(norm):
                _share(norm, self.full._parameters, part)
        for norm in filter(is_slim, self.norms()):
            norm.__dict__["_slim_lent"] = self.full._parameters

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse tensors that other code adds, as pruning does."""
        raise ConversionError(
            f"{name} cannot be added to a {type(self).__name__}, which has no tensors of its own; change those of all "
            "widths, norm.full and norm.narrow, or change the model before slimmable.slimify"
        )

    @torch.inference_mode(False)  # it is used outside of that, too
    def _narrowed(self, part: Part) -> nn.Module:
        """Return a cut copy of the full module, which may read the parameters of that."""
        module = copy_of_norm(self.full)
        tensors = dict((*module.named_parameters(), *module.named_buffers()))
        for name in tensors.keys() & part.axes.keys():
            tensors[name].data = _cut(tensors[name].data, part, name)
        for name, value in part.values.items():
            owner, _, own = name.rpartition(".")
            setattr(module.get_submodule(owner), own, value)
        return _share(module, self.full._parameters, part) if part.shared else module

    def to_plain(self) -> nn.Module:
        """Return the module of the full width, the module itself, not a copy."""
        return _unguarded(self.full)

    def module_at(self, index: int) -> nn.Module:
        """Return the module of the width with this index; 0 is the full width, -1 a guest."""
        if index > 0:
            return inner_modules(self, "narrow")[str(index - 1)]
        return cast(nn.Module, self._modules["guest" if index else "full"])

    def own_at(self, index: int) -> nn.Module:
        """Return a module like that of the width with this index, on the same tensors except shared ones."""
        norm = self.module_at(index)
        if not is_slim(norm):
            return _unguarded(twin_of(norm, type(norm)))
        part = self._parts[index] if index > 0 else cast(Guest, self._slim.active).part
        own = self._narrowed(part._replace(shared=False)).train(norm.training)
        own.load_state_dict(norm.state_dict(), strict=False)  # its statistics
        return _unguarded(own)

    def norms(self) -> Iterator[nn.Module]:
        """Yield the modules of all widths and of an active guest."""
        yield self.full
        for name in self._lists:
            yield from self._modules.get(name) or ()  # type: ignore[misc]
        yield from filter(None, [self._modules.get("guest")])

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if name.startswith("_") or "narrow" not in modules:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.module_at(self._slim.index), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or "_is_replica" in self.__dict__:  # of DataParallel, which fills it in
            super().__setattr__(name, value)
        elif name == "full":
            self.add_module(name, value)
        elif name in self.__dict__ or name in self._modules or not hasattr(self.full, name):
            super().__setattr__(name, value)
        elif isinstance(value, Tensor):
            setattr(self.module_at(self._slim.index), name, value)
        else:
            for norm in self.norms():
                setattr(norm, name, value)

    def _named_members(self, *args: Any, recurse: bool = True, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """List tensors only under the norms, since the container's own are those of the full norm."""
        if recurse:
            yield from super()._named_members(*args, **kwargs)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """List the full norm under the container's own name, before the container."""
        memo = set() if memo is None else memo
        own = vars(self.full).get("_slim")
        yield from self.full.named_modules(memo, prefix, remove_duplicate)
        if vars(self.full).pop("_parts", None):  # torch.export gives all modules of a name the last one's attributes
            vars(self.full).pop("_slim") if own is None else vars(self.full).update(_slim=own)
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
        for name in self._lists:
            path = f"{prefix}.{name}" if prefix else name
            yield from getattr(self, name).named_modules(memo, path, remove_duplicate)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Tell `torch.distributed.checkpoint`, which walks by attributes, where names leave out `full`."""
        return dict.fromkeys([*self.full._parameters, *self.full._buffers, *self.full._modules], "full")

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Save the full norm under the container's own name, the others under the names of their lists."""
        found: Any = self.full.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        found._metadata[f"{prefix}full"] = found._metadata[prefix[:-1]]
        found._metadata[prefix[:-1]]["widths"] = self._slim.widths
        for name in self._lists:
            found = getattr(self, name).state_dict(destination=found, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
        return found

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *reports: list[str]
    ) -> None:
        """Rename entries as torch's loading of the children expects; `_report_plain_names` undoes this in reports."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name.partition(".")[0] not in self._lists:
                state_dict[f"{prefix}full.{name}"] = state_dict.pop(key)
        theirs, full = local_metadata.get("widths", ()), self.full.state_dict(keep_vars=True)
        same = all(mine == other for mine, other in zip(self._slim.widths, theirs, strict=False))
        for name, first in self._lists.items():
            if any(key.startswith(f"{prefix}{name}.") for key in state_dict):
                if not same:
                    reports[-1].append(f"{prefix}{name} has norms of the widths {theirs}, not {self._slim.widths}")
                continue
            for place, norm in enumerate(getattr(self, name)):
                index = first + place
                dense = f"narrow.{index - 1}" if index else "full"
                for key, own in norm.state_dict(keep_vars=True).items():  # of the dense pass, or parts of the full norm
                    given = state_dict.get(f"{prefix}{dense}.{key}", state_dict.get(f"{prefix}full.{key}"))
                    if given is not None and given.shape in (own.shape, full[key].shape):
                        part = given.clone() if given.shape == own.shape else _cut(given, self._parts[index], key)
                        state_dict[f"{prefix}{name}.{place}.{key}"] = part
        self.__dict__["_loading"] = (prefix, reports, self._modules.pop("guest", None))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.full!r}, {self.extra_repr()})"


class SwitchableNorm(Switchable):
    """One real norm per width; the forward runs that of the active width and touches no other.

    In the state dict and `named_parameters`, the full width's norm has the plain names (`bn.weight`); the narrower
    ones follow as `bn.narrow.0.weight` and so on, from wide to narrow. A checkpoint without narrow names loads into
    the full norm, and its kept channels into the narrower ones.

    Attributes that the container lacks are those of the active norm. Setting one sets it in every norm, except that a
    tensor is set in the active norm alone.

    Source: switchable batch normalization of Yu et al., Slimmable Neural Networks, ICLR 2019, section 3.2.

    Args:
        full: the norm of the full width, of any class; the container holds the module itself.
        widths: distinct numbers in (0, 1] with 1.0 among them.
        kept: the channels kept at each width, from the widest: None for all, a number for the first ones, or indices.
        shared_affine: narrower norms have their own statistics, but read their part of the full norm's gain and bias
            (Yu and Huang, Universally Slimmable Networks, ICCV 2019, section 3.2).

    >>> norm = SwitchableNorm(nn.BatchNorm2d(8), (1.0, 0.5), (None, 4))
    >>> [name for name, _ in norm.named_parameters()]
    ['weight', 'bias', 'narrow.0.weight', 'narrow.0.bias']
    >>> norm.module_at(1).num_features
    4
    """

    @checked
    def __init__(
        self, full: nn.Module, widths: Iterable[float], kept: Sequence[Kept], *, shared_affine: bool = False
    ) -> None:
        parts = [keep if isinstance(keep, Part) else _part_of_norm(full, keep, shared_affine) for keep in kept]
        super().__init__(full, widths, parts)


class Guest(Column):
    """A guest of a switchable module: a module that starts from the full one's statistics; its part is a shared one."""

    def __init__(self, container: Switchable, width: float | Counts, part: Part) -> None:
        super().__init__(width)
        self.part, self.norm = part, container._narrowed(part)

    def enter(self, module: nn.Module) -> None:
        """Put the norm into the container as `guest`."""
        module._modules["guest"] = self.norm.train(module.training)

    def leave(self, module: nn.Module) -> None:
        """Take the norm out of the container."""
        module._modules.pop("guest", None)

    def keep(self, module: nn.Module) -> None:
        """Append the norm to the narrow ones, which puts its statistics into the state dict."""
        container = cast(Switchable, module)
        container.narrow.append(self.norm)
        container.__dict__["_parts"] = (*container._parts, self.part)
        if container._slim.active is self:
            self.leave(module)
        del self.norm  # a converter may replace the appended one

    def drop(self, module: nn.Module) -> None:
        """Take back the norm that `keep` appended."""
        container = cast(Switchable, module)
        container.__dict__["_parts"] = container._parts[:-1]
        self.norm = container.narrow[-1]
        del container.narrow[-1]


def _report_plain_names(norm: Switchable, _: Any) -> None:
    """Report missing, unexpected and ill-shaped tensors by their state-dict names; reset an active guest."""
    prefix, reports, guest = norm.__dict__.pop("_loading", ("", (), None))
    if guest is not None:
        norm._modules["guest"] = guest
        guest.load_state_dict(norm._narrowed(cast(Guest, norm._slim.active).part).state_dict())
    for report in reports:
        report[:] = [text.replace(f"{prefix}full.", prefix) for text in report]


def _share(norm: nn.Module, lent: dict[str, nn.Parameter | None], part: Part) -> nn.Module:
    """Let a narrow module read its part of `lent`, the full module's parameters, instead of having its own."""
    own = {name: None for name, tensor in lent.items() if tensor is None}
    norm.__dict__.update(_parameters=own, _slim_lent=lent)
    norm.__dict__.update({"affine": False} if "affine" in norm.__dict__ else {})  # which converters read
    whole = {name: [None] * tensor.ndim for name, tensor in lent.items() if tensor is not None}
    install_view(norm, (1.0,), {name: [part.axes.get(name, every)] for name, every in whole.items()}, {})
    return norm


def _guarded(norm: M) -> M:
    """Let a norm refuse to be reset without those of other widths, unless its parameters are, too."""
    if isinstance(norm, _BatchNorm):
        norm.__dict__.update(reset_running_stats=partial(_refuse_reset), reset_parameters=partial(_start_anew, norm))
    return norm


def _unguarded(norm: M) -> M:
    for name in ("reset_running_stats", "reset_parameters"):
        vars(norm).pop(name, None)
    return norm


def _refuse_reset() -> None:
    raise UsageError(
        "the statistics of a switchable BatchNorm cannot be reset: torch.optim.swa_utils.update_bn would lose those of "
        "all widths but the active one; call slimmable.calibrate_bn(model, loader) instead"
    )


def _start_anew(norm: _BatchNorm) -> None:
    _unguarded(norm).reset_parameters()
    _guarded(norm)


def copy_of_norm(norm: nn.Module) -> nn.Module:
    """Copy a norm, except for the process group of a SyncBatchNorm, which cannot be copied."""
    group = getattr(norm, "process_group", None)
    return copy.deepcopy(norm, {} if group is None else {id(group): group})


def part_of(module: nn.Module, own: Mapping[str, Sequence[Kept]], values: Mapping[str, object], shared: bool) -> Part:
    """Return what a width has of a norm or layer, by what a plan keeps of its tensors, and its attributes then."""
    if isinstance(module, _BatchNorm):
        return _part_of_norm(module, next(axes[0] for axes in own.values() if len(axes) == 1), shared)
    return Part(own, values, shared)


def _part_of_norm(norm: nn.Module, kept: Kept, shared: bool) -> Part:
    """Return what a width has of a norm that keeps these channels, and of modules inside, such as an activation."""
    if kept is None:
        return Part({}, {}, shared)
    counts = (getattr(norm, name, None) for name in _CHANNEL_COUNTS)
    channels = next((count for count in counts if isinstance(count, int)), None)
    if channels is None:
        raise ConversionError(f"{type(norm).__name__} has no num_features or num_channels, its number of channels")
    units = kept if isinstance(kept, tuple) and kept else [kept - 1] if type(kept) is int else [-1]
    if not set(units) <= set(range(channels)):
        raise ConversionError(
            f"SwitchableNorm: an entry of kept must be None, 1 to {channels} channels or a tuple of them, got {kept!r}"
        )
    tensors = (*norm.named_parameters(), *norm.named_buffers())
    axes = {name: (kept, *[None] * (each.ndim - 1)) for name, each in tensors if each.shape[:1] == (channels,)}
    places = ((path, name, vars(each).get(name)) for path, each in norm.named_modules() for name in _CHANNEL_COUNTS)
    sizes = {f"{path}.{name}".lstrip("."): kept_of(channels, kept) for path, name, size in places if size == channels}
    return Part(axes, sizes, shared)


def _cut(tensor: Tensor, part: Part, name: str) -> Tensor:
    cut = make_cut(tensor, part.axes[name], name) if name in part.axes else None
    return (tensor if cut is None else take(tensor, cut)).clone()


def _units(tensors: Mapping[str, Tensor], part: Part, moved: Mapping[Any, Sequence[int]], path: str) -> _Units:
    """Return the units that are kept of each axis of a full module's tensors, by where they were before they moved."""
    found: _Units = {}
    for name, tensor in tensors.items():
        place = f"{path}.{name}".lstrip(".").rpartition(".")[::2]
        kept = part.axes.get(name, [None] * tensor.ndim)
        for axis, (size, keep) in enumerate(zip(tensor.shape, kept, strict=True)):
            units, order = keep if isinstance(keep, tuple) else range(kept_of(size, keep)), moved.get((*place, axis))
            found[name, axis] = [unit if order is None else int(order[unit]) for unit in units]
    return found


def inherit(
    norm: Switchable, before: Switchable, moved: Mapping[Any, Sequence[int]], path: str
) -> list[float | Counts]:
    """Give a container what one of the same full module has learned; return the widths that lose some of it.

    A width that keeps its channels keeps its module. Any other starts from the nearest wider one's module and, for the
    channels that it had, from its own. `moved` says of axes (module path, name, number) where each unit was before.
    """
    norm.__class__ = type(before)
    norm.__dict__.update(vars(before) | {name: vars(norm)[name] for name in ("_slim", "_parts", "_modules")})
    norms = {width: before.module_at(index) for index, width in enumerate(before._slim.widths)}
    tensors = norm.full.state_dict(keep_vars=True)
    parts = dict(zip(norms, before._parts, strict=True))
    had = {width: _units(tensors, part, {}, path) for width, part in parts.items()}
    lost = []
    for place, (width, part) in enumerate(zip(norm._slim.widths[1:], norm._parts[1:], strict=True)):
        units, known = _units(tensors, part, moved, path), width in norms
        if known and units == had[width] and part.shared == parts[width].shared:
            norm.narrow[place] = norms[width]
            continue
        wider = [w for w in norms if isinstance(w, float) and isinstance(width, float) and width < w < 1]
        for source in (*sorted(wider, reverse=True), *([width] if known else [])):
            _take_over(norm.narrow[place], units, norms[source], had[source])
        loses_affine = known and part.shared and not parts[width].shared and norm.full.affine
        if loses_affine or (known and any(set(units[axis]) != set(had[width][axis]) for axis in units)):
            lost.append(width)
    return lost


def _take_over(norm: nn.Module, units: _Units, source: nn.Module, theirs: _Units) -> None:
    mine, given = norm.state_dict(), source.state_dict()
    for name in mine.keys() & given.keys():
        axes = [(name, axis) for axis in range(mine[name].ndim)]
        shared = [np.intersect1d(units[axis], theirs[axis], return_indices=True) for axis in axes]
        into, out_of = (np.ix_(*(places[of] for places in shared)) for of in (1, 2))
        mine[name][into] = given[name][out_of].to(mine[name])
