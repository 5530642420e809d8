"""Slimmable convolutions of one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from slimmable._widths import Kept, check_widths
from slimmable.layers._kept import in_groups, ranges_of
from slimmable.layers._layer import SlimLayer
from slimmable.view.view import install_view


class _SlimConv(SlimLayer, _ConvNd):
    """The common base; see `SlimConv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        widths: Iterable[float],
        slim_in: bool = True,
        slim_out: bool = True,
        overlap: bool = True,
    ) -> None:
        settings: Any = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *settings)  # type: ignore[arg-type]
        self._install(check_widths(widths), slim_in, slim_out, overlap)

    def _install(
        self, widths: tuple[float, ...], slim_in: bool = True, slim_out: bool = True, overlap: bool = True
    ) -> None:
        in_size, out_size = self.in_channels // self.groups, self.out_channels // self.groups
        groups = [self.groups] * len(widths)
        if in_size == 1 and self.groups > 1 and slim_in and slim_out:  # depthwise: its groups are its channels
            kept_groups = ranges_of(self.groups, widths, slim=True, overlap=overlap)
            groups = [len(kept) for kept in kept_groups]
            inputs = ranges_of(1, widths, slim=False, overlap=True)
            rows: list[Kept] = [
                None if len(kept) == self.groups else tuple(range(kept.start * out_size, kept.stop * out_size))
                for kept in kept_groups
            ]
            out_counts = [count * out_size for count in groups]
        else:
            inputs = ranges_of(in_size, widths, slim=slim_in, overlap=overlap)
            outputs = ranges_of(out_size, widths, slim=slim_out, overlap=overlap)
            rows = in_groups(outputs, out_size, self.groups)
            out_counts = [len(kept) * self.groups for kept in outputs]
        columns = in_groups(inputs, in_size, 1)
        rest: tuple[Kept, ...] = (None,) * len(self.kernel_size)
        install_view(
            self,
            widths,
            {
                "weight": [(row, column, *rest) for row, column in zip(rows, columns, strict=True)],
                "bias": [(row,) for row in rows],
            },
            {"groups": groups} if len(set(groups)) > 1 else {},
            {
                "in_channels": [len(kept) * count for kept, count in zip(inputs, groups, strict=True)],
                "out_channels": out_counts,
            },
        )


class SlimConv1d(_SlimConv, nn.Conv1d):
    """`nn.Conv1d` that runs with part of its channels; everything is as in `SlimConv2d`.

    >>> SlimConv1d(4, 8, 3, widths=(1.0, 0.5))
    SlimConv1d(4, 8, kernel_size=(3,), stride=(1,), widths=(1.0, 0.5), width=1.0)
    """

    _slim_plain = nn.Conv1d

    @classmethod
    def from_conv1d(cls, conv: nn.Conv1d, widths: Iterable[float], **options: bool) -> SlimConv1d:
        """Return the slimmable twin of `conv`; as `SlimConv2d.from_conv2d`."""
        return cls._from_torch(conv, widths, **options)

    def to_conv1d(self) -> nn.Conv1d:
        """Return the full-width `nn.Conv1d`, which shares the Parameters."""
        return self._to_torch(nn.Conv1d)


class SlimConv2d(_SlimConv, nn.Conv2d):
    """`nn.Conv2d` that runs with part of its channels: at width `w`, with the first `round(w * channels)`.

    Names in the state dict are torch's; `in_channels` and `out_channels` are the full ones at every width. A depthwise
    convolution keeps its first groups. Any other grouped one keeps all groups and the first channels of each, so it
    expects an input of `groups * round(w * in_channels / groups)` channels.

    Shapes: (N, kept in_channels, H, W) -> (N, kept out_channels, H', W').

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in torch.
        widths: distinct numbers in (0, 1] with 1.0 among them.
        slim_in: False if the input is full at every width, such as an image.
        slim_out: False if the output should be full at every width.
        overlap: False gives the narrower widths disjoint channels, the first ones to the narrowest (non-overlapping
            weights of Zhao et al., SlimCLR, IJCV 2024).

    Raises:
        WidthError: if `widths` is invalid, or too large in total for `overlap=False`.

    >>> import torch
    >>> from slimmable import at_width
    >>> conv = SlimConv2d(3, 8, 3, widths=(1.0, 0.5), slim_in=False)
    >>> with at_width(conv, 0.5):
    ...     conv(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 4, 6, 6])
    """

    _slim_plain = nn.Conv2d

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, widths: Iterable[float], **options: bool) -> SlimConv2d:
        """Return the slimmable twin of `conv`: it shares the Parameters and keeps the training flag.

        `options` are `slim_in`, `slim_out` and `overlap` of the constructor.

        Raises:
            ConversionError: unless `conv` is exactly an `nn.Conv2d`.
            WidthError: as the constructor.
        """
        return cls._from_torch(conv, widths, **options)

    def to_conv2d(self) -> nn.Conv2d:
        """Return the full-width `nn.Conv2d`, which shares the Parameters."""
        return self._to_torch(nn.Conv2d)


class SlimConv3d(_SlimConv, nn.Conv3d):
    """`nn.Conv3d` that runs with part of its channels; everything is as in `SlimConv2d`.

    >>> SlimConv3d(4, 8, 1, widths=(1.0, 0.5))
    SlimConv3d(4, 8, kernel_size=(1, 1, 1), stride=(1, 1, 1), widths=(1.0, 0.5), width=1.0)
    """

    _slim_plain = nn.Conv3d

    @classmethod
    def from_conv3d(cls, conv: nn.Conv3d, widths: Iterable[float], **options: bool) -> SlimConv3d:
        """Return the slimmable twin of `conv`; as `SlimConv2d.from_conv2d`."""
        return cls._from_torch(conv, widths, **options)

    def to_conv3d(self) -> nn.Conv3d:
        """Return the full-width `nn.Conv3d`, which shares the Parameters."""
        return self._to_torch(nn.Conv3d)
