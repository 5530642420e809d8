"""The width view: any module, of any class, runs with the slices and sizes of its active width.

`install_view` gives a module a generated subclass of its own class. Reading `module.weight` then gives the slice of the
active width and `module.num_heads` the number of that width, so the class's own `forward` just works, also for classes
that we never heard of. The Parameters themselves stay full-size, under their own names, where optimizers, state dicts
and averages look for them. The generated class has the name of the original, which it is a subclass of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import mul
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from slimmable._errors import ConversionError

Kept: TypeAlias = "int | tuple[int, ...] | None"
"""What is kept along one axis at one width: all, the first k, or these indices (ascending)."""

_INDEX_PREFIX = "_slim_kept"
_PLAIN_TENSORS = (Tensor, nn.Parameter)


class Cut(NamedTuple):
    """How to take a slice: a block, if it is not the whole tensor, then for some axes the buffer with the indices."""

    block: tuple[slice, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    picks: tuple[tuple[int, str], ...]


class WidthState:
    """The widths of one module, widest first, and which of them is active; `index` 0 is the full width."""

    def __init__(self, widths: tuple[float, ...]) -> None:
        self.widths = widths
        self.index = 0
        self.cuts: dict[str, tuple[Cut, ...]] = {}
        self.values: dict[str, tuple[object, ...]] = {}
        self.sizes: dict[str, tuple[object, ...]] = {}
        self.index_buffers: dict[str, tuple[int, ...]] = {}
        self.blanks: dict[str, object] = {}
        self.caches: dict[str, list[object]] = {}


def state_of(module: nn.Module) -> WidthState | None:
    """Return the width state of a module, or None if it does not react to widths."""
    return module.__dict__.get("_slim")


def is_slim(module: nn.Module) -> bool:
    """Tell whether the module itself, not only a part of it, reacts to widths.

    >>> is_slim(nn.Linear(4, 4))
    False
    """
    return "_slim" in module.__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module has without its view; for our own layers it is torch's.

    A subclass of one of our layers stays, since it may have a forward of its own.

    >>> linear = nn.Linear(4, 4)
    >>> install_view(linear, (1.0, 0.5), {"weight": [(None, None), (None, 2)]}, {})
    >>> type(linear) is nn.Linear, original_class(linear) is nn.Linear
    (False, True)
    """
    base = getattr(type(module), "_slim_base", type(module))
    return cast("type[nn.Module]", base.__dict__.get("_slim_plain", base))


def install_view(
    module: nn.Module,
    widths: tuple[float, ...],
    tensors: Mapping[str, Sequence[Sequence[Kept]]],
    values: Mapping[str, Sequence[object]],
    sizes: Mapping[str, Sequence[object]] | None = None,
    caches: Mapping[str, object] | None = None,
) -> None:
    """Let `module` run at several widths, in place; it starts at the full width.

    Args:
        module: any module; only its own tensors and attributes are concerned, not those of its children.
        widths: from the widest, 1.0, to the narrowest.
        tensors: name of a parameter, a buffer or a tensor attribute -> for each width -> for each axis what is kept.
        values: name of a plain attribute -> its value at each width.
        sizes: the same for attributes that go on reading as at full width, such as `in_features`, which other code
            sizes its heads by; only `narrow_values`, and so an extracted network, has their narrow value.
        caches: attributes in which the module's own forward keeps what it has computed -> their value when empty.
            Each width gets its own; assigning one drops what other widths keep.

    With no tensors and no values the module is only marked as known to have nothing to slim; its class stays.

    Raises:
        ConversionError: if the module has a view already, or a tensor does not exist or is too small.

    >>> linear = nn.Linear(4, 4, bias=False)
    >>> install_view(linear, (1.0, 0.5), {"weight": [(None, None), (None, 2)]}, {"in_features": (4, 2)})
    >>> linear._slim.index = 1
    >>> linear.weight.shape, linear
    (torch.Size([4, 2]), Linear(in_features=4, out_features=4, bias=False, widths=(1.0, 0.5), width=0.5))
    """
    if is_slim(module):
        raise ConversionError(f"{type(module).__name__} has a width view already; remove it first with remove_view")
    state = WidthState(widths)
    buffer_of: dict[tuple[int, ...], str] = {}
    for name, per_width in tensors.items():
        tensor = _full_tensor(module, name)
        _check_length(module, name, per_width, widths)
        if tensor is not None:
            state.cuts[name] = tuple(_cut(module, name, tensor.shape, kept, buffer_of) for kept in per_width)
    for name, per_width_values in values.items():
        _check_length(module, name, per_width_values, widths)
        state.values[name] = tuple(per_width_values)
    for name, per_width_values in (sizes or {}).items():
        _check_length(module, name, per_width_values, widths)
        state.sizes[name] = tuple(per_width_values)
    for name, blank in (caches or {}).items():
        state.blanks[name] = blank
        state.caches[name] = [copy.copy(state.blanks[name]) for _ in widths]
    device = next((t.device for name in state.cuts if (t := _full_tensor(module, name)) is not None), None)
    for kept, buffer in buffer_of.items():
        state.index_buffers[buffer] = kept
        module.register_buffer(buffer, torch.tensor(kept, device=device), persistent=False)
    module.__dict__["_slim"] = state
    for name, full_to_narrow in state.values.items():
        module.__dict__.setdefault(name, full_to_narrow[0])
    names = (tuple(sorted(tensors)), tuple(sorted(values)), tuple(sorted(state.caches)))
    if any(names):
        module.__class__ = _viewed_class(type(module), *names)


def remove_view(module: nn.Module) -> None:
    """Undo `install_view`: the original class, full tensors and full values.

    Raises:
        ConversionError: if the module has no view.
    """
    state = state_of(module)
    if state is None:
        raise ConversionError(f"{type(module).__name__} has no width view to remove")
    module.__class__ = original_class(module)
    del module.__dict__["_slim"]
    module.__dict__.update(state.blanks)
    for buffer in state.index_buffers:
        delattr(module, buffer)


def narrow_tensors(module: nn.Module, index: int) -> dict[str, Tensor]:
    """Return the slices that the module has at the width with this index; they share memory where torch can."""
    state = state_of(module)
    found: dict[str, Tensor] = {}
    for name, cuts in ({} if state is None else state.cuts).items():
        tensor = _full_tensor(module, name)
        if tensor is not None:
            found[name] = _apply_cut(tensor, cuts[index], module._buffers)
    return found


def narrow_values(module: nn.Module, index: int) -> dict[str, object]:
    """Return the plain attributes that the module has at the width with this index."""
    state = state_of(module)
    return {} if state is None else {name: values[index] for name, values in (state.values | state.sizes).items()}


def _full_tensor(module: nn.Module, name: str) -> Tensor | None:
    for store in (module._parameters, module._buffers, module.__dict__):
        if name in store:
            return cast("Tensor | None", store[name])
    raise ConversionError(f"{type(module).__name__} has no tensor {name!r}")


def _check_length(module: nn.Module, name: str, per_width: Sequence[object], widths: tuple[float, ...]) -> None:
    if len(per_width) != len(widths):
        raise ConversionError(
            f"{type(module).__name__}.{name}: {len(per_width)} entries for the {len(widths)} widths {widths}"
        )


def _cut(
    module: nn.Module, name: str, shape: torch.Size, kept: Sequence[Kept], buffer_of: dict[tuple[int, ...], str]
) -> Cut:
    """Turn what is kept on each axis into a block and index buffers."""
    block: list[slice] = []
    picks: list[tuple[int, str]] = []
    for axis, (size, keep) in enumerate(zip(shape, kept, strict=True)):
        first, last = (0, size if keep is None else keep) if not isinstance(keep, tuple) else (keep[0], keep[-1] + 1)
        if last > size:
            raise ConversionError(f"{type(module).__name__}.{name}: axis {axis} has size {size}, cannot keep {keep}")
        if isinstance(keep, tuple) and last - first != len(keep):
            picks.append((axis, buffer_of.setdefault(keep, f"{_INDEX_PREFIX}{len(buffer_of)}")))
            first, last = 0, size
        block.append(slice(first, last))
    sizes = tuple(part.stop - part.start for part in block)
    starts = tuple(part.start for part in block)
    return Cut(tuple(block) if sizes != shape else (), starts if any(starts) else (), sizes, tuple(picks))


def _apply_cut(tensor: Tensor, cut: Cut, buffers: Mapping[str, Tensor | None]) -> Tensor:
    if cut.block:
        tensor = _block(tensor, cut)
    for axis, buffer in cut.picks:
        tensor = tensor.index_select(axis, cast(Tensor, buffers[buffer]))
    return tensor


def _block(tensor: Tensor, cut: Cut) -> Tensor:
    """Take the block in one operation; indexing takes one per axis, and each fills zeros of its own in the backward."""
    if type(tensor) not in _PLAIN_TENSORS or is_compiling():
        return tensor[cut.block]
    strides = tensor.stride()
    if not cut.starts:
        return tensor.as_strided(cut.sizes, strides)
    return tensor.as_strided(cut.sizes, strides, tensor.storage_offset() + sum(map(mul, cut.starts, strides)))


def _missing(module: nn.Module, name: str) -> AttributeError:
    return AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")


def _set_plain(module: nn.Module, name: str, value: object) -> None:
    """Store what nn.Module does not store itself: neither a Parameter nor a registered buffer."""
    module.__dict__[name] = value


def _delete_plain(module: nn.Module, name: str) -> None:
    if name not in module.__dict__:
        raise _missing(module, name)
    del module.__dict__[name]


def _tensor_property(name: str) -> property:
    def get(self: Any) -> Tensor | None:
        parameters = self._parameters
        if name in parameters:
            tensor = parameters[name]
        elif name in self._buffers:
            tensor = self._buffers[name]
        elif name in self.__dict__:
            tensor = self.__dict__[name]
        else:
            raise _missing(self, name)
        state = self._slim
        if state.index == 0 or tensor is None:
            return cast("Tensor | None", tensor)
        return _apply_cut(tensor, state.cuts[name][state.index], self._buffers)

    return property(get, lambda self, value: _set_plain(self, name, value), lambda self: _delete_plain(self, name))


def _value_property(name: str) -> property:
    def get(self: Any) -> object:
        if name not in self.__dict__:
            raise _missing(self, name)
        state = self._slim
        if name in state.values:
            return state.values[name][state.index]
        return self.__dict__[name]  # while a constructor runs

    def put(self: Any, value: object) -> None:
        _set_plain(self, name, value)
        state = state_of(self)
        if state is not None and name in state.values:
            state.values[name] = (value, *state.values[name][1:])

    return property(get, put, lambda self: _delete_plain(self, name))


def _cache_property(name: str) -> property:
    def get(self: Any) -> object:
        state = self._slim
        return state.caches[name][state.index]

    def put(self: Any, value: object) -> None:
        state = self._slim
        state.caches[name] = [copy.copy(state.blanks[name]) for _ in state.widths]
        state.caches[name][state.index] = value

    return property(get, put)


@contextmanager
def _at_full(state: WidthState) -> Iterator[None]:
    index, state.index = state.index, 0
    try:
        yield
    finally:
        state.index = index


def _extra_repr(base: type[nn.Module]) -> Callable[[nn.Module], str]:
    def extra_repr(self: nn.Module) -> str:
        state = cast(WidthState, state_of(self))
        with _at_full(state):
            full = base.extra_repr(self)
        width = f"widths={state.widths}, width={state.widths[state.index]}"
        return f"{full}, {width}" if full else width

    return extra_repr


def _own_repr(base: type[nn.Module]) -> Callable[[nn.Module], str]:
    """For classes that print themselves without `extra_repr`: as at full width."""

    def own_repr(self: nn.Module) -> str:
        with _at_full(cast(WidthState, state_of(self))):
            return base.__repr__(self)

    return own_repr


def _apply_of(base: type[nn.Module]) -> Callable[..., nn.Module]:
    """Keep the contents of the index buffers through moves that drop contents, such as `to_empty`."""

    def apply_to_all(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        base._apply(self, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, kept in cast(WidthState, state_of(self)).index_buffers.items():
            buffer = self._buffers[name]
            if buffer is not None and not buffer.is_meta:
                self._buffers[name] = torch.tensor(kept, device=buffer.device)
        return self

    return apply_to_all


def _reduce_of(base: type[nn.Module], *names: tuple[str, ...]) -> Callable[..., Any]:
    """Pickle and copy by way of the original class, since the generated one cannot be imported."""

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        with _at_full(cast(WidthState, state_of(self))):  # recurrent layers refresh their list of weights here
            reduced = base.__reduce_ex__(self, max(2, int(protocol)))
        if isinstance(reduced, str) or reduced[1][:1] != (type(self),):
            return reduced
        return (_rebuild, (base, names, *reduced[1][1:]), *reduced[2:])

    return reduce_ex


def _rebuild(base: type[nn.Module], names: _Names, *args: Any) -> nn.Module:
    viewed = _viewed_class(base, *names)
    return viewed.__new__(viewed, *args)


_Names: TypeAlias = "tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]"
_viewed_classes: dict[tuple[type[nn.Module], _Names], type[nn.Module]] = {}


def _viewed_class(base: type[nn.Module], *names: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of `base` with properties for these tensors, values and caches."""
    tensors, values, caches = names
    key = (base, (tensors, values, caches))
    if key not in _viewed_classes:
        _viewed_classes[key] = _make_viewed_class(base, tensors, values, caches)
    return _viewed_classes[key]


def _make_viewed_class(
    base: type[nn.Module], tensors: tuple[str, ...], values: tuple[str, ...], caches: tuple[str, ...]
) -> type[nn.Module]:
    body: dict[str, Any] = {
        "_slim_base": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_of(base, tensors, values, caches),
        "extra_repr": _extra_repr(base),
        "_apply": _apply_of(base),
    }
    if base.__repr__ is not nn.Module.__repr__:
        body["__repr__"] = _own_repr(base)
    body.update({name: _tensor_property(name) for name in tensors})
    body.update({name: _value_property(name) for name in values})
    body.update({name: _cache_property(name) for name in caches})
    return type(base.__name__, (base,), body)
