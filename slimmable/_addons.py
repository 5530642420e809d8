"""Add-ons: what another room puts into models, and how the core takes it off, writes it to files and puts it back.

The core does not know what add-ons there are. Each offers itself when its module is imported; a model can only have an
add-on that has been imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

_MODULES = {"gating": "slimmable.gating"}  # name in files -> the module that offers it
_offered: dict[str, AddOn] = {}


@dataclass(frozen=True)
class AddOn:
    """What an add-on does for the core.

    Attributes:
        refusal: why a model that has it cannot be converted, and how to take it off; follows "this ResNet".
        present: whether a model has it.
        detach: take it off a model, in place, and return the model; a model without it stays as it is.
        describe: return a copy of a model without it, and what `restore` needs, as data for JSON.
        restore: put it back onto a model, in place, as `describe` said, and return the model.
    """

    refusal: str
    present: Callable[[nn.Module], bool]
    detach: Callable[[nn.Module], nn.Module]
    describe: Callable[[nn.Module], tuple[nn.Module, dict[str, Any]]]
    restore: Callable[[nn.Module, dict[str, Any]], nn.Module]


def offer(name: str, addon: AddOn) -> None:
    """Make an add-on known to the core."""
    _offered[name] = addon


def addons_of(model: nn.Module) -> dict[str, AddOn]:
    """Return the add-ons that a model has, by name."""
    return {name: addon for name, addon in _offered.items() if addon.present(model)}


def detach_all(model: nn.Module) -> nn.Module:
    """Take all add-ons off a model, in place, and return it."""
    for addon in _offered.values():
        model = addon.detach(model)
    return model


def restore_all(model: nn.Module, data: Mapping[str, Any]) -> nn.Module:
    """Put the add-ons that a file describes, by name, back onto a model, in place, and return it."""
    for name, module in _MODULES.items():
        if name in data:
            import_module(module)
            model = _offered[name].restore(model, data[name])
    return model
