"""Slimmable and switchable layers: torch's layers with `widths`, for networks built by hand."""

from slimmable.layers._batchnorm import SwitchableBatchNorm as SwitchableBatchNorm
from slimmable.layers._batchnorm import SwitchableBatchNorm1d as SwitchableBatchNorm1d
from slimmable.layers._batchnorm import SwitchableBatchNorm2d as SwitchableBatchNorm2d
from slimmable.layers._batchnorm import SwitchableBatchNorm3d as SwitchableBatchNorm3d
from slimmable.layers._conv import SlimConv1d as SlimConv1d
from slimmable.layers._conv import SlimConv2d as SlimConv2d
from slimmable.layers._conv import SlimConv3d as SlimConv3d
from slimmable.layers._linear import SlimLinear as SlimLinear
from slimmable.layers._norm import SlimGroupNorm as SlimGroupNorm
from slimmable.layers._norm import SlimLayerNorm as SlimLayerNorm
from slimmable.layers._probe import SwitchableProbe as SwitchableProbe
from slimmable.view.container import SwitchableContainer as SwitchableContainer
from slimmable.view.norms import SwitchableNorm as SwitchableNorm

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
