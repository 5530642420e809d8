"""Switching: which widths a model has, which one is active, running at another one or at all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from slimmable._errors import ConversionError, WidthError
from slimmable._widths import width_index
from slimmable.layers._container import SwitchableContainer
from slimmable.layers._view import WidthState


def set_width(model: nn.Module, width: float) -> None:
    """Let `model` run at `width` from now on.

    Works on a whole model, on any part of it and on any wrapper around it (DDP, `torch.compile`, `nn.Sequential`).

    Raises:
        WidthError: if the model, or a part of it, does not have this width; the message names the nearest.
        ConversionError: if nothing in the model reacts to widths, or if layers were added after its conversion.

    >>> from slimmable import SlimLinear
    >>> layer = SlimLinear(8, 4, widths=(1.0, 0.5))
    >>> set_width(layer, 0.5)
    >>> layer.weight.shape
    torch.Size([2, 4])
    """
    states = _states(model)
    for state, index in zip(states, _indices(states, width), strict=True):
        state.index = index


@contextmanager
def at_width(model: nn.Module, width: float) -> Iterator[None]:
    """Run a block at `width`; afterwards, also after an error, every part is at the width that it had before.

    Raises: as `set_width`.

    >>> from slimmable import SlimLinear
    >>> layer = SlimLinear(8, 4, widths=(1.0, 0.5))
    >>> with at_width(layer, 0.5):
    ...     width_of(layer)
    0.5
    >>> width_of(layer)
    1.0
    """
    states = _states(model)
    before = [state.index for state in states]
    for state, index in zip(states, _indices(states, width), strict=True):
        state.index = index
    try:
        yield
    finally:
        for state, index in zip(states, before, strict=True):
            state.index = index


def widths_of(model: nn.Module) -> tuple[float, ...]:
    """Return the widths that every part of `model` has, from the widest to the narrowest.

    Raises:
        ConversionError: if nothing in the model reacts to widths, or if layers were added after its conversion.
    """
    states = _states(model)
    common = set.intersection(*(set(widths) for widths in {state.widths for state in states}))
    return tuple(sorted(common, reverse=True))


def width_of(model: nn.Module) -> float:
    """Return the active width of `model`.

    Raises:
        WidthError: if its parts are at different widths.
        ConversionError: if nothing in the model reacts to widths, or if layers were added after its conversion.
    """
    active = {state.widths[state.index] for state in _states(model)}
    if len(active) > 1:
        raise WidthError(
            f"parts of {type(model).__name__} are at different widths {sorted(active, reverse=True)}; "
            "call set_width on the whole model"
        )
    return active.pop()


def run_widths(model: nn.Module, *args: Any, **kwargs: Any) -> dict[float, Any]:
    """Run `model` once at each of its widths, the widest first, and return width -> output.

    Afterwards, also after an error, every part is at the width that it had before.

    Raises: ConversionError: if nothing in the model reacts to widths, or if layers were added after its conversion.

    >>> import torch
    >>> from slimmable import SlimLinear
    >>> outputs = run_widths(SlimLinear(3, 4, widths=(1.0, 0.5), slim_in=False), torch.zeros(2, 3))
    >>> {width: tuple(output.shape) for width, output in outputs.items()}
    {1.0: (2, 4), 0.5: (2, 2)}
    """
    outputs = {}
    widths = widths_of(model)
    with at_width(model, widths[0]):
        for width in widths:
            set_width(model, width)
            outputs[width] = model(*args, **kwargs)
    return outputs


class AllWidths(nn.Module):
    """`run_widths` as a module, so that wrappers such as DDP see one forward for all widths.

    >>> import torch
    >>> from slimmable import SlimLinear
    >>> every = AllWidths(SlimLinear(3, 4, widths=(1.0, 0.5), slim_in=False))
    >>> list(every(torch.zeros(2, 3)))
    [1.0, 0.5]
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> dict[float, Any]:
        """Return width -> output of the model."""
        return run_widths(self.model, *args, **kwargs)


def _states(model: nn.Module) -> list[WidthState]:
    """Collect the width states in one walk, and refuse a converted model that has gained layers."""
    states: list[WidthState] = []
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
            states.append(state)
            if isinstance(module, SwitchableContainer):
                continue
        elif converted and (attributes["_parameters"] or attributes["_buffers"]):
            strangers = True
        children = attributes["_modules"]
        if children:
            pending.extend([(child, converted) for child in children.values() if child is not None])
    if strangers:
        raise _gained_layers(model)
    if not states:
        raise ConversionError(
            f"{type(model).__name__} was never converted and has no slimmable layer; "
            "call slimmable.slimify first, or build it from the layers of slimmable"
        )
    return states


def _indices(states: list[WidthState], width: float) -> list[int]:
    """Return the index of `width` in each state's own list."""
    known: dict[tuple[float, ...], int] = {}
    indices = []
    for state in states:
        index = known.get(state.widths)
        if index is None:
            index = known[state.widths] = width_index(width, state.widths)
        indices.append(index)
    return indices


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
