"""What one module knows of widths: a column for each, and which of them is active."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

from slimmable.view.cuts import Cut
from slimmable.view.recompute import Active

Counts: TypeAlias = "tuple[int, ...]"
"""A sub-network that need not be uniform: how many units of each channel group of a plan it keeps."""


class Column:
    """What one module has at one width.

    Attributes:
        width: the width, or the counts of a sub-network that has none.
        index: its position among the module's columns, or -1 for a guest.
        counts: the units that the sub-network keeps of each group of the plan, if the module has one.
        cuts: name of a tensor -> its cut; what is not named is whole.
        values: name of a plain attribute -> its value.
        sizes: the same for attributes that go on reading as at full width.
        caches: name of an attribute in which the forward keeps what it has computed -> its contents.
        guest: what a column brings along that is not of the module's own widths: index buffers of a view
            (name -> indices), or a container's norm and what it keeps. None for the module's own widths.
    """

    def __init__(
        self,
        width: float | Counts,
        cuts: Mapping[str, Cut] | None = None,
        values: Mapping[str, object] | None = None,
        sizes: Mapping[str, object] | None = None,
        guest: Any = None,
    ) -> None:
        self.width = width
        self.index = -1
        self.counts: Counts | None = None
        self.cuts = dict(cuts or {})
        self.values = dict(values or {})
        self.sizes = dict(sizes or {})
        self.caches: dict[str, object] = {}
        self.guest = guest


class WidthState(Active[Column]):
    """The columns of one module, the full width first, and which is active.

    `index` is the position of the active column, or -1 for one that is not among them: a guest, which stays only
    while it is active. `plan` and `path` say which conversion the module belongs to; hand-made layers have none.
    """

    def __init__(self, widths: tuple[float, ...]) -> None:
        self.columns: list[Column] = []
        for width in widths:
            self.add(Column(width))
        super().__init__(self.columns[0])
        self.index_buffers: dict[str, tuple[int, ...]] = {}
        self.blanks: dict[str, object] = {}
        self.plan: Any = None
        self.path = ""

    @property
    def index(self) -> int:
        """The position of the active column."""
        return operator.index(self.active.index)  # a constant in torch.compile; before torch 2.11 it need not be one

    def add(self, column: Column) -> None:
        """Append a column."""
        column.index, column.guest = len(self.columns), None
        self.columns.append(column)
        self._list_widths()

    def keep_first(self, count: int) -> None:
        """Drop the columns behind the first `count`, of which none must be active."""
        del self.columns[count:]
        self._list_widths()

    def _list_widths(self) -> None:
        self.widths: tuple[float | Counts, ...] = tuple(column.width for column in self.columns)


def state_of(module: nn.Module) -> WidthState | None:
    """Return the width state of a module, or None if it does not react to widths."""
    return module.__dict__.get("_slim")


def is_slim(module: nn.Module) -> bool:
    """Tell whether the module itself, not only a part of it, reacts to widths.

    >>> is_slim(nn.Linear(4, 4))
    False
    """
    return "_slim" in module.__dict__
