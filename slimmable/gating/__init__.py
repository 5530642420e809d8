"""Gates that open and close channels for each image: a dense and a gated network in one set of weights."""

from slimmable._addons import offer
from slimmable.gating import _addon
from slimmable.gating._activity import gate_activity
from slimmable.gating._calibrate import calibrate_gates
from slimmable.gating._convert import gate, ungate
from slimmable.gating._extract import extract_gated
from slimmable.gating._find import GatePlan, gate_plan
from slimmable.gating._gate import ChannelGate, annealed, hard_mask
from slimmable.gating._gated_pass import GatedPass
from slimmable.gating._losses import GateBudget, bound_loss, budget_loss, open_shares
from slimmable.gating._parts import has_gates
from slimmable.gating._passes import dense, gated

__all__ = [
    "ChannelGate",
    "GateBudget",
    "GatePlan",
    "GatedPass",
    "annealed",
    "bound_loss",
    "budget_loss",
    "calibrate_gates",
    "dense",
    "extract_gated",
    "gate",
    "gate_activity",
    "gate_plan",
    "gated",
    "hard_mask",
    "has_gates",
    "open_shares",
    "ungate",
]

offer("gating", _addon)
