"""Inference at a narrow width as fast as in its extracted network: `slimmable.inference`.

While its block runs, a call of a module of the model goes to a *twin*: an object that shares the module's attributes,
but holds the contiguous blocks of parameters that its width reads, and the twins of its children. So names, modes and
what a forward leaves in `self` are the module's own. Before each call the twin is compared with the module.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from slimmable._convert import shallow_modules
from slimmable._described import named_in_forward
from slimmable._modules import swapped, unannounced
from slimmable._width import places_of
from slimmable.view.norms import Switchable, SwitchableContainer
from slimmable.view.recompute import last_switch
from slimmable.view.state import Column, WidthState, is_slim, take

_SAMPLED = 8  # elements of each copied block that are compared before a call
_CALL = "_compiled_call_impl"  # what torch calls instead of the module, and leaves out of copies and pickles
_call = nn.Module.__call__  # torch.fx replaces it while it records
_version = attrgetter("_version")


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients, in which each width costs what the network that `extract` returns costs.

    The blocks of parameters that a width reads are copied at its first forward, unless they are contiguous, and again
    when parameters have changed; they are freed at the end. Forwards under `torch.enable_grad`, compiled or exported
    ones, and layers with hooks run as they do outside; other threads have gradients on unless they turn them off.

    Changes of weights, modules and hooks are noticed at the next forward, except for what is written past autograd into
    the memory of a parameter (`parameter.data.mul_(…)`, NumPy, another process): of that, 8 elements of each copied
    block are compared, and none on a GPU. Write to the parameter itself, under `torch.no_grad`, or enter a new block.

    Raises: ConversionError: if `model` has no slimmable part, or has gained layers since its conversion.

    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> model = slimmable.slimify(net, widths=(1.0, 0.5), example_inputs=torch.zeros(2, 8)).eval()
    >>> with slimmable.inference(model), slimmable.at_width(model, 0.5):
    ...     scores = model(torch.zeros(2, 8))
    """
    places_of(model)  # which refuses what has no widths
    blocks = _Blocks()
    open_ = (module for module in shallow_modules(model) if not isinstance(module, SwitchableContainer))
    free = (module for module in open_ if vars(module).get(_CALL) is None and _states(module))
    with (
        torch_module.register_module_module_registration_hook(_count),
        torch_module.register_module_parameter_registration_hook(_count),
        swapped([(vars(module), _CALL, _Entry(module, blocks)) for module in free]),
        torch.no_grad(),
    ):
        yield


def _count(*_: object) -> None:
    """Let the registration of a module or parameter be one of those that `RemovableHandle` counts."""
    RemovableHandle(OrderedDict())


def _states(module: nn.Module) -> list[WidthState]:
    return [vars(each)["_slim"] for each in shallow_modules(module) if is_slim(each)]


class _Entry:
    def __init__(self, module: nn.Module, blocks: "_Blocks") -> None:
        self.module, self.blocks, self.states = module, blocks, list[WidthState]()
        self.twins: dict[tuple[Column, ...], _Twins] = {}
        self.last: tuple[object, _Twins | None] = (None, None)  # the switch after which twins were called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.module if _is_recorded() else self.twin())._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def twin(self) -> nn.Module:
        """Return the twin of the active width, made anew if it is not like the module any more."""
        switch = last_switch()
        seen, twins = self.last
        if seen != switch:
            twins = self.twins.get(tuple(state.active for state in self.states))
        twins = twins or self._made()  # also of blocks that another module has read before they changed
        if not twins.are_current():
            twins = self._made(anew=True)
        self.last = switch, twins
        return twins.root

    @torch.inference_mode(False)
    @torch.no_grad()
    def _made(self, anew: bool = False) -> "_Twins":
        self.states = _states(self.module)
        columns = tuple(state.active for state in self.states)
        for column in columns if anew else ():
            self.blocks.pop(column, None)
        new = _Twins(self.module, self.states, self.blocks)
        own = {each: twins for each, twins in self.twins.items() if all(column.index >= 0 for column in each)}
        self.twins = own | {columns: new}  # without those of guests, which are gone
        return new


def _is_recorded() -> bool:
    """Tell whether what a forward does is recorded, by autograd, a program, a mode, or hooks on all modules."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or nn.Module.__call__ is not _call
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())  # type: ignore[no-untyped-call]
        or bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    )


class _Block(NamedTuple):
    """The contiguous block of a parameter, and the memory and version of it from which it was taken."""

    full: nn.Parameter
    memory: Tensor  # which keeps its address from being used again
    version: int
    part: nn.Parameter
    sample: Tensor | None  # some elements of the memory, on a CPU, if the block is a copy of it


_Blocks = WeakKeyDictionary[Column, dict[str, _Block]]


class _Twins:
    """The twins of a module and of all modules inside, at their active widths, and what they were made from."""

    def __init__(self, module: nn.Module, states: list[WidthState], blocks: _Blocks) -> None:
        self.module, self.states, self.blocks, self.registered = module, states, blocks, RemovableHandle.next_id
        self.read: list[tuple[dict[str, Any], str, object]] = []  # dicts, and what was read in them by which name
        self.dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []  # of hooks and children, and what was in them
        self.used: list[_Block] = []
        self.made: dict[nn.Module, nn.Module] = {}
        self.root = self._twin(module)
        self.stores, self.names, self.values = [*zip(*self.read, strict=True)] or [(), (), ()]
        self.full = [block.full for block in self.used]
        self.seen = [(block.memory.data_ptr(), block.memory.stride(), block.version) for block in self.used]
        self.samples = [block.sample for block in self.used if block.sample is not None]
        self.sampled = torch.cat(self.samples) if self.samples else None

    def are_current(self) -> bool:
        """Tell whether modules, hooks and parameters are what they were, as far as that can be seen in microseconds."""
        if self.registered != (registered := RemovableHandle.next_id):
            if _states(self.module) != self.states or any(now != before for now, before in self.dicts):
                return False
            self.registered = registered
        now = zip(map(Tensor.data_ptr, self.full), map(Tensor.stride, self.full), map(_version, self.full), strict=True)
        return (
            all(map(is_, map(dict.get, self.stores, self.names), self.values))
            and list(now) == self.seen
            and (self.sampled is None or torch.equal(torch.cat(self.samples), self.sampled))
        )

    def _twin(self, module: nn.Module) -> nn.Module:
        """Return the twin of a module, or the module itself if it has nothing to slim, or hooks, which are told it."""
        if module not in self.made:
            self.made[module] = module
            names = self._attributes(module).items()
            own = {name: it for name, it in names if name.isidentifier() and not name.startswith("__")}
            if own:
                twin = self.made[module] = object.__new__(_twin_class(type(module), tuple(own)))  # type: ignore[arg-type]
                object.__setattr__(twin, "__dict__", vars(module))
                for name, value in own.items():
                    object.__setattr__(twin, name, value)
        return self.made[module]

    def _attributes(self, module: nn.Module) -> dict[str, Any]:
        """Return what a twin of a module has of its own, nothing if there is none."""
        kind, entry = type(module), vars(module).get(_CALL)
        switched = isinstance(entry, _Entry) or (entry is None and is_slim(module))
        sets_parameters = "functional_call" in named_in_forward(kind)  # type: ignore[arg-type]
        if kind.__call__ is not _call or not switched or sets_parameters or self._has_hooks(module):
            return {}
        if isinstance(module, SwitchableContainer):
            if not isinstance(module, Switchable) or type(module).module_at is not Switchable.module_at:
                return {}  # such as a norm with gates
            inner = module.module_at(module._slim.index)
            replaced = type(module).forward is not Switchable.forward or "forward" in vars(module)
            hooked = [self._has_hooks(each) for each in (inner, module.narrow)]
            return {} if replaced or any(hooked) else {"forward": self._twin(inner).forward}
        parameters: dict[str, Any] = module._parameters
        has: dict[str, Any] = dict.fromkeys(name for name, parameter in parameters.items() if parameter is None)
        if is_slim(module):
            column: Column = vars(module)["_slim"].active
            has |= {name: self._read(column.values, name) for name in column.values}
            for name in getattr(kind, "_slim_view", ((), ((),)))[1][0]:
                store = parameters if name in parameters else vars(module).get("_slim_lent", {})
                if (part := self._part(store, column, name)) is not None:
                    has[name] = part
        twins = {name: child if child is None else self._twin(child) for name, child in module._modules.items()}
        return has | {name: it for name, it in twins.items() if not hasattr(kind, name)} | {"_modules": twins}

    def _has_hooks(self, module: nn.Module) -> bool:
        hooks = module._forward_hooks, module._forward_pre_hooks
        self.dicts += [(each, dict(each)) for each in (*hooks, module._modules)]
        return any(hooks)

    def _read(self, store: dict[str, Any], name: str) -> Any:
        self.read.append((store, name, store[name]))
        return store[name]

    def _part(self, store: dict[str, Any], column: Column, name: str) -> nn.Parameter | None:
        """Return what a column reads of a parameter; None of other tensors, or if changes cannot be seen."""
        full, cut, known = store.get(name), column.cuts.get(name), self.blocks.setdefault(column, {})
        if type(full) is not nn.Parameter or self._read(store, name).is_inference() or 0 in full.stride():
            return None
        if cut is None or full.shape != cut.full:
            return None if cut else full
        if name not in known:
            memory = full.detach()
            part, whole = take(memory, cut).contiguous(), take(memory, cut._replace(picks=()))
            sample = None
            if memory.is_cpu and part.data_ptr() != whole.data_ptr():
                sample = memory.as_strided((min(_SAMPLED, part.numel()),), (1,), whole.storage_offset())
            known[name] = _Block(full, memory, full._version, nn.Parameter(part, full.requires_grad), sample)
        self.used.append(known[name])
        return known[name].part


@cache
def _twin_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass whose objects hold these attributes themselves, apart from the dict that they share."""
    return unannounced(base, {"__slots__": names, "__call__": nn.Module._call_impl})
