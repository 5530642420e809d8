"""Narrow norms of a `SwitchableNorm`: cut copies of the full norm, which may share its gain and bias."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import cast

from torch import nn

from slimmable._modules import twin_of
from slimmable._widths import Kept, kept_of
from slimmable.errors import ConversionError
from slimmable.view.cuts import take_channels
from slimmable.view.view import install_view, narrow_tensors, remove_view

_CHANNEL_COUNTS = ("num_features", "num_channels", "num_parameters")


class NarrowNorms(nn.ModuleList):
    """The narrower norms, from wide to narrow; one that shares still does after a converter has replaced it."""

    shared_affine: bool

    def __init__(self, norms: Iterable[nn.Module], shared_affine: bool) -> None:
        super().__init__(norms)
        self.shared_affine = shared_affine

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Insert a norm, as converters such as that of `SyncBatchNorm` do."""
        before = self._modules.get(name)
        if before is not None and module is not None and shares(before) and not shares(module):
            share(module, before.__dict__["_slim_lent"], before.__dict__["_slim_shared"])
        super().add_module(name, module)


def share(norm: nn.Module, lent: dict[str, nn.Parameter | None], kept: Kept) -> nn.Module:
    """Let a narrow norm read its part of `lent`, the full norm's gain and bias, instead of having its own."""
    own = {name: None for name, tensor in lent.items() if tensor is None}
    norm.__dict__.update(_parameters=own, affine=False, _slim_lent=lent, _slim_shared=kept)  # converters read `affine`
    install_view(norm, (1.0,), {name: [(kept,)] for name, tensor in lent.items() if tensor is not None}, {})
    return norm


def shares(norm: nn.Module) -> bool:
    """Tell whether a norm reads the gain and bias of another."""
    return "_slim_lent" in norm.__dict__


def own_norm(norm: nn.Module) -> nn.Module:
    """Return the norm itself, or if it shares gain and bias, a copy with its own part of them."""
    if not shares(norm):
        return norm
    parts = narrow_tensors(norm, 0)
    twin = twin_of(norm, type(norm))
    remove_view(twin)
    full, _ = twin.__dict__.pop("_slim_lent"), twin.__dict__.pop("_slim_shared")
    twin.__dict__["_parameters"] = {
        name: None if whole is None else nn.Parameter(parts.get(name, whole).detach().clone(), whole.requires_grad)
        for name, whole in full.items()
    }
    twin.__dict__["affine"] = any(tensor is not None for tensor in twin._parameters.values())
    return twin


def copy_of_norm(norm: nn.Module) -> nn.Module:
    """Copy a norm, except for the process group of a SyncBatchNorm, which cannot be copied."""
    group = getattr(norm, "process_group", None)
    return copy.deepcopy(norm, {} if group is None else {id(group): group})


def narrowed(full: nn.Module, kept: Kept) -> nn.Module:
    """Return a copy of a norm in which every tensor and count of its full number of channels is cut."""
    norm = copy_of_norm(full)
    if kept is None:
        return norm
    channels = _channel_count(full)
    for module in norm.modules():
        for name in _CHANNEL_COUNTS:
            if getattr(module, name, None) == channels:
                setattr(module, name, kept_of(channels, kept))
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
