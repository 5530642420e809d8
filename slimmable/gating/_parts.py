"""What a gated model has in its layers, and how to take it off."""

from __future__ import annotations

from torch import nn

from slimmable._modules import replace_modules
from slimmable.gating._layer_gates import LayerGates as LayerGates
from slimmable.gating._layer_gates import Look as Look
from slimmable.gating._layer_gates import Mask as Mask
from slimmable.gating._layer_gates import NoGates as NoGates
from slimmable.gating._pass import Pass as Pass
from slimmable.gating._pass_norm import PassNorm as PassNorm
from slimmable.gating._state_dicts import refuse_other_gates as refuse_other_gates

GATE = "channel_gate"  # the name of a gate in the layer that makes what it opens and closes
PLAN = "_gate_plan"  # attribute of the module that was given to `gate`

Gated = LayerGates | PassNorm


def gated_parts(model: nn.Module) -> list[Gated]:
    """Return what reacts to the pass."""
    return [module for module in model.modules() if isinstance(module, (LayerGates, PassNorm))]


def remove_gates(model: nn.Module) -> nn.Module:
    """Take gates, hooks and the gated pass's norms off a model, in place; return it."""
    for module in list(model.modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (Look, Mask)):
                del module._forward_pre_hooks[key]
        for key, check in list(module._load_state_dict_pre_hooks.items()):
            if getattr(check, "hook", None) is refuse_other_gates:
                del module._load_state_dict_pre_hooks[key]
        module.__dict__.pop(PLAN, None)
        for name, child in list(module._modules.items()):
            if isinstance(child, (LayerGates, NoGates)):
                del module._modules[name]
    norms = [module for module in model.modules() if isinstance(module, PassNorm)]
    return replace_modules(model, {id(norm): norm.without() for norm in norms})


def has_gates(model: nn.Module) -> bool:
    """Tell whether a model has gates."""
    return any(isinstance(module, LayerGates) for module in model.modules())
