"""Switchable norms: one real norm per width, so that each width has its own statistics and its own gain and bias."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimmable._errors import ConversionError
from slimmable.layers._container import SwitchableContainer, inner_modules
from slimmable.layers._view import Kept

_CHANNEL_COUNTS = ("num_features", "num_channels", "num_parameters")


class _TensorsOfFull(dict[str, Any]):
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


class SwitchableNorm(SwitchableContainer):
    """A container of one real norm per width; the forward runs the norm of the active width and touches no other.

    In the state dict, as in `named_parameters`, the full width's norm has the plain names (`bn.weight`), the narrower
    ones are `bn.narrow.0.weight` and so on, from wide to narrow. A checkpoint without the narrow names loads into
    the full norm, and its kept channels into the narrower ones.

    Attributes that the container does not have are those of the active norm. Setting one sets it in every norm; only
    a tensor is set in the active norm alone.

    Source: switchable batch normalization of Yu et al., Slimmable Neural Networks, ICLR 2019, section 3.2.

    Args:
        full: the norm of the full width, of any class; the container keeps this very module.
        widths: distinct numbers in (0, 1] with 1.0 among them.
        kept: for each width, from the widest, which of the channels it keeps: None for all, a number for the first
            ones, or indices.

    >>> norm = SwitchableNorm(nn.BatchNorm2d(8), (1.0, 0.5), (None, 4))
    >>> [name for name, _ in norm.named_parameters()]
    ['weight', 'bias', 'narrow.0.weight', 'narrow.0.bias']
    >>> norm.norm_at(1).num_features
    4
    """

    full: nn.Module
    narrow: nn.ModuleList

    def __init__(self, full: nn.Module, widths: Iterable[float], kept: Sequence[Kept]) -> None:
        super().__init__(widths)
        if len(kept) != len(self.widths):
            raise ConversionError(
                f"{len(kept)} entries of kept channels for the {len(self.widths)} widths {self.widths}"
            )
        self.__dict__["_parameters"] = _TensorsOfFull(self._modules, "_parameters")
        self.__dict__["_buffers"] = _TensorsOfFull(self._modules, "_buffers")
        self.__dict__["_kept"] = tuple(kept)
        self.add_module("full", full)
        self.add_module("narrow", nn.ModuleList(_narrowed(full, keep) for keep in kept[1:]))
        self.__dict__["training"] = self._modules["narrow"].training = full.training  # type: ignore[union-attr]
        self.register_load_state_dict_post_hook(_report_plain_names)  # type: ignore[no-untyped-call]

    @classmethod
    def from_norm(
        cls, norm: nn.Module, widths: Iterable[float], kept: Sequence[Kept], *, share: bool = True
    ) -> SwitchableNorm:
        """Switch `norm`: it becomes the full width's norm itself, or with `share=False` a copy of it does."""
        return SwitchableNorm(norm if share else _copy(norm), widths, kept)

    def to_norm(self) -> nn.Module:
        """Return the norm of the full width, the very module that the container holds."""
        return self.full

    def norm_at(self, index: int) -> nn.Module:
        """Return the norm of the width with this index; 0 is the full width."""
        if index == 0:
            return cast(nn.Module, self._modules["full"])
        return inner_modules(self, "narrow")[str(index - 1)]

    module_at = norm_at

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the norm of the active width."""
        return self.norm_at(self._slim.index)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if name.startswith("_") or "narrow" not in modules:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.norm_at(self._slim.index), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or name in self._modules or name.startswith("_") or not hasattr(self.full, name):
            super().__setattr__(name, value)
        elif isinstance(value, Tensor):
            setattr(self.norm_at(self._slim.index), name, value)
        else:
            for norm in (self.full, *self.narrow):
                setattr(norm, name, value)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """List the full norm under the container's own name, before the container."""
        memo = set() if memo is None else memo
        yield from self.full.named_modules(memo, prefix, remove_duplicate)
        if self not in memo:
            memo.add(self)
            yield prefix, self
        yield from self.narrow.named_modules(memo, f"{prefix}.narrow" if prefix else "narrow", remove_duplicate)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Save the full norm under the container's own name, the narrower ones under `narrow`."""
        found: Any = self.full.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        found._metadata[f"{prefix}full"] = found._metadata[prefix[:-1]]
        return self.narrow.state_dict(destination=found, prefix=f"{prefix}narrow.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *reports: list[str]
    ) -> None:
        """Rename to the children's names what torch hands on to them; `_report_plain_names` undoes it in reports."""
        mine = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if not any(key.startswith("narrow.") for key in mine):
            for key, tensor in self.full.state_dict(keep_vars=True).items():
                if key in mine and mine[key].shape == tensor.shape:
                    state_dict.update(self._for_narrow(f"{prefix}narrow.", key, mine[key]))
        for key, value in mine.items():
            if not key.startswith("narrow."):
                del state_dict[prefix + key]
                state_dict[f"{prefix}full.{key}"] = value
        self.__dict__["_loading"] = (prefix, reports)

    def _for_narrow(self, prefix: str, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Cut a tensor of the full norm for each narrower one."""
        shapes = [norm.state_dict(keep_vars=True)[key].shape for norm in self.narrow]
        return {
            f"{prefix}{position}.{key}": _channels(tensor, None if shape == tensor.shape else kept).clone()
            for position, (shape, kept) in enumerate(zip(shapes, self._kept[1:], strict=True))
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.full!r}, {self.extra_repr()})"


def _report_plain_names(norm: SwitchableNorm, _: Any) -> None:
    """Name missing, unexpected and ill-shaped tensors as the state dict does."""
    prefix, reports = norm.__dict__.pop("_loading", ("", ()))
    for report in reports:
        report[:] = [text.replace(f"{prefix}full.", prefix) for text in report]


def _copy(norm: nn.Module) -> nn.Module:
    """Copy a norm but not the process group of a SyncBatchNorm, which is shared and cannot be copied."""
    group = getattr(norm, "process_group", None)
    return copy.deepcopy(norm, {} if group is None else {id(group): group})


def _channels(tensor: Tensor, kept: Kept) -> Tensor:
    if kept is None:
        return tensor
    if isinstance(kept, int):
        return tensor[:kept]
    return tensor.index_select(0, torch.tensor(kept, device=tensor.device))


def _narrowed(full: nn.Module, kept: Kept) -> nn.Module:
    """Copy a norm with its settings, and cut every tensor and every count that has its number of channels."""
    norm = _copy(full)
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
                cut = _channels(parameter.detach(), kept).clone()
                module._parameters[name] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.shape[:1] == (channels,):
                module._buffers[name] = _channels(buffer, kept).clone()
    return norm


def _channel_count(norm: nn.Module) -> int:
    for name in _CHANNEL_COUNTS:
        if isinstance(getattr(norm, name, None), int):
            return cast(int, getattr(norm, name))
    raise ConversionError(
        f"{type(norm).__name__} does not say its number of channels as {' or '.join(_CHANNEL_COUNTS[:2])}; "
        "only norms that do can be switched"
    )
