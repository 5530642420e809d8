"""What a forward can reach, such as attributes, globals and caches, and how all of it stays as it was."""

import copy
import functools
import gc
import operator
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from types import CellType, CodeType, FrameType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimmable._nested import tensors
from slimmable.errors import ConversionError

PROCESS = threading.RLock()  # held by whoever changes what all threads share, until it is as before

_Memo: Any = functools._lru_cache_wrapper
_MISSING: Any = object()
_ATOMS = (str, bytes, int, float, complex, type(None), Tensor)
_LISTS = (list, set, deque)
_WRAPPERS = (tuple, frozenset, MethodType, functools.partial, property, staticmethod, classmethod)
_KNOWN = (dict, *_LISTS, *_WRAPPERS, CellType, nn.Module, MutableMapping, SimpleNamespace, threading.local)
_FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "slimmable"}  # packages that keep nothing of a forward
_MODULE = frozenset(vars(nn.Module()))  # attributes that torch gives to every module
_CALLED = {"forward", "__call__", "__init__", "__getitem__", "__contains__", "__missing__", "__getattr__", "__get__"}


@dataclass(frozen=True, eq=False)
class _Place:
    """An object that holds others: a module, a class, a container, the cell of a closure, or a dict of names."""

    holder: Any
    names: Set[str] | None = None  # if given, only these count
    space: bool = False  # whether it has names, which hold None while nothing is kept; another dict then lacks the key

    def entries(self) -> dict[Any, Any]:
        """Return the held objects by name, key or position."""
        holder = self.holder
        if isinstance(holder, type):
            return {name: value for name, value in vars(holder).items() if not name.startswith("__")}
        if isinstance(holder, nn.Module):
            return {name: value for name, value in vars(holder).items() if name not in _MODULE}
        if isinstance(holder, CellType):
            return dict.fromkeys(["cell_contents"], *held) if (held := gc.get_referents(holder)) else {}
        if not isinstance(holder, dict):
            return dict(enumerate(holder))
        keys = dict.keys(holder) if self.names is None else self.names & dict.keys(holder)
        return {key: dict.__getitem__(holder, key) for key in keys}  # a subclass may make what it returns

    def put(self, key: Any, value: Any) -> None:
        """Hold `value`, or nothing, under a name, key or position."""
        holder = vars(self.holder) if isinstance(self.holder, nn.Module) else self.holder
        if isinstance(holder, (type, CellType)):
            delattr(holder, key) if value is _MISSING else setattr(holder, key, value)
        elif value is _MISSING:
            del holder[key]
        else:
            holder[key] = value

    def restore(self, before: dict[Any, Any]) -> None:
        """Hold again what `entries` returned before."""
        now = self.entries()
        if _same(now, before):
            return
        if isinstance(self.holder, _LISTS):
            self.holder.clear()
            (self.holder.update if isinstance(self.holder, set) else self.holder.extend)(before.values())
            return
        for key in now.keys() - before.keys():
            self.put(key, _MISSING)
        for key, value in before.items():
            if now.get(key, _MISSING) is not value:
                self.put(key, value)


@dataclass(eq=False)
class _Kept:
    """Where an earlier forward may have left tensors: if a blank hides them, the next one makes them again."""

    place: _Place
    key: Any
    blank: Any


class Reach:
    """What the forward of a model, a throw-away copy, can read and change, except parameters and buffers.

    That is what the names in its code lead to: attributes of modules, globals, closures and defaults of functions,
    attributes of classes, contents of containers and instances; not those of torch, numpy and the standard library.
    """

    def __init__(self, model: nn.Module) -> None:
        # module path -> attribute -> its value before, of all that the last forward has set where it has kept tensors
        self.caches: dict[str, dict[str, Any]] = {}
        self._model, self._hidden, self._missing = model, list[_Kept](), list[_Kept]()
        self._places: dict[int, _Place] = {}
        self._memos: dict[int, Any] = {}
        self._names, self._spaces, self._met = set(_CALLED), list[Any](), set[int]()
        todo: list[Any] = [model]
        with PROCESS:
            while todo:
                while todo:
                    thing = todo.pop()
                    if not issubclass(type(thing), _ATOMS) and id(thing) not in self._met:
                        self._met.add(id(thing))
                        todo += [] if _is_foreign(thing) else self._follow(thing)
                for space in self._spaces:
                    built = {"__init__"} if isinstance(space, type) and issubclass(space, nn.Module) else set()
                    found = [vars(space)[name] for name in (self._names & vars(space).keys()) - built]
                    todo += [thing for thing in found if id(thing) not in self._met and not isinstance(thing, _ATOMS)]

    def _follow(self, thing: Any) -> Iterable[Any]:
        kind = type(thing)
        if issubclass(kind, nn.Module):
            self._add(thing, space=True)
            hooks = [hook for name in _MODULE if name.endswith("hooks") for hook in vars(thing)[name].values()]
            return [*kind.__mro__, *self._places[id(thing)].entries().values(), *hooks, *thing._modules.values()]
        if issubclass(kind, FunctionType):
            names = {name for code in codes_in(thing.__code__) for name in code.co_names}
            self._names |= names
            self._add(thing.__globals__, self._names, space=True)
            self._add(vars(thing), space=True)
            known = [space[name] for space in (thing.__globals__, sys.modules) for name in names & space.keys()]
            return [*known, *vars(thing).values(), thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
        if issubclass(kind, (type, ModuleType)):
            self._spaces.append(thing)
            self._add(thing if issubclass(kind, type) else vars(thing), self._names, space=True)
            return thing.__mro__ if issubclass(kind, type) else ()
        if kind is _Memo:
            self._memos[id(thing)] = thing
            return [thing.__wrapped__]
        if issubclass(kind, (dict, *_LISTS, CellType)):
            self._add(thing, space=kind is CellType)
        elif not issubclass(kind, _WRAPPERS) and isinstance(getattr(thing, "__dict__", None), dict):
            self._add(vars(thing), space=True)
            return [kind, *vars(thing).values()]
        return gc.get_referents(thing)

    def _add(self, holder: Any, names: Set[str] | None = None, space: bool = False) -> None:
        self._places[id(holder)] = _Place(holder, names, space)
        self._met.add(id(holder))

    @contextmanager
    def untouched(self, traced: Callable[[object], bool]) -> Iterator[None]:
        """Run a forward in the block; afterwards everything is as before.

        Memoising functions forget in the block what they have been asked before it, and after it what in it. `traced`
        tells of a key whether it depends on integers that are traced; with such arguments they always compute.
        """
        with PROCESS:
            before = [(place, place.entries()) for place in self._places.values()]
            private: dict[int, Any] = {}
            try:
                for place, entries in before:
                    for key, value in entries.items():
                        bound = isinstance(value, (staticmethod, classmethod))
                        memo = value.__func__ if bound else value
                        if id(memo) in self._memos and not isinstance(place.holder, set):
                            own = private.setdefault(id(memo), _private(memo, traced))
                            place.put(key, type(value)(own) if bound else own)
                self._clear(self._memos.keys() - private.keys())
                for kept in self._hidden:
                    kept.place.put(kept.key, _copy(kept.blank))
                modules = [(path, self._places[id(module)]) for path, module in self._model.named_modules()]
                blank = {path: {name: _copy(held) for name, held in at.entries().items()} for path, at in modules}
                yield
                self._missing = [kept for kept in self._hidden if not tensors(kept.place.entries().get(kept.key))]
                self.caches = {}
                for path, at in modules:
                    now = at.entries()
                    changed = [name for name, value in blank[path].items() if not _same(now.get(name), value)]
                    if tensors([now.get(name) for name in changed]):
                        self.caches[path] = {name: blank[path][name] for name in changed}
            finally:
                for place, entries in before:
                    place.restore(entries)
                self._clear(self._memos.keys() - private.keys())

    def _clear(self, memos: Iterable[int]) -> None:
        for memo in memos:  # where nothing can stand for them, such as in a tuple
            self._memos[memo].cache_clear()

    # -- tensors that an earlier forward may have kept
    def hide_tensors(self) -> None:
        """Hide from each forward what an earlier one may have kept, so that it does not depend on that."""
        for place in self._places.values():
            if not isinstance(place.holder, _LISTS):
                for key, value in place.entries().items():
                    blank: Any = [] if isinstance(value, list) else None
                    if isinstance(value, tuple):  # such as a key with what belongs to it
                        blank = (None,) * len(value)
                    if Tensor in map(type, [value] if blank is None else tree_leaves(value)):
                        self._hidden.append(_Kept(place, key, blank if place.space else _MISSING))

    def show_tensors(self, failed: nn.Module | None = None) -> bool:
        """Show what was not made again, or what `failed` most likely lacked; return if the forward must run again."""
        shown = self._missing
        if failed is not None:
            near = [kept for kept in self._hidden if kept.key in vars(failed)]
            shown = near or [kept for kept in self._hidden if kept.place.space] or self._hidden
        self._hidden = [kept for kept in self._hidden if kept not in shown]
        return bool(shown)


def _private(memo: Any, traced: Callable[[object], bool]) -> Callable[..., Any]:
    """Return what stands for a memoising function in one run and this thread."""
    own = functools.lru_cache(**memo.cache_parameters())(memo.__wrapped__)
    thread = threading.get_ident()

    @functools.wraps(memo)
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return memo(*args, **kwargs)
        return (memo.__wrapped__ if traced((args, *kwargs.items())) else own)(*args, **kwargs)

    vars(call).update(cache_info=own.cache_info, cache_clear=own.cache_clear)
    return call


def _copy(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list)) else value


def _same(now: Any, before: Any) -> bool:
    if not isinstance(now, (dict, list)) or type(now) is not type(before):
        return now is before
    first, second = ([*value, *value.values()] if isinstance(value, dict) else value for value in (now, before))
    return len(first) == len(second) and all(map(operator.is_, first, second))


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and that of the functions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def _is_foreign(thing: Any) -> bool:
    kind = type(thing)
    if issubclass(kind, _KNOWN):
        return False
    named = thing if issubclass(kind, (type, FunctionType, _Memo)) else kind
    home = thing.__name__ if issubclass(kind, ModuleType) else named.__module__
    return str(home).partition(".")[0] in _FOREIGN


# -- what is left where no name leads to
def sweep(made: Sequence[weakref.ref[Tensor]]) -> None:
    """Remove the tensors of finished runs from the caches that hold them; `ConversionError` if anything else does."""
    if any(ref() is not None for ref in made):
        gc.collect()
    left: list[Any] = [tensor for ref in made if (tensor := ref()) is not None]
    while left:
        held, outer = set(map(id, left)), []
        for holder in gc.get_referrers(*left):
            if type(holder) is _Memo:
                holder.cache_clear()
            elif isinstance(holder, (tuple, list)):
                outer += [] if holder is left else [holder]
            elif type(holder) is dict and not _is_space(holder):
                for key in [key for key, value in holder.items() if id(value) in held]:
                    del holder[key]
            elif not isinstance(holder, FrameType):
                raise ConversionError(
                    "a tensor without numbers, made while the forward was examined, is still held by "
                    f"{holder!r:.200}; let the forward keep it in an attribute of its module, in a dict or by lru_cache"
                )
        left = outer


def _is_space(names: dict[Any, Any]) -> bool:
    owners = gc.get_referrers(names)
    return any(isinstance(owner, type) or getattr(owner, "__dict__", None) is names for owner in owners)
