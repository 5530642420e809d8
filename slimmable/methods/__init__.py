"""Training methods as modules: SimCLR, MoCo v2 and v3, BYOL, VICReg, and supervised training, each at every width."""

from slimmable.methods._batch import Batch as Batch
from slimmable.methods._batch import Outcome as Outcome
from slimmable.methods._byol import BYOL as BYOL
from slimmable.methods._encoder import Encoder as Encoder
from slimmable.methods._method import Method as Method
from slimmable.methods._moco import MoCoV2 as MoCoV2
from slimmable.methods._moco_v3 import MoCoV3 as MoCoV3
from slimmable.methods._simclr import SimCLR as SimCLR
from slimmable.methods._supervised import Supervised as Supervised
from slimmable.methods._vicreg import VICReg as VICReg

__all__ = [
    "BYOL",
    "Batch",
    "Encoder",
    "Method",
    "MoCoV2",
    "MoCoV3",
    "Outcome",
    "SimCLR",
    "Supervised",
    "VICReg",
]
