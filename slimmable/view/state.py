"""The width state of a module: what it has at each of its widths, as columns of a table, one of which is active."""

import copy
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from slimmable.view.cuts import Cut
from slimmable.view.recompute import Active

Counts: TypeAlias = tuple[int, ...]  # a sub-network, as the number of units that it keeps of each group of a plan


@dataclass(eq=False)
class Column:
    """What one module has at one width; a *guest*, which is none of the module's own, from one switch to the next."""

    width: float | Counts  # or the counts of a sub-network without a single width
    index: int = -1  # position among the module's own columns, or -1 for a guest
    counts: Counts | None = None  # units kept of each group of the plan, if the module has one
    cuts: dict[str, Cut] = field(default_factory=dict)  # name of a tensor -> the part that is used, unless the whole
    values: dict[str, object] = field(default_factory=dict)  # name of a plain attribute -> its value
    caches: dict[str, object] = field(default_factory=dict)  # attribute in which the forward keeps results -> contents
    shared: bool = False  # whether a container's module reads its part of the full one's parameters, and has none
    module: nn.Module | None = None  # that of a guest of a container


class WidthState(Active[Column]):
    """The columns of one module, the full width first, and the active one.

    `widths` are those of the columns, and `numbers` those of them that are no counts. `plan` is the plan of the
    conversion that made them, None for a module built by hand, and `path` the place in it, "" for the converted model.
    """

    def __init__(self, columns: Iterable[Column]) -> None:
        self.columns: list[Column] = []
        for column in columns:
            self.add(column)
        super().__init__(self.columns[0])
        self.blanks: dict[str, object] = {}
        self.plan: Any = None
        self.path = ""

    @property
    def index(self) -> int:
        """The position of the active column, or -1 for a guest."""
        return operator.index(self.active.index)  # makes it a constant for torch.compile, even in torch 2.6

    def add(self, column: Column) -> None:
        """Append a column."""
        column.index = len(self.columns)
        self.columns.append(column)
        self._list_widths()

    def remove(self) -> Column:
        """Remove the last column, which becomes a guest, and return it."""
        column = self.columns.pop()
        column.index = -1
        self._list_widths()
        return column

    def _list_widths(self) -> None:
        self.widths: tuple[float | Counts, ...] = tuple(column.width for column in self.columns)
        self.numbers = tuple(width for width in self.widths if isinstance(width, float))


class HasWidths(nn.Module):
    """A module with a width state."""

    _slim: WidthState

    def _replicate_for_data_parallel(self) -> nn.Module:
        """Return a replica, which runs in another thread, with a state of its own: what is active here."""
        replica: nn.Module = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["_slim"] = copy.copy(self._slim)
        return replica


def state_of(module: nn.Module) -> WidthState | None:
    """Return the width state of a module, or None if it has no widths."""
    return module.__dict__.get("_slim")


def is_slim(module: nn.Module) -> bool:
    """Tell whether the module itself, not just a part of it, has widths."""
    return "_slim" in module.__dict__
