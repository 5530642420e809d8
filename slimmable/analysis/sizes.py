"""Size attributes of torch's layers, such as `in_features`, which must agree with their weights."""

from __future__ import annotations

from torch import nn


def size_axes(module: nn.Module) -> dict[str, int]:
    """Return attribute -> axis of the weight; axis 1 of a convolution's is the attribute divided by `groups`.

    >>> size_axes(nn.Conv2d(4, 8, 3))
    {'out_channels': 0, 'in_channels': 1}
    """
    if isinstance(module, nn.Linear):
        return {"out_features": 0, "in_features": 1}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"in_channels": 0, "out_channels": 1} if module.transposed else {"out_channels": 0, "in_channels": 1}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": 1}
    return {"num_channels": 0} if isinstance(module, nn.GroupNorm) else {}
