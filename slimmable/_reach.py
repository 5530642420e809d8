"""What a forward on fake tensors meets: what its code can reach, all kept as it was, and numbers to branch on."""

import copy
import functools
import gc
import operator
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import CellType, CodeType, FrameType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from slimmable._inputs import MOST, tensors
from slimmable.errors import ConversionError

PROCESS = threading.RLock()  # held by whoever changes what all threads share, until it is as before
RECURRENT = ("gru", "lstm", "rnn_relu", "rnn_tanh")  # torch's functions

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


class Reach:
    """What the forward of a model, a throw-away copy, can read and change, except parameters and buffers.

    That is what the names in its code lead to: attributes of modules, globals, closures and defaults of functions,
    attributes of classes, contents of containers and instances; not those of torch, numpy and the standard library.
    """

    def __init__(self, model: nn.Module) -> None:
        # module path -> attribute -> its value before, of all that the last forward has set where it has kept tensors
        self.caches: dict[str, dict[str, Any]] = {}
        # where an earlier forward may have left tensors, with the blank that hides them, so that the next makes them
        self._hidden, self._missing = list[tuple[_Place, Any, Any]](), list[tuple[_Place, Any, Any]]()
        self._model, self._inside = model, set(model.modules())
        self._places: dict[int, _Place] = {}
        self._memos: dict[int, Any] = {}
        self._spaces, self._met = list[Any](), set[int]()
        self.names = set(_CALLED)  # all that its code names
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
                    found = [vars(space)[name] for name in (self.names & vars(space).keys()) - built]
                    todo += [thing for thing in found if id(thing) not in self._met and not isinstance(thing, _ATOMS)]

    def _follow(self, thing: Any) -> Iterable[Any]:
        kind = type(thing)
        if issubclass(kind, nn.Module):
            self._add(thing, space=True)
            if thing not in self._inside:
                self._add(thing._parameters)
            hooks = [vars(thing)[name] for name in _MODULE if name.endswith("hooks")]  # which a forward may add to
            return [*kind.__mro__, *self._places[id(thing)].entries().values(), *hooks, *thing._modules.values()]
        if issubclass(kind, FunctionType):
            names = {name for code in codes_in(thing.__code__) for name in code.co_names}
            self.names |= names
            self._add(thing.__globals__, self.names, space=True)
            self._add(vars(thing), space=True)
            known = [space[name] for space in (thing.__globals__, sys.modules) for name in names & space.keys()]
            return [*known, *vars(thing).values(), thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
        if issubclass(kind, (type, ModuleType)):
            self._spaces.append(thing)
            self._add(thing if issubclass(kind, type) else vars(thing), self.names, space=True)
            return thing.__mro__ if issubclass(kind, type) else ()
        if kind is _Memo:
            self._memos[id(thing)] = thing
            return [thing.__wrapped__]
        if issubclass(kind, (dict, *_LISTS, CellType)):
            self._add(thing, space=kind is CellType)
        elif kind.__dictoffset__ and not issubclass(kind, _WRAPPERS) and isinstance(vars(thing), dict):
            self._add(vars(thing), space=True)
            return [kind, *vars(thing).values()]
        return gc.get_referents(thing)

    def _add(self, holder: Any, names: Set[str] | None = None, space: bool = False) -> None:
        self._places[id(holder)] = _Place(holder, names, space)
        self._met.add(id(holder))

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Run a forward in the block; afterwards everything is as before, and memoising functions have forgotten it.

        In it, they always compute: of two traced integers that are equal, each may follow another axis.
        """
        with PROCESS:
            before = [(place, place.entries()) for place in self._places.values()]
            computing = set[int]()
            parameters = {id(parameter) for parameter in self._model.parameters()}
            reached = {id(each) for module in self._inside for each in (module, vars(module).get("_flat_weights"))}

            def clear() -> None:
                for memo in self._memos.keys() - computing:  # for which nothing can stand, such as in a tuple
                    self._memos[memo].cache_clear()

            try:
                for place, entries in before:
                    for key, value in entries.items():
                        if id(value) in parameters and id(place.holder) not in reached:  # by any width
                            place.put(key, alias := value.detach())
                            vars(alias).update(vars(value), slim_elsewhere=True)
                        bound = isinstance(value, (staticmethod, classmethod))
                        memo = value.__func__ if bound else value
                        if id(memo) in self._memos and not isinstance(place.holder, set):
                            computing.add(id(memo))
                            own = functools.lru_cache(maxsize=0)(memo.__wrapped__)
                            place.put(key, type(value)(own) if bound else own)
                clear()
                for place, key, blank in self._hidden:
                    place.put(key, _copy(blank))
                modules = [(path, self._places[id(module)]) for path, module in self._model.named_modules()]
                start = {path: {name: _copy(held) for name, held in at.entries().items()} for path, at in modules}
                yield
                self._missing = [kept for kept in self._hidden if not tensors(kept[0].entries().get(kept[1]))]
                self.caches = {}
                for path, at in modules:
                    now = at.entries()
                    changed = {name: was for name, was in start[path].items() if not _same(now.get(name), was)}
                    if tensors([now.get(name) for name in changed]):
                        self.caches[path] = changed
            finally:
                for place, entries in before:
                    place.restore(entries)
                clear()

    # -- tensors that an earlier forward may have kept
    def hide_tensors(self) -> None:
        """Hide from each forward what an earlier one may have kept, so that it does not depend on that."""
        for place in self._places.values():
            if not isinstance(place.holder, _LISTS):
                for key, value in place.entries().items():
                    pair = isinstance(value, tuple)  # such as a key with what belongs to it
                    blank: Any = (None,) * len(value) if pair else [] if isinstance(value, list) else None
                    if Tensor in map(type, [value] if blank is None else tree_leaves(value)):
                        self._hidden.append((place, key, blank if place.space else _MISSING))

    def show_tensors(self, failed: nn.Module | None = None) -> bool:
        """Show what was not made again, or what `failed` likely lacked; tell whether the forward must run again."""
        shown = self._missing
        if failed is not None:
            near = [kept for kept in self._hidden if kept[1] in vars(failed)]
            shown = near or [kept for kept in self._hidden if kept[0].space] or self._hidden
        self._hidden = [kept for kept in self._hidden if kept not in shown]
        return bool(shown)


def _copy(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list)) else value


def _same(now: Any, before: Any) -> bool:
    if isinstance(before, Tensor) and getattr(now, "slim_origin", None) == "weights":  # such as on another device
        return list(map(id, now.slim_axes)) == list(map(id, getattr(before, "slim_axes", ())))
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
                what = f"a tensor of shapes alone is still held by {holder!r:.200}"
                raise ConversionError(f"{what}; keep it in an attribute of its module, in a dict or by lru_cache")
        left = outer


def _is_space(names: dict[Any, Any]) -> bool:
    owners = gc.get_referrers(names)
    return any(isinstance(owner, type) or getattr(owner, "__dict__", None) is names for owner in owners)


# -- numbers of fake tensors
def fits(tensor: Tensor) -> bool:
    """Tell whether the numbers of a tensor can be tracked."""
    real = not tensor.is_meta and not isinstance(tensor, FakeTensor)
    return real and tensor.layout == torch.strided and tensor.numel() <= MOST


def _sources(tensor: Tensor) -> list[Tensor]:
    return getattr(tensor, "slim_sources", None) or [tensor]


def know(fake: Tensor, real: Tensor, sources: Iterable[Tensor] = (), copied: bool = False) -> Tensor:
    """Attach to a fake tensor its numbers, `copied` if a forward may write into them, with sources; return them."""
    with _disable_current_modes():
        numbers = real.detach().cpu()
        numbers = numbers.clone() if copied else numbers
    fake.slim_value = numbers  # type: ignore[attr-defined]
    fake.slim_sources = [source for source in sources if source is not fake]  # type: ignore[attr-defined]
    return numbers


def arguments(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operation by name; those that were not passed have their defaults."""
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    return {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}


def written(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes into."""
    given = arguments(schema, args, kwargs)
    return tensors([given[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write])


class KnownNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes the numbers of fake tensors that depend only on known ones: constants, buffers and inputs such as masks.

    So code may branch on them, or size tensors by them. Scores are assumed to choose each in turn, masks to choose all.
    """

    def __init__(self, buffers: Mapping[int, Tensor], on_branch: Callable[[Sequence[Tensor]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers, self.on_branch = buffers, on_branch
        self._stale: dict[int, Tensor] = {}  # numbers that unknown ones were written into, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_grouped_mm" and args[1].ndim == 3:  # torch's own refuses float32 on shapes alone
            return args[0] @ (args[1][0] if args[0].ndim == 2 else args[1])
        if name == "nonzero" and self._value(args[0]) is None:
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.long)
        features = args and isinstance(args[0], FakeTensor) and self._value(args[0]) is None
        if features and not func._schema.is_mutable and name not in _CHOICES and not name.startswith("index"):
            return func(*args, **kwargs)  # as most operations
        given = tensors((args, kwargs))
        known = all(self._value(tensor) is not None for tensor in given)
        sources = {id(source): source for tensor in given if known for source in _sources(tensor)}.values()
        tags = () if name == "index" else func.tags  # its shape depends on masks alone, which become indices
        if known and (torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags):
            self.on_branch(list(sources))
            real = self._computed(func, args, kwargs)
            like = functools.partial(torch.empty_like, device=given[0].device)
            out = func(*args, **kwargs) if real is None else tree_map_only(Tensor, like, real)
        else:
            out = func(*(self._masks_as_indices(args) if name.startswith("index") else args), **kwargs)
            known = known and torch.Tag.nondeterministic_seeded not in func.tags
            known = known and all((given or result.numel()) and result.numel() <= MOST for result in tensors(out))
            real = self._computed(func, args, kwargs) if known else None
        if real is None:
            for value in map(self._value, written(func._schema, args, kwargs)):
                if value is not None:  # all that shares this memory is no longer known
                    self._stale[value.untyped_storage().data_ptr()] = value
            if name in _CHOICES:
                _assume_choices(func, args, kwargs, tensors(out)[-1])
            return out
        for fake, value in zip(tree_leaves(out), tree_leaves(real), strict=True):
            if isinstance(fake, Tensor):
                know(fake, value, sources)
        return out

    def _value(self, tensor: Tensor) -> Tensor | None:
        value: Tensor | None = tensor.__dict__.get("slim_value")
        if value is None:
            real = self.buffers.get(id(tensor)) if isinstance(tensor, FakeTensor) else tensor
            if real is None:
                return None
            value = know(tensor, real, copied=True)
        return None if self._stale and value.untyped_storage().data_ptr() in self._stale else value

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operation gives on known numbers, or None if the CPU cannot run it."""
        here = {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
        args, kwargs = tree_map_only(Tensor, self._value, (args, kwargs))
        with _disable_current_modes(), suppress(Exception):
            return func(*args, **{**kwargs, **here})
        return None

    def _masks_as_indices(self, args: Any) -> Any:
        """Replace boolean masks, whose results have unknown shapes, with the indices that they select."""
        indices: list[Any] = []
        for part in args[1] if isinstance(args[1], (list, tuple)) else ():
            masked = isinstance(part, Tensor) and part.dtype == torch.bool
            chosen = part.numel() if masked else 0
            if masked and (mask := self._value(part)) is not None:
                self.on_branch(_sources(part))
                with _disable_current_modes():
                    chosen = int(mask.count_nonzero())
            indices += [part.new_empty(chosen, dtype=torch.long) for _ in range(part.ndim)] if masked else [part]
        return (args[0], indices, *args[2:]) if indices else args


_CHOICES = {"topk", "sort", "argmax", "argmin", "max", "min"}


def _assume_choices(func: Any, args: Any, kwargs: Any, indices: Tensor) -> None:
    """Assume that the rows of scores choose the first unit, the second, and so on, so that all are chosen."""
    scores, dim = args[0], arguments(func._schema, args, kwargs).get("dim")
    if dim is None or not scores.numel() or indices.dtype != torch.long or indices.numel() > MOST:
        return
    units = scores.shape[dim]
    rows = scores.numel() // units
    each = indices.numel() // rows
    if units <= rows * each:
        with _disable_current_modes():
            step = 1 if units <= rows else each
            numbers = (step * torch.arange(rows)[:, None] + torch.arange(each)) % units
            others = [size for axis, size in enumerate(scores.shape) if axis != dim % scores.ndim]
            numbers = numbers.reshape(*others, each).movedim(-1, dim).reshape(indices.shape)
        know(indices, numbers, [scores])


class ReadInMemory(TorchFunctionMode):
    """Replaces what reads numbers in memory: packed sequences, numbers in text; and runs two steps of a long RNN."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "_pack_padded_sequence":
            source, ends, batch_first = args[0], args[1].tolist(), args[2]
            sizes = [sum(end > step for end in ends) for step in range(max(ends))]
            steps = source.unbind(1 if batch_first else 0)
            with _disable_current_modes():
                real = torch.tensor(sizes)  # recurrent layers read it in memory
            return torch.cat([step[:size] for step, size in zip(steps, sizes, strict=False)]), real
        if name == "_pad_packed_sequence":
            data, batch_sizes, batch_first, padding, total = args
            sizes, dim = batch_sizes.tolist(), 1 if batch_first else 0
            rows = [_padded(step, 0, sizes[0], padding) for step in data.split(sizes)]
            lengths = torch.tensor([sum(size > row for size in sizes) for row in range(sizes[0])])
            return _padded(torch.stack(rows, dim), dim, max(total, len(sizes)), padding), lengths
        if name in RECURRENT and isinstance(args[3], bool):  # not packed
            source, axis = args[0], int(args[-1])
            out, *states = func(source[:, :2] if axis else source[:2], *args[1:])  # the second step reads the first's
            return torch.cat([out.narrow(axis, 0, 1)] * source.shape[axis], axis), *states
        if name == "tensor":  # of a list of tensors, for one
            args = tree_map_only(Tensor, lambda each: each.tolist() if "slim_value" in vars(each) else each, args)
        if name in ("numpy", "__array__") and "slim_value" in args[0].__dict__:
            return np.array(args[0].tolist())
        if name == "__format__" and "slim_value" in args[0].__dict__ and args[0].ndim == 0:
            return format(args[0].item(), args[1])
        return func(*args, **(kwargs or {}))


def _padded(tensor: Tensor, axis: int, size: int, value: float) -> Tensor:
    after = [0] * (2 * (tensor.ndim - axis) - 1) + [size - tensor.shape[axis]]
    return torch.nn.functional.pad(tensor, after, value=value)
