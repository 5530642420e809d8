"""The slimmable linear layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from slimmable._widths import check_widths
from slimmable.layers._kept import in_groups, ranges_of
from slimmable.layers._layer import SlimLayer
from slimmable.view.view import install_view


class SlimLinear(SlimLayer, nn.Linear):
    """`nn.Linear` that runs with part of its features: at width `w`, with the first `round(w * features)`.

    Names in the state dict are torch's; `in_features` and `out_features` are the full ones at every width.

    Shapes: (..., kept in_features) -> (..., kept out_features).

    Args:
        in_features, out_features, bias, device, dtype: as in torch.
        widths: distinct numbers in (0, 1] with 1.0 among them.
        slim_in: False if the input is full at every width, such as a vector of measurements.
        slim_out: False if the output should be full at every width, such as class scores and embeddings.
        overlap: False gives the narrower widths disjoint features, the first ones to the narrowest (non-overlapping
            weights of Zhao et al., SlimCLR, IJCV 2024).

    Raises:
        WidthError: if `widths` is invalid, or too large in total for `overlap=False`.

    >>> from slimmable import set_width
    >>> layer = SlimLinear(8, 4, widths=(1.0, 0.5))
    >>> set_width(layer, 0.5)
    >>> layer, layer.weight.shape
    (SlimLinear(in_features=8, out_features=4, bias=True, widths=(1.0, 0.5), width=0.5), torch.Size([2, 4]))
    """

    _slim_plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        widths: Iterable[float],
        slim_in: bool = True,
        slim_out: bool = True,
        overlap: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._install(check_widths(widths), slim_in, slim_out, overlap)

    def _install(
        self, widths: tuple[float, ...], slim_in: bool = True, slim_out: bool = True, overlap: bool = True
    ) -> None:
        inputs = ranges_of(self.in_features, widths, slim=slim_in, overlap=overlap)
        outputs = ranges_of(self.out_features, widths, slim=slim_out, overlap=overlap)
        rows, columns = in_groups(outputs, self.out_features, 1), in_groups(inputs, self.in_features, 1)
        install_view(
            self,
            widths,
            {"weight": list(zip(rows, columns, strict=True)), "bias": [(row,) for row in rows]},
            {},
            {"in_features": [len(kept) for kept in inputs], "out_features": [len(kept) for kept in outputs]},
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, widths: Iterable[float], **options: bool) -> SlimLinear:
        """Return the slimmable twin of `linear`: it shares the Parameters and keeps the training flag.

        `options` are `slim_in`, `slim_out` and `overlap` of the constructor.

        Raises:
            ConversionError: unless `linear` is exactly an `nn.Linear`.
            WidthError: as the constructor.
        """
        return cls._from_torch(linear, widths, **options)

    def to_linear(self) -> nn.Linear:
        """Return the full-width `nn.Linear`, which shares the Parameters."""
        return self._to_torch(nn.Linear)
