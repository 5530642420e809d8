"""The width view: a module of any class runs with the slices and sizes of its active width.

`install_view` changes a module's class to a generated subclass of the same name. Reading `module.weight` then returns
the slice of the active width, and `module.num_heads` the number at that width, so the class's own `forward` just works,
even if this library has never seen it. The Parameters stay full-size under their own names, where optimizers, state
dicts and weight averages look for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from slimmable._modules import empty_cache
from slimmable._widths import Kept
from slimmable.errors import ConversionError
from slimmable.view._classes import add_properties
from slimmable.view.cuts import Cut, make_cut, take
from slimmable.view.state import Column, Counts, WidthState, is_slim, slim_state, state_of


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of the module without its view; for this library's layers, torch's class.

    A subclass of one of these layers is returned as it is, since it may have its own forward.

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
    """Let `module` run at several widths, in place, starting at the full width.

    Without tensors and values, the module is only marked as having nothing to slim and keeps its class.

    Args:
        module: any module; its children are not affected.
        widths: from the widest, 1.0, to the narrowest.
        tensors: name of a parameter, buffer or tensor attribute -> for each width, what is kept of each axis.
        values: name of a plain attribute -> its value at each width.
        sizes: the same for attributes that always read as at full width, such as `in_features`, from which other code
            sizes its heads; only extracted networks have their narrow values.
        caches: name of an attribute in which the module's forward keeps results -> its value when empty. Each width
            has its own; assigning one empties those of the others.

    Raises:
        ConversionError: if the module already has a view, or a tensor does not exist or is too small.

    >>> linear = nn.Linear(4, 4, bias=False)
    >>> install_view(linear, (1.0, 0.5), {"weight": [(None, None), (None, 2)]}, {"in_features": (4, 2)})
    >>> linear._slim.active = linear._slim.columns[1]
    >>> linear.weight.shape, linear
    (torch.Size([4, 2]), Linear(in_features=4, out_features=4, bias=False, widths=(1.0, 0.5), width=0.5))
    """
    if is_slim(module):
        raise ConversionError(f"{type(module).__name__} already has a width view; remove it first with remove_view")
    state = WidthState(widths)
    for what in (tensors, values, sizes or {}):
        for name, per_width in what.items():
            if len(per_width) != len(widths):
                raise ConversionError(
                    f"{type(module).__name__}.{name}: {len(per_width)} entries for the {len(widths)} widths {widths}"
                )
    for index, column in enumerate(state.columns):
        kept = {name: per_width[index] for name, per_width in tensors.items()}
        column.cuts = _cuts(module, kept, state.index_buffers)
        column.values = {name: per_width_values[index] for name, per_width_values in values.items()}
        column.sizes = {name: per_width_values[index] for name, per_width_values in (sizes or {}).items()}
        column.caches = {name: empty_cache(blank) for name, blank in (caches or {}).items()}
    state.blanks = dict(caches or {})
    _register(module, state.index_buffers, tensors)
    module.__dict__["_slim"] = state
    for name, full in state.columns[0].values.items():
        module.__dict__.setdefault(name, full)
    add_properties(module, tensors, values, state.blanks)


def remove_view(module: nn.Module) -> None:
    """Undo `install_view`: restore the original class, full tensors and full values.

    Raises: ConversionError: if the module has no view.
    """
    state = state_of(module)
    if state is None:
        raise ConversionError(f"{type(module).__name__} has no width view to remove")
    module.__class__ = _without_view(type(module))
    state.active.leave(module)
    del module.__dict__["_slim"]
    module.__dict__.update(state.blanks)
    for buffer in state.index_buffers:
        delattr(module, buffer)


def _without_view(kind: type) -> type:
    """Return a class without its generated base, also one made from that since, as parametrizations do."""
    if "_slim_base" in kind.__dict__:
        return cast(type, kind._slim_base.__dict__.get("_slim_plain", kind._slim_base))  # type: ignore[attr-defined]
    if not hasattr(kind, "_slim_base"):
        return kind
    body = {name: value for name, value in kind.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(map(_without_view, kind.__bases__)), body)


class GuestColumn(Column):
    """A guest of a module with a view, with its own index buffers, and properties for what was never cut before."""

    def __init__(
        self,
        module: nn.Module,
        width: float | Counts,
        kept: Mapping[str, Sequence[Kept]],
        values: Mapping[str, object],
    ) -> None:
        super().__init__(width)
        self.buffers: dict[str, tuple[int, ...]] = {}
        self.cuts, self.values = _cuts(module, kept, self.buffers), dict(values)
        self.caches = {name: empty_cache(blank) for name, blank in slim_state(module).blanks.items()}

    def enter(self, module: nn.Module) -> None:
        """Register the index buffers and add the properties."""
        if self.index == -1:
            _register(module, self.buffers, self.cuts)
            add_properties(module, self.cuts, self.values)

    def leave(self, module: nn.Module) -> None:
        """Remove the index buffers that the module does not keep."""
        for buffer in self.buffers.keys() - slim_state(module).index_buffers.keys():
            delattr(module, buffer)

    def keep(self, module: nn.Module) -> None:
        """Add the index buffers to those that the module keeps."""
        self.enter(module)
        kept = slim_state(module).index_buffers
        self.buffers = {name: indices for name, indices in self.buffers.items() if name not in kept}
        kept.update(self.buffers)

    def drop(self, module: nn.Module) -> None:
        """Remove the index buffers that `keep` added."""
        for buffer in self.buffers:
            del slim_state(module).index_buffers[buffer]
            delattr(module, buffer)


def narrow_tensors(module: nn.Module, column: Column) -> dict[str, Tensor]:
    """Return the slices of a column, if a guest the active one; they share the module's memory where possible."""
    found = {name: (_full_tensor(module, name), cut) for name, cut in column.cuts.items()}
    return {name: take(tensor, cut, module._buffers) for name, (tensor, cut) in found.items() if tensor is not None}


def _full_tensor(module: nn.Module, name: str) -> Tensor | None:
    own = module.__dict__
    for store in (own["_parameters"], own["_buffers"], own, own.get("_slim_lent", {})):
        if name in store:
            return cast("Tensor | None", store[name])
    raise ConversionError(f"{type(module).__name__} has no tensor {name!r}")


def _cuts(module: nn.Module, kept: Mapping[str, Sequence[Kept]], buffers: dict[str, tuple[int, ...]]) -> dict[str, Cut]:
    """Return the cuts of the tensors that are not kept whole, and add the index buffers that they need."""
    found = {}
    for name, axes in kept.items():
        tensor = _full_tensor(module, name)
        cut = None if tensor is None else make_cut(tensor.shape, axes, f"{type(module).__name__}.{name}", buffers)
        if cut is not None:
            found[name] = cut
    return found


def _register(module: nn.Module, buffers: Mapping[str, tuple[int, ...]], tensors: Iterable[str]) -> None:
    device = next((tensor.device for name in tensors if (tensor := _full_tensor(module, name)) is not None), None)
    for buffer, kept in buffers.items():
        if buffer not in module._buffers:
            module.register_buffer(buffer, torch.tensor(kept, device=device), persistent=False)
