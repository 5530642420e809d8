"""The switchable linear probe: one linear classifier per width."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from slimmable._widths import kept_units
from slimmable.errors import ConversionError
from slimmable.view.container import SwitchableContainer, inner_modules


class SwitchableProbe(SwitchableContainer):
    """One linear classifier per width, on the features of that width.

    The best classifier on part of the features is not a slice of the best classifier on all of them, unless they are
    orthogonal. To compare with a sliced classifier, use `SlimLinear(..., slim_out=False)`.

    Source: the switchable linear probe layer of Zhao et al., SlimCLR, IJCV 2024.

    Shapes: (N, kept in_features) -> (N, num_classes).

    Args:
        in_features: number of features at the full width.
        num_classes: number of scores, at every width.
        widths: distinct numbers in (0, 1] with 1.0 among them.
        bias, device, dtype: as in `nn.Linear`.

    Raises:
        WidthError: if `widths` is invalid.

    >>> import torch
    >>> from slimmable import at_width
    >>> probe = SwitchableProbe(8, 10, (1.0, 0.5))
    >>> with at_width(probe, 0.5):
    ...     probe(torch.zeros(2, 4)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        widths: Iterable[float],
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(widths)
        self.in_features = in_features
        self.num_classes = num_classes
        self.linears = nn.ModuleList(
            nn.Linear(kept_units(in_features, width), num_classes, bias, device, dtype) for width in self.widths
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, widths: Iterable[float]) -> SwitchableProbe:
        """Return a probe with `linear` itself for the full width and cut copies of it for the narrower ones.

        Raises:
            ConversionError: if `linear` is not a linear layer.
            WidthError: if `widths` is invalid.
        """
        if not isinstance(linear, nn.Linear):
            raise ConversionError(f"{cls.__name__} is made from a linear layer, got {type(linear).__name__}")
        weight, bias = linear.weight, linear.bias
        probe = cls(linear.in_features, linear.out_features, widths, bias is not None, weight.device, weight.dtype)
        for index in range(1, len(probe.widths)):
            narrow = probe.module_at(index)
            narrow.weight.data.copy_(weight.data[:, : narrow.in_features])
            if bias is not None:
                narrow.bias.data.copy_(bias.data)
        probe.linears[0] = linear
        return probe.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Return the classifier of the full width, the module itself, not a copy."""
        return cast(nn.Linear, self.linears[0])

    def module_at(self, index: int) -> nn.Linear:
        """Return the classifier of the width with this index; 0 is the full width."""
        return cast(nn.Linear, inner_modules(self, "linears")[str(index)])

    def forward(self, features: Tensor) -> Tensor:
        """Return the scores from the classifier of the active width."""
        return cast(Tensor, self.module_at(self._slim.index)(features))

    def __repr__(self) -> str:
        settings = f"in_features={self.in_features}, num_classes={self.num_classes}"
        return f"{type(self).__name__}({settings}, bias={self.to_linear().bias is not None}, {self.extra_repr()})"
