"""Going back and forth between a torch layer and its slimmable twin, sharing the Parameters."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from slimmable._modules import twin_of
from slimmable.errors import ConversionError
from slimmable.view.state import is_slim
from slimmable.view.view import remove_view

Layer = TypeVar("Layer", bound=nn.Module)


def slim_twin(module: nn.Module, kind: type[Layer]) -> Layer:
    """Return the twin of a plain torch layer, ready for its view.

    Raises: ConversionError: if it is not exactly of the torch class, whose forward the twin has.
    """
    plain = getattr(kind, "_slim_plain", None)
    if type(module) is not plain:
        expected = getattr(plain, "__name__", plain)
        raise ConversionError(
            f"{kind.__name__} is made from exactly torch's {expected}, got {type(module).__name__}, which may compute "
            "something else; slimmable.slimify converts any module"
        )
    return twin_of(module, kind)


def plain_twin(module: nn.Module, kind: type[Layer]) -> Layer:
    """Return the full-width torch layer of a slimmable one."""
    twin = twin_of(module, type(module))
    if is_slim(twin):
        remove_view(twin)
    if type(twin) is not kind:
        raise ConversionError(f"{type(module).__name__} has no torch twin of class {kind.__name__}")
    return twin
