"""The base of the slimmable layers: conversion from torch's layers and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from slimmable._modules import twin_of
from slimmable._widths import check_widths
from slimmable.errors import ConversionError
from slimmable.view.state import is_slim
from slimmable.view.view import remove_view

if TYPE_CHECKING:
    from typing_extensions import Self

Plain = TypeVar("Plain", bound=nn.Module)


class SlimLayer(nn.Module):
    """A layer of torch that runs at several widths; subclasses add `from_...` and `to_...` methods for their kind."""

    _slim_plain: ClassVar[type[nn.Module]]
    """The class of torch that it is made from and converted back to."""

    def _install(self, widths: tuple[float, ...], *args: Any, **options: Any) -> None:
        """Give the layer its view."""
        raise NotImplementedError

    @classmethod
    def _from_torch(cls, module: nn.Module, widths: Iterable[float], **options: bool) -> Self:
        """Return the slimmable twin of a plain layer: it shares the Parameters and keeps the training flag.

        Raises: ConversionError: unless the layer is exactly of torch's class, whose forward the twin uses.
        """
        if type(module) is not cls._slim_plain:
            raise ConversionError(
                f"{cls.__name__} is made from exactly torch's {cls._slim_plain.__name__}, got {type(module).__name__}, "
                "which may compute something else; slimmable.slimify converts any module"
            )
        slim = twin_of(module, cls)
        slim._install(check_widths(widths), **options)
        return slim

    def _to_torch(self, kind: type[Plain]) -> Plain:
        """Return the full-width layer of torch's class `kind`, which shares the Parameters."""
        twin: Any = twin_of(self, type(self))
        if is_slim(twin):
            remove_view(twin)
        if type(twin) is not kind:
            raise ConversionError(f"a {type(self).__name__} has no torch twin of class {kind.__name__}")
        return twin
