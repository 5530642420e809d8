"""Add-ons to models, such as gates: how the core, which knows none, removes them, writes them to files and restores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

MODULES = {"gating": "slimmable.gating"}  # name in files -> the module that registers it
ADDONS: "dict[str, AddOn]" = {}  # those whose modules have been imported


@dataclass(frozen=True)
class AddOn:
    """The functions of one add-on."""

    refusal: str  # why a model that has it cannot be converted, and how to remove it; follows "this ResNet"
    present: Callable[[nn.Module], bool]  # whether a model has it
    detach: Callable[[nn.Module], nn.Module]  # remove it from a model, if present, in place, and return the model
    describe: Callable[[nn.Module], tuple[nn.Module, dict[str, Any]]]  # a copy without it, and JSON data for `restore`
    restore: Callable[[nn.Module, dict[str, Any]], nn.Module]  # add it again, in place, as `describe` recorded it


def addons_of(model: nn.Module) -> dict[str, AddOn]:
    """Return the add-ons that a model has, by name."""
    return {name: addon for name, addon in ADDONS.items() if addon.present(model)}


def detach_all(model: nn.Module) -> nn.Module:
    """Remove all add-ons from a model, in place, and return it."""
    for addon in ADDONS.values():
        model = addon.detach(model)
    return model
