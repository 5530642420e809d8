"""Switchable containers of one real module per width; those of norms and layers hold cut copies of the full one."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from slimmable._checks import checked
from slimmable._distributed import check_same_widths, in_group, note_width, world_size
from slimmable._modules import twin_of
from slimmable._widths import Kept, check_widths, kept_of
from slimmable.errors import ConversionError, UsageError
from slimmable.view.state import Column, Counts, Cut, HasWidths, WidthState, is_slim, make_cut, take, units_of
from slimmable.view.view import add_properties, column_of

_Units: TypeAlias = "dict[str, list[list[int]]]"  # name of a tensor -> units, by axis
_CHANNEL_COUNTS = ("num_features", "num_channels", "num_parameters")
_COMPARED = 8  # forwards with DistributedDataParallel in which a container compares widths


class SwitchableContainer(HasWidths):
    """One real module per width; see `SwitchableNorm` and `SwitchableProbe`."""

    _static_graph = False  # of the DistributedDataParallel around it
    _compared = 0  # forwards before whose backward the processes have compared their widths

    def __init__(self, widths: Iterable[float]) -> None:
        super().__init__()
        self.__dict__["_slim"] = WidthState(map(Column, check_widths(widths)))

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths, from the widest to the narrowest."""
        return self._slim.numbers

    @property
    def width(self) -> float:
        """The active width."""
        return cast(float, self._slim.active.width)

    def module_at(self, index: int) -> nn.Module:
        """Return the module of the width with this index; 0 is the full width."""
        raise NotImplementedError

    def own_at(self, index: int) -> nn.Module:
        """Return the module of the width with this index, or a copy if it shares tensors with others."""
        return self.module_at(index)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module of the active width."""
        return self.linked(self.module_at(self._slim.index)(*args, **kwargs))

    def linked(self, output: Any) -> Any:
        """Return `output`; with a process group, its graph has the idle parameters too, as DDP needs."""
        if not in_group() or not isinstance(output, Tensor):
            return output
        wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is not None:  # None in the forwards that checkpointing repeats
            self._static_graph = wrapper.static_graph
        if not torch.is_grad_enabled():
            return output
        linked: Tensor = _Linked.apply(output, self._static_graph, *self.parameters())
        if not torch.compiler.is_compiling() and linked.requires_grad and world_size() > 1:
            self._compare(wrapper, linked)
        return linked

    def _compare(self, wrapper: DistributedDataParallel | None, output: Tensor) -> None:
        """Let the processes notice that they train at different widths: now, or when they average gradients."""
        width = str(self._slim.active.width)
        output.register_hook(lambda grad: note_width(self, width))  # type: ignore[no-untyped-call]
        averages = wrapper is not None and wrapper.training and wrapper.require_backward_grad_sync
        if wrapper is not None and averages and self._compared < _COMPARED and not wrapper._join_config.enable:
            self._compared += 1
            check_same_widths("DistributedDataParallel", width, output.device, wrapper.process_group)


class _Linked(torch.autograd.Function):
    """The identity, whose backward reaches further tensors, with zeros for a static graph, which else drops them."""

    @staticmethod
    def forward(output: Tensor, zeros: bool, *idle: Tensor) -> Tensor:
        return output.detach()  # not a view for autograd, so it may be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, zeros, *idle = inputs
        ctx.count = len(idle)
        ctx.save_for_backward(*idle if zeros else ())
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        missing: list[Tensor | None] = [None] * ctx.count
        return grad, None, *([torch.zeros_like(idle) for idle in ctx.saved_tensors] or missing)


def inner_modules(container: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return the modules of a list inside a container, faster than through attribute access."""
    return cast("dict[str, nn.Module]", container._modules[name]._modules)  # type: ignore[union-attr]


class Switchable(SwitchableContainer):
    """One real module per width, a norm or any layer; see `SwitchableNorm`."""

    full: nn.Module
    narrow: nn.ModuleList
    _torch_class: ClassVar[type[nn.Module] | None] = None  # that of the full module, if this class's name says so
    _lists: ClassVar[dict[str, int]] = {"narrow": 1}  # of all norms but the full one -> the first one's width, by index

    def __init__(self, full: nn.Module, columns: Sequence[Column]) -> None:
        nn.Module.__init__(self)
        self.__dict__["_slim"] = WidthState(columns)
        self.add_module("full", full)
        self.add_module("narrow", nn.ModuleList(map(self._narrowed, columns[1:])))
        self.__dict__["training"] = self.narrow.training = full.training
        self.register_load_state_dict_post_hook(_report_plain_names)  # type: ignore[no-untyped-call]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Insert a module, as converters do; the container uses the parameter and buffer dicts of its full norm."""
        super().add_module(name, module)
        self.__dict__.update(_parameters=self.full._parameters, _buffers=self.full._buffers)
        _guard(self.full)
        narrow: Any = self._modules.get("narrow") or ()
        for norm, column in zip(narrow, self._slim.columns[1:], strict=False):
            _guard(norm)
            if column.shared and not is_slim(norm):
                _share(norm, self.full._parameters, column.cuts)
        for norm in filter(is_slim, self.norms()):
            norm.__dict__["_slim_lent"] = self.full._parameters

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse tensors that other code adds, as pruning does."""
        what = f"{name} cannot be added to a {type(self).__name__}, which has no tensors of its own"
        raise ConversionError(f"{what}; change norm.full and norm.narrow, or the model before slimmable.slimify")

    @torch.inference_mode(False)  # it is used outside of that, too
    def _narrowed(self, column: Column) -> nn.Module:
        """Return a cut copy of the full module, which may read the parameters of that."""
        module = copy_of_norm(self.full)
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            if name in column.cuts:
                tensor.data = take(tensor.data, column.cuts[name]).clone()
        for name, value in column.values.items():
            owner, _, own = name.rpartition(".")
            setattr(module.get_submodule(owner), own, value)
        return _share(module, self.full._parameters, column.cuts) if column.shared else module

    def to_plain(self) -> nn.Module:
        """Return the module of the full width, the module itself, not a copy."""
        return _unguarded(self.full)

    def module_at(self, index: int) -> nn.Module:
        """Return the module of the width with this index; 0 is the full width, -1 a guest."""
        if index > 0:
            return inner_modules(self, "narrow")[str(index - 1)]
        return cast(nn.Module, self._slim.active.module if index else self._modules["full"])

    def own_at(self, index: int) -> nn.Module:
        """Return a module like that of the width with this index, on the same tensors except shared ones."""
        norm = self.module_at(index)
        if not is_slim(norm):
            return _unguarded(twin_of(norm, type(norm)))
        column = self._slim.columns[index] if index > 0 else self._slim.active
        own = self._narrowed(replace(column, shared=False)).train(norm.training)
        own.load_state_dict(norm.state_dict(), strict=False)  # its statistics
        return _unguarded(own)

    def norms(self) -> Iterator[nn.Module]:
        """Yield the modules of all widths and of an active guest."""
        for child in self.children():
            yield from child if isinstance(child, nn.ModuleList) else (child,)

    def children(self) -> Iterator[nn.Module]:
        """Yield an active guest, too, so that it follows modes, types and devices."""
        yield from super().children()
        yield from filter(None, [self._slim.now.module])

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
        if vars(self.full).get("_slim") is self._slim:  # torch.export gives all of one name the last one's attributes
            vars(self.full).pop("_slim") if own is None else vars(self.full).update(_slim=own)
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
        for name in self._lists:
            yield from getattr(self, name).named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

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
        for name, first in self._lists.items():
            if any(key.startswith(f"{prefix}{name}.") for key in state_dict):
                if any(mine != other for mine, other in zip(self._slim.widths, theirs, strict=False)):
                    reports[-1].append(f"{prefix}{name} has norms of the widths {theirs}, not {self._slim.widths}")
                continue
            for place, norm in enumerate(getattr(self, name)):
                index = first + place
                dense = f"narrow.{index - 1}" if index else "full"
                for key, own in norm.state_dict(keep_vars=True).items():  # of the dense pass, or parts of the full norm
                    given = state_dict.get(f"{prefix}{dense}.{key}", state_dict.get(f"{prefix}full.{key}"))
                    if given is not None and given.shape in (own.shape, full[key].shape):
                        part = given if given.shape == own.shape else take(given, self._slim.columns[index].cuts[key])
                        state_dict[f"{prefix}{name}.{place}.{key}"] = part.clone()
        self.__dict__["_loading"] = (prefix, reports)

    def __repr__(self) -> str:
        full = self.full.extra_repr() if type(self.full) is self._torch_class else repr(self.full)
        return f"{type(self).__name__}({full}, {self.extra_repr()})"


class SwitchableNorm(Switchable):
    """One real norm per width; the forward runs that of the active width and touches no other.

    In the state dict and `named_parameters`, the full width's norm has the plain names (`bn.weight`); the narrower
    ones follow as `bn.narrow.0.weight` and so on, from wide to narrow. A checkpoint without narrow names loads into
    the full norm, and its kept channels into the narrower ones.

    Attributes that the container lacks are those of the active norm. Setting one sets it in every norm, except that a
    tensor is set in the active norm alone. Source: Yu et al., Slimmable Neural Networks, ICLR 2019, section 3.2.

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
        known = check_widths(widths)
        if len(kept) != len(known):
            raise ConversionError(f"SwitchableNorm: kept must be one entry for each of {known}, got {kept!r}")
        super().__init__(full, [column_of_norm(full, *each, shared_affine) for each in zip(known, kept, strict=True)])


def guest_of(
    norm: Switchable, width: float | Counts, kept: Mapping[str, Sequence[Kept]], values: Mapping[str, object]
) -> Column:
    """Return a further column, whose module starts from the full one's statistics and shares its parameters."""
    if isinstance(norm.full, _BatchNorm):
        channels = next(axes[0] for axes in kept.values() if len(axes) == 1)
        column = column_of_norm(norm.full, width, channels, shared=True)
    else:
        column = replace(column_of(norm.full, width, kept, values), shared=True)
    column.module = norm._narrowed(column).train(norm.training)
    return column


def _report_plain_names(norm: Switchable, _: Any) -> None:
    """Report missing, unexpected and ill-shaped tensors by their state-dict names; reset an active guest."""
    prefix, reports = norm.__dict__.pop("_loading", ("", ()))
    if guest := norm._slim.now.module:
        guest.load_state_dict(norm._narrowed(norm._slim.now).state_dict())
    for report in reports:
        report[:] = [text.replace(f"{prefix}full.", prefix) for text in report]


def _share(norm: nn.Module, lent: dict[str, nn.Parameter | None], cuts: dict[str, Cut]) -> nn.Module:
    """Let a narrow module read its part of `lent`, the full module's parameters, instead of having its own."""
    own = {name: None for name, tensor in lent.items() if tensor is None}
    norm.__dict__.update(_parameters=own, _slim_lent=lent, _slim=WidthState([Column(1.0, cuts=cuts)]))
    norm.__dict__.update({"affine": False} if "affine" in norm.__dict__ else {})  # which converters read
    add_properties(norm, lent.keys() - own.keys(), ())
    return norm


def _guard(norm: nn.Module) -> None:
    """Let a norm refuse to be reset without those of other widths, unless its parameters are, too."""
    if isinstance(norm, _BatchNorm):
        norm.__dict__.update(reset_running_stats=partial(_refuse_reset), reset_parameters=partial(_start_anew, norm))


def _unguarded(norm: nn.Module) -> nn.Module:
    for name in ("reset_running_stats", "reset_parameters"):
        vars(norm).pop(name, None)
    return norm


def _refuse_reset() -> None:
    what = "the statistics of a switchable BatchNorm cannot be reset: update_bn would lose those of other widths"
    raise UsageError(f"{what}; call slimmable.calibrate_bn(model, loader) instead")


def _start_anew(norm: _BatchNorm) -> None:
    _unguarded(norm)
    norm.reset_parameters()
    _guard(norm)


def copy_of_norm(norm: nn.Module) -> nn.Module:
    """Copy a norm, except for the process group of a SyncBatchNorm, which cannot be copied."""
    group = getattr(norm, "process_group", None)
    return copy.deepcopy(norm, {} if group is None else {id(group): group})


def column_of_norm(norm: nn.Module, width: float | Counts, kept: Kept, shared: bool) -> Column:
    """Return what a norm that keeps these channels has at a width, and modules inside it, such as an activation."""
    if kept is None:
        return Column(width, shared=shared)
    counts = (getattr(norm, name, None) for name in _CHANNEL_COUNTS)
    channels = next((count for count in counts if isinstance(count, int)), None)
    if channels is None:
        raise ConversionError(f"{type(norm).__name__} has no num_features or num_channels, its number of channels")
    units = kept if isinstance(kept, tuple) and kept else [kept - 1] if type(kept) is int else [-1]
    if not set(units) <= set(range(channels)):
        raise ConversionError(f"SwitchableNorm: kept must hold None, 1 to {channels}, or tuples of these, got {kept!r}")
    tensors = chain(norm.named_parameters(), norm.named_buffers())
    of_channels = ((name, it) for name, it in tensors if it.shape[:1] == (channels,))
    cuts = {name: make_cut(it, (kept, *[None] * (it.ndim - 1)), name) for name, it in of_channels}
    places = ((path, name, vars(each).get(name)) for path, each in norm.named_modules() for name in _CHANNEL_COUNTS)
    sizes = {f"{path}.{name}".lstrip("."): kept_of(channels, kept) for path, name, size in places if size == channels}
    return Column(width, cuts={name: cut for name, cut in cuts.items() if cut}, values={**sizes}, shared=shared)


def _units(tensors: Mapping[str, Tensor], column: Column, moved: Mapping[Any, Any], path: str) -> _Units:
    """Return the units that a column keeps of each axis of a full module's tensors, by where they are now."""
    found: _Units = {}
    for name, tensor in tensors.items():
        place = f"{path}.{name}".lstrip(".").rpartition(".")[::2]
        kept = units_of(column.cuts[name]) if name in column.cuts else map(range, tensor.shape)
        orders = ((moved.get((*place, axis)), [*units]) for axis, units in enumerate(kept))
        found[name] = [units if order is None else np.argsort(order)[units].tolist() for order, units in orders]
    return found


def inherit(
    norm: Switchable, before: Switchable, moved: Mapping[Any, Sequence[int]], path: str
) -> list[float | Counts]:
    """Give a container what one of the same full module has learned; return the widths that lose some of it.

    A width with other channels starts from the nearest wider one's module and, for the channels that it had, its own.
    `moved` says of axes (module path, name, number) where each unit was before.
    """
    norm.__class__ = type(before)
    norm.__dict__.update(vars(before) | {name: vars(norm)[name] for name in ("_slim", "_modules")})
    full, columns = norm.full.state_dict(), {column.width: column for column in before._slim.columns}
    had = {width: _units(full, column, moved, path) for width, column in columns.items()}
    lost = []
    for place, column in enumerate(norm._slim.columns[1:]):
        width, units, own = column.width, _units(full, column, {}, path), columns.get(column.width)
        if own is not None and units == had[width] and column.shared == own.shared:
            norm.narrow[place] = before.module_at(own.index)
            continue
        wider = [w for w in columns if isinstance(w, float) and isinstance(width, float) and width < w < 1]
        known = {name: tensor.clone() for name, tensor in full.items()}
        for source in (*sorted(wider, reverse=True), *([] if own is None else [width])):
            for name, tensor in before.module_at(columns[source].index).state_dict().items():
                known[name][np.ix_(*had[source][name])] = tensor.to(known[name])
        parts = {name: tensor[np.ix_(*units[name])] for name, tensor in known.items()}
        norm.narrow[place].load_state_dict(parts, strict=False)
        if own is not None:
            loses_affine = column.shared and not own.shared and norm.full.affine
            same = all(map(set.__eq__, *(map(set, chain(*each.values())) for each in (units, had[width]))))
            lost += [width] if loses_affine or not same else []
    return lost
