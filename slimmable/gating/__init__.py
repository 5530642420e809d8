"""Gates that open and close channels for each image: a dense and a gated network in one set of weights."""

from slimmable.gating._convert import calibrate_gates, extract_gated, gate, gate_activity, gate_parameters, ungate
from slimmable.gating._losses import GateBudget, annealed, bound_loss, budget_loss, open_fractions
from slimmable.gating._passes import ChannelGate, GatedPass, LayerGates, PassNorm, dense, gated, hard_mask, has_gates
from slimmable.gating._plan import GatePlan, gate_plan

__all__ = [
    "ChannelGate", "GateBudget", "GatePlan", "GatedPass", "LayerGates", "PassNorm", "annealed", "bound_loss",
    "budget_loss", "calibrate_gates", "dense", "extract_gated", "gate", "gate_activity", "gate_parameters", "gate_plan",
    "gated", "hard_mask", "has_gates", "open_fractions", "ungate",
]  # fmt: skip
