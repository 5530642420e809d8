"""Inference at a narrow width as fast as in its extracted network: `slimmable.inference`.

While its block runs, a call of a module of the model goes to a *twin*: an object that shares the module's attributes,
but holds the blocks of parameters that its width reads, contiguous, and the twins of its children. So names, hooks,
modes and what a forward leaves in `self` are the module's own. Before each call the twin is compared with the module.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from operator import attrgetter, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from slimmable._modules import unannounced
from slimmable._width import places_of
from slimmable.view.cuts import take
from slimmable.view.norms import Switchable, SwitchableContainer
from slimmable.view.recompute import last_switch
from slimmable.view.state import Column, WidthState, state_of

_SAMPLED = 8  # elements of each copied block that are compared before a call
_CALL = "_compiled_call_impl"  # what torch calls instead of the module, and leaves out of copies and pickles
_call = nn.Module.__call__  # torch.fx replaces it while it records
_version = attrgetter("_version")
_registered = 0  # modules and parameters, anywhere, while a block runs


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients, in which each width costs what the network that `extract` returns costs.

    A narrow width's blocks of parameters are copied at its first forward, and again when parameters have changed. The
    copies take the memory of the blocks that are not contiguous, at most the size of an extracted network for each
    width in use, and are freed at the end. Widths are switched as elsewhere, in any thread, with `set_width` and
    `at_width`. Forwards under `torch.enable_grad`, compiled or exported ones, and layers with hooks run as they do
    outside of the block; other threads have gradients on unless they call `torch.no_grad`.

    Changes of weights, modules and hooks are noticed at the next forward, with one exception: what is written past
    autograd into the memory of a parameter (`parameter.data.mul_(…)`, NumPy, another process). Of that, 8 elements of
    each copied block are compared, so a change of whole layers is noticed, but one of few elements may not be, nor any
    on a GPU. Write to the parameter itself, under `torch.no_grad`, or leave the block and enter it again.

    Raises: ConversionError: if `model` has no slimmable part, or has gained layers since its conversion.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> model = slimmable.slimify(net, widths=(1.0, 0.5), example_inputs=torch.zeros(2, 8)).eval()
    >>> with slimmable.inference(model), slimmable.at_width(model, 0.5):
    ...     scores = model(torch.zeros(2, 8))
    """
    places_of(model)  # which refuses what has no widths
    blocks, found = _Blocks(), dict[nn.Module, list[WidthState]]()
    _states(model, found)
    free = {module: states for module, states in found.items() if vars(module).get(_CALL) is None}
    entries = [(vars(module), _Entry(module, states, blocks)) for module, states in free.items()]
    with ExitStack() as stack:
        stack.callback(_remove, entries)
        stack.enter_context(torch_module.register_module_module_registration_hook(_note_registration))
        stack.enter_context(torch_module.register_module_parameter_registration_hook(_note_registration))
        for attributes, entry in entries:
            attributes[_CALL] = entry
        with torch.no_grad():
            yield


def _remove(entries: "list[tuple[dict[str, Any], _Entry]]") -> None:
    for attributes, entry in entries:
        if attributes.get(_CALL) is entry:
            del attributes[_CALL]


def _note_registration(*_: object) -> None:
    global _registered
    _registered += 1


def _changes() -> tuple[int, int]:
    """Return numbers that grow when a hook, a module or a parameter is registered, here or anywhere."""
    return RemovableHandle.next_id, _registered


def _states(module: nn.Module, found: dict[nn.Module, list[WidthState]]) -> list[WidthState]:
    """Return the width states of a module and all in it, and note those of each that has some and is no container."""
    if module not in found:
        own = [] if (state := state_of(module)) is None else [state]
        if isinstance(module, SwitchableContainer):
            return own
        children = vars(module)["_modules"].values()
        states = dict.fromkeys(own + [state for child in filter(None, children) for state in _states(child, found)])
        if not states:
            return []
        found[module] = list(states)
    return found[module]


class _Entry:
    """What torch calls instead of a module."""

    def __init__(self, module: nn.Module, states: list[WidthState], blocks: "_Blocks") -> None:
        self.module, self.states, self.blocks = module, states, blocks
        self.trees: dict[tuple[Column, ...], _Tree] = {}
        self.last: tuple[object, _Tree | None] = (None, None)  # the switch after which a tree was called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.module if _is_recorded() else self.twin())._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def twin(self) -> nn.Module:
        """Return the twin of the active width, made anew if it is not like the module any more."""
        switch = last_switch()
        seen, tree = self.last
        if seen != switch:
            tree = self.trees.get(tuple(state.active for state in self.states))
        if tree is None or not tree.is_current():
            tree = self._grown(tree)
        self.last = switch, tree
        return tree.root

    @torch.inference_mode(False)
    @torch.no_grad()
    def _grown(self, old: "_Tree | None") -> "_Tree":
        if old is not None:
            self.states = _states(self.module, {})
        columns = tuple(state.active for state in self.states)
        for column in columns if old is not None else ():
            self.blocks.pop(column, None)
        own = {each: tree for each, tree in self.trees.items() if all(column.index >= 0 for column in each)}
        self.trees = own | {columns: _Tree(self.module, self.blocks)}  # without those of guests, which are gone
        return self.trees[columns]


def _is_recorded() -> bool:
    """Tell whether what a forward does is recorded, by autograd, a compiler, a mode, or hooks on all modules."""
    return (
        torch.is_grad_enabled()
        or is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or nn.Module.__call__ is not _call
        or bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    )


@dataclass(frozen=True, eq=False)
class _Block:
    """The contiguous block of a parameter, and the memory and version of it from which it was taken."""

    full: nn.Parameter
    memory: Tensor  # which keeps its address from being used again
    version: int
    part: nn.Parameter
    sample: Tensor | None  # some elements of the memory if the block is a copy, which does not follow what is written


_Blocks = WeakKeyDictionary[Column, dict[str, _Block]]


class _Tree:
    """The twin of a module at its active widths, with those of all modules inside, and what they were made from."""

    def __init__(self, module: nn.Module, blocks: _Blocks) -> None:
        self.changes = _changes()
        self.blocks, self.twins = blocks, dict[nn.Module, nn.Module]()
        self.held: list[tuple[dict[str, Any], str, object]] = []  # what must still be in a dict
        self.sized: list[dict[Any, Any]] = []  # dicts that must not grow
        self.stores: list[dict[str, Any]] = []  # what was read, compared at every call: the dicts,
        self.names: list[str] = []  # the names in them
        self.values: list[object] = []  # and the values
        self.used: list[_Block] = []
        self.root = self._twin(module)
        self.sizes = list(map(len, self.sized))
        copied = [block for block in self.used if block.sample is not None]
        self.full, self.copied = [block.full for block in self.used], [block.full for block in copied]
        self.addresses = [block.memory.data_ptr() for block in self.used]
        self.strides = [block.memory.stride() for block in self.used]
        self.versions = [block.version for block in copied]
        self.samples = [block.sample for block in copied if block.sample is not None and block.sample.is_cpu]
        self.sampled = torch.cat(self.samples) if self.samples else None

    def is_current(self) -> bool:
        """Tell whether modules, hooks and parameters are what they were, as far as that can be seen in microseconds."""
        if self.changes != (changes := _changes()):
            held = all(store.get(name) is value for store, name, value in self.held)
            if not held or list(map(len, self.sized)) != self.sizes:
                return False
            self.changes = changes
        return (
            all(map(is_, map(dict.get, self.stores, self.names), self.values))
            and list(map(Tensor.data_ptr, self.full)) == self.addresses
            and list(map(Tensor.stride, self.full)) == self.strides
            and list(map(_version, self.copied)) == self.versions
            and (self.sampled is None or torch.equal(torch.cat(self.samples), self.sampled))
        )

    def _twin(self, module: nn.Module) -> nn.Module:
        """Return the twin of a module, or the module itself if it has nothing to slim, or hooks, which are told it."""
        if module not in self.twins:
            has = self._attributes(module)
            self.twins[module] = module if has is None else _twin(module, has)
        return self.twins[module]

    def _attributes(self, module: nn.Module) -> dict[str, object] | None:
        """Return what a twin has of its own, or None if there is none."""
        attributes, state = vars(module), state_of(module)
        entry: object = attributes.get(_CALL)
        compiled = entry is not None and not isinstance(entry, _Entry)
        if type(module).__call__ is not _call or compiled or (entry is None and state is None):
            return None
        hooks: list[dict[Any, Any]] = [attributes["_forward_hooks"], attributes["_forward_pre_hooks"]]
        children: dict[str, nn.Module | None] = attributes["_modules"]
        self.held += [(children, *item) for item in children.items()] + [(attributes, "_slim", state)]
        self.sized += [*hooks, children]
        if any(hooks):
            return None
        if isinstance(module, SwitchableContainer):
            return self._container(module)
        has: dict[str, object] = dict.fromkeys(name for name, it in attributes["_parameters"].items() if it is None)
        if state is not None:
            for name in state.active.values:
                has[name] = self._read(state.active.values, name)
            for name in getattr(type(module), "_slim_view", ((), ((),)))[1][0]:
                parameters: dict[str, Any] = attributes["_parameters"]
                store = parameters if name in parameters else attributes.get("_slim_lent", {})
                if type(store.get(name)) is nn.Parameter:
                    part = self._part(self._read(store, name), state.active, name)
                    has |= {} if part is None else {name: part}
        twins = {name: child if child is None else self._twin(child) for name, child in children.items()}
        return has | {name: it for name, it in twins.items() if not hasattr(type(module), name)} | {"_modules": twins}

    def _container(self, module: SwitchableContainer) -> dict[str, object] | None:
        kind = type(module)
        own = kind.forward is SwitchableContainer.forward and kind.module_at is Switchable.module_at
        if not own or not isinstance(module, Switchable) or "forward" in vars(module):
            return None
        inner = module.module_at(module._slim.index)
        narrow = vars(module.narrow)["_modules"]
        self.held += [(narrow, *item) for item in narrow.items()]
        self.sized += [inner._forward_hooks, inner._forward_pre_hooks]
        return None if inner._forward_hooks or inner._forward_pre_hooks else {"forward": self._twin(inner).forward}

    def _read(self, store: dict[str, Any], name: str) -> Any:
        """Return the value of a name in a dict, and remember it."""
        self.stores.append(store)
        self.names.append(name)
        self.values.append(store[name])
        return store[name]

    def _part(self, full: nn.Parameter, column: Column, name: str) -> nn.Parameter | None:
        """Return what a column reads of a parameter; None if changes of that cannot be seen."""
        cut, known = column.cuts.get(name), self.blocks.setdefault(column, {})
        if cut is None:
            return full
        if full.is_inference() or full.shape != cut.full:
            return None
        if name not in known:
            memory = full.detach()
            part, whole = take(memory, cut).contiguous(), take(memory, cut._replace(picks=()))
            sample = None
            if part.data_ptr() != whole.data_ptr():
                elements = memory.untyped_storage().nbytes() // memory.element_size()
                middle = sum(stride * (size // 2) for stride, size in zip(whole.stride(), whole.shape, strict=True))
                count = min(_SAMPLED, elements)
                sample = memory.as_strided((count,), (1,), min(whole.storage_offset() + middle, elements - count))
            known[name] = _Block(full, memory, full._version, nn.Parameter(part, full.requires_grad), sample)
        self.used.append(known[name])
        return known[name].part


def _twin(module: nn.Module, has: dict[str, object]) -> nn.Module:
    own = {name: value for name, value in has.items() if name.isidentifier() and not name.startswith("__")}
    twin = object.__new__(_twin_class(type(module), tuple(own)))  # type: ignore[arg-type]
    object.__setattr__(twin, "__dict__", vars(module))
    for name, value in own.items():
        object.__setattr__(twin, name, value)
    return twin


@cache
def _twin_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass whose objects hold these attributes themselves, apart from the dict that they share."""
    body = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return unannounced(base, body | {"__slots__": names, "__call__": nn.Module._call_impl})
