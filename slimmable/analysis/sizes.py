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
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"embedding_dim": 1}
    if isinstance(module, nn.Bilinear):
        return {"out_features": 0, "in1_features": 1, "in2_features": 2}
    return {"num_channels": 0} if isinstance(module, nn.GroupNorm) else {}


def output_axis(module: nn.Module) -> int | None:
    """Return the axis of a torch layer's weight along which its outputs are, or None for other modules."""
    made = ("out_features", "out_channels", "embedding_dim")
    return next((axis for name, axis in size_axes(module).items() if name in made), None)
