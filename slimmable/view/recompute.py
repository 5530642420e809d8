"""The active column, also where a checkpointed forward runs again: then it is the column of the first run.

Gradient checkpointing runs a forward a second time inside the backward pass, when the model may have been switched.
Autograd numbers its nodes in the order of their making. So the width of a node's forward is the one that was switched
to last before its number, and the node that the backward pass is at says which forward is run again.
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
    """What is active, with what was before; `C` has an `index`, -1 for what cannot be taken up again (a guest)."""

    def __init__(self, column: C) -> None:
        self._now = column
        self._switches = [(-1, weakref.ref(column))]  # number of the next node, what is active from then on
        self._again: tuple[int, C] | None = None  # node, what its second forward switched to

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the history: another process numbers its nodes anew."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_switches", "_again")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        Active.__init__(self, self._now)

    @property
    def active(self) -> C:
        """The active column; in a second forward that of the first, unless the second forward itself has switched."""
        if is_compiling() or _task() == -1:
            return self._now
        number = _number_of_node()
        if number is None:
            return self._now
        if self._again is not None and self._again[0] == number:
            return self._again[1]
        return self._at(number)

    @active.setter
    def active(self, column: C) -> None:
        if is_compiling():
            self._now = column
            return
        number = None if _task() == -1 else _number_of_node()
        if number is not None:
            self._again = (number, column)
            return
        self.switch(column, _next_number())

    def switch(self, column: C, following: int) -> None:
        """Do as setting `active` where `next_node` gives a number, this one; quicker for many at a time."""
        self._now, self._again = column, None
        switches = self._switches
        if switches[-1][0] == following:  # no node was made since the last switch
            switches.pop()
        if not switches or switches[-1][1]() is not column:
            switches.append((following, weakref.ref(column)))
            del switches[:-_REMEMBERED]

    @property
    def now(self) -> C:
        """The column that was switched to last; `active` but for second forwards."""
        return self._now

    def _at(self, number: int) -> C:
        found = next((column() for since, column in reversed(self._switches) if since <= number), None)
        if found is self._now or (found is not None and found.index != -1):  # type: ignore[attr-defined]
            return found
        raise WidthError(
            f"gradient checkpointing runs a forward again that lies more than {_REMEMBERED} switches back, "
            "or was at a width that the model has only while it is active; call backward earlier, such as once a width"
        )


def in_backward() -> bool:
    """Tell whether a backward pass is under way, so that a forward is one that runs again."""
    return not is_compiling() and _task() != -1


def next_node() -> int | None:
    """Return the number of the node that autograd makes next; None in a backward pass and while compiling."""
    return None if is_compiling() or _task() != -1 else int(_next_number())


def _number_of_node() -> int | None:
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()
