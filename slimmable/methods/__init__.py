"""Training methods as modules: self-supervised, supervised, and from a teacher, each at every width."""

from slimmable.methods.method import Batch, Encoder, Method, Outcome
from slimmable.methods.published import BYOL, MoCoV2, MoCoV3, SimCLR, Supervised, VICReg
from slimmable.methods.teacher import Distillation

__all__ = [
    "BYOL",
    "Batch",
    "Distillation",
    "Encoder",
    "Method",
    "MoCoV2",
    "MoCoV3",
    "Outcome",
    "SimCLR",
    "Supervised",
    "VICReg",
]
