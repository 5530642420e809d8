"""What happens once per step, although a step runs once per width: changes of state, and forwards without gradient."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from slimmable._nested import map_tensors, output_tensors
from slimmable.errors import UsageError
from slimmable.view.container import SwitchableContainer

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
            stores += [module._buffers] if self.only_buffers else [module._buffers, module._parameters, vars(module)]
        if widest:
            if self.from_before:
                self._before = {id(store): _copies(store) for store in stores} | self._before
            yield
            return
        if self.from_before and not {id(store) for store in stores} <= self._before.keys():
            raise UsageError("SlimRecipe.once: used at a narrower width, but not used at the widest width of this step")
        after = [(store, _state(store)) for store in stores]
        for store in stores:
            store.update(_copied(self._before[id(store)]) if self.from_before else _copies(store))
        try:
            yield
        finally:
            for store, state in after:
                for added in _state(store).keys() - state.keys():
                    del store[added]
                store.update(state)


class Draws:
    """Lets every width draw the random numbers of the widest, as if only that had run: masks, permutations, views."""

    def __init__(self) -> None:
        self._before = _random_states()

    @contextmanager
    def same(self, widest: bool) -> Iterator[None]:
        """Run a block, of the widest width or of a narrower one."""
        if widest:
            yield
            return
        after = _random_states()
        for restore, state in self._before:
            restore(state)
        try:
            yield
        finally:
            for restore, state in after:
                restore(state)


class Replay:
    """Runs modules without gradient at the widest width only; narrower widths get the same outputs again.

    The calls of a narrower width are matched with those of the widest by their order, for each module.
    """

    def __init__(self) -> None:
        self._outputs: dict[int, list[Any]] = defaultdict(list)  # by module, in the order of the calls
        self._busy = False

    @contextmanager
    def run(self, modules: Iterable[nn.Module], widest: bool) -> Iterator[None]:
        """Run a block of the widest width, or of a narrower one.

        Raises: UsageError: in the block, if an output carries a gradient, or at a narrower width there are more calls.
        """
        entries = [(part, name, vars(part).get(name)) for part, name in _entries(modules)]
        for part, name, _ in entries:
            if widest:
                vars(part)[name] = partial(self._record, part, getattr(part, name))
            else:
                vars(part)[name] = partial(self._repeat, part, iter(self._outputs[id(part)]))
        try:
            yield
        finally:
            for part, name, own in entries:
                if own is None:
                    del vars(part)[name]
                else:
                    vars(part)[name] = own

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
        self._outputs[id(module)].append(map_tensors(Tensor.clone, output))
        return output

    def _repeat(self, module: nn.Module, outputs: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            return map_tensors(Tensor.clone, output)
        raise UsageError(
            f"SlimRecipe: frozen {type(module).__name__} is called more often at a narrower width than at the widest"
        )


def _entries(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Yield modules and those in them, but not what is inside a compiled one, with the name of what a call runs."""
    seen: set[nn.Module] = set()
    pending = list(modules)
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            compiled = "_compiled_call_impl" if "_compiled_call_impl" in vars(module) else None
            yield module, compiled or "forward"
            if compiled is None and "_orig_mod" not in module._modules:
                pending.extend(module.children())


def unswitched(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of `model` whose state does not belong to a width; not BatchNorms, which are per width."""
    pending = [model]
    while pending:
        module = pending.pop()
        if not isinstance(module, (SwitchableContainer, DistributedDataParallel)):
            yield module
        if not isinstance(module, SwitchableContainer):
            pending.extend(module.children())


def _state(store: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in store.items()
        if name not in _OF_EVERY_MODULE
        and not name.startswith("_slim")
        and not (isinstance(value, Tensor) and value.requires_grad)
    }


def _copies(store: dict[str, Any]) -> dict[str, Any]:
    return _copied(_state(store))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return copies of tensors, arrays and containers; other objects themselves."""
    copies: dict[str, Any] = tree_map(_copied_leaf, state)
    return copies


def _copied_leaf(value: Any) -> Any:
    if isinstance(value, nn.Parameter) and not value.requires_grad:
        return nn.Parameter(value.detach().clone(), requires_grad=False)
    if isinstance(value, Tensor) and not value.requires_grad:
        return value.clone()
    return copy.deepcopy(value) if isinstance(value, _CHANGEABLE) else value


def _random_states() -> list[tuple[Callable[[Any], object], Any]]:
    """Return what sets each generator that torch, numpy and Python draw from by default, and its state."""
    states: list[tuple[Callable[[Any], object], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (np.random.set_state, np.random.get_state()),  # noqa: NPY002  what others draw from
        (random.setstate, random.getstate()),
    ]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        device = torch.get_device_module(accelerator)
        if not hasattr(device, "is_initialized") or device.is_initialized():
            states.append((device.set_rng_state, device.get_rng_state()))
    return states
