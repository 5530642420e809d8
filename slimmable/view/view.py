"""The width view: a module of any class runs with the slices and sizes of its active width.

`install_view` changes a module's class to a generated subclass of the same name. Reading `module.weight` then returns
the slice of the active width, and `module.num_heads` the number at that width, so the class's own `forward` just works.
The Parameters stay full-size under their own names, where optimizers and state dicts look for them.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, TypeAlias, cast

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import Proxy

from slimmable._modules import tensors_of, unannounced
from slimmable._widths import Kept
from slimmable.errors import ConversionError
from slimmable.view.state import Column, Counts, HasWidths, WidthState, is_slim, make_cut, put, state_of, take

_Names: TypeAlias = "tuple[tuple[str, ...], ...]"  # tensors, values, caches, and which of the tensors are buffers
_getattr = nn.Module.__getattr__  # torch.fx replaces it while it records
_COUNTERS = ("ptflops", "thop", "torchinfo")
_INSTEAD = "give it slimmable.extract(model, width), the plain network of one width"


def install_view(
    module: nn.Module,
    widths: tuple[float, ...],
    tensors: Mapping[str, Sequence[Sequence[Kept]]],
    values: Mapping[str, Sequence[object]],
    caches: Mapping[str, object] | None = None,
) -> None:
    """Let `module`, without its children, run at several widths, in place; without tensors and values, it is marked.

    Args:
        tensors: name of a parameter, buffer or tensor attribute -> for each width, what is kept of each axis.
        values: name of a plain attribute -> its value at each width.
        caches: name of an attribute in which the forward keeps results -> its value when empty. Each width has its own;
            assigning one empties those of the others, unless a narrow forward has filled it.
    """
    if is_slim(module):
        raise ConversionError(f"{type(module).__name__} already has a width view; remove it first with remove_view")
    columns = []
    for index, width in enumerate(widths):
        kept = {name: per_width[index] for name, per_width in tensors.items()}
        own = {name: per_width[index] for name, per_width in values.items()}
        columns.append(column_of(module, width, kept, own, caches))
    state = module.__dict__["_slim"] = WidthState(columns)
    state.blanks = dict(caches or {})
    for name, full in columns[0].values.items():
        module.__dict__.setdefault(name, full)
    add_properties(module, tensors, values, state.blanks)


def column_of(
    module: nn.Module,
    width: float | Counts,
    kept: Mapping[str, Sequence[Kept]],
    values: Mapping[str, object],
    caches: Mapping[str, object] | None = None,
) -> Column:
    """Return what a module has at a width, by the units kept of its tensors' axes, and the values of attributes."""
    full = ((name, full_tensor(module, name), axes) for name, axes in kept.items())
    cuts = {name: make_cut(it, axes, f"{type(module).__name__}.{name}") for name, it, axes in full if it is not None}
    empty = {name: copy.copy(blank) for name, blank in (caches or {}).items()}
    return Column(width, cuts={name: cut for name, cut in cuts.items() if cut}, values=dict(values), caches=empty)


def remove_view(module: nn.Module) -> None:
    """Undo `install_view`: restore the original class, full tensors and full values."""
    module.__class__ = _without_view(type(module))
    module.__dict__.update(module.__dict__.pop("_slim").blanks)


def _without_view(kind: type) -> type:
    """Return a class without its generated base, also one made from that since, as parametrizations do."""
    if "_slim_base" in kind.__dict__:
        return cast(type, kind._slim_base.__dict__.get("_slim_plain", kind._slim_base))  # type: ignore[attr-defined]
    if not hasattr(kind, "_slim_base"):
        return kind
    body = {name: value for name, value in kind.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(map(_without_view, kind.__bases__)), body)


def full_tensor(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter, buffer or plain tensor of a module as it is at full width."""
    own = module.__dict__
    for store in (own["_parameters"], own["_buffers"], own, own.get("_slim_lent", {})):
        if name in store:
            return cast("Tensor | None", store[name])
    raise ConversionError(f"{type(module).__name__} has no tensor {name!r}")


# -- the generated classes, whose properties return what the active column holds
def _changed(module: nn.Module, name: str, tensor: Tensor) -> ConversionError:
    place = f"{module.__dict__['_slim'].path}.{name}".lstrip(".")
    what = f"{place} of a {type(module).__name__} has shape {tuple(tensor.shape)}, not that of its conversion"
    return ConversionError(f"{what}; call slimmable.slimify on the model again")


def _whole(module: nn.Module, name: str, full: Any, value: Any) -> Any:
    """Return what to keep of a tensor that is assigned: at a narrow width the full one, in which it replaces a part."""
    cut = None if (state := state_of(module)) is None else state.active.cuts.get(name)
    if cut is None or not isinstance(value, Tensor) or value.shape == cut.full or getattr(full, "shape", 0) != cut.full:
        return value
    part = take(full, cut)
    if value.shape != part.shape:
        raise _changed(module, name, value)
    own = not is_compiling() and value._base is full and value.storage_offset() == part.storage_offset()
    return full if own and value.stride() == part.stride() else put(full, cut, value.detach())


def _delete_plain(module: nn.Module, name: str) -> None:
    if name not in module.__dict__:
        raise AttributeError(name)
    del module.__dict__[name]


def _tensor_property(name: str) -> property:
    def get(self: Any) -> Tensor | Proxy | None:
        parameters = self._parameters
        if name in parameters:
            if not is_compiling() and nn.Module.__getattr__ is not _getattr:
                recorded: Any = nn.Module.__getattr__(self, name)
                if isinstance(recorded, Proxy):  # whose graph takes the tensor from this property when it is done
                    return recorded
            tensor = parameters[name]
        elif name in self._buffers:
            tensor = self._buffers[name]
        elif name in self._slim_lent:
            tensor = self._slim_lent[name]
        elif name in self.__dict__:
            tensor = self.__dict__[name]
        else:
            raise AttributeError(name)  # which `nn.Module.__getattr__` says in more words
        cut = self._slim.active.cuts.get(name)
        if cut is None or tensor is None:
            return cast("Tensor | None", tensor)
        if tensor.shape != cut.full:
            raise _changed(self, name, tensor)
        return take(tensor, cut)

    def put(self: Any, value: object) -> None:
        self.__dict__[name] = _whole(self, name, self.__dict__.get(name), value)

    return property(get, put, lambda self: _delete_plain(self, name))


def _value_property(name: str) -> property:
    def get(self: Any) -> object:
        if name not in self.__dict__:
            raise AttributeError(name)
        values = self._slim.active.values
        # `self.__dict__` only as a last resort, since torch.compile cannot read it up to torch 2.11
        return values[name] if name in values else self.__dict__[name]

    def put(self: Any, value: object) -> None:
        self.__dict__[name] = value
        state = state_of(self)
        if state is not None and name in state.columns[0].values:
            state.columns[0].values[name] = value

    return property(get, put, lambda self: _delete_plain(self, name))


def _cache_property(name: str) -> property:
    def get(self: Any) -> object:
        return self._slim.active.caches[name]

    def put(self: Any, value: object) -> None:
        state = self._slim
        kept = [value] if not isinstance(value, (tuple, list)) else value
        counted = isinstance(value, (int, float)) and value != state.blanks[name]
        narrow = state.active is not state.columns[0]  # where a forward that keeps something leaves other widths alone
        for column in () if narrow and (counted or any(isinstance(each, Tensor) for each in kept)) else state.columns:
            column.caches[name] = copy.copy(state.blanks[name])
        state.active.caches[name] = value

    return property(get, put)


class _Viewed(HasWidths):
    """The common base of all generated classes, before the module's own; it notices tools that would be wrong."""

    _slim_view: ClassVar[tuple[type[nn.Module], _Names]]  # the module's own class, and the names of the properties
    _slim_lent: Mapping[str, Tensor | None] = {}  # parameters of another module, part of which this one reads

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a layer of the original class for tools that copy a layer by `type(layer)(...)`."""
        return cls._slim_view[0](*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __repr__(self) -> str:
        if self._slim_view[0].__repr__ is nn.Module.__repr__:
            return super().__repr__()
        with self._slim.at_full():  # a class with its own `__repr__`, which may not use `extra_repr`
            return super().__repr__()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a tensor of the active width in place of the full one, such as a narrow weight quantised."""
        cut = self._slim.active.cuts.get(name) if "_slim" in self.__dict__ else None
        if cut is not None and param is not None and param.shape != cut.full:
            what = f"{type(self).__name__}.{name} has shape {cut.full}, and cannot become {tuple(param.shape)}"
            raise ConversionError(f"{what}; change it at width 1.0, or in slimmable.extract(model, width)")
        super().register_parameter(name, param)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Have the indices on the new device, too, which a compiled forward would otherwise make each time."""
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        picks = [picked for column in self._slim.columns for cut in column.cuts.values() for _, picked in cut.picks]
        for tensor in tensors_of(self).values():
            for picked in picks:
                picked.on(tensor.device)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy through the original class, since the generated one cannot be imported."""
        with self._slim.at_full():  # recurrent layers refresh their list of weights here
            reduced = super().__reduce_ex__(max(2, int(protocol)))
        if isinstance(reduced, str) or reduced[1][:1] != (type(self),):
            return reduced
        own = {name: value for name, value in self.__dict__.items() if name.startswith("_slim")}
        return (_rebuild, (*self._slim_view, *reduced[1][1:]), (reduced[2], own), *reduced[3:])

    def __setstate__(self, state: tuple[Any, dict[str, Any]]) -> None:
        super().__setstate__(state[0])  # type: ignore[no-untyped-call]  # a class may run its constructor
        self.__dict__.update(state[1])

    # -- what tools that count, quantise or script layers are told
    def apply(self, fn: Any) -> Any:
        """Apply a function to every module; refuse those of tools that know layers by their exact class."""
        if counter := _counter(fn):
            raise ConversionError(f"{counter} knows layers by their exact class, not converted ones; {_INSTEAD}")
        return super().apply(fn)

    def register_forward_pre_hook(self, hook: Any, **kwargs: Any) -> Any:
        """Register a hook; warn if it counts what a layer holds."""
        if counter := _counter(hook):
            told = f"{counter} counts the parameters that a converted model holds, those of all widths; {_INSTEAD}"
            warnings.warn(told, stacklevel=2)
        return super().register_forward_pre_hook(hook, **kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        raise ConversionError(f"torch.jit.script cannot read the class of a converted layer; {_INSTEAD}")

    def _refuse_qconfig(self, value: object = None) -> None:
        raise ConversionError(f"torch.ao.quantization does not know the classes of converted layers; {_INSTEAD}")

    # it may be there from before the conversion
    qconfig = _value_property("qconfig").setter(_refuse_qconfig).deleter(_refuse_qconfig)


def _counter(function: Any) -> str | None:
    package = (getattr(getattr(function, "func", function), "__module__", None) or "").partition(".")[0]  # or a partial
    return package if package in _COUNTERS else None


class _ViewedWithBuffers(_Viewed):
    """Lets a forward that assigns a buffer at a narrow width change only the part that the width uses."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _whole(self, name, self.__dict__.get("_buffers", {}).get(name), value))


def _rebuild(base: type[nn.Module], names: _Names, *args: Any) -> nn.Module:
    return base.__new__(_viewed_class(base, names), *args)  # type: ignore[arg-type]  # mypy takes no class for hashable


def add_properties(
    module: nn.Module, tensors: Iterable[str], values: Iterable[str], caches: Iterable[str] = ()
) -> None:
    """Make these names of a module return what its active width has, in addition to those that already do."""
    base, known = getattr(type(module), "_slim_view", (type(module), ((), (), (), ())))
    new = (set(tensors), set(values), set(caches), set(tensors) & module._buffers.keys())
    names = tuple(tuple(sorted({*old, *more})) for old, more in zip(known, new, strict=True))
    if any(names):
        module.__class__ = _viewed_class(base, names)  # type: ignore[arg-type]


@cache
def _viewed_class(base: type[nn.Module], names: _Names) -> type[nn.Module]:
    """Return the subclass of `base` with properties for these names; each class is made only once."""
    *properties, buffers = names
    body: dict[str, Any] = {"_slim_base": base, "_slim_view": (base, names)}
    for make, own in zip((_tensor_property, _value_property, _cache_property), properties, strict=True):
        body |= {name: make(name) for name in own}
    return unannounced(base, body, _ViewedWithBuffers if buffers else _Viewed)
