"""Switching between widths: resolve a width, widths by layer or channel counts to each module's column."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from typing import Any, TypeAlias, cast

from torch import nn

from slimmable._checks import check_is_module
from slimmable._modules import tensors_of
from slimmable._widths import width_index
from slimmable.analysis.plan import Plan, Setting
from slimmable.errors import ConversionError, WidthError
from slimmable.layers import refuse_plain_between
from slimmable.view.norms import Switchable, SwitchableContainer, guest_of
from slimmable.view.recompute import switch, switched
from slimmable.view.state import Column, WidthState
from slimmable.view.view import add_properties, column_of

Places: TypeAlias = "list[tuple[nn.Module, WidthState]]"


def set_width(model: nn.Module, width: Setting) -> None:
    """Make `model` run at `width` from now on, in this thread or asyncio task and in all that have set no width.

    This works on a whole model, any part of it and any wrapper around it (DDP, `torch.compile`, `nn.Sequential`).

    Args:
        model: a converted model, or one built from slimmable layers.
        width: one of its widths; for a universal model, any number from its narrowest width to 1. A converted model
            also takes widths by layer, such as `{"layer1*": 0.5, "layer4": 0.75}`, or one count per channel group, in
            the order of `plan(model).groups`. The keys are `fnmatch` patterns of names as `plan` prints them; the last
            match decides, layers without a match are at 1, and channels made by several layers are at the widest.

    At a width or sub-network that the model was not made with, BatchNorms start from the statistics of the full width
    and lose their own at the next switch; `calibrate_bn` computes and keeps them.

    Raises: WidthError: if a part of the model does not have this width; the message names the nearest. Or if it is none
        of its own, and another thread uses the model. ConversionError: if no part has widths, or layers were added.

    >>> layer = slimmable.SlimLinear(8, 4, widths=(1.0, 0.5))
    >>> set_width(layer, 0.5)
    >>> layer.weight.shape
    torch.Size([2, 4])
    """
    switch(columns_of(places_of(model), width))


def at_width(model: nn.Module, width: Setting) -> AbstractContextManager[None]:
    """Run a block at `width`, then return every part to its previous width, even after an error.

    It holds for the block's thread or asyncio task, and for what it starts there by `asyncio`. Raises: as `set_width`.

    >>> layer = slimmable.SlimLinear(8, 4, widths=(1.0, 0.5))
    >>> with at_width(layer, 0.5):
    ...     width_of(layer)
    0.5
    >>> width_of(layer)
    1.0
    """
    return switched(columns_of(places_of(model), width))


def widths_of(model: nn.Module) -> tuple[float, ...]:
    """Return the widths that all parts of `model` have, the widest first. Raises: ConversionError: as `set_width`."""
    return tuple(sorted(set.intersection(*(set(state.numbers) for _, state in places_of(model))), reverse=True))


def width_of(model: nn.Module) -> float | tuple[int, ...]:
    """Return the active width of `model`, or the counts of its channel groups if they have different widths.

    Raises: WidthError: if its parts are at different widths. ConversionError: as `set_width`.
    """
    width, *others = sorted({state.active.width for _, state in places_of(model)}, key=str, reverse=True)
    if others:
        found = f"parts of {type(model).__name__} are at different widths {[width, *others]}"
        raise WidthError(f"{found}; call set_width on the whole model")
    return width


def run_widths(model: nn.Module, *args: Any, **kwargs: Any) -> dict[float, Any]:
    """Run `model` once at each of its widths, the widest first, and return width -> output.

    Afterwards, even after an error, every part is back at its previous width. Raises: ConversionError: as `set_width`.

    >>> outputs = run_widths(slimmable.SlimLinear(3, 4, widths=(1.0, 0.5), slim_in=False), torch.zeros(2, 3))
    >>> {width: tuple(output.shape) for width, output in outputs.items()}
    {1.0: (2, 4), 0.5: (2, 2)}
    """
    outputs = {}
    for width in widths_of(model):
        with at_width(model, width):
            outputs[width] = model(*args, **kwargs)
    return outputs


class AllWidths(nn.Module):
    """`run_widths` as a module, which gives wrappers such as DDP a single forward for all widths.

    >>> every = AllWidths(slimmable.SlimLinear(3, 4, widths=(1.0, 0.5), slim_in=False))
    >>> list(every(torch.zeros(2, 3)))
    [1.0, 0.5]
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        places_of(model)  # which refuses a model without widths
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> dict[float, Any]:
        """Return width -> output of the model."""
        return run_widths(self.model, *args, **kwargs)


# -- the steps of a switch, also used by training, search and files
def places_of(model: nn.Module) -> Places:
    """Collect the modules that have widths, in one walk; refuse a model without any, or that has gained layers."""
    check_is_module("switching widths", model)
    places: Places = []
    seen: set[nn.Module] = set()
    new: set[nn.Module] = set()
    pending = [(model, False)]
    while pending:
        module, converted = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        attributes = module.__dict__
        if (state := attributes.get("_slim")) is not None:
            places.append((module, state))
            if isinstance(module, SwitchableContainer):
                continue
        elif converted and (attributes["_parameters"] or attributes["_buffers"]):
            new.add(module)
        converted = converted or state is not None
        children = attributes["_modules"]
        if not converted and type(module) is nn.Sequential:
            refuse_plain_between(children)
        pending += [(child, converted) for child in children.values() if child is not None]
    if new:
        found = [f"{name or 'the model itself'} ({type(m).__name__})" for name, m in model.named_modules() if m in new]
        what = f"{type(model).__name__} gained layers after its conversion that no width applies to: {', '.join(found)}"
        raise ConversionError(f"{what}; call slimmable.slimify on it again")
    if not places:
        what = f"{type(model).__name__} was never converted and has no layer of slimmable.layers"
        raise ConversionError(f"{what}; call slimmable.slimify first")
    return places


def columns_of(places: Places, setting: Setting) -> list[tuple[WidthState, Column]]:
    """Return each module's state and column for a setting, a new guest column if it has none; change nothing."""
    number: Any = setting if not isinstance(setting, bool) and isinstance(setting, Real) else None
    if number is None and not isinstance(setting, (Mapping, tuple, list)):
        raise WidthError(f"{setting!r} is not a width, a dict of widths by layer or a tuple of counts by channel group")
    return [(state, _column(module, state, setting, number)) for module, state in places]


@contextmanager
def registered(model: nn.Module, settings: Iterable[Setting]) -> Iterator[None]:
    """Add widths and sub-networks to the model for good, which keeps their statistics; none if the block fails."""
    places = places_of(model)
    before, owned = [(state, state.active) for _, state in places], [state.columns for _, state in places]
    try:
        for setting in settings:
            for (module, _), (state, column) in zip(places, columns_of(places, setting), strict=True):
                if column.index == -1:
                    if column.module is not None:
                        cast(Switchable, module).narrow.append(column.module)
                        column.module = None  # a converter may replace the appended one
                    state.keep([*state.columns, column])
        yield
    except BaseException:
        for (module, state), own in zip(places, owned, strict=True):
            for column in state.columns[: len(own) - 1 : -1]:  # which become guests
                column.index, column.module = -1, module.narrow.pop(-1) if isinstance(module, Switchable) else None
            state.keep(own)
        switch(before)
        raise


def _column(module: nn.Module, state: WidthState, setting: Setting, number: float | None) -> Column:
    if number in state.widths:
        return state.columns[state.widths.index(number)]
    plan: Plan | None = state.plan
    if number is not None and (plan is None or not plan.universal):
        return state.columns[width_index(number, state.numbers)]  # whose message names those registered later, too
    if plan is None:
        what = f"{type(module).__name__} was made by hand and has only the widths {state.widths}"
        raise WidthError(f"{what}; widths by layer and counts are for models that slimmable.slimify has converted")
    found = plan.sub_network(setting)
    for column in (*state.columns, state.now):
        if column.counts == found.counts:
            return column
    width = found.counts if number is None else float(number)
    kept = found.tensors
    own = {name: kept[state.path, name] for name in tensors_of(module) if (state.path, name) in kept}
    values = found.values.get(state.path, {})
    if isinstance(module, Switchable):
        column = guest_of(module, width, own, values)
    else:
        column = column_of(module, width, own, values, state.blanks)
        add_properties(module, column.cuts, values)  # for what was never cut before
    column.counts = found.counts
    return column
