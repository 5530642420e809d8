"""Slimmable and switchable layers: torch's layers with `widths`, for networks built by hand."""

from slimmable.layers._batchnorm import (
    SwitchableBatchNorm,
    SwitchableBatchNorm1d,
    SwitchableBatchNorm2d,
    SwitchableBatchNorm3d,
)
from slimmable.layers._probe import SwitchableProbe
from slimmable.layers._slim import SlimConv1d, SlimConv2d, SlimConv3d, SlimGroupNorm, SlimLayerNorm, SlimLinear
from slimmable.view.container import SwitchableContainer
from slimmable.view.norms import SwitchableNorm

__all__ = [
    "SlimConv1d",
    "SlimConv2d",
    "SlimConv3d",
    "SlimGroupNorm",
    "SlimLayerNorm",
    "SlimLinear",
    "SwitchableBatchNorm",
    "SwitchableBatchNorm1d",
    "SwitchableBatchNorm2d",
    "SwitchableBatchNorm3d",
    "SwitchableContainer",
    "SwitchableNorm",
    "SwitchableProbe",
]
