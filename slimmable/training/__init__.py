"""Tools for training all widths: a recipe for your own loop, several processes, MoCo, BatchNorm, and diagnostics."""

from slimmable._distributed import average_gradients, gather
from slimmable.training.batchnorm import calibrate_bn, synchronised_batchnorm
from slimmable.training.diagnostics import GradientDiagnostics
from slimmable.training.moco import MoCo, MomentumEncoder, cosine_momentum
from slimmable.training.recipe import SlimRecipe

__all__ = [
    "GradientDiagnostics", "MoCo", "MomentumEncoder", "SlimRecipe", "average_gradients", "calibrate_bn",
    "cosine_momentum", "gather", "synchronised_batchnorm",
]  # fmt: skip
