"""The top-level names, imported when one of them is first used."""

from slimmable._convert import extract as extract
from slimmable._convert import plan as plan
from slimmable._convert import slimify as slimify
from slimmable._inputs import Inputs as Inputs
from slimmable._profile import profile as profile
from slimmable._search import search as search
from slimmable._width import AllWidths as AllWidths
from slimmable._width import at_width as at_width
from slimmable._width import run_widths as run_widths
from slimmable._width import set_width as set_width
from slimmable._width import width_of as width_of
from slimmable._width import widths_of as widths_of
from slimmable.errors import SlimmableError as SlimmableError
from slimmable.files.construction import full_state_dict as full_state_dict
from slimmable.files.model import load as load
from slimmable.files.model import save as save
from slimmable.files.slimclr import load_slimclr as load_slimclr
from slimmable.layers import SlimConv2d as SlimConv2d
from slimmable.layers import SlimLinear as SlimLinear
from slimmable.layers import SwitchableBatchNorm as SwitchableBatchNorm
from slimmable.layers import SwitchableProbe as SwitchableProbe
from slimmable.losses import OnlineDistillation as OnlineDistillation
from slimmable.rules import register_rule as register_rule
from slimmable.training import SlimRecipe as SlimRecipe
from slimmable.training import calibrate_bn as calibrate_bn
