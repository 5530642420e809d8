"""The width state of a module: what it has at each of its widths, as columns of a table, one of which is active."""

import copy
import operator
from typing import Any, TypeAlias, cast

from torch import nn

from slimmable.view.cuts import Cut
from slimmable.view.recompute import Active

Counts: TypeAlias = tuple[int, ...]  # a sub-network, as the number of units that it keeps of each group of a plan


class Column:
    """What one module has at one width; a *guest*, which is none of the module's own, from one switch to the next.

    What else a guest needs in its module, subclasses add and remove.
    """

    def __init__(self, width: float | Counts) -> None:
        self.width = width  # or the counts of a sub-network without a single width
        self.index = -1  # position among the module's own columns, or -1 for a guest
        self.counts: Counts | None = None  # units kept of each group of the plan, if the module has one
        self.cuts: dict[str, Cut] = {}  # name of a tensor -> the part of it that is used; without an entry, the whole
        self.values: dict[str, object] = {}  # name of a plain attribute -> its value
        self.caches: dict[str, object] = {}  # name of an attribute in which the forward keeps results -> its contents

    def enter(self, module: nn.Module) -> None:
        """Add what a guest needs to the module, before it becomes active."""

    def leave(self, module: nn.Module) -> None:
        """Undo `enter`, before another column becomes active."""

    def keep(self, module: nn.Module) -> None:
        """Add what a guest needs to the module for good, before it becomes one of the module's own."""

    def drop(self, module: nn.Module) -> None:
        """Undo `keep`."""


class WidthState(Active[Column]):
    """The columns of one module, the full width first, and the active one.

    `widths` are those of the columns, and `numbers` those of them that are no counts. `plan` is the plan of the
    conversion that made them, None for a module built by hand, and `path` the place in it, "" for the converted model.
    """

    def __init__(self, widths: tuple[float, ...]) -> None:
        self.columns: list[Column] = []
        for width in widths:
            self.add(Column(width))
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


def slim_state(module: nn.Module) -> WidthState:
    """Return the width state of a module that has one."""
    return cast(WidthState, module.__dict__["_slim"])


def state_of(module: nn.Module) -> WidthState | None:
    """Return the width state of a module, or None if it has no widths."""
    return module.__dict__.get("_slim")


def is_slim(module: nn.Module) -> bool:
    """Tell whether the module itself, not just a part of it, has widths."""
    return "_slim" in module.__dict__
