"""What tools that count, quantise or script layers are told about converted ones, which have no single width."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from slimmable.errors import ConversionError

_COUNTERS = ("ptflops", "thop", "torchinfo")
_INSTEAD = "give it slimmable.extract(model, width), the plain network of one width"


class Watched(nn.Module):
    """Notices tools that would be silently wrong on a converted model by what they do to its layers first."""

    def apply(self, fn: Any) -> Any:
        """Apply a function to every module; refuse those of tools that know layers by their exact class."""
        counter = _counter(fn)
        if counter:
            raise ConversionError(
                f"{counter} knows layers by their exact class, so it would miss those of a converted model; {_INSTEAD}"
            )
        return super().apply(fn)

    def register_forward_pre_hook(self, hook: Any, **kwargs: Any) -> Any:
        """Register a hook; warn if it counts what a layer holds."""
        counter = _counter(hook)
        if counter:
            warnings.warn(
                f"{counter} counts the parameters that a converted model holds, those of all widths; {_INSTEAD}",
                stacklevel=2,
            )
        return super().register_forward_pre_hook(hook, **kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        raise ConversionError(f"torch.jit.script cannot read the class of a converted layer; {_INSTEAD}")

    def _refuse_qconfig(self, value: object = None) -> None:
        raise ConversionError(f"torch.ao.quantization does not know the classes of converted layers; {_INSTEAD}")

    def _read_qconfig(self) -> object:
        if "qconfig" not in self.__dict__:  # it may be there from before the conversion
            raise AttributeError("qconfig")
        return self.__dict__["qconfig"]

    qconfig = property(_read_qconfig, _refuse_qconfig, _refuse_qconfig)


def _counter(function: Any) -> str | None:
    module = getattr(getattr(function, "func", function), "__module__", None) or ""  # `func` of a partial
    package = module.partition(".")[0]
    return package if package in _COUNTERS else None
