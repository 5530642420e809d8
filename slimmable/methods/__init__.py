"""Training methods as modules: self-supervised ones, and supervised training, each at every width."""

from slimmable.methods.method import Batch, Encoder, Method, Outcome
from slimmable.methods.published import (
    BYOL,
    DINO,
    BarlowTwins,
    Distillation,
    MoCoV2,
    MoCoV3,
    SimCLR,
    SimSiam,
    Supervised,
    VICReg,
)

__all__ = [
    "BYOL", "DINO", "BarlowTwins", "Batch", "Distillation", "Encoder", "Method", "MoCoV2", "MoCoV3", "Outcome",
    "SimCLR", "SimSiam", "Supervised", "VICReg",
]  # fmt: skip
