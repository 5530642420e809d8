"""Models whose parameters `torch.distributed.fsdp.fully_shard` has split over processes, made whole for a while."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from torch import nn

from slimmable._modules import snapshot
from slimmable.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")
_MARKS = "__composable_api", "_is_fsdp_managed_module", "_fsdp_use_orig_params"  # what `fully_shard` leaves behind


def of_whole(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function of a model, its first argument, see a model without shards; then all processes must call it."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module) or not _is_sharded(function.__name__, model):
            return function(*args, **kwargs)
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # it may be whole since a forward, perhaps in another type
        restore = snapshot(model)
        try:
            _gather(model)
            return function(*args, **kwargs)
        finally:
            restore()

    return called


def refuse_shards(where: str, model: nn.Module) -> None:
    """Raise `UsageError` if the model is sharded."""
    if _is_sharded(where, model):
        raise UsageError(f"{where}: this {type(model).__name__} is split over processes; do this before fully_shard")


def _is_sharded(where: str, model: nn.Module) -> bool:
    """Tell whether `fully_shard` has split parameters, now or between forwards; refuse what has joined some."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    modules = list(model.modules()) if fsdp is not None else []
    if any("_fsdp_wrapped_module" in module._modules for module in modules):
        raise UsageError(
            f"{where}: this {type(model).__name__} has parts in FullyShardedDataParallel, which joins the parameters "
            "of layers; use fully_shard, or load its full state dict into the model without it"
        )
    parameters = (parameter for module in modules for parameter in module._parameters.values())
    return any(isinstance(module, fsdp.FSDPModule) for module in modules) or any(  # type: ignore[union-attr]
        hasattr(parameter, "full_tensor") for parameter in parameters
    )


def _gather(model: nn.Module) -> None:
    """Make every parameter whole, in place, and give all modules their classes and hooks from before `fully_shard`."""
    from torch.distributed.fsdp import FSDPModule

    whole: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, sharded in module._parameters.items():
            if sharded is not None and hasattr(sharded, "full_tensor"):
                if id(sharded) not in whole:
                    whole[id(sharded)] = nn.Parameter(cast(Any, sharded.detach()).full_tensor(), sharded.requires_grad)
                module._parameters[name] = whole[id(sharded)]
        if isinstance(module, FSDPModule):
            kinds = type(module).__mro__
            module.__class__ = kinds[kinds.index(FSDPModule) + 1]
        for attribute, value in list(vars(module).items()):
            if attribute.startswith(_MARKS):
                del module.__dict__[attribute]
            elif attribute.endswith("_hooks"):
                for key, hook in list(value.items()):
                    if getattr(hook, "hook", hook).__module__.startswith("torch.distributed"):
                        del value[key]
