"""Gates that open and close channels for each image: a dense and a gated network in one set of weights."""

from slimmable.gating._activity import gate_activity as gate_activity
from slimmable.gating._calibrate import calibrate_gates as calibrate_gates
from slimmable.gating._convert import gate as gate
from slimmable.gating._convert import ungate as ungate
from slimmable.gating._extract import extract_gated as extract_gated
from slimmable.gating._find import GatePlan as GatePlan
from slimmable.gating._find import gate_plan as gate_plan
from slimmable.gating._gate import ChannelGate as ChannelGate
from slimmable.gating._gate import annealed as annealed
from slimmable.gating._gate import hard_mask as hard_mask
from slimmable.gating._gated_pass import GatedPass as GatedPass
from slimmable.gating._losses import GateBudget as GateBudget
from slimmable.gating._losses import bound_loss as bound_loss
from slimmable.gating._losses import budget_loss as budget_loss
from slimmable.gating._losses import open_shares as open_shares
from slimmable.gating._passes import dense as dense
from slimmable.gating._passes import gated as gated
