"""Slimmable and switchable layers: torch's layers with `widths`, for networks built by hand."""

from slimmable.layers._slim import SlimConv1d, SlimConv2d, SlimConv3d, SlimGroupNorm, SlimLayerNorm, SlimLinear
from slimmable.layers._slim import refuse_plain_between as refuse_plain_between
from slimmable.layers._switchable import (
    SwitchableBatchNorm,
    SwitchableBatchNorm1d,
    SwitchableBatchNorm2d,
    SwitchableBatchNorm3d,
    SwitchableLinear,
    SwitchableProbe,
)
from slimmable.view.norms import SwitchableContainer, SwitchableNorm

__all__ = [
    "SlimConv1d", "SlimConv2d", "SlimConv3d", "SlimGroupNorm", "SlimLayerNorm", "SlimLinear", "SwitchableBatchNorm",
    "SwitchableBatchNorm1d", "SwitchableBatchNorm2d", "SwitchableBatchNorm3d", "SwitchableContainer",
    "SwitchableLinear", "SwitchableNorm", "SwitchableProbe",
]  # fmt: skip
