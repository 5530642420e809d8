"""Training all widths in the training code of others: one module per framework, imported when it is first used."""

from importlib import import_module
from typing import Any

__all__ = ["lightning", "solo", "timm", "transformers"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
