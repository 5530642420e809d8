"""Switchable containers, which hold one real module per width and run that of the active width."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import nn

from slimmable._widths import check_widths
from slimmable.view.state import WidthState


class SwitchableContainer(nn.Module):
    """One real module per width; see `SwitchableNorm` and `SwitchableProbe`."""

    _slim: WidthState

    def __init__(self, widths: Iterable[float]) -> None:
        super().__init__()
        self.__dict__["_slim"] = WidthState(check_widths(widths))

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths, from the widest to the narrowest."""
        return tuple(width for width in self._slim.widths if isinstance(width, float))

    @property
    def width(self) -> float:
        """The active width."""
        return cast(float, self._slim.active.width)

    def module_at(self, index: int) -> nn.Module:
        """Return the module of the width with this index; 0 is the full width."""
        raise NotImplementedError

    @property
    def idle(self) -> bool:
        """Whether none of its modules is in use."""
        return False

    def own_at(self, index: int) -> nn.Module:
        """Return the module of the width with this index, or a copy if it shares tensors with others."""
        return self.module_at(index)

    def extra_repr(self) -> str:
        """Return the widths and the active one."""
        return f"widths={self.widths}, width={self.width}"


def inner_modules(container: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return the modules of a list inside a container, faster than through attribute access."""
    return cast("dict[str, nn.Module]", container._modules[name]._modules)  # type: ignore[union-attr]
