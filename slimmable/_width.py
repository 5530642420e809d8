"""Switching: which widths a model has, which one is active, running at another one or at all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from slimmable._columns import columns_of, places_of, switch
from slimmable.analysis.plan import Setting
from slimmable.errors import WidthError


def set_width(model: nn.Module, width: Setting) -> None:
    """Let `model` run at `width` from now on.

    Works on a whole model, on any part of it and on any wrapper around it (DDP, `torch.compile`, `nn.Sequential`).

    Args:
        model: a converted model, or one of slimmable layers, or a part or wrapper of one.
        width: one of its widths; for a universal model any number from its narrowest width to 1. A converted model also
            takes widths by layer, as `{"layer1*": 0.5, "layer4": 0.75}`: patterns (`fnmatch`) of names as `plan` prints
            them, of which the last that matches counts; layers without one are at 1, and channels that layers of
            several widths make are at the widest. Or one count for each channel group, as in `plan(model).groups`.

    At a width or sub-network that the model was not made with, BatchNorm statistics start as those of the full width
    and are lost at the next switch; `calibrate_bn` computes and keeps them.

    Raises:
        WidthError: if the model, or a part of it, does not have this width; the message names the nearest.
        ConversionError: if nothing in the model reacts to widths, or if layers were added after its conversion.

    >>> from slimmable import SlimLinear
    >>> layer = SlimLinear(8, 4, widths=(1.0, 0.5))
    >>> set_width(layer, 0.5)
    >>> layer.weight.shape
    torch.Size([2, 4])
    """
    places = places_of(model)
    switch(places, columns_of(places, width))


@contextmanager
def at_width(model: nn.Module, width: Setting) -> Iterator[None]:
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
    places = places_of(model)
    before = [state.active for _, state in places]
    switch(places, columns_of(places, width))
    try:
        yield
    finally:
        switch(places, before)


def widths_of(model: nn.Module) -> tuple[float, ...]:
    """Return the widths that every part of `model` has statistics for, from the widest to the narrowest.

    Raises:
        ConversionError: if nothing in the model reacts to widths, or if layers were added after its conversion.
    """
    known = {state.widths for _, state in places_of(model)}
    common = set.intersection(*({width for width in widths if isinstance(width, float)} for widths in known))
    return tuple(sorted(common, reverse=True))


def width_of(model: nn.Module) -> float | tuple[int, ...]:
    """Return the active width of `model`; for a sub-network that is not uniform the counts of its channel groups.

    Raises:
        WidthError: if its parts are at different widths.
        ConversionError: if nothing in the model reacts to widths, or if layers were added after its conversion.
    """
    active = {state.active.width for _, state in places_of(model)}
    if len(active) > 1:
        raise WidthError(
            f"parts of {type(model).__name__} are at different widths {sorted(active, key=str, reverse=True)}; "
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
