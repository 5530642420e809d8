"""What a recipe does around a step: state that changes once, frozen modules, random numbers, calls, and optimizers."""

import copy
import random
import re
import warnings
import weakref
from array import array
from collections import UserDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import is_dataclass
from functools import partial, wraps
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map

from slimmable._convert import shallow_modules
from slimmable._inputs import map_tensors, named_tensors, output_tensors
from slimmable._modules import swapped, walk
from slimmable.errors import UsageError
from slimmable.losses import DistillationKind, nt_xent_logits
from slimmable.view.norms import SwitchableContainer

Store: TypeAlias = dict[str, Any]
"""The buffers, parameters or attributes of a module itself."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # torch's own attributes, such as the hooks
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_CHANGEABLE = (nn.Parameter, set, bytearray, array, np.ndarray, *_GENERATORS)


class Once:
    """Lets state change once per step, at its first and widest width: stores, and what a step of `model` draws from."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._before: dict[int, Store] = {}  # by the id of the store
        self._generators: list[tuple[Callable[..., Any], Callable[..., object]]] = []  # how to get and set the state
        self._rewind: Sequence[Callable[[], object]] = ()
        if model is not None:
            for device in {parameter.device for parameter in model.parameters()}:
                kind: Any = getattr(torch, device.type, None)
                if hasattr(kind, "set_rng_state"):  # the CPU's follow
                    own = partial(kind.get_rng_state, device), partial(kind.set_rng_state, device=device)
                    self._generators.append(own)
            numpy = np.random.get_state, np.random.set_state  # what others draw from
            self._generators += [(random.getstate, random.setstate), numpy, (torch.get_rng_state, torch.set_rng_state)]

    @contextmanager
    def changes(self, stores: Sequence[Store], widest: bool, left: Sequence[Store] = ()) -> Iterator[None]:
        """Run a block of a width; narrower ones find `stores` as the widest one did, and `left` as it left them."""
        draws = [partial(put, get()) for get, put in self._generators]
        if widest:
            self._before = {id(store): _copied(store) for store in stores} | self._before
            self._rewind = draws
            yield
            return
        if not {id(store) for store in stores} <= self._before.keys():
            raise UsageError("SlimRecipe.once: used at a narrower width, but not used at the widest width of this step")
        after = [(store, store.copy()) for store in (*stores, *left)]
        for store, state in after:
            store.update(_copied(self._before.get(id(store), state)))
        for put in self._rewind:
            put()
        try:
            yield
        finally:
            for store, state in after:
                store.clear()
                store.update(state)
            for put in draws:
                put()


def shared_by_widths(modules: Iterable[nn.Module], without: Collection[nn.Module] = ()) -> list[nn.Module]:
    """Return the modules in `modules` whose state does not belong to a width, as that of a switchable norm does."""
    parts = dict.fromkeys(part for each in modules for part in shallow_modules(each) if part not in without)
    return [part for part in parts if not isinstance(part, (SwitchableContainer, DistributedDataParallel))]


def stores_of(modules: Collection[nn.Module]) -> list[Store]:
    """Return where modules themselves keep state."""
    return [store for module in modules for store in (vars(module), module._buffers, module._parameters)]


def _copied(store: Store) -> Any:
    """Return the entries of a store: tensors without gradient, arrays and containers as copies, all else itself."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            return value
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return value.clone()
        if isinstance(value, _CHANGEABLE):
            return copy.deepcopy(value)
        return copy.copy(value) if isinstance(value, (dict, list, UserDict)) or is_dataclass(value) else value

    own = {name: it for name, it in store.items() if name not in _OF_EVERY_MODULE and not name.startswith("_slim")}
    return tree_map(copied, own) if own else {}  # most modules have none


class Replay:
    """Runs modules without gradient at the widest width only; narrower ones get its outputs, in the same order."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._outputs: dict[nn.Module, list[Any]] = defaultdict(list)  # in the order of the calls
        self._busy = False

    @contextmanager
    def run(self, widest: bool) -> Iterator[None]:
        """Run a block; raise `UsageError` in it if an output has a gradient, or a narrower width calls more often."""
        parts = walk(self._modules, _is_plain)
        with swapped([(vars(part), _entry(part), self._stand_in(part, widest)) for part in parts]):
            yield
        for module in self._modules:
            if self._outputs.keys().isdisjoint(walk([module], _is_plain)):
                kind = type(module).__name__
                warnings.warn(f"SlimRecipe: the step did not call frozen {kind}; give the one it calls", stacklevel=2)

    def _stand_in(self, part: nn.Module, widest: bool) -> Callable[..., Any]:
        forward, kind = getattr(part, _entry(part)), f"frozen {type(part).__name__}"
        earlier = iter(() if widest else self._outputs[part])

        def called(*args: Any, **kwargs: Any) -> Any:
            for output in earlier:
                return map_tensors(Tensor.clone, output)
            if not widest:
                raise UsageError(f"SlimRecipe: {kind} is called more often at a narrower width than at the widest")
            if self._busy:  # a part of a module that is being recorded
                return forward(*args, **kwargs)
            with swapped([(vars(self), "_busy", True)]):
                output = forward(*args, **kwargs)
            if any(tensor.requires_grad for tensor in output_tensors(output)):
                raise UsageError(f"SlimRecipe: {kind} returned a tensor with a gradient; freeze all that it reads")
            self._outputs[part].append(map_tensors(Tensor.clone, output))
            return output

        return called


class Calls:
    """Notes what calls of a model, and of the modules directly in it, return while a block runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._calls: list[tuple[nn.Module, Any]] = []
        self._outer = _callable_parts(model)
        children = (child for part in self._outer if _is_plain(part) for child in part.children())
        noted = {*self._outer, *(each for child in children for each in _callable_parts(child))}
        # the same functions in every step, so that a compiler that has seen them need not compile again
        self._noting = [(vars(part), _entry(part), self._noted(part, getattr(part, _entry(part)))) for part in noted]

    def _noted(self, part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if not torch.compiler.is_compiling():
                self._calls.append((part, output))
            return output

        return noted

    def noted(self) -> AbstractContextManager[None]:
        """Note the calls in a block."""
        self._calls.clear()
        return swapped(self._noting)

    def outputs(self) -> list[Tensor] | None:
        """Return what of the model's outputs, or the last of several models', can learn, or `logits` alone; or None."""
        found = []
        for part, output in self._calls:
            learn = [(name, each) for name, each in named_tensors(output) if each.requires_grad and each.ndim >= 2]
            named = [(name.split(".")[-1], each) for name, each in learn if each.is_floating_point()]
            found.append((part, [tensor for name, tensor in named if name == "logits"] or [each for _, each in named]))
        self._calls.clear()
        inner = [call for call in found if call[1]]
        calls = [call for call in inner if call[0] in self._outer] or inner or found
        return [tensor for part, tensors in calls if part is calls[-1][0] for tensor in tensors] if calls else None


def _entry(module: nn.Module) -> str:
    """Return the name of the attribute that a call of `module` runs."""
    return "_compiled_call_impl" if "_compiled_call_impl" in vars(module) else "forward"


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module is not compiled, nor copied to several devices: it calls what is inside it one by one."""
    copied = isinstance(module, nn.DataParallel) and len(module.device_ids) > 1
    return _entry(module) == "forward" and "_orig_mod" not in module._modules and not copied


def _callable_parts(model: nn.Module) -> list[nn.Module]:
    single = isinstance(model, nn.DataParallel) and _is_plain(model)
    if single or isinstance(model, (DistributedDataParallel, nn.ModuleList, nn.ModuleDict)):
        return [part for child in model.children() for part in _callable_parts(child)]
    return [model]


def compared(outputs: Mapping[float, Sequence[Tensor]], kind: DistillationKind) -> dict[float, list[Tensor]]:
    """Return what distillation of this kind compares, for each width; features that get thinner are left out."""
    if len({len(tensors) for tensors in outputs.values()}) > 1:
        counts = ", ".join(f"{len(tensors)} at width {width}" for width, tensors in outputs.items())
        raise UsageError(f"SlimRecipe: the model returned {counts}, so what to compare is open; return (loss, teach)")
    same = [found for found in zip(*outputs.values(), strict=True) if len({tensor.shape for tensor in found}) == 1]
    chosen = [found for found in same if kind == "mse" or found[0].shape[1 if found[0].ndim == 4 else -1] > 1]
    if not chosen:
        why = "a single score has no classes, so use kind 'mse'" if same else "no output learns and keeps its size"
        raise UsageError(f"SlimRecipe: nothing to compare, {why}; or return (loss, teach)")
    shapes, of_widths = [found[0].shape for found in chosen], dict(zip(outputs, zip(*chosen, strict=True), strict=True))
    if kind not in ("embedding", "mse") and len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 2:
        return {width: [nt_xent_logits(*views)] for width, views in of_widths.items()}
    if kind == "dkd":
        raise UsageError("SlimRecipe: kind 'dkd' needs logits with the right class in column 0; return (loss, teach)")
    last = {width: [each.movedim(1, -1) if each.ndim == 4 else each for each in of_widths[width]] for width in outputs}
    return {width: [scores.flatten(0, -2) for scores in classes_last] for width, classes_last in last.items()}


class OptimizerCheck:
    """Notices optimizers that train nothing or not all, of those that step between the first gradients and the next."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self.in_step = model, False  # between the first gradients of a step and the last
        self._updated: set[int] = set()  # ids of parameters
        self._idle = ""  # the class of an optimizer whose parameters had no gradients
        self._hook: Any = None

    def before_gradients(self) -> None:
        """Begin to look or, once an optimizer has stepped, say what the optimizers lack."""
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(partial(OptimizerCheck._look, weakref.proxy(self)))
            weakref.finalize(self, self._hook.remove)
        elif self._updated:
            self._hook.remove()
            updated, self._updated, self._idle = self._updated, set(), ""
            held = {name: id(parameter) in updated for name, parameter in self._model.named_parameters()}
            # those of narrow norms, if the full norm's are held
            missing = [name for name in held if not held[name] and held.get(re.sub(r"\bnarrow\.\d+\.", "", name))]
            if missing:
                what = f"the model's {missing[0]} and {len(missing) - 1} more"
                warnings.warn(f"SlimRecipe: no optimizer has {what}; make it after slimmable.slimify", stacklevel=4)
        elif self._idle:
            raise UsageError(f"SlimRecipe: {self._idle} trains nothing of this model; make it after slimmable.slimify")

    def _look(self, optimizer: torch.optim.Optimizer, *step: Any) -> None:
        kind, held = type(optimizer).__name__, [each for group in optimizer.param_groups for each in group["params"]]
        ids = {id(parameter) for parameter in held}
        if not ids.isdisjoint(map(id, self._model.parameters())):
            self._updated |= ids
            if self.in_step and torch._C._current_graph_task_id() >= 0:
                what = f"{kind} steps inside backward, which runs once for each width"
                raise UsageError(f"SlimRecipe: {what}; call backward on recipe.total(closure) instead")
            if all(parameter.grad is None for parameter in self._model.parameters()):
                raise UsageError(f"SlimRecipe: no gradients when {kind} steps; call zero_grad before recipe.backward")
        elif all(parameter.grad is None for parameter in held):
            self._idle = kind
