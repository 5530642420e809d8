"""What one module knows of widths, as a table with a column for each width, and which column is active.

The rows of the table are what depends on the width: which part of each tensor is used, plain attributes such as
`num_heads`, and what the forward keeps for later calls.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from torch import nn

from slimmable.view.cuts import Cut
from slimmable.view.recompute import Active

Counts: TypeAlias = "tuple[int, ...]"
"""A sub-network that need not be uniform: how many units of each channel group of a plan it keeps."""


class Column:
    """What one module has at one width.

    A column that is not among the module's own is a *guest*: it is made for one switch and gone after the next.
    Subclasses bring things along that a guest puts into the module.

    Attributes:
        width: the width, or the counts of a sub-network that is not of one width.
        index: its position among the module's own columns, or -1 for a guest.
        counts: the units that the sub-network keeps of each group of the plan, if the module has one.
        cuts: name of a tensor -> which part of it is used; a tensor without an entry is used whole.
        values: name of a plain attribute -> its value.
        sizes: the same for attributes that read as at full width.
        caches: name of an attribute in which the forward keeps what it has computed -> its contents.
    """

    def __init__(
        self,
        width: float | Counts,
        cuts: Mapping[str, Cut] | None = None,
        values: Mapping[str, object] | None = None,
        sizes: Mapping[str, object] | None = None,
    ) -> None:
        self.width = width
        self.index = -1
        self.counts: Counts | None = None
        self.cuts = dict(cuts or {})
        self.values = dict(values or {})
        self.sizes = dict(sizes or {})
        self.caches: dict[str, object] = {}

    def enter(self, module: nn.Module) -> None:
        """Put what a guest brings along into the module; called before it becomes active."""

    def leave(self, module: nn.Module) -> None:
        """Undo `enter`; called when another column is about to become active."""

    def keep(self, module: nn.Module) -> None:
        """Put what the guest brings along into the module for good; called before it becomes one of its own."""

    def drop(self, module: nn.Module) -> None:
        """Undo `keep`."""


class WidthState(Active[Column]):
    """The columns of one module, the full width first, and which is active.

    `index` is the position of the active column, or -1 for a guest. `plan` and `path` say which conversion the module
    belongs to; layers made by hand have none.
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
        return operator.index(self.active.index)  # a constant for torch.compile, also for that of torch 2.6

    def add(self, column: Column) -> None:
        """Append a column."""
        column.index = len(self.columns)
        self.columns.append(column)
        self._list_widths()

    def remove_last(self) -> Column:
        """Remove the last column, which must not be active, and return it."""
        column = self.columns.pop()
        self._list_widths()
        return column

    def _list_widths(self) -> None:
        self.widths: tuple[float | Counts, ...] = tuple(column.width for column in self.columns)


def activate(module: nn.Module, column: Column) -> None:
    """Switch a module to one of its own columns or to a guest."""
    state = _state(module)
    if state.active is not column:
        state.active.leave(module)
        column.enter(module)
        state.active = column


def keep(module: nn.Module, column: Column) -> None:
    """Make a guest one of the module's own columns."""
    column.keep(module)
    _state(module).add(column)


def forget(module: nn.Module, own: int) -> None:
    """Switch a module to its full width, and remove all but its first `own` columns."""
    state = _state(module)
    activate(module, state.columns[0])
    while len(state.columns) > own:
        state.remove_last().drop(module)


def _state(module: nn.Module) -> WidthState:
    return cast(WidthState, module.__dict__["_slim"])


def state_of(module: nn.Module) -> WidthState | None:
    """Return the width state of a module, or None if it does not react to widths."""
    return module.__dict__.get("_slim")


def is_slim(module: nn.Module) -> bool:
    """Tell whether the module itself, not only a part of it, reacts to widths.

    >>> is_slim(nn.Linear(4, 4))
    False
    """
    return "_slim" in module.__dict__
