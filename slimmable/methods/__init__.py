"""Training methods as modules: SimCLR, MoCo v2 and v3, BYOL, VICReg, and supervised training, each at every width."""

from slimmable.methods.method import Batch, Encoder, Method, Outcome
from slimmable.methods.published import BYOL, MoCoV2, MoCoV3, SimCLR, Supervised, VICReg

__all__ = ["BYOL", "Batch", "Encoder", "Method", "MoCoV2", "MoCoV3", "Outcome", "SimCLR", "Supervised", "VICReg"]
