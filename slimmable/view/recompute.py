"""What is active in a module: for each user of it, and for a forward that gradient checkpointing repeats.

A user is a thread or an asyncio task, or a block in it, and stands in a context variable. So a task, and what
`asyncio.to_thread` runs, follows the user that has started it until it switches itself. For a new thread, which has no
user, counts the last switch outside of blocks.

Checkpointing repeats a forward inside the backward pass, when the model may have been switched. Autograd numbers the
nodes of each thread in order, so the number of the node that the backward pass is at tells which forward is repeated,
if it was noted for each thread from which node on what was active. Where the thread matters, an error is raised.
"""

import asyncio
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch.compiler import is_compiling

from slimmable.errors import WidthError

_REMEMBERED = 64
_LOCK = threading.RLock()  # held while anything is switched
_NEVER: Any = (None, None, None)

_task = torch._C._current_graph_task_id  # -1 outside of a backward pass
_next_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]

C = TypeVar("C")
New: TypeAlias = "Sequence[tuple[Active[Any], Any]]"  # what is switched, and to what


class _Mark:
    """Stands for a thread or a user, also after its end."""


class _Thread(threading.local):
    """The running thread, and what was last seen there: the user and the last switch of all, from which node on."""

    def __init__(self) -> None:
        self.mark, self.seen, self.since, self.sure = _Mark(), _NEVER, 0, True
        self.alive = _Mark()  # which nothing else holds


class _User:
    """A thread, task or block: what it has, and the user that it follows in everything else."""

    def __init__(self, follows: "_User | None", who: Any, is_block: bool = False) -> None:
        self.mark, self.follows, self.who, self.is_block, self.left = _Mark(), follows, who, is_block, False
        self.has: MutableMapping[Active[Any], Any] = {} if is_block else weakref.WeakKeyDictionary()

    def line(self) -> "Iterator[_User]":
        """Yield the user and those that it follows, without the blocks that its thread or task has left."""
        user: _User | None = self
        while user is not None:
            if not user.left or user.who is not _who():
                yield user
            user = user.follows


_here = _Thread()
_nobody = _User(None, None)
_user: ContextVar[_User] = ContextVar("slimmable_user", default=_nobody)
_current = _user.get
_blocks: list[_User] = []  # those that are open
_owners: weakref.WeakSet[_User] = weakref.WeakSet()  # threads and tasks that have switched
_switches = 0
_compiled_switch = False  # whether compiled code has switched since `last_switch` was asked
_differ = False  # whether users have different things active in the same module


class Active(Generic[C]):
    """What is active, for each user; what has the `index` -1 is a guest, which cannot be activated again later."""

    def __init__(self, value: C) -> None:
        self._base = value  # of those who have nothing of their own
        self.now = self._shown = value  # after the last switch of all; compiled code reads and sets only the first
        self._last: tuple[_Mark, _Mark, C] = _NEVER  # user and thread that have read last, and what they got
        self._unread: tuple[_Mark, int] | None = None  # thread and next node of a switch that nobody has read since
        # what forwards read: the thread, from which node on, whether surely not at the one before, and what
        self._history: list[tuple[_Mark, int, bool, weakref.ref[Any]]] = []
        self._forgotten: set[weakref.ref[_Mark]] = set()  # threads of which there was more
        self._again: dict[_Mark, tuple[tuple[int, int], C]] = {}  # thread -> node, what its repeated forward has set

    def __getstate__(self) -> dict[str, Any]:
        """Leave out users and history; what is active for the running user is so for all users of a copy."""
        own = {name: value for name, value in self.__dict__.items() if name not in vars(Active(None))}
        return own | {"now": self._found()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Active.__init__(self, state.pop("now"))
        self.__dict__.update(state)

    @property
    def active(self) -> C:
        """What is active; in a repeated forward, what was in its first run, unless the repeated one has switched."""
        if is_compiling():
            return _find(self) if _differ else self.now
        if _task() != -1 and (node := _node()) is not None:
            again = self._again.get(_here.mark)
            return again[1] if again is not None and again[0] == node else self._of_first_run(node[1])
        user, thread, value = self._last
        return value if _current().mark is user and _here.mark is thread else _find(self)

    def _found(self) -> C:
        """Find what is active for the running user, and note it for the running thread."""
        with _LOCK:
            user = _current()
            if self.now is not self._shown:  # compiled code has switched
                _put([(self, self.now)])
            own = [each.has[self] for each in user.line() if self in each.has]
            value: C = own[0] if own else self._base
            if not own and any(other is not value for other in _others(user, self)):
                what = "another thread or task has this model at a width of its own"
                raise WidthError(f"{what}; call slimmable.at_width or set_width here too, or use a copy of the model")
            self._note(user, value)
            self._last = user.mark, _here.mark, value
            return value

    def _note(self, user: _User, value: C) -> None:
        if _here.seen != (user.mark, _switches):
            _here.seen, _here.since, _here.sure = (user.mark, _switches), _next_number(), torch.is_grad_enabled()
        since, sure = _here.since, _here.sure
        if self._unread is not None and self._unread[0] is _here.mark and value is self.now:
            since, sure = self._unread[1], True
        self._unread = None
        self._again.pop(_here.mark, None)
        last = next((noted for noted in reversed(self._history) if noted[0] is _here.mark), None)
        if last is not None and last[3]() is value:
            return
        if last is not None and last[1] == since:  # no node was made since
            self._history.remove(last)
        self._history.append((_here.mark, since, sure, weakref.ref(value)))
        self._forgotten.update(weakref.ref(thread) for thread, *_ in self._history[:-_REMEMBERED])
        del self._history[:-_REMEMBERED]

    def _of_first_run(self, number: int) -> C:
        found: list[C] = []
        known: set[_Mark | None] = {None}
        for thread, since, sure, noted in reversed(tuple(self._history)):
            if thread not in known and since <= number + (not sure):
                found.append(noted())
                if since <= number:
                    known.add(thread)
        if None in found or not known.issuperset(thread() for thread in self._forgotten):
            which = f"of more than {_REMEMBERED} switches ago, or at a width that is none of the model's own"
            raise WidthError(f"gradient checkpointing repeats a forward {which}; call backward earlier, once per width")
        if any(value is not found[0] for value in found):
            which = "of one of several threads or tasks, at different widths; give each a copy of the model"
            raise WidthError(f"gradient checkpointing repeats a forward {which}")
        return found[0] if found else self._found()


def switch(new: New) -> bool:
    """Activate something in each module, for the running user; return whether only for a forward that is repeated."""
    if is_compiling():
        global _compiled_switch
        _compiled_switch = True
        for active, value in new:
            active.now, active._last = value, _NEVER
    elif (node := _node()) is not None:
        for active, value in new:
            active._again[_here.mark] = node, value
        return True
    else:
        _put(new)
    return False


@contextmanager
def switched(new: New) -> Iterator[None]:
    """Activate something in each of several modules while the block runs, for those who run in it."""
    if is_compiling() or _node() is not None:
        before = [(active, active.active) for active, _ in new]
        switch(new)
        try:
            yield
        finally:
            switch(before)
        return
    with _LOCK:
        outer = _own_user()
        block = _User(outer, outer.who, is_block=True)
        _put(new, block)
        _blocks.append(block)
        _user.set(block)
        _settle()
    try:
        yield
    finally:
        with _LOCK:
            block.left = True
            _blocks.remove(block)
            _own_user()
            for active, _ in new:
                _show(active, next((it.has[active] for it in reversed(_blocks) if active in it.has), active._base))
            _settle()


def last_switch() -> tuple[object, object, int]:
    """Return marks of the running user and thread, and a count of switches; what is active depends on these alone."""
    global _compiled_switch, _switches
    if _compiled_switch:
        _compiled_switch, _switches = False, _switches + 1
    return _current().mark, _here.mark, _switches


def _node() -> tuple[int, int] | None:
    node = torch._C._current_autograd_node() if _task() != -1 else None
    return None if node is None else (_task(), node._sequence_nr())


# -- users
def _who() -> Any:
    task = asyncio.current_task() if asyncio._get_running_loop() else None
    return weakref.ref(_here.alive if task is None else task)


def _own_user() -> _User:
    """Return the user of the running thread or task, or its innermost block; make one if it only follows another."""
    user, who = next(_current().line()), _who()
    if user.who is not who:
        user = _User(user, who)
        _owners.add(user)
    _user.set(user)
    return user


def _others(user: _User, active: Active[C]) -> "Iterator[C]":
    line = list(user.line())
    others = (each for each in (*_blocks, *_owners) if each.who() and each not in line)  # whose thread is alive
    return (other.has[active] for other in others if active in other.has)


def _put(new: New, entered: _User | None = None) -> None:
    """Give something to a new block, or to the innermost block that has the same, or else to the thread or task."""
    with _LOCK:
        user = _own_user()
        for active, value in new:
            guest = -1 in (getattr(value, "index", 0), getattr(active.now, "index", 0))
            if guest and any(True for _ in _others(user, active)):
                what = "another thread or task runs this model, which can be at a width not its own by one only"
                raise WidthError(f"{what}; keep the width with calibrate_bn, or use a copy of the model")
        root = next(each for each in user.line() if not each.is_block)
        for active, value in new:
            block = entered or next((each for each in user.line() if each.is_block and active in each.has), None)
            if block is None:
                active._base = value
            (root if block is None or block.who is not root.who else block).has[active] = value
            _show(active, value)
        _settle()


def _show(active: Active[Any], value: Any) -> None:
    active.now = active._shown = value
    active._last, active._unread = _NEVER, (_here.mark, _next_number())


def _settle() -> None:
    """Count a switch, and find out whether compiled code may run."""
    global _switches, _differ, _find
    _switches += 1
    _differ = len(_owners) > 1 and _users_differ()
    if "torch._dynamo" in sys.modules and not is_compiling():
        _keep_graphs()
        if _differ:
            _find = torch.compiler.disable(Active._found)  # type: ignore[no-untyped-call]


@cache
def _keep_graphs() -> None:
    """Let torch keep one graph for each width, mode and kind of input; by default, it gives up after 8."""
    for name in ("recompile_limit", "cache_size_limit"):  # the second is that of torch 2.6
        if hasattr(config := torch._dynamo.config, name):
            setattr(config, name, max(getattr(config, name), 64))


def _users_differ() -> bool:
    found: dict[Active[Any], tuple[Any, object]] = {}
    for user in (each for each in (*reversed(_blocks), *_owners) if each.who()):
        for active, value in user.has.items():
            other, who = found.setdefault(active, (value, user.who))
            if other is not value and who is not user.who:
                return True
    return False


_find: Callable[[Any], Any] = Active._found  # which is not compiled
