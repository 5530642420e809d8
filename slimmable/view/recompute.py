"""The active column; when gradient checkpointing repeats a forward, the column of its first run.

Checkpointing repeats a forward inside the backward pass, when the model may have been switched. Autograd numbers its
nodes in the order of creation. So the number of the node that the backward pass is at tells which forward is being
repeated, and its column is that of the last switch before this number.
"""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

import torch
from torch.compiler import is_compiling

from slimmable.errors import WidthError

_REMEMBERED = 64

_task = torch._C._current_graph_task_id  # -1 outside of a backward pass
_next_number = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]

C = TypeVar("C")


class Active(Generic[C]):
    """The active column and its history; one with the `index` -1 is a guest, which cannot be activated again later."""

    def __init__(self, column: C) -> None:
        self._now = column
        self._switches = [(-1, weakref.ref(column))]  # number of the next node, the column active from there on
        self._again: tuple[int, C] | None = None  # node, the column that its repeated forward switched to

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the history, since another process numbers its nodes afresh."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_switches", "_again")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        Active.__init__(self, self._now)

    @property
    def active(self) -> C:
        """The active column; in a repeated forward, that of the first run, unless the repeated one has switched."""
        if is_compiling() or _task() == -1 or (number := _number_of_node()) is None:
            return self._now
        if self._again is not None and self._again[0] == number:
            return self._again[1]
        found = next((column() for since, column in reversed(self._switches) if since <= number), None)
        if found is self._now or (found is not None and getattr(found, "index", 0) != -1):
            return found
        raise WidthError(
            f"gradient checkpointing repeats a forward that lies more than {_REMEMBERED} switches back, or was at a "
            "width that the model has only while it is active; call backward earlier, such as once per width"
        )

    @active.setter
    def active(self, column: C) -> None:
        if is_compiling():
            self._now = column
        elif _task() != -1 and (number := _number_of_node()) is not None:
            self._again = (number, column)
        else:
            self.switch(column, _next_number())

    def switch(self, column: C, following: int) -> None:
        """Set `active`, given the number from `next_node`; faster for many modules at a time."""
        self._now, self._again = column, None
        switches = self._switches
        if switches[-1][0] == following:  # no node was made since the last switch
            switches.pop()
        if not switches or switches[-1][1]() is not column:
            switches.append((following, weakref.ref(column)))
            del switches[:-_REMEMBERED]

    @property
    def now(self) -> C:
        """The column of the last switch: `active`, except in a repeated forward."""
        return self._now


def in_backward() -> bool:
    """Tell whether a backward pass is running, in which any forward is a repeated one."""
    return not is_compiling() and _task() != -1


def next_node() -> int | None:
    """Return the number of autograd's next node; None in a backward pass and while compiling."""
    return None if is_compiling() or _task() != -1 else int(_next_number())


def _number_of_node() -> int | None:
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()
