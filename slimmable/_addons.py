"""Add-ons: what another package folder puts into models, and how the core removes, saves and restores it.

The core names no add-on's classes. An add-on offers itself when it is imported, so a model that has one has offered it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from torch import nn

_MODULES = {"gating": "slimmable.gating"}  # name in files -> the module that offers it
_offered: dict[str, AddOn] = {}


class AddOn(Protocol):
    """What an add-on does for the core."""

    REFUSAL: str
    """Why a model that has it cannot be converted, and how it is taken off; follows "this ResNet"."""

    def present(self, model: nn.Module) -> bool:
        """Tell whether a model has this add-on."""
        ...

    def detach(self, model: nn.Module) -> nn.Module:
        """Take it off a model, in place, and return the model; a model without it stays as it is."""
        ...

    def describe(self, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """Return a copy of the model without it, and what `restore` needs, as data for JSON."""
        ...

    def restore(self, model: nn.Module, data: dict[str, Any]) -> nn.Module:
        """Put it back, in place, as `describe` said, and return the model."""
        ...


def offer(name: str, addon: AddOn) -> None:
    """Make an add-on known to the core."""
    _offered[name] = addon


def detach_all(model: nn.Module) -> nn.Module:
    """Take all add-ons off a model, in place, and return it."""
    for addon in _offered.values():
        model = addon.detach(model)
    return model


def addons_of(model: nn.Module) -> dict[str, AddOn]:
    """Return the add-ons that a model has, by name."""
    return {name: addon for name, addon in _offered.items() if addon.present(model)}


def restore_all(model: nn.Module, data: Mapping[str, Any]) -> nn.Module:
    """Put the add-ons that a file describes, by name, back on a model, in place, and return it."""
    for name in data.keys() & _MODULES.keys():
        import_module(_MODULES[name])
        model = _offered[name].restore(model, data[name])
    return model
