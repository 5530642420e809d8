"""Slimmable networks: one set of weights that runs at several widths.

>>> import torch, slimmable
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> model = slimmable.slimify(net, widths=(1.0, 0.5), example_inputs=torch.zeros(2, 8))
>>> slimmable.set_width(model, 0.5)
>>> model[0].weight.shape
torch.Size([8, 8])
"""

from slimmable import losses as losses
from slimmable._errors import CheckpointError as CheckpointError
from slimmable._errors import ConversionError as ConversionError
from slimmable._errors import DataError as DataError
from slimmable._errors import SlimmableError as SlimmableError
from slimmable._errors import TraceError as TraceError
from slimmable._errors import UsageError as UsageError
from slimmable._errors import WidthError as WidthError
from slimmable._inputs import Inputs as Inputs
from slimmable.checkpoint import load as load
from slimmable.checkpoint import save as save
from slimmable.convert import extract as extract
from slimmable.convert import plan as plan
from slimmable.convert import slimify as slimify
from slimmable.gating import GateBudget as GateBudget
from slimmable.gating import dense as dense
from slimmable.gating import extract_gated as extract_gated
from slimmable.gating import gate as gate
from slimmable.gating import gate_plan as gate_plan
from slimmable.gating import gated as gated
from slimmable.layers import SlimConv1d as SlimConv1d
from slimmable.layers import SlimConv2d as SlimConv2d
from slimmable.layers import SlimConv3d as SlimConv3d
from slimmable.layers import SlimGroupNorm as SlimGroupNorm
from slimmable.layers import SlimLayerNorm as SlimLayerNorm
from slimmable.layers import SlimLinear as SlimLinear
from slimmable.layers import SwitchableBatchNorm as SwitchableBatchNorm
from slimmable.layers import SwitchableBatchNorm1d as SwitchableBatchNorm1d
from slimmable.layers import SwitchableBatchNorm2d as SwitchableBatchNorm2d
from slimmable.layers import SwitchableBatchNorm3d as SwitchableBatchNorm3d
from slimmable.layers import SwitchableProbe as SwitchableProbe
from slimmable.losses import OnlineDistillation as OnlineDistillation
from slimmable.profile import profile as profile
from slimmable.search import search as search
from slimmable.slimclr import load_slimclr as load_slimclr
from slimmable.training import SlimRecipe as SlimRecipe
from slimmable.training import calibrate_bn as calibrate_bn
from slimmable.width import AllWidths as AllWidths
from slimmable.width import at_width as at_width
from slimmable.width import run_widths as run_widths
from slimmable.width import set_width as set_width
from slimmable.width import width_of as width_of
from slimmable.width import widths_of as widths_of

__version__ = "0.1.0"
