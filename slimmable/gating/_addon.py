"""Gates as an add-on of the core: taken off, written into files as what `gate` was asked, made again from that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimmable._checks import check_positive
from slimmable._convert import copy_of
from slimmable._input_data import decode_inputs
from slimmable._inputs import Inputs
from slimmable.errors import CheckpointError, SlimmableError
from slimmable.gating._convert import gate
from slimmable.gating._find import GatePlan, gate_plan
from slimmable.gating._gate import ChannelGate
from slimmable.gating._judge import SKIPPED
from slimmable.gating._parts import PLAN, LayerGates, PassNorm
from slimmable.gating._parts import has_gates as present
from slimmable.gating._parts import remove_gates as detach

__all__ = ["REFUSAL", "describe", "detach", "present", "restore"]

REFUSAL = "has gates, which are made for its widths; take them off with slimmable.gating.ungate"


def describe(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of a gated model without its gates, and what `restore` needs, as data for JSON.

    Raises: CheckpointError: if `gate` would not make these gates for the copy.
    """
    found: GatePlan | None = model.__dict__.get(PLAN)
    if found is None:
        raise CheckpointError(
            f"a part or the whole of this {type(model).__name__} has gates, but it is not what slimmable.gating.gate "
            "returned; save the gated model itself"
        )
    data = {
        "example": found.example,
        "skipped": [maker for maker, _, reason in found.refused if reason == SKIPPED],
        "separate_norms": any(isinstance(module, PassNorm) for module in model.modules()),
        "bias": any(gate.expand.bias is not None for gate in _gates(model)),
        "settings": [[gate.temperature, gate.open_at_zero] for gate in _gates(model)],
    }
    bare = detach(copy_of(model))
    arguments = _arguments(bare, data)
    try:
        again = _units(gate_plan(bare, **arguments))
    except SlimmableError as error:
        raise _changed(model) from error
    own = {gates.name for gates in model.modules() if isinstance(gates, LayerGates)}
    if again != _units(found) or own != {name for name, _ in again}:
        raise _changed(model)
    return bare, data


def _changed(model: nn.Module) -> CheckpointError:
    return CheckpointError(
        f"this {type(model).__name__} was changed after it was gated; take the gates off with "
        "slimmable.gating.ungate, gate it again and save it then"
    )


def restore(model: nn.Module, data: dict[str, Any]) -> nn.Module:
    """Gate a model in place as `describe` says, and return it; the gates have random weights.

    Raises: an error of some kind if the data is of another model, or anything else.
    """
    norms, bias = bool(data["separate_norms"]), bool(data["bias"])
    gate(model, **_arguments(model, data), separate_norms=norms, bias=bias, inplace=True)
    for made, (temperature, open_at_zero) in zip(_gates(model), data["settings"], strict=True):
        check_positive("load", temperature=temperature)
        made.temperature, made.open_at_zero = float(temperature), bool(open_at_zero)
    return model


def _arguments(model: nn.Module, data: dict[str, Any]) -> dict[str, Any]:
    """Return what `gate` was asked, for a model of any type and on any device."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    args, kwargs = decode_inputs(data["example"], like)
    skipped = set(map(str, data["skipped"]))
    return {"example_inputs": Inputs(*args, **kwargs), "skip": lambda path, module: path in skipped}


def _units(found: GatePlan) -> list[tuple[str, int]]:
    return [(gate.name, gate.units) for gate in found.gates]


def _gates(model: nn.Module) -> list[ChannelGate]:
    """Return the gates of all widths, in the order of their layers.

    Raises: CheckpointError: if one is of another class, which a file cannot name.
    """
    found = []
    for gates in (module for module in model.modules() if isinstance(module, LayerGates)):
        for own in gates.at:
            if not isinstance(own, ChannelGate):
                raise CheckpointError(f"the gate of {gates.name} is a {type(own).__name__}; a file holds ChannelGates")
            found.append(own)
    return found
