"""The norms of the narrower widths in a `SwitchableNorm`: copies of the full one, or sharers of its gain and bias."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from slimmable._modules import twin_of
from slimmable._widths import Kept
from slimmable.errors import ConversionError
from slimmable.view.cuts import take_channels
from slimmable.view.state import is_slim
from slimmable.view.view import install_view, narrow_tensors, remove_view

_CHANNEL_COUNTS = ("num_features", "num_channels", "num_parameters")


class TensorsOfFull(dict[str, Any]):
    """Own no tensor, but find and replace those of the full norm by name, as `torch.func.functional_call` does."""

    def __init__(self, modules: dict[str, nn.Module | None], store: str) -> None:
        super().__init__()
        self.modules = modules
        self.store = store

    def _of_full(self) -> dict[str, Any]:
        return cast("dict[str, Any]", getattr(self.modules.get("full"), self.store, {}))

    def __contains__(self, name: object) -> bool:
        return name in self._of_full()

    def __getitem__(self, name: str) -> Any:
        return self._of_full()[name]

    def __setitem__(self, name: str, tensor: Any) -> None:
        self._of_full()[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._of_full()[name]


class NarrowNorms(nn.ModuleList):
    """The narrower norms, from wide to narrow; one that shares goes on sharing when a converter replaces it."""

    _container: dict[str, nn.Module | None]
    _shared: dict[str, Kept]
    shared_affine: bool

    def __init__(self, container: dict[str, nn.Module | None], kept: Sequence[Kept], shared: bool) -> None:
        super().__init__()
        self.__dict__["_container"] = container
        self.__dict__["_shared"] = {}
        self.__dict__["shared_affine"] = shared
        for keep in kept:
            self.add(narrowed(cast(nn.Module, container["full"]), keep), keep if shared else ...)

    def add(self, norm: nn.Module, shared: Any) -> None:
        """Append a norm; unless `shared` is `...`, it reads these channels of the full norm's gain and bias."""
        name = str(len(self))
        if shared is not ...:
            self._shared[name] = shared
        self.add_module(name, norm)

    def keep_first(self, count: int) -> None:
        """Drop the norms behind the first `count`."""
        for name in list(self._modules)[count:]:
            del self._modules[name]
            self._shared.pop(name, None)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Put a norm in, as converters such as that of `SyncBatchNorm` do."""
        if name in self._shared and module is not None and not is_slim(module):
            share(module, self._container, self._shared[name])
        super().add_module(name, module)


def share(norm: nn.Module, container: dict[str, nn.Module | None], kept: Kept) -> nn.Module:
    """Let a narrow norm read gain and bias from the full norm of a container, given by its modules."""
    tensors = [name for name, tensor in cast(nn.Module, container["full"])._parameters.items() if tensor is not None]
    norm.__dict__["_parameters"] = TensorsOfFull(container, "_parameters")
    norm.__dict__["affine"] = False  # it has none of its own; converters ask
    install_view(norm, (1.0,), {name: [(kept,)] for name in tensors}, {})
    return norm


def own_norm(norm: nn.Module) -> nn.Module:
    """Return a norm that shares nothing: itself, or for a sharing one a twin with its part of gain and bias."""
    if not is_slim(norm):
        return norm
    parts = narrow_tensors(norm, 0)
    full = {name: norm._parameters[name] for name in ("weight", "bias") if name in norm._parameters}
    twin = twin_of(norm, type(norm))
    remove_view(twin)
    twin.__dict__["_parameters"] = {
        name: None if whole is None else nn.Parameter(parts.get(name, whole).detach().clone(), whole.requires_grad)
        for name, whole in full.items()
    }
    twin.__dict__["affine"] = any(tensor is not None for tensor in twin._parameters.values())
    return twin


def copy_of_norm(norm: nn.Module) -> nn.Module:
    """Copy a norm but not the process group of a SyncBatchNorm, which is shared and cannot be copied."""
    group = getattr(norm, "process_group", None)
    return copy.deepcopy(norm, {} if group is None else {id(group): group})


def narrowed(full: nn.Module, kept: Kept) -> nn.Module:
    """Copy a norm with its settings, and cut every tensor and every count that has its number of channels."""
    norm = copy_of_norm(full)
    if kept is None:
        return norm
    channels = _channel_count(full)
    count = kept if isinstance(kept, int) else len(kept)
    for module in norm.modules():
        for name in _CHANNEL_COUNTS:
            if getattr(module, name, None) == channels:
                setattr(module, name, count)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.shape[:1] == (channels,):
                cut = take_channels(parameter.detach(), kept).clone()
                module._parameters[name] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.shape[:1] == (channels,):
                module._buffers[name] = take_channels(buffer, kept).clone()
    return norm


def _channel_count(norm: nn.Module) -> int:
    for name in _CHANNEL_COUNTS:
        if isinstance(getattr(norm, name, None), int):
            return cast(int, getattr(norm, name))
    raise ConversionError(
        f"{type(norm).__name__} does not say its number of channels as {' or '.join(_CHANNEL_COUNTS[:2])}; "
        "only norms that do can be switched"
    )
