"""The gating add-on: files store the arguments of `gate`, and loading calls `gate` with them again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimmable._addons import AddOn
from slimmable._checks import check_positive
from slimmable._convert import copy_of
from slimmable._inputs import Inputs
from slimmable.errors import CheckpointError, SlimmableError
from slimmable.gating._convert import gate, ungate
from slimmable.gating._example import decode_inputs
from slimmable.gating._find import SKIPPED, gate_plan
from slimmable.gating._gate import ChannelGate
from slimmable.gating._layer_gates import gates_in, has_gates
from slimmable.gating._pass_norm import PassNorm
from slimmable.gating._plan import PLAN, GatePlan


def _describe(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of a gated model without its gates, and the JSON data that `_restore` needs.

    Raises: CheckpointError: if `gate` would not make the same gates for the copy.
    """
    found: GatePlan | None = model.__dict__.get(PLAN)
    if found is None:
        raise CheckpointError(
            f"this {type(model).__name__} or a part of it has gates, but it is not the model that "
            "slimmable.gating.gate returned; save that model"
        )
    gates = _channel_gates(model)
    data = {
        "example": found.example,
        "skipped": [maker for maker, _, reason in found.refused if reason == SKIPPED],
        "separate_norms": any(isinstance(module, PassNorm) for module in model.modules()),
        "bias": any(own.expand.bias is not None for own in gates),
        "settings": [[own.temperature, own.open_at_zero] for own in gates],
    }
    bare = ungate(copy_of(model))
    arguments = _arguments(bare, data)
    changed = CheckpointError(
        f"this {type(model).__name__} was changed after it was gated; remove the gates with "
        "slimmable.gating.ungate, gate it again, then save it"
    )
    try:
        again = [(planned.name, planned.units) for planned in gate_plan(bare, **arguments).gates]
    except SlimmableError as error:
        raise changed from error
    before = [(planned.name, planned.units) for planned in found.gates]
    if again != before or {own.name for own in gates_in(model)} != {name for name, _ in before}:
        raise changed
    return bare, data


def _restore(model: nn.Module, data: dict[str, Any]) -> nn.Module:
    """Gate a model in place from the data of `_describe`, and return it; the gates have random weights.

    Raises: an error of any type if the data belongs to another model or is malformed.
    """
    norms, bias = bool(data["separate_norms"]), bool(data["bias"])
    gate(model, **_arguments(model, data), separate_norms=norms, bias=bias, inplace=True)
    for made, (temperature, open_at_zero) in zip(_channel_gates(model), data["settings"], strict=True):
        check_positive("load", temperature=temperature)
        made.temperature, made.open_at_zero = float(temperature), bool(open_at_zero)
    return model


def _arguments(model: nn.Module, data: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `gate`, with the dtype and device of the model."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    args, kwargs = decode_inputs(data["example"], like)
    skipped = set(map(str, data["skipped"]))
    return {"example_inputs": Inputs(*args, **kwargs), "skip": lambda path, module: path in skipped}


def _channel_gates(model: nn.Module) -> list[ChannelGate]:
    """Return the gates of all widths, in the order of their layers.

    Raises: CheckpointError: if a gate is not a `ChannelGate`, since a file cannot name its class.
    """
    found = []
    for gates in gates_in(model):
        for own in gates.at:
            if not isinstance(own, ChannelGate):
                raise CheckpointError(f"the gate of {gates.name} is a {type(own).__name__}; a file holds ChannelGates")
            found.append(own)
    return found


ADDON = AddOn(
    refusal="has gates, which are made for its widths; remove them with slimmable.gating.ungate",
    present=has_gates,
    detach=ungate,
    describe=_describe,
    restore=_restore,
)
