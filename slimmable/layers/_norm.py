"""Slimmable norms without running statistics, whose gain and bias are sliced: LayerNorm and GroupNorm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from slimmable._widths import Kept, check_widths, kept_units
from slimmable.layers._kept import first_units, in_groups
from slimmable.layers._layer import SlimLayer
from slimmable.view.view import install_view


class SlimLayerNorm(SlimLayer, nn.LayerNorm):
    """`nn.LayerNorm` over part of the features: at width `w`, the first `round(w * n)` of the last axis.

    Shapes: (..., *normalized_shape with a narrower last axis) -> the same.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in torch.
        widths: distinct numbers in (0, 1] with 1.0 among them.

    Raises:
        WidthError: if `widths` is invalid.

    >>> import torch
    >>> from slimmable import at_width
    >>> norm = SlimLayerNorm(8, widths=(1.0, 0.5))
    >>> with at_width(norm, 0.5):
    ...     norm(torch.randn(2, 4)).shape
    torch.Size([2, 4])
    """

    _slim_plain = nn.LayerNorm

    def __init__(
        self,
        normalized_shape: int | list[int] | tuple[int, ...],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        widths: Iterable[float],
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._install(check_widths(widths))

    def _install(self, widths: tuple[float, ...]) -> None:
        *outer, last = self.normalized_shape
        kept = [kept_units(last, width) for width in widths]
        cuts: list[Sequence[Kept]] = [(*(None for _ in outer), count) for count in kept]
        shapes = [(*outer, count) for count in kept]
        install_view(self, widths, {"weight": cuts, "bias": cuts}, {"normalized_shape": shapes})

    @classmethod
    def from_layernorm(cls, norm: nn.LayerNorm, widths: Iterable[float]) -> SlimLayerNorm:
        """Return the slimmable twin of `norm`: it shares the Parameters and keeps the training flag.

        Raises:
            ConversionError: unless `norm` is exactly an `nn.LayerNorm`.
            WidthError: if `widths` is invalid.
        """
        return cls._from_torch(norm, widths)

    def to_layernorm(self) -> nn.LayerNorm:
        """Return the full-width `nn.LayerNorm`, which shares the Parameters."""
        return self._to_torch(nn.LayerNorm)


class SlimGroupNorm(SlimLayer, nn.GroupNorm):
    """`nn.GroupNorm` over part of the channels.

    If `w * num_groups` is a whole number at every width `w`, that many first groups are kept. Otherwise all groups are
    kept, each with its first channels, and the input must have `num_groups * round(w * num_channels / num_groups)`.

    Shapes: (N, kept channels, ...) -> the same.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as in torch.
        widths: distinct numbers in (0, 1] with 1.0 among them.

    Raises:
        WidthError: if `widths` is invalid.

    >>> from slimmable import at_width
    >>> norm = SlimGroupNorm(4, 16, widths=(1.0, 0.5))
    >>> with at_width(norm, 0.5):
    ...     norm.num_groups, tuple(norm.weight.shape)
    (2, (8,))
    """

    _slim_plain = nn.GroupNorm

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        widths: Iterable[float],
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self._install(check_widths(widths))

    def _install(self, widths: tuple[float, ...]) -> None:
        size = self.num_channels // self.num_groups
        shares = [width * self.num_groups for width in widths]
        if all(round(share) >= 1 and math.isclose(share, round(share), abs_tol=1e-9) for share in shares):
            groups = [round(share) for share in shares]
            counts = [count * size for count in groups]
            kept: list[Kept] = list(counts)
        else:
            groups = [self.num_groups] * len(widths)
            ranges = first_units(size, widths)
            counts = [self.num_groups * len(each) for each in ranges]
            kept = in_groups(ranges, size, self.num_groups)
        cuts = [(each,) for each in kept]
        install_view(self, widths, {"weight": cuts, "bias": cuts}, {"num_groups": groups}, {"num_channels": counts})

    @classmethod
    def from_groupnorm(cls, norm: nn.GroupNorm, widths: Iterable[float]) -> SlimGroupNorm:
        """Return the slimmable twin of `norm`: it shares the Parameters and keeps the training flag.

        Raises:
            ConversionError: unless `norm` is exactly an `nn.GroupNorm`.
            WidthError: if `widths` is invalid.
        """
        return cls._from_torch(norm, widths)

    def to_groupnorm(self) -> nn.GroupNorm:
        """Return the full-width `nn.GroupNorm`, which shares the Parameters."""
        return self._to_torch(nn.GroupNorm)
