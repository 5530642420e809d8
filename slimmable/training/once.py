"""What happens once per step, although a step runs once per width: changes of state, and forwards without gradient."""

import copy
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from slimmable._convert import shallow_modules
from slimmable._modules import swapped, walk
from slimmable._nested import map_tensors, output_tensors
from slimmable.errors import UsageError
from slimmable.view.container import SwitchableContainer
from slimmable.view.state import is_slim

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # torch's own attributes, such as the hooks
_CHANGEABLE = (set, bytearray, np.ndarray, np.random.Generator, np.random.RandomState, random.Random)


class Once:
    """Lets the state of modules change once per step: at the widest width, which must be the first of the step.

    State is what calling a module may change: buffers, parameters without gradient, and its own attributes. What has a
    gradient is the optimizer's. The narrower widths work on copies.

    Args:
        from_before: whether narrower widths start from the state before the step, as the widest did, and not from the
            state that it left.
        only_buffers: whether parameters and attributes are left alone.
    """

    def __init__(self, *, from_before: bool = True, only_buffers: bool = False) -> None:
        self.from_before = from_before
        self.only_buffers = only_buffers
        self._before: dict[int, dict[str, Any]] = {}  # by the id of the module or of its dict of tensors

    @contextmanager
    def changes(self, modules: Iterable[nn.Module], widest: bool) -> Iterator[None]:
        """Run a block, of the widest width or of a narrower one.

        Raises: UsageError: at a narrower width, if the modules were not given at the widest.
        """
        stores: list[dict[str, Any]] = []
        for module in modules:
            stores.append(module._buffers)
            if not self.only_buffers:
                stores += [module._parameters] if is_slim(module) else [module._parameters, vars(module)]
        if widest:
            if self.from_before:
                self._before = {id(store): _copied(_state(store)) for store in stores} | self._before
            yield
            return
        if self.from_before and not {id(store) for store in stores} <= self._before.keys():
            raise UsageError("SlimRecipe.once: used at a narrower width, but not used at the widest width of this step")
        after = [(store, _state(store)) for store in stores]
        for store, state in after:
            store.update(_copied(self._before[id(store)] if self.from_before else state))
        try:
            yield
        finally:
            for store, state in after:
                for added in _state(store).keys() - state.keys():
                    del store[added]
                store.update(state)


class Replay:
    """Runs modules without gradient at the widest width only; narrower widths get the same outputs again.

    The calls of a narrower width are matched with those of the widest by their order, for each module.
    """

    def __init__(self) -> None:
        self._outputs: dict[nn.Module, list[Any]] = defaultdict(list)  # in the order of the calls
        self._busy = False

    @contextmanager
    def run(self, modules: Sequence[nn.Module], widest: bool) -> Iterator[None]:
        """Run a block of the widest width, or of a narrower one.

        Raises: UsageError: in the block, if an output carries a gradient, or at a narrower width there are more calls.
        """
        calls: list[tuple[dict[str, Any], str, Any]] = []
        for part in _uncompiled(modules):
            name = entry(part)
            if widest:
                calls.append((vars(part), name, partial(self._record, part, getattr(part, name))))
            else:
                calls.append((vars(part), name, partial(self._repeat, part, iter(self._outputs[part]))))
        with swapped(calls):
            yield
        for module in modules:
            if widest and not any(part in self._outputs for part in _uncompiled([module])):
                warnings.warn(
                    f"SlimRecipe: the step did not call frozen {type(module).__name__}; if the program has made a new "
                    "one, give that to `backward`",
                    stacklevel=2,
                )

    def _record(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._busy:  # a part of a module that is being recorded
            return forward(*args, **kwargs)
        self._busy = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self._busy = False
        if any(tensor.requires_grad for tensor in output_tensors(output)):
            raise UsageError(
                f"SlimRecipe: frozen {type(module).__name__} returned a tensor with a gradient, which depends on "
                "the width; freeze only what has none in parameters and inputs, such as a momentum encoder or a teacher"
            )
        self._outputs[module].append(map_tensors(Tensor.clone, output))
        return output

    def _repeat(self, module: nn.Module, outputs: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            return map_tensors(Tensor.clone, output)
        raise UsageError(
            f"SlimRecipe: frozen {type(module).__name__} is called more often at a narrower width than at the widest"
        )


class SameDraws:
    """Lets narrower widths draw the random numbers of the widest; afterwards, the program goes on as after the widest.

    So all widths see the same masks and crops that a step draws, and a program's random numbers stay what they were.
    """

    def __init__(self, model: nn.Module) -> None:
        get, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
        parameters = model.parameters() if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        devices = {tensor.device for tensor in parameters if tensor.device.type == "cuda"}
        self._generators: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
            (random.getstate, random.setstate),
            (np.random.get_state, np.random.set_state),  # what others draw from
            (torch.get_rng_state, torch.set_rng_state),
            *((partial(get, device), partial(put, device=device)) for device in devices),
        ]

    @contextmanager
    def run(self, widest: bool) -> Iterator[None]:
        """Run a block of the widest width, or of a narrower one."""
        states = [get() for get, _ in self._generators]
        if widest:
            self._states = states
            yield
            return
        self._put(self._states)
        try:
            yield
        finally:
            self._put(states)

    def _put(self, states: Sequence[Any]) -> None:
        for (_, put), state in zip(self._generators, states, strict=True):
            put(state)


def shared_by_widths(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of `model` whose state does not belong to a width, as that of a switchable norm does."""
    for module in shallow_modules(model):
        if not isinstance(module, (SwitchableContainer, DistributedDataParallel)):
            yield module


def entry(module: nn.Module) -> str:
    """Return the name of the attribute that a call of `module` runs."""
    return "_compiled_call_impl" if "_compiled_call_impl" in vars(module) else "forward"


def _uncompiled(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield modules and those in them, but not what is inside a compiled one."""
    return walk(modules, lambda module: entry(module) == "forward" and "_orig_mod" not in module._modules)


def _state(store: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in store.items()
        if name not in _OF_EVERY_MODULE
        and not name.startswith("_slim")
        and not (isinstance(value, Tensor) and value.requires_grad)
    }


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return copies of tensors, arrays and containers; other objects themselves."""

    def copied(value: Any) -> Any:
        if isinstance(value, nn.Parameter) and not value.requires_grad:
            return nn.Parameter(value.detach().clone(), requires_grad=False)
        if isinstance(value, Tensor) and not value.requires_grad:
            return value.clone()
        return copy.deepcopy(value) if isinstance(value, _CHANGEABLE) else value

    copies: dict[str, Any] = tree_map(copied, state) if state else {}  # most modules have none
    return copies
