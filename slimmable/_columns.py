"""From a width, widths by layer, or counts of channels to the column that every module of a model switches to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeAlias

from torch import nn

from slimmable._inputs import check_module
from slimmable._widths import width_index
from slimmable.analysis.plan import Plan, Setting
from slimmable.analysis.sizes import feature_sizes, layer_sizes
from slimmable.errors import ConversionError, WidthError
from slimmable.view import view as _view
from slimmable.view.container import SwitchableContainer
from slimmable.view.norms import SwitchableNorm
from slimmable.view.recompute import next_node
from slimmable.view.state import Column, WidthState

Places: TypeAlias = "list[tuple[nn.Module, WidthState]]"


def places_of(model: nn.Module) -> Places:
    """Collect what reacts to widths in one walk, and refuse a converted model that has gained layers.

    Raises:
        ConversionError: if nothing reacts to widths, or if layers were added after the conversion.
        UsageError: if it is no module.
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        check_module("switching widths", given)
    places: Places = []
    strangers = False
    seen: set[int] = set()
    pending = [(model, False)]
    while pending:
        module, converted = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        attributes = module.__dict__
        converted = converted or attributes.get("_slim_root", False)
        state = attributes.get("_slim")
        if state is not None:
            places.append((module, state))
            if isinstance(module, SwitchableContainer):
                continue
        elif converted and (attributes["_parameters"] or attributes["_buffers"]):
            strangers = True
        children = attributes["_modules"]
        if children:
            pending.extend([(child, converted) for child in children.values() if child is not None])
    if strangers:
        raise _gained_layers(model)
    if not places:
        raise ConversionError(
            f"{type(model).__name__} was never converted and has no slimmable layer; "
            "call slimmable.slimify first, or build it from the layers of slimmable"
        )
    return places


def columns_of(places: Places, setting: Setting) -> list[Column]:
    """Return the column of each module, for those that do not have it a guest; nothing is changed.

    Raises: WidthError: if a part of the model does not have this width or sub-network.
    """
    given: Any = setting
    if not isinstance(given, (Mapping, tuple, list, Real)):
        raise WidthError(
            f"{setting!r} is no width, no dict of widths by layer and no tuple of one count for each channel group"
        )
    if not isinstance(setting, (Mapping, tuple, list, bool)):
        found: dict[tuple[object, ...], int] = {}
        for _, state in places:
            if state.widths not in found:
                if setting not in state.widths:
                    break
                found[state.widths] = state.widths.index(float(setting))
        else:
            return [state.columns[found[state.widths]] for _, state in places]
    return [_column(module, state, setting) for module, state in places]


def switch(places: Places, columns: Iterable[Column]) -> None:
    """Make each module's column the active one."""
    following = next_node()
    for (module, state), column in zip(places, columns, strict=True):
        if column.guest is None and state.now.index != -1:
            if following is None:
                state.active = column
            else:
                state.switch(column, following)
        elif isinstance(module, SwitchableNorm):
            module.activate(column)
        else:
            _view.activate(module, column)


def _register(model: nn.Module, setting: Setting) -> None:
    """Make a width or sub-network one of the model's own, so that its statistics stay.

    Raises: as `places_of` and `columns_of`.
    """
    places = places_of(model)
    for (module, _), column in zip(places, columns_of(places, setting), strict=True):
        if column.guest is None:
            continue
        if isinstance(module, SwitchableNorm):
            module.register_column(column)
        else:
            _view.register_column(module, column)


@contextmanager
def registered(model: nn.Module, settings: Iterable[Setting]) -> Iterator[None]:
    """Register widths and sub-networks for good, unless one of them or the block fails: then none of them is.

    Raises: as `places_of` and `columns_of`.
    """
    places = places_of(model)
    before = [(state.active, len(state.columns), dict(state.index_buffers)) for _, state in places]
    guests = [active.width for active, *_ in before if active.index == -1]
    try:
        for setting in settings:
            _register(model, setting)
        yield
    except BaseException:
        for (module, state), (_, own, buffers) in zip(places, before, strict=True):
            if len(state.columns) == own:
                continue
            if isinstance(module, SwitchableNorm):
                module.forget_registered(own)
            else:
                _view.forget_registered(module, own, buffers)
        switch(places, columns_of(places, guests[0]) if guests else [active for active, *_ in before])
        raise


def _column(module: nn.Module, state: WidthState, setting: Setting) -> Column:
    plan: Plan | None = state.plan
    if plan is None:
        if isinstance(setting, (Mapping, tuple, list)):
            raise WidthError(
                f"{type(module).__name__} was made by hand and has only the widths {state.widths}; "
                "widths by layer and counts of channels are for models that slimmable.slimify has converted"
            )
        return state.columns[width_index(setting, _widths(state))]
    if not isinstance(setting, (Mapping, tuple, list, bool)) and setting in state.widths:
        return state.columns[state.widths.index(float(setting))]
    try:
        found = plan.sub_network(setting)
    except WidthError:
        if isinstance(setting, (Mapping, tuple, list)) or plan.universal:
            raise
        width_index(setting, _widths(state))  # names all widths, also those registered later
        raise
    for column in (*state.columns, state.active):
        if column.counts == found.counts:
            return column
    width = float(setting) if not isinstance(setting, (Mapping, tuple, list)) else found.counts
    own = {name: kept for name in _tensor_names(module) if (kept := found.tensors.get((state.path, name))) is not None}
    if isinstance(module, SwitchableNorm):
        channels = next(kept for kept in own.values() if len(kept) == 1)[0]
        column = module.make_column(width, channels)
    else:
        values = found.values.get(state.path, {})
        sizes = layer_sizes(module, {n: [k] for n, k in own.items()}, {n: [v] for n, v in values.items()})
        if not state.path:
            sizes |= feature_sizes(module, plan.columns[0], [found])
        column = _view.make_column(module, width, own, values, {name: each[0] for name, each in sizes.items()})
    column.counts = found.counts
    return column


def _tensor_names(module: nn.Module) -> list[str]:
    source = module.full if isinstance(module, SwitchableNorm) else module
    return [*source._parameters, *source._buffers]


def _widths(state: WidthState) -> tuple[float, ...]:
    return tuple(width for width in state.widths if isinstance(width, float))


def _gained_layers(model: nn.Module) -> ConversionError:
    containers = [module for module in model.modules() if isinstance(module, SwitchableContainer)]
    inside = {id(module) for container in containers for module in container.modules()}
    roots = [(name, module) for name, module in model.named_modules() if module.__dict__.get("_slim_root")]
    found = {
        f"{f'{root}.' if root else ''}{name}".rstrip("."): type(module).__name__
        for root, top in roots
        for name, module in top.named_modules()
        if "_slim" not in module.__dict__ and id(module) not in inside and (module._parameters or module._buffers)
    }
    listed = ", ".join(f"{name or 'the model itself'} ({kind})" for name, kind in found.items())
    return ConversionError(
        f"{type(model).__name__} gained layers after its conversion that no width applies to: {listed}; "
        "call slimmable.slimify on it again"
    )
